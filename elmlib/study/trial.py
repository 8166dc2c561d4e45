"""Both sides of a trial: the process that executes its notebook, and the callback inside the notebook."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import optuna
import psutil
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.pool import NullPool

from elmlib.config import SummaryTrainingConfig
from elmlib.data.records import write_json
from elmlib.evaluation.metrics import objective
from elmlib.training.loggers import MetricsRow, RunLogger

if TYPE_CHECKING:
    from elmlib.training.trainer import TrainResult

logger = logging.getLogger(__name__)

T = TypeVar("T")
Kind = Literal["complete", "pruned", "failed", "killed", "timed out", "interrupted"]

STORAGE_VARIABLE = "ELM_STUDY_STORAGE"
"""Environment variable with the storage's address: a password in it reaches no file, notebook or process list."""
PRUNER = "pruner"
"""Attribute of a study: `startup_trials` and `warmup_reports` of its pruner; empty where nothing is pruned."""
RUN_FILES = ("*_step_*", "best_*", "metrics.jsonl", "predictions.jsonl")
"""Files of a run that the next attempt at its trial resumes from."""

_PATIENCE, _PAUSE = 600.0, 1.0  # seconds that a database may be away, and between two calls meanwhile
_DETAILS = 1500  # characters of a traceback that are kept
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_OUT_OF_MEMORY = re.compile(r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED")
_DEAD_KERNEL = re.compile(r"DeadKernelError|Kernel died|Kernel didn't respond|kernel_info")
# Standard input is a pipe from the launcher: when the launcher dies, notebook and kernel end with it.
_PAPERMILL = """
import os, runpy, threading
def end_with_launcher():
    os.read(0, 1)
    import psutil
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os._exit(1)
threading.Thread(target=end_with_launcher, daemon=True).start()
runpy.run_module("papermill", run_name="__main__", alter_sys=True)
"""


def open_storage(address: str, heartbeat: int = 30) -> RDBStorage:
    """The storage at a SQLAlchemy URL; `heartbeat` is the seconds between the heartbeats of a running trial. Raises
    ValueError for an address that is no URL or whose driver is missing, without its password."""
    try:
        url = make_url(address)
    except ArgumentError as error:
        raise ValueError("the storage is no database URL; expected sqlite:///study.db for example") from error
    if url.get_backend_name() == "sqlite" and url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    connect = {"timeout": 60} if url.get_backend_name() == "sqlite" else {}
    # No connection is held between calls: a server has a hundred, and launchers and notebooks are more.
    engine = {"poolclass": NullPool, "pool_pre_ping": True, "connect_args": connect}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # the heartbeat is, since Optuna 2.9
            attempts = 5
            while True:
                attempts -= 1
                try:
                    return RDBStorage(
                        address, engine_kwargs=engine, heartbeat_interval=heartbeat, grace_period=3 * heartbeat
                    )
                except (IntegrityError, ProgrammingError):  # another launcher makes the tables at the same moment
                    if not attempts:
                        raise
                    time.sleep(_PAUSE)
    except ImportError as error:
        raise ValueError(
            f"no driver for {url.render_as_string(hide_password=True)}; for PostgreSQL: pip install -e '.[postgres]' "
            "and an address postgresql+psycopg://..."
        ) from error


def patiently(call: Callable[[], T]) -> T:
    """The result of `call`, which is repeated while the database is away, for ten minutes at most."""
    give_up = time.monotonic() + _PATIENCE
    while True:
        try:
            return call()
        except (StorageInternalError, DBAPIError) as error:
            cause = error if isinstance(error, DBAPIError) else error.__cause__
            outage = isinstance(cause, DBAPIError) and (
                cause.connection_invalidated or type(cause).__name__ in ("OperationalError", "InterfaceError")
            )
            if not outage or time.monotonic() > give_up:
                raise
            logger.warning("the study's database does not answer (%s); trying again", type(cause).__name__)
            time.sleep(_PAUSE)


def make_pruner(settings: dict[str, int]) -> BasePruner:
    """Prunes a trial whose best report so far is below the median of the finished trials at the same report."""
    if not settings:
        return NopPruner()
    return MedianPruner(n_startup_trials=settings["startup_trials"], n_warmup_steps=settings["warmup_reports"])


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    kind: Kind
    reason: str = ""
    """One line; empty for a complete trial."""
    details: str = ""
    """The last lines of a failed notebook's traceback."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the best evaluation."""


class TrialProcess:
    """A running trial: papermill in a process of its own, with this Python and its kernel."""

    def __init__(
        self,
        trial: optuna.Trial,
        folder: Path,
        notebook: Path,
        config: SummaryTrainingConfig,
        environment: dict[str, str],
    ):
        """Start it in `folder`; `environment` is added to this process's own."""
        self.trial = trial
        self.folder, self.notebook = folder, folder / notebook.name
        folder.mkdir(parents=True, exist_ok=True)
        write_parameters(folder / "parameters.yaml", config, f"{trial.study.study_name}:{trial._trial_id}")
        (folder / "settings.json").write_text(config.to_json(), encoding="utf-8")
        # A kernel of our own name: one called python3 may belong to another Python. jupyter_client replaces `python`
        # by the Python that runs papermill.
        write_json(
            folder.parent / "jupyter" / "kernels" / "elm" / "kernel.json",
            {"argv": ["python", "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "elm"}
            | {"language": "python"},
        )
        search = [str((folder.parent / "jupyter").absolute()), os.environ.get("JUPYTER_PATH", "")]
        environment = environment | {"JUPYTER_PATH": os.pathsep.join(filter(None, search))}
        # papermill takes paths as format strings, so that braces are doubled.
        paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, self.notebook)]
        flags = ["-f", str(folder / "parameters.yaml"), "-k", "elm", "--no-progress-bar"]
        with open(folder / "trial.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PAPERMILL, *paths, *flags],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment,
                start_new_session=True,  # Ctrl-C is the launcher's to handle
            )  # fmt: skip

    def is_running(self) -> bool:
        """Whether the notebook has not ended yet."""
        return self.process.poll() is None

    def kill(self) -> None:
        """End the notebook and its kernel at once, and wait until both are gone."""
        try:
            root = psutil.Process(self.process.pid)
            family = [*root.children(recursive=True), root]
        except psutil.NoSuchProcess:
            family = []
        for process in family:
            process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin
        self.process.stdin.close()
        psutil.wait_procs(family, timeout=10)

    def outcome(self) -> Outcome:
        """How an ended notebook ended; only a `result.json` makes it complete or pruned."""
        assert self.process.stdin and self.process.returncode is not None
        self.process.stdin.close()
        code, path = self.process.returncode, self.folder / "result.json"
        if code == 0 and path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            metrics = {name: value for name, value in result.items() if isinstance(value, int | float)}
            return Outcome("pruned" if result["stopped"] else "complete", result["stopped"], metrics=metrics)
        if code < 0:
            return Outcome("killed", f"the trial's process ended with signal {-code}")
        if error := _notebook_error(self.notebook):
            lines = _COLOURS.sub("", "\n".join(error["traceback"]))
            return Outcome("failed", f"{error['ename']}: {error['evalue']}".splitlines()[0], lines[-_DETAILS:])
        log = _COLOURS.sub("", (self.folder / "trial.log").read_text(encoding="utf-8", errors="replace"))
        last = (log.strip().splitlines() or [""])[-1]
        if code == 0:
            return Outcome("failed", f"{self.notebook.name} ran to its end but left no result.json")
        return Outcome("killed" if _DEAD_KERNEL.search(last) else "failed", last, log[-_DETAILS:])


def trial_environments(jobs: int) -> list[dict[str, str]]:
    """For each of `jobs` trials at a time its environment: a GPU of its own, or its share of the processors."""
    if jobs == 1:
        return [{}]
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        import torch

        listed = ",".join(map(str, range(torch.cuda.device_count())))
    if gpus := [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]:
        return [{"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} for index in range(jobs)]
    share = max(1, len(os.sched_getaffinity(0)) // jobs)
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(share)} for _ in range(jobs)]


def _notebook_error(path: Path) -> dict[str, Any]:
    """The error output of an executed notebook; empty where there is none."""
    if not path.is_file():
        return {}
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    return next((output for output in outputs if output["output_type"] == "error"), {})


def write_parameters(path: Path, config: SummaryTrainingConfig, trial: str) -> None:
    """Write all settings of a trial as parameters of its notebook, which trains these and no others."""
    import yaml

    values = {each.name: getattr(config, each.name) for each in fields(config) if each.name != "summary_data_path"}
    values = {"trial": trial, "data_dir": config.summary_data_path} | values
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def take_over(before: Path, folder: Path) -> None:
    """Move the run of an attempt that was cut short into the folder of the next one."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in RUN_FILES:
        for path in before.glob(pattern):
            path.rename(folder / path.name)


@dataclass
class OptunaCallback:
    """Reports a training run to its trial, and stops it when it is pruned. Outside a study it only trains."""

    trial: optuna.Trial | None = None
    evals_per_epoch: int = 1
    reports: int = 0
    """Reports of a whole run."""
    reason: str = ""
    """Why the run should stop; empty while it should not."""

    @classmethod
    def join(cls, trial: str, config: SummaryTrainingConfig) -> Self:
        """Join the running trial `study name:trial id`; with an empty name, no study.

        The storage's address comes in the environment, because a notebook's parameters are visible in its output.
        """
        if not trial:
            return cls()
        name, _, trial_id = trial.rpartition(":")

        def load() -> optuna.Trial:
            sampler = optuna.samplers.RandomSampler()  # nothing is sampled here
            study = optuna.load_study(
                study_name=name, storage=open_storage(os.environ[STORAGE_VARIABLE]), sampler=sampler
            )
            study.pruner = make_pruner(study.user_attrs[PRUNER])
            return optuna.Trial(study, int(trial_id))

        return cls(patiently(load), config.evals_per_epoch, config.evals_per_epoch * config.max_epochs)

    def log(self, row: MetricsRow) -> None:
        """Report the objective of an evaluation, each once, and ask the pruner, except after the last one."""
        if self.trial is not None and row.kind == "eval":
            patiently(lambda: self._report(row))

    def _report(self, row: MetricsRow) -> None:
        assert self.trial
        number = round(row.epoch * self.evals_per_epoch)
        if number == 0 or number in self.trial.storage.get_trial(self.trial._trial_id).intermediate_values:
            return
        value = objective(row.values)
        self.trial.report(value, number)
        if number < self.reports and self.trial.should_prune():
            self.reason = (
                f"pruned at report {number} of {self.reports}: {value:.4f}, and its best report so far is below the "
                "median of the trials before it"
            )

    def stop(self) -> str:
        """Why the run should stop; the trainer asks after each step and evaluation."""
        return self.reason

    def close(self) -> None:
        """The launcher ends the trial, not its notebook."""

    def train(self, config: SummaryTrainingConfig, loggers: Sequence[RunLogger] = ()) -> "TrainResult":
        """Train; a trial that runs out of GPU memory starts again with half the batch and twice the accumulation.

        The trial's attribute `memory` says so, and the next attempt at the trial begins with that batch.
        """
        from elmlib.training.trainer import train

        if self.trial is None:
            return train(config, loggers)
        while True:
            batch = self.trial.user_attrs.get("memory_batch_size", config.batch_size)
            steps = config.gradient_accumulation_steps * config.batch_size // batch
            fitting = replace(config, batch_size=batch, gradient_accumulation_steps=steps)
            try:
                return train(fitting, [*loggers, self], stop=self.stop)
            except RuntimeError as error:
                if not is_out_of_memory(error) or batch % 2:
                    raise
                message = str(error).splitlines()[0]
            self._halve(config, batch, message)

    def _halve(self, config: SummaryTrainingConfig, batch: int, message: str) -> None:
        import torch
        from accelerate.utils import release_memory

        assert self.trial
        release_memory()
        torch.cuda.empty_cache()
        rows = config.batch_size * config.gradient_accumulation_steps
        note = f"starts again with {batch // 2} x {rows // (batch // 2)} rows: {batch} did not fit ({message})"
        logger.warning("out of memory: the trial %s", note)
        # A checkpoint of the larger batch cannot be resumed with the smaller one.
        for pattern in RUN_FILES:
            for path in Path(config.checkpoint_dir).glob(pattern):
                path.unlink()
        trial = self.trial
        patiently(lambda: trial.set_user_attr("memory", note))
        patiently(lambda: trial.set_user_attr("memory_batch_size", batch // 2))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a training run failed because a GPU's memory was too small, by its type or its message."""
    return type(error).__name__ == "OutOfMemoryError" or bool(_OUT_OF_MEMORY.search(str(error)))
