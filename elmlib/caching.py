"""What is computed once and kept: a folder under the user's cache, whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def build_once(target: Path, build: Callable[[Path], None]) -> None:
    """Make the folder `target` by `build(temporary folder)`, unless it exists.

    Processes that ask at once wait for the first. The folder is renamed into place when it is whole: a build that
    fails or is killed leaves no `target`.
    """
    from filelock import FileLock

    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return
        temporary = target.with_name(f"{target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed build: the lock is ours
        temporary.mkdir()
        try:
            build(temporary)
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def cache_folder() -> Path:
    """Where converted models lie: `ELMLIB_CACHE`, else the user's cache folder of this platform."""
    import platformdirs

    return Path(os.environ.get("ELMLIB_CACHE") or platformdirs.user_cache_dir("elmlib"))
