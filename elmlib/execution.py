"""A notebook executed by papermill, with a kernel of its own."""

import tempfile
from pathlib import Path

Value = str | int | float | bool


def execute_notebook(source: Path, output: Path, parameters: dict[str, Value]) -> None:
    """Run `source` with `parameters` and leave what it shows in `output`; raises papermill's error for a failed cell.

    Everything in `parameters` can be read in `output`: no password.
    """
    import papermill
    from jupyter_client.manager import AsyncKernelManager

    # By default the sockets lie in the working folder under the same names for each kernel, and two that start at once
    # take each other's.
    with tempfile.TemporaryDirectory(prefix="elm-kernel-") as folder:

        class FileSocketKernels(AsyncKernelManager):
            """Kernels on sockets of the file system: nothing to eavesdrop on, and no clash of ports between runs."""

            transport = "ipc"
            ip = f"{folder}/socket"

        papermill.execute_notebook(
            str(source),
            str(output),
            parameters,
            kernel_name="python3",
            kernel_manager_class=FileSocketKernels,
            shutdown_kernel="immediate",  # all cells are done; torch takes 2.5 s to leave in good order
        )
