"""One trial of a study: a notebook that papermill runs in a process of its own, and how it ended."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from elmlib.records import write_json

Kind = Literal["complete", "pruned", "failed", "out of memory", "killed", "timed out", "interrupted"]

_POLL = 0.2  # seconds between looks at a running trial
_TOLD = 1500  # characters of a traceback that are kept
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    kind: Kind
    reason: str = ""
    """Why it was not complete, in one line."""
    details: str = ""
    """The last lines of the traceback, of a failed notebook."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The best evaluation's figures, where there was one."""


def read_result(folder: Path) -> dict[str, Any]:
    """`result.json` of a trial's folder; empty where the notebook left none."""
    path = folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def run_trial(folder: Path, environment: dict[str, str], stop: Callable[[], Kind | None]) -> Outcome:
    """Run the trial that `folder`/trial.json describes, in a process with `environment`, and say how it ended.

    `stop` is asked all the time; a kind ends the trial at once. trial.json: `notebook`, `parameters`, and what
    `LiveTrial` needs.
    """
    # The process ends when its standard input does, with whatever becomes of this one, and its kernel a second later.
    with open(folder / "trial.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "elmlib.trial", str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is the worker's to handle
        )
    assert process.stdin
    ended: Kind | None = None
    try:
        while process.poll() is None and not ended:
            ended = stop()
            time.sleep(_POLL)
    finally:
        process.stdin.close()
        process.wait()
    if ended:
        return Outcome(ended, f"the study {'ran out of time' if ended == 'timed out' else 'was interrupted'}")
    path = folder / "outcome.json"
    if not path.is_file():
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        return Outcome("killed", f"the trial's process ended with {how}; see {folder / 'trial.log'}")
    return Outcome(**json.loads(path.read_text(encoding="utf-8")))


def main(folder: Path) -> None:
    """Execute the notebook of a trial and leave `outcome.json`; this is the trial's own process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    described = json.loads((folder / "trial.json").read_text(encoding="utf-8"))
    outcome = _execute(Path(described["notebook"]), folder, described["parameters"])
    write_json(folder / "outcome.json", asdict(outcome))


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):  # not sys.stdin's own read: it holds a lock that the interpreter's end needs
        pass
    os._exit(1)


def _execute(notebook: Path, folder: Path, parameters: dict[str, Any]) -> Outcome:
    # jsonschema, which papermill imports, would take a second to compile a grammar that no notebook needs.
    sys.modules["rfc3987_syntax"] = None
    from papermill.exceptions import PapermillExecutionError

    from elmlib.execution import execute_notebook

    try:
        execute_notebook(notebook, folder / notebook.name, parameters)
    except RuntimeError as error:  # of nbclient: a kernel that died, or did not answer when it was started
        return Outcome("killed", f"no kernel: {error}")
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}".splitlines()[0]
        lines = _COLOURS.sub("", "\n".join(error.traceback))
        return Outcome("out of memory" if error.ename == "OutOfMemoryError" else "failed", reason, lines[-_TOLD:])
    result = read_result(folder)
    if not result:
        return Outcome("failed", f"{notebook.name} ran to its end but left no result.json")
    metrics = {name: value for name, value in result.items() if isinstance(value, int | float)}
    if result["stopped"]:
        return Outcome("pruned", result["stopped"], metrics=metrics)
    return Outcome("complete", metrics=metrics)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
