"""The launcher of a study: it asks Optuna for trials, runs each as a process, and tells Optuna how it ended."""

import logging
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.samplers import TPESampler
from optuna.storages import RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import TrialState
from sqlalchemy import text
from tqdm.auto import tqdm

from elmlib.config import StudyConfig
from elmlib.data.records import atomic_path
from elmlib.evaluation.metrics import objective
from elmlib.study.results import (
    HALTED,
    Progress,
    best_trial,
    common_failure,
    is_retried,
    last_attempts,
    publish,
    storage_address,
    tally,
    write_results,
)
from elmlib.study.search_space import Settings, check_contract, plan_study
from elmlib.study.trial import (
    PRUNER,
    STORAGE_VARIABLE,
    Outcome,
    TrialProcess,
    open_storage,
    patiently,
    take_over,
    trial_environments,
)
from elmlib.training.loggers import read_metrics

logger = logging.getLogger(__name__)

CONTRACT, LAUNCHER = "contract", "launcher"
"""Attributes: what all trials of a study have in common; the launcher of a trial or of a study on SQLite."""

_POLL, _LOOK = 0.1, 1.0  # seconds between looks at the trial processes, and at a study with nothing to start
_ADVISORY = 0x656C6D << 32  # the range of PostgreSQL's advisory locks that elmlib uses
_KEPT = ("origin", "variant", "changes", "seed", "memory", "memory_batch_size")  # attributes of the next attempt


class StudyFailedError(RuntimeError):
    """No trial of a study completed; the message ends with the reason."""


def run_study(config: StudyConfig) -> optuna.Study:
    """Run trials until `config.trials` are finished, `config.jobs` at a time, and write the results.

    A study that exists is resumed. The first Ctrl-C lets running trials end, the second stops them; they are resumed
    by the next start. Raises ValueError or FileNotFoundError for settings, data, a space or a storage that do not fit,
    and StudyFailedError if no trial completed.
    """
    launcher = Launcher(config, storage_address(config))
    launcher.run()
    study = launcher.study
    write_results(study, config, launcher.plan.target)
    reason, failures = study.user_attrs.get(HALTED), [t for t in study.trials if "reason" in t.user_attrs]
    if best_trial(study) is None and not launcher.presses and not launcher.is_late():
        reason = reason or (failures[-1].user_attrs["reason"] if failures else "all trials were pruned")
        raise StudyFailedError(f"no trial of study {study.study_name!r} completed: {reason}")
    if reason:
        logger.error("the study stopped: %s", reason)
    return study


def submit_launchers(config: StudyConfig) -> list[str]:
    """Begin the study and submit `config.jobs` launchers of one trial at a time as SLURM jobs; the ids of the jobs.

    Raises ValueError for a storage that machines cannot share, and as `run_study` does.
    """
    import submitit

    address = storage_address(config)
    if not address.startswith("postgresql"):
        raise ValueError("several launchers need PostgreSQL: set ELM_STUDY_STORAGE to postgresql+psycopg://...")
    Launcher(config, address)
    # Not as an argument: submitit writes those to disk, and the address may hold a password.
    os.environ[STORAGE_VARIABLE] = address
    executor = submitit.AutoExecutor(folder=config.folder / "slurm", cluster=config.slurm_cluster)
    executor.update_parameters(
        name=config.study_name,
        timeout_min=max(1, round(60 * config.slurm_hours)),
        gpus_per_node=config.slurm_gpus if config.slurm_cluster == "slurm" else 0,
        slurm_partition=config.slurm_partition or None,
    )
    single = replace(config, storage="", jobs=1, slurm=False)
    return [executor.submit(_launch, single).job_id for _ in range(config.jobs)]


def _launch(config: StudyConfig) -> None:
    run_study(config)


