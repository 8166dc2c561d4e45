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
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from datetime import datetime
from functools import partial
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

from elmlib.config import InputError, StudyConfig
from elmlib.data.records import atomic_path
from elmlib.evaluation.metrics import objective
from elmlib.study import results
from elmlib.study.search_space import check_contract, plan_study
from elmlib.study.trial import PRUNER, STORAGE_VARIABLE, Outcome, TrialProcess, open_storage, patiently, run_files
from elmlib.training.loggers import read_metrics

logger = logging.getLogger(__name__)

CONTRACT = "contract"  # attribute of a study: what all of its trials have in common
LAUNCHER = "launcher"  # attribute of a trial, and on SQLite of the study: host and process of its launcher
_POLL, _LOOK = 0.1, 1.0  # seconds between looks at the trial processes, and at a study with nothing to start
_ADVISORY = 0x656C6D << 32  # the range of PostgreSQL's advisory locks that elmlib uses
_KEPT = ("origin", "variant", "changes", "seed", "memory", "memory_batch_size")  # attributes of the next attempt


class StudyFailedError(RuntimeError):
    """No trial of a study completed; the message ends with the reason."""


def run_study(config: StudyConfig) -> optuna.Study:
    """Run trials until `config.trials` are finished, `config.jobs` at a time, and write the results. A study that
    exists is resumed, its stopped trials too. The first Ctrl-C lets running trials end, the second stops them. Raises
    InputError for what does not fit, StudyFailedError if no trial completed."""
    launcher = Launcher(config)
    launcher.run()
    study = launcher.study
    results.write_results(study, config, launcher.plan.target)
    reason = study.user_attrs.get(results.HALTED)
    if results.best_trial(study) is None and not launcher.presses and not launcher.is_late():
        reasons = [trial.user_attrs["reason"] for trial in study.trials if "reason" in trial.user_attrs]
        reason = reason or ["no trial ended", *reasons][-1]
        raise StudyFailedError(f"no trial of study {study.study_name!r} completed: {reason}")
    if reason:
        logger.error("the study stopped: %s", reason)
    return study


def submit_launchers(config: StudyConfig) -> list[str]:
    """Begin the study and submit `config.jobs` launchers of one trial at a time as SLURM jobs; the ids of the jobs."""
    import submitit

    if not results.storage_address(config).startswith("postgresql"):
        raise InputError("several launchers need PostgreSQL: set ELM_STUDY_STORAGE to postgresql+psycopg://...")
    # Not as an argument: submitit writes those to disk, and the address may hold a password.
    os.environ[STORAGE_VARIABLE] = Launcher(config).storage.url
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
    run_study(config)  # a job returns nothing: submitit would pickle the study, and the address with it


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
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(share)}] * jobs


