"""Processes that begin with all imports behind them: forked from one that has made them, as web servers do it.

Imports are half of what a short trial would spend beside its training. A fork is safe only while the process has one
thread and no GPU in use, so nothing but imports happens before it.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import traceback
from multiprocessing.context import ForkServerContext

_IMPORTS = ["papermill", "ipykernel.kernelapp", "sentence_transformers", "bert_score", "elmlib.live"]


def prepared_context() -> ForkServerContext:
    """Context whose processes have torch, transformers, papermill and elmlib loaded.

    The first call begins to load them, in a process of its own that serves this one; the first process waits for it.
    """
    # Without this torch asks the driver whether there is a GPU, and a fork behind that cannot use it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTS)
    multiprocessing.forkserver.ensure_running()
    return context


class ForkedKernel:
    """A Jupyter kernel forked from this process, which waits to be told where to connect.

    What a kernel's provisioner asks of a `subprocess.Popen` is there.
    """

    stdin = stdout = stderr = None

    def __init__(self) -> None:
        """Fork; before this process has other threads."""
        reader, self._writer = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._writer)
                with open(reader, encoding="utf-8") as pipe:
                    _serve(pipe.read())
            except Exception:
                traceback.print_exc()  # into the trial's log: nothing above this sees it
            finally:
                os._exit(1)
        os.close(reader)

    def connect(self, connection_file: str) -> None:
        """Let the kernel serve there."""
        os.write(self._writer, connection_file.encode())
        os.close(self._writer)

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        """Exit code, when it has ended."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To the kernel alone."""
        os.kill(self.pid, number)


def _serve(connection_file: str) -> None:
    """Be a kernel, or nothing where the process that forked this one has ended first."""
    if not connection_file:
        return
    from ipykernel.kernelapp import launch_new_instance

    os.setsid()  # an interrupt is for the kernel's manager to send
    multiprocessing.set_start_method(None, force=True)  # the platform's default again, as every kernel has it
    os.environ["JPY_PARENT_PID"] = str(os.getppid())  # whose end is the kernel's
    launch_new_instance(argv=["-f", connection_file])