class Launcher:
    """Runs the trials of one study, in one thread."""

    def __init__(self, config: StudyConfig, address: str):
        """Check all settings, and create or load the study in the storage at `address`, password and all."""
        self.config, self.address = config, address
        self.plan = plan_study(config)
        self.storage = open_storage(address, config.heartbeat)
        self.is_shared = self.storage.engine.dialect.name == "postgresql"
        self.name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.started = datetime.now()
        self.deadline = time.time() + 3600 * config.timeout if config.timeout else float("inf")
        self.running: dict[int, TrialProcess] = {}
        self.presses = 0
        self.beaten = 0.0
        with self._lock():
            self.study = optuna.create_study(
                study_name=config.study_name, storage=self.storage, direction="maximize", load_if_exists=True
            )
            if not config.resume and self.study.trials:
                raise ValueError(f"study {config.study_name!r} exists; omit --no-resume, or use another --study-name")
            check_contract(config.study_name, self.study.user_attrs.get(CONTRACT), self.plan.contract)
            self.study.set_user_attr(CONTRACT, self.plan.contract)
            pruner = {"startup_trials": config.startup_trials, "warmup_reports": config.warmup_reports}
            self.study.set_user_attr(PRUNER, {} if config.grid else pruner)
        # Frozen: an edit of the notebook does not change the trials of a study that runs.
        self.notebook = config.folder / config.notebook.name
        with atomic_path(self.notebook) as temporary:
            shutil.copyfile(config.notebook, temporary)

    def run(self) -> None:
        """Start, watch and end trials until the study has enough, its time is up, it is halted or it is interrupted."""
        if not self.is_shared:
            self._claim()
        if self.study.user_attrs.get(HALTED):
            self.study.set_user_attr(HALTED, "")
        slots, looked = trial_environments(self.config.jobs), 0.0
        with self._signals(), Progress(self.study, self.config, self.plan.target) as progress:
            try:
                while True:
                    self._beat()
                    for slot in [slot for slot, it in self.running.items() if not it.is_running()]:
                        self._finish(self.running.pop(slot))
                        progress.update()
                    if self.presses > 1 or self.is_late():
                        return
                    halts = self.presses > 0 or bool(self.study.user_attrs.get(HALTED))
                    free = [slot for slot in range(len(slots)) if slot not in self.running]
                    if free and not halts and time.monotonic() > looked + _LOOK:
                        trial = patiently(self._ask)
                        looked = 0.0 if trial else time.monotonic()
                        if trial:
                            self._start(trial, free[0], slots[free[0]])
                            continue
                        if progress.update().finished >= self.plan.target and not self.running:
                            return
                    if halts and not self.running:
                        return
                    time.sleep(_POLL)
            finally:
                kind, reason = ("timed out", "time is up") if self.is_late() else ("interrupted", "interrupted")
                for each in self.running.values():
                    each.kill()
                    self._finish(each, Outcome(kind, f"the study: {reason}"))  # type: ignore[arg-type]
                if not self.is_shared:
                    self.study.set_user_attr(LAUNCHER, {})

    def is_late(self) -> bool:
        """Whether the study's time is up."""
        return time.time() > self.deadline

    @contextmanager
    def _lock(self) -> Iterator[Callable[[], object]]:
        """On PostgreSQL one launcher at a time counts and asks. Yields a check that raises once the lock is lost with
        its connection."""
        if not self.is_shared:
            yield bool
            return
        key = _ADVISORY + zlib.crc32(self.config.study_name.encode())
        with self.storage.engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            yield lambda: connection.execute(text("SELECT 1"))

    def _claim(self) -> None:
        """Become the one launcher of a study on SQLite, and fail the trials of one that has ended; ValueError while
        another one runs."""
        other = self.study.user_attrs.get(LAUNCHER)
        host, pid, _ = (other or {"name": "::"})["name"].rsplit(":", 2)
        is_gone = host == socket.gethostname() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid)))
        if other and not is_gone and time.time() - other["time"] < 3 * self.config.heartbeat:
            raise ValueError(
                f"study {self.study.study_name!r} is run by another launcher ({other['name']}); use PostgreSQL for "
                f"several. If that one is gone, start again in {3 * self.config.heartbeat} s"
            )
        self._beat()
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.storage.set_trial_user_attr(trial._trial_id, "reason", "its launcher ended")
            self.study.tell(trial.number, state=TrialState.FAIL)

    def _beat(self) -> None:
        """Record the heartbeats, and kill each trial that another launcher has marked as lost."""
        if time.monotonic() < self.beaten + self.config.heartbeat / 3:
            return
        self.beaten = time.monotonic()
        if not self.is_shared:
            sign = {"name": self.name, "time": time.time()}
            patiently(lambda: self.study.set_user_attr(LAUNCHER, sign))
        for slot, process in list(self.running.items()):
            number = process.trial._trial_id
            patiently(lambda number=number: self.storage.record_heartbeat(number))  # type: ignore[misc]
            if patiently(lambda number=number: self.storage.get_trial(number)).state.is_finished():  # type: ignore[misc]
                logger.warning("another launcher marked trial %d as lost and runs it again", process.trial.number)
                process.kill()
                del self.running[slot]

    def _ask(self) -> optuna.Trial | None:
        """The next trial of the study, those that were cut short first; None while there is none to start."""
        with self._lock() as check, warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            warnings.filterwarnings("ignore", "Heartbeat of storage")  # Optuna expects optimize()
            fail_stale_trials(self.study)
            trials = self.study.get_trials(deepcopy=False)
            for trial in trials:
                # Its launcher ended before the first heartbeat, and without one it would never count as lost.
                if trial.state == TrialState.RUNNING and LAUNCHER not in trial.user_attrs:
                    self.storage.record_heartbeat(trial._trial_id)
                    self.storage.set_trial_user_attr(trial._trial_id, LAUNCHER, "none")
            if reason := common_failure(trials, self.started):
                self.study.set_user_attr(HALTED, reason)  # all launchers of the study stop
                return None
            retry = RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)
            for lost in [trial for trial in last_attempts(trials) if is_retried(trial, self.config.max_retries)]:
                again, how = deepcopy(lost), lost.user_attrs.get("outcome", "killed")
                again.user_attrs = {name: value for name, value in lost.user_attrs.items() if name in _KEPT}
                again.user_attrs["retry"] = f"trial {lost.number} again, which was {how}"
                check()
                retry(self.study, again)
            trials = self.study.get_trials(deepcopy=False)
            now = tally(trials, self.config.max_retries)
            if now.finished + now.running >= self.plan.target:
                return None
            begun = sum("retry_history" not in trial.system_attrs for trial in trials)
            check()
            if not now.waiting and begun < len(self.plan.first):
                self.study.enqueue_trial(self.plan.first[begun].params, user_attrs=self.plan.first[begun].attributes)
            # Seeded by the number of begun trials: a study that was stopped samples what it would have.
            seed = self.config.seed + now.begun
            self.study.sampler = TPESampler(n_startup_trials=self.config.startup_trials, seed=seed)
            asked = self.study.ask()
            self.storage.record_heartbeat(asked._trial_id)
            asked.set_user_attr(LAUNCHER, self.name)
            try:
                asked.set_user_attr("settings", self.plan.suggest(asked))
            except ValueError as error:
                asked.set_user_attr("impossible", str(error))
            return asked

    def _start(self, trial: optuna.Trial, slot: int, environment: dict[str, str]) -> None:
        """Start the process of a trial; a retried trial gets the files of the attempt before it."""
        folder = self.config.folder / f"trial-{trial.number:04d}"
        attributes = patiently(lambda: self.storage.get_trial(trial._trial_id))
        own: Settings = {"checkpoint_dir": str(folder), "wandb_run_name": f"{self.config.study_name}-{folder.name}"}
        try:
            if message := attributes.user_attrs.get("impossible"):
                raise ValueError(message)
            settings = replace(self.plan.base, **attributes.user_attrs["settings"], **own)
        except ValueError as error:
            self._tell(trial, folder, Outcome("failed", f"impossible settings: {error}"))
            return
        if folder.exists():  # of a study that was deleted: numbers are never used twice
            shutil.rmtree(folder)
        if history := attributes.system_attrs.get("retry_history"):
            take_over(self.config.folder / f"trial-{history[-1]:04d}", folder)
        environment = environment | {STORAGE_VARIABLE: self.address}
        self.running[slot] = TrialProcess(trial, folder, self.notebook, settings, environment)

    def _finish(self, ended: TrialProcess, outcome: Outcome | None = None) -> None:
        outcome = outcome or ended.outcome()
        if outcome.kind == "complete" and not math.isfinite(objective(outcome.metrics)):
            outcome = replace(outcome, kind="failed", reason="the objective is not a number")
        if outcome.metrics and self.config.grid:
            # The last evaluation and not the best: a choice would favour variants with many evaluations.
            rows = [row for row in read_metrics(ended.folder / "metrics.jsonl") if row.kind == "eval"]
            outcome = replace(outcome, metrics=outcome.metrics | (rows[-1].values if rows else {}))
        self._tell(ended.trial, ended.folder, outcome)

    def _tell(self, trial: optuna.Trial, folder: Path, outcome: Outcome) -> None:
        """Store how a trial ended, with its metrics, note and artifacts, and tell Optuna."""
        values: dict[str, Any] = {"outcome": outcome.kind, "folder": str(folder)}
        values |= {name: getattr(outcome, name) for name in ("reason", "details") if getattr(outcome, name)}
        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
        state = states.get(outcome.kind, TrialState.FAIL)
        value = objective(outcome.metrics) if state == TrialState.COMPLETE else None

        def tell() -> None:
            for name, each in (values | outcome.metrics).items():
                trial.set_user_attr(name, each)
            try:
                publish(trial, folder, outcome, self.config.folder / "artifacts")
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                logger.warning("trial %d has no note for the dashboard: %s", trial.number, error)
            self.study.tell(trial, value, state=state)

        try:
            patiently(tell)
        except (UpdateFinishedTrialError, ValueError):  # Optuna's: its trial has ended already
            logger.warning("trial %d had already ended; another launcher may run it again", trial.number)
        for path in folder.glob("*_step_*") if state != TrialState.FAIL else ():
            path.unlink()  # only an attempt that was cut short is resumed

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C lets running trials end; the second, and the end of a SLURM job, stops them."""
        if threading.current_thread() is not threading.main_thread():  # only a main thread takes signals
            yield
            return

        def press(number: int, _: object) -> None:
            self.presses += 1 if number == signal.SIGINT else 2
            message = "running trials end; Ctrl-C again stops them" if self.presses == 1 else "stopping trials"
            tqdm.write(f"interrupted: {message}", file=sys.stderr)

        before = {number: signal.signal(number, press) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
