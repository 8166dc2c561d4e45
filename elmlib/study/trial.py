"""Both sides of a trial: the process that executes its notebook, and the callback inside the notebook."""

import json
import logging
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.storages import RDBStorage
from sqlalchemy import exc, make_url
from sqlalchemy.pool import NullPool

from elmlib.config import InputError, SummaryTrainingConfig, read_settings
from elmlib.data.records import write_json
from elmlib.evaluation.metrics import objective
from elmlib.training.loggers import MetricsRow, RunLogger

if TYPE_CHECKING:
    from elmlib.training.trainer import TrainResult

logger = logging.getLogger(__name__)

T = TypeVar("T")

STORAGE_VARIABLE = "ELM_STUDY_STORAGE"  # the storage's address: a password reaches no file, notebook or process list
PRUNER = "pruner"  # attribute of a study: `startup_trials` and `warmup_reports`; empty where nothing is pruned

_PATIENCE, _PAUSE = 600.0, 1.0  # seconds that a database may be away, and between two calls meanwhile
_DETAILS = 1500  # characters of a traceback that are kept
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED")
_DEAD_KERNEL = re.compile(r"DeadKernelError|Kernel died|Kernel didn't respond|kernel_info")
# Standard input is a pipe from the launcher. Notebook and kernel end when it closes: the launcher does that, or died.
_PAPERMILL = """
import os, runpy, threading
def end_with_launcher():
    os.read(0, 1)
    import psutil
    kernels = psutil.Process().children(recursive=True)
    for kernel in kernels:
        kernel.kill()
    psutil.wait_procs(kernels, timeout=10)
    os.kill(os.getpid(), 9)
threading.Thread(target=end_with_launcher, daemon=True).start()
runpy.run_module("papermill", run_name="__main__", alter_sys=True)
"""


def open_storage(address: str, heartbeat: int = 30, attempts: int = 5) -> RDBStorage:
    """The storage at a SQLAlchemy URL; InputError, without its password, if that is none or cannot be used."""
    # No connection is held between calls: a server has a hundred, and launchers and notebooks are more.
    engine: dict[str, Any] = {"poolclass": NullPool, "pool_pre_ping": True}
    shown = "the storage"
    try:
        url = make_url(address)
        shown = f"the storage {url!r}"  # hides the password
        if url.get_backend_name() == "sqlite" and url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
            engine["connect_args"] = {"timeout": 60}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # the heartbeat is, since Optuna 2.9
            return RDBStorage(_escaped(address), engine, heartbeat_interval=heartbeat, grace_period=3 * heartbeat)
    except (exc.DBAPIError, RuntimeError) as error:  # RuntimeError: Optuna's, for tables of another version
        if isinstance(error, exc.IntegrityError | exc.ProgrammingError) and attempts > 1:
            time.sleep(_PAUSE)  # another launcher makes the tables at the same moment
            return open_storage(address, heartbeat, attempts - 1)
        reason = getattr(error, "orig", error)  # without SQL
        raise InputError(f"{shown} cannot be used: {reason}; expected a server that runs, or a study's file") from error
    except (exc.ArgumentError, ImportError) as error:
        raise InputError(
            f"{shown} is no database URL or has no driver; expected sqlite:///study.db for example, or after "
            "pip install -e '.[postgres]' postgresql+psycopg://..."
        ) from error


def _escaped(path: str) -> str:
    """`path` for Optuna and papermill, which take it for a format string."""
    return path.replace("{", "{{").replace("}", "}}")


def patiently(call: Callable[[], T]) -> T:
    """The result of `call`, which is repeated while the database is away, for ten minutes at most."""
    give_up = time.monotonic() + _PATIENCE
    while True:
        try:
            return call()
        except (StorageInternalError, exc.DBAPIError, InputError) as error:  # InputError: of `open_storage`
            cause = error if isinstance(error, exc.DBAPIError) else error.__cause__
            is_away = isinstance(cause, exc.OperationalError | exc.InterfaceError)
            is_away |= getattr(cause, "connection_invalidated", False)
            if not is_away or time.monotonic() > give_up:
                raise
            logger.warning("the study's database does not answer (%s); trying again", type(cause).__name__)
            time.sleep(_PAUSE)


