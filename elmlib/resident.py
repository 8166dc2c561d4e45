"""The resident memory of this process, as the system counts it."""

import sys
from pathlib import Path


def resident_bytes() -> int:
    """What is resident now; Linux only."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that was resident so far, since the program began or `forget_peak` was called; not on Windows.

    On Linux not getrusage's figure: the one who starts a process hands its own peak on to it, even through exec.
    """
    if sys.platform == "linux":
        return _status("VmHWM")
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def forget_peak() -> None:
    """The peak is what is resident now; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to VmRSS


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