class Launcher:
    """Runs the trials of one study, in one thread."""

    def __init__(self, config: StudyConfig):
        """Check all settings, and create or load the study."""
        import optuna_dashboard  # noqa: F401  (`publish` needs it: told before a trial is trained)

        self.config, self.plan = config, plan_study(config)
        self.storage = open_storage(results.storage_address(config), config.heartbeat)
        self.is_shared = self.storage.engine.dialect.name == "postgresql"
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.started = datetime.now()
        self.deadline = time.time() + 3600 * config.timeout if config.timeout else float("inf")
        self.running: dict[int, TrialProcess] = {}  # GPU, or share of the processors -> its trial
        self.presses, self.beaten = 0, 0.0  # Ctrl-C so far; the time of the last heartbeats
        with self._lock():
            self.study = optuna.create_study(
                study_name=config.study_name, storage=self.storage, direction="maximize", load_if_exists=True
            )
            if not config.resume and self.study.trials:
                raise InputError(f"study {config.study_name!r} exists; omit --no-resume, or use another --study-name")
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
        slots, looked = trial_environments(self.config.jobs), 0.0
        finished = results.tally(self.study.get_trials(), self.config.max_retries)["finished"]
        # Without smoothing: the mean over all trials, where its default would count each look without a new one.
        bar = tqdm(initial=finished, total=self.plan.target, desc=self.config.study_name, unit="trial", smoothing=0)
        with bar, self._claim(), self._signals():
            self.study.set_user_attr(results.HALTED, "")
            try:
                while self.presses < 2 and not self.is_late():
                    self._beat()
                    for slot, process in list(self.running.items()):
                        if outcome := process.outcome():
                            del self.running[slot]
                            self._finish(process.trial, process.folder, outcome)
                    free = [slot for slot in range(len(slots)) if slot not in self.running]
                    if free and time.monotonic() > looked + _LOOK:
                        is_over = self._is_over(bar) or self.presses > 0
                        if is_over and not self.running:
                            return
                        if trial := None if is_over else patiently(self._ask):
                            self._start(trial, free[0], slots[free[0]])
                        else:
                            looked = time.monotonic()
                    time.sleep(_POLL)
            finally:
                kind = "timed out" if self.is_late() else "interrupted"
                for process in self.running.values():
                    process.kill()
                    self._finish(process.trial, process.folder, Outcome(kind, f"the study stopped it: {kind}"))

    def is_late(self) -> bool:
        """Whether the study's time is up."""
        return time.time() > self.deadline

    def _is_over(self, bar: "tqdm[Any]") -> bool:
        """Whether the study has enough trials or is halted; updates the progress bar."""
        trials, halted = patiently(lambda: (self.study.get_trials(), self.study.user_attrs.get(results.HALTED)))
        counts = results.tally(trials, self.config.max_retries)
        best = max([trial.value or 0.0 for trial in trials if trial.state == TrialState.COMPLETE], default=math.nan)
        bar.set_postfix({name: counts[name] for name in ("running", "pruned", "failed")} | {"best": best})
        bar.update(counts["finished"] - bar.n)
        return bool(halted) or counts["finished"] >= self.plan.target

    @contextmanager
    def _lock(self) -> Iterator[Callable[[], object]]:
        """On PostgreSQL one launcher at a time asks; yields a check that raises if the lock was lost."""
        if not self.is_shared:
            yield bool
            return
        key = _ADVISORY + zlib.crc32(self.config.study_name.encode())
        with self.storage.engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            yield lambda: connection.execute(text("SELECT 1"))

    @contextmanager
    def _claim(self) -> Iterator[None]:
        """On SQLite be the one launcher, and fail the trials of one that has ended; InputError while one runs."""
        if self.is_shared:
            yield
            return
        name, since = self.study.user_attrs.get(LAUNCHER) or (":0", 0.0)
        host, _, pid = name.rpartition(":")
        is_gone = host == socket.gethostname() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid)))
        if not is_gone and (wait := round(since + 3 * self.config.heartbeat - time.time())) > 0:
            raise InputError(
                f"study {self.config.study_name!r} is run by another launcher, {name}; use PostgreSQL for several. If "
                f"that one is gone, start again in {wait} s"
            )
        self._beat()
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.storage.set_trial_user_attr(trial._trial_id, "reason", "its launcher ended")
            self.study.tell(trial.number, state=TrialState.FAIL)
        yield
        self.study.set_user_attr(LAUNCHER, None)

    def _beat(self) -> None:
        """Record the heartbeats, and kill each trial that another launcher has marked as lost."""
        if time.monotonic() < self.beaten + self.config.heartbeat / 3:
            return
        self.beaten = time.monotonic()
        if not self.is_shared:
            patiently(partial(self.study.set_user_attr, LAUNCHER, (self.name, time.time())))
        for slot, process in list(self.running.items()):
            patiently(partial(self.storage.record_heartbeat, process.trial._trial_id))
            if patiently(partial(self.storage.get_trial, process.trial._trial_id)).state.is_finished():
                logger.warning("another launcher marked trial %d as lost and runs it again", process.trial.number)
                process.kill()
                del self.running[slot]

    def _ask(self) -> optuna.Trial | None:
        """The next trial of the study, those that were cut short first; None while there is none to start."""
        with self._lock() as check, warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            warnings.filterwarnings("ignore", "Heartbeat of storage")  # Optuna expects optimize()
            self._beat()  # so that a slow launcher does not take its own trials for lost
            fail_stale_trials(self.study)
            trials = self.study.get_trials(deepcopy=False)
            for trial in trials:
                # Its launcher ended before the first heartbeat, and without one it would never count as lost.
                if trial.state == TrialState.RUNNING and LAUNCHER not in trial.user_attrs:
                    self.storage.record_heartbeat(trial._trial_id)
                    self.storage.set_trial_user_attr(trial._trial_id, LAUNCHER, "none")
            if reason := self.study.user_attrs.get(results.HALTED) or results.common_failure(trials, self.started):
                self.study.set_user_attr(results.HALTED, reason)  # all launchers of the study stop
                return None
            retry = RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)
            for lost in results.last_attempts(trials):
                if not results.is_retried(lost, self.config.max_retries):
                    continue
                again = deepcopy(lost)
                again.user_attrs = {name: lost.user_attrs[name] for name in _KEPT if name in lost.user_attrs}
                again.user_attrs["retry"] = f"trial {lost.number} again, which was {results.outcome_of(lost)}"
                check()
                retry(self.study, again)
            trials = self.study.get_trials(deepcopy=False)
            counts = results.tally(trials, self.config.max_retries)
            if counts["finished"] + counts["running"] >= self.plan.target:
                return None
            begun = sum("retry_history" not in trial.system_attrs for trial in trials)
            check()
            if not counts["waiting"] and begun < len(self.plan.first):
                self.study.add_trial(self.plan.first[begun])
            # Seeded by the number of attempts: a study that was stopped samples what it would have.
            seed = self.config.seed + sum(trial.state != TrialState.WAITING for trial in trials)
            self.study.sampler = TPESampler(n_startup_trials=self.config.startup_trials, seed=seed)
            asked = self.study.ask(self.plan.space)
            self.storage.record_heartbeat(asked._trial_id)
            asked.set_user_attr(LAUNCHER, self.name)
            return asked

    def _start(self, trial: optuna.Trial, slot: int, environment: dict[str, str]) -> None:
        """Start the process of a trial; a retried trial gets the files of the attempts before it."""
        frozen = patiently(partial(self.storage.get_trial, trial._trial_id))
        folder = self.config.folder / f"trial-{trial.number:04d}"
        settings = frozen.params | frozen.user_attrs.get("changes", {})
        settings |= {"checkpoint_dir": str(folder), "wandb_run_name": f"{self.config.study_name}-{folder.name}"}
        try:
            config = replace(self.plan.base, **settings)
        except InputError as error:
            self._finish(trial, folder, Outcome("failed", f"impossible settings: {error}"))
            return
        shutil.rmtree(folder, ignore_errors=True)  # of a study that was deleted: numbers are never used twice
        folder.mkdir(parents=True)
        # From all of them, oldest first: a launcher that is killed here leaves the files in two folders.
        for number in frozen.system_attrs.get("retry_history", ()):
            for path in run_files(self.config.folder / f"trial-{number:04d}"):
                path.rename(folder / path.name)
        environment = environment | {STORAGE_VARIABLE: self.storage.url}
        self.running[slot] = TrialProcess(trial, self.notebook, config, environment)

    def _finish(self, trial: optuna.Trial, folder: Path, outcome: Outcome) -> None:
        """Store how a trial ended, with its metrics, note and artifacts, and tell Optuna."""
        if outcome.kind == "complete" and not math.isfinite(objective(outcome.metrics)):
            outcome = outcome._replace(kind="failed", reason="the objective is not a number")
        if outcome.metrics and self.config.grid:
            # The last evaluation and not the best: a choice would favour variants with many evaluations.
            rows = [row.values for row in read_metrics(folder / "metrics.jsonl") if row.kind == "eval"]
            outcome = outcome._replace(metrics=outcome.metrics | (rows[-1] if rows else {}))
        state = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}.get(outcome.kind, TrialState.FAIL)
        attributes: dict[str, Any] = {"outcome": outcome.kind, "folder": str(folder)}
        attributes |= {"reason": outcome.reason, "details": outcome.details} | outcome.metrics

        def tell() -> None:
            for name, value in attributes.items():
                if value != "":
                    trial.set_user_attr(name, value)
            try:
                results.publish(trial, folder, outcome, self.config.folder / "artifacts")
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                logger.warning("trial %d has no note for the dashboard: %s", trial.number, error)
            self.study.tell(trial, objective(outcome.metrics) if outcome.kind == "complete" else None, state)

        try:
            patiently(tell)
        except (UpdateFinishedTrialError, ValueError):  # Optuna's: its trial has ended already
            logger.warning("trial %d had already ended; another launcher may run it again", trial.number)
        for path in folder.glob("*_step_*") if state != TrialState.FAIL else ():
            path.unlink()  # only an attempt that was cut short is resumed

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C lets running trials end; the second, and the end of a SLURM job, stops them."""

        def press(number: int, _: object) -> None:
            self.presses += 1 if number == signal.SIGINT else 2
            message = "running trials end; Ctrl-C again stops them" if self.presses == 1 else "stopping trials"
            tqdm.write(f"interrupted: {message}", file=sys.stderr)

        is_main = threading.current_thread() is threading.main_thread()  # no other thread takes signals
        taken = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        before = {number: signal.signal(number, press) for number in taken}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