def make_pruner(settings: dict[str, int]) -> BasePruner:
    """Prunes a trial whose best report so far is below the median of the finished trials at the same report."""
    return MedianPruner(settings["startup_trials"], settings["warmup_reports"]) if settings else NopPruner()


class Outcome(NamedTuple):
    """How a trial ended."""

    kind: str  # complete, pruned, failed, killed, timed out or interrupted
    reason: str = ""  # one line; empty for a complete trial
    details: str = ""  # the last lines of a failed notebook's traceback
    metrics: dict[str, float] = {}  # noqa: RUF012 (of the best evaluation; never changed)


class TrialProcess:
    """A running trial: papermill in a process of its own, with this Python and its kernel."""

    def __init__(self, trial: optuna.Trial, notebook: Path, config: SummaryTrainingConfig, environment: dict[str, str]):
        """Start it in its checkpoint folder; `environment` is added to this process's own."""
        import yaml

        self.trial, self.folder = trial, (folder := Path(config.checkpoint_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(config.to_json(), encoding="utf-8")
        # The notebook trains its parameters and nothing else. It calls summary_data_path data_dir.
        values = {"trial": f"{trial.study.study_name}:{trial._trial_id}", "data_dir": config.summary_data_path}
        values |= {name: value for name, value in vars(config).items() if name != "summary_data_path"}
        parameters = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        (folder / "parameters.yaml").write_text(parameters, encoding="utf-8")
        # A kernel of our own name: one called python3 may belong to another Python. jupyter_client replaces `python`
        # by the Python that runs papermill.
        jupyter, command = folder.parent / "jupyter", ["python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        kernel = {"argv": command, "display_name": "elm", "language": "python"}
        write_json(jupyter / "kernels" / "elm" / "kernel.json", kernel)
        search = [str(jupyter.absolute()), os.environ.get("JUPYTER_PATH", "")]
        paths = [_escaped(str(path)) for path in (notebook, folder / notebook.name)]
        flags = ["-f", str(folder / "parameters.yaml"), "-k", "elm", "-l", "python", "--no-progress-bar"]
        with open(folder / "trial.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PAPERMILL, *paths, *flags],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | environment | {"JUPYTER_PATH": os.pathsep.join(filter(None, search))},
                start_new_session=True,  # Ctrl-C is the launcher's to handle
            )  # fmt: skip

    def kill(self) -> None:
        """End the notebook and its kernel at once, and wait until both are gone."""
        try:
            self.process.communicate(timeout=30)  # closes standard input
        except subprocess.TimeoutExpired:  # it does not run; its kernel ends without it
            self.process.kill()

    def outcome(self) -> Outcome | None:
        """How the notebook ended, None while it runs; only a `result.json` makes it complete or pruned."""
        if self.process.poll() is None:
            return None
        self.process.communicate()  # closes standard input
        code, path = self.process.returncode, self.folder / "result.json"
        if code < 0:
            return Outcome("killed", f"the trial's process ended with signal {-code}")
        if code == 0 and not path.is_file():
            return Outcome("failed", "the notebook ran to its end but left no result.json")
        if code == 0:
            try:
                result = read_settings(path)
                metrics = {name: value for name, value in result.items() if isinstance(value, int | float)}
                stopped = str(result["stopped"] or "")
                if not stopped:
                    objective(metrics)
            except (InputError, KeyError) as error:  # of a person's own notebook
                return Outcome("failed", f"{path} is not what a training writes: {error!r}")
            return Outcome("pruned" if stopped else "complete", stopped, metrics=metrics)
        cells = [cell for path in self.folder.glob("*.ipynb") for cell in json.loads(path.read_text("utf-8"))["cells"]]
        for output in [output for cell in cells for output in cell.get("outputs", ())]:
            if output["output_type"] == "error":
                lines = _COLOURS.sub("", "\n".join(output["traceback"]))
                return Outcome("failed", f"{output['ename']}: {output['evalue']}".splitlines()[0], lines[-_DETAILS:])
        log = _COLOURS.sub("", (self.folder / "trial.log").read_text("utf-8", errors="replace"))
        last = (log.strip().splitlines() or [""])[-1]
        return Outcome("killed" if _DEAD_KERNEL.search(last) else "failed", last, log[-_DETAILS:])


def run_files(folder: Path) -> list[Path]:
    """The files of a run that the next attempt at its trial resumes from."""
    patterns = ("*_step_*", "best_*", "metrics.jsonl", "predictions.jsonl")
    return [path for pattern in patterns for path in folder.glob(pattern)]


@dataclass
class OptunaCallback:
    """Reports a training run to its trial, and stops it when it is pruned. Outside a study it only trains."""

    trial: optuna.Trial | None = None
    evals_per_epoch: int = 1
    reports: int = 0  # of a whole run
    reason: str = ""  # why the run should stop; empty while it should not

    @classmethod
    def join(cls, trial: str, config: SummaryTrainingConfig) -> Self:
        """Join the running trial `study name:trial id`; with an empty name, no study."""
        if not trial:
            return cls()
        name, _, trial_id = trial.rpartition(":")

        def load() -> optuna.Trial:
            study = optuna.load_study(study_name=name, storage=open_storage(os.environ[STORAGE_VARIABLE]))
            study.pruner = make_pruner(study.user_attrs[PRUNER])
            return optuna.Trial(study, int(trial_id))

        return cls(patiently(load), config.evals_per_epoch, config.evals_per_epoch * config.max_epochs)

    def log(self, row: MetricsRow) -> None:
        """Report the objective of an evaluation, each once, and ask the pruner, except after the last one."""
        if row.kind == "eval":
            patiently(lambda: self._report(round(row.epoch * self.evals_per_epoch), objective(row.values)))

    def _report(self, number: int, value: float) -> None:
        assert self.trial
        if number == 0 or number in self.trial.storage.get_trial(self.trial._trial_id).intermediate_values:
            return
        self.trial.report(value, number)
        if number < self.reports and self.trial.should_prune():
            self.reason = f"pruned at report {number} of {self.reports}: its best report is below the trials' median"

    def close(self) -> None:
        """The launcher ends the trial, not its notebook."""

    def train(self, config: SummaryTrainingConfig, loggers: Sequence[RunLogger] = ()) -> "TrainResult":
        """Train; after a lack of GPU memory, start again with half the batch and twice the accumulation, for good."""
        from accelerate.utils import release_memory

        from elmlib.training.trainer import train

        if self.trial is None:
            return train(config, loggers)
        rows = config.batch_size * config.gradient_accumulation_steps
        while True:
            batch = self.trial.user_attrs.get("memory_batch_size", config.batch_size)
            fitting = replace(config, batch_size=batch, gradient_accumulation_steps=rows // batch)
            try:
                return train(fitting, [*loggers, self], stop=lambda: self.reason)
            except RuntimeError as error:
                if not is_out_of_memory(error) or batch % 2:
                    raise
                message = str(error).splitlines()[0]
            half = batch // 2  # outside `except`, whose error holds on to the memory
            release_memory()
            note = f"starts again with {half} x {rows // half} rows: {batch} did not fit ({message})"
            logger.warning("out of memory: the trial %s", note)
            for path in run_files(Path(config.checkpoint_dir)):
                path.unlink()  # a checkpoint of the larger batch cannot be resumed with the smaller one
            for name, value in (("memory", note), ("memory_batch_size", half)):
                patiently(partial(self.trial.set_user_attr, name, value))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a training run failed because a GPU's memory was too small, by its type or its message."""
    return bool(_OUT_OF_MEMORY.search(repr(error)))
