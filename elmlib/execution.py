"""A notebook executed by papermill, with a kernel of its own."""

import tempfile
from pathlib import Path
from typing import Any

from elmlib.forking import ForkedKernel

Value = str | int | float | bool


def execute_notebook(
    source: Path, output: Path, parameters: dict[str, Value], kernel: ForkedKernel | None = None
) -> None:
    """Run `source` with `parameters` and leave what it shows in `output`; raises papermill's error for a failed cell.

    Everything in `parameters` can be read in `output`: no password. `kernel` is one that waits, where there is one.
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

            async def _async_launch_kernel(self, kernel_cmd: list[str], **kwargs: Any) -> None:
                if kernel is None:
                    await super()._async_launch_kernel(kernel_cmd, **kwargs)
                    return
                kernel.connect(self.connection_file)
                provisioner: Any = self.provisioner  # a local one, whose `process` and `pid` its base class has not
                provisioner.process, provisioner.pid = kernel, kernel.pid
                self._reconcile_connection_info(provisioner.connection_info)

        papermill.execute_notebook(
            str(source),
            str(output),
            parameters,
            kernel_name="python3",
            kernel_manager_class=FileSocketKernels,
            shutdown_kernel="immediate",  # all cells are done; torch takes 2.5 s to leave in good order
        )
