"""One trial of a study: a notebook that papermill runs in a process of its own, and how it ended."""

import json
import multiprocessing
import os
import re
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from elmlib.execution import execute_notebook
from elmlib.forking import ForkedKernel, prepared_context
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
    """Run the trial that `folder`/trial.json describes, in a process with `environment` added, and say how it ended.

    `stop` is asked all the time; a kind ends the trial at once. trial.json: `notebook`, `parameters`, and what
    `LiveTrial` needs.
    """
    # The process ends when the pipe is closed, with whatever becomes of this one, and its kernel a second later.
    reader, writer = multiprocessing.Pipe(duplex=False)
    process = prepared_context().Process(target=_be_trial, args=(folder, environment, reader))
    process.start()
    reader.close()
    ended: Kind | None = None
    try:
        while process.exitcode is None and not ended:
            ended = stop()
            process.join(_POLL)
    finally:
        writer.close()
        process.join()
    path = folder / "outcome.json"
    if not path.is_file():
        ended = ended or stop()  # a cluster ends the worker and its trial in one moment
    if ended:
        return Outcome(ended, f"the study {'ran out of time' if ended == 'timed out' else 'was interrupted'}")
    if not path.is_file():
        code = process.exitcode
        assert code is not None, process  # joined above
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return Outcome("killed", f"the trial's process ended with {how}; see {folder / 'trial.log'}")
    return Outcome(**json.loads(path.read_text(encoding="utf-8")))


def _be_trial(folder: Path, environment: dict[str, str], alive: Connection) -> None:
    """Execute the notebook of a trial and leave `outcome.json`; this is the trial's own process."""
    os.setsid()  # Ctrl-C is the worker's to handle
    with open(folder / "trial.log", "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(environment)
    kernel = ForkedKernel()
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    described = json.loads((folder / "trial.json").read_text(encoding="utf-8"))
    outcome = _execute(Path(described["notebook"]), folder, described["parameters"], kernel)
    write_json(folder / "outcome.json", asdict(outcome))


def _end_with(pipe: Connection) -> None:
    pipe.poll(None)
    os._exit(1)


def _execute(notebook: Path, folder: Path, parameters: dict[str, Any], kernel: ForkedKernel) -> Outcome:
    from papermill.exceptions import PapermillExecutionError

    try:
        execute_notebook(notebook, folder / notebook.name, parameters, kernel)
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
