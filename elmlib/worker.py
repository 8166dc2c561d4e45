"""A worker of a study: takes its turn, runs a trial, says how it ended, until enough are finished."""

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import time
import uuid
from collections import Counter
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.samplers import TPESampler
from optuna.trial import TrialState
from sqlalchemy.exc import DBAPIError

from elmlib.config import SummaryTrainingConfig
from elmlib.forking import prepared_context
from elmlib.notes import publish
from elmlib.quality import objective
from elmlib.records import write_json
from elmlib.results import write_results
from elmlib.search import begin, trial_settings
from elmlib.space import load_space
from elmlib.storage import STORAGE_VARIABLE, turn
from elmlib.study_commands import StudyConfig
from elmlib.tally import HALTED, WORKER, reap, tally, worker_lock
from elmlib.trial import Kind, Outcome, run_trial

logger = logging.getLogger(__name__)

_PAUSE = 1.0  # seconds between looks at a study that has nothing to do for this worker
_SAME_FAILURES = 3


class TrialEndedError(Exception):
    """A trial ended without a score; the message says how."""


class Worker:
    """Runs trials of one study, one at a time."""

    def __init__(self, config: StudyConfig, address: str, deadline: float = float("inf")):
        """`address`: of the storage, password and all. `deadline`: time after which a trial is stopped, as time.time()
        has it. Raises as `begin` does."""
        self.config, self.address, self.deadline = config, address, deadline
        self.space = load_space(config.space)
        self.study, self.storage = begin(config, address)
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.started = datetime.now()
        self.parent = multiprocessing.parent_process()  # None where the worker is nobody's child, as on a cluster
        self.draining = self.interrupted = self.given_up = False

    def run(self) -> None:
        """Work until the study has its trials, its time is up, it is halted, or this worker is told to stop."""
        first = prepared_context().Process(target=int)  # does nothing, when all is loaded that a trial needs
        first.start()
        first.join()
        with worker_lock(self.config.folder, self.name):
            while not self._is_over():
                try:
                    if not self._take_turn():
                        return
                except (StorageInternalError, DBAPIError) as error:
                    logger.warning("the study's storage failed (%s); trying again", error)
                    time.sleep(_PAUSE)

    def _is_over(self) -> bool:
        return self.draining or self._stop() is not None or bool(self.study.user_attrs.get(HALTED))

    def _stop(self) -> Kind | None:
        if self.interrupted or (self.parent and not self.parent.is_alive()):
            return "interrupted"
        return "timed out" if time.time() > self.deadline else None

    def _take_turn(self) -> bool:
        """Run a trial or wait a moment; False where nothing is left to do."""
        with ExitStack() as lock:
            lock.enter_context(turn(self.storage, self.config.folder))
            reap(self.study, self.storage, self.config.folder, self.config.max_retries)
            if self._halts():
                return False
            now = tally(self.study, self.config.max_retries)
            if now.finished >= self.config.trials:
                return False
            if now.finished + now.running < self.config.trials:  # those that wait come first
                # A seed of its own, by how many have begun: a study that was stopped goes on as if it had not been.
                seed = self.config.seed + now.total - now.waiting
                self.study.sampler = TPESampler(n_startup_trials=self.config.startup_trials, seed=seed)
                self._run_one(lock)
                return True
        time.sleep(_PAUSE)
        return True

    def _halts(self) -> bool:
        """Whether the same failure came three times since this worker began; all workers of the study then stop."""
        failed = [
            trial.user_attrs["reason"]
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
            if trial.user_attrs.get("outcome") == "failed"
            and trial.datetime_start is not None
            and trial.datetime_start >= self.started
        ]
        for reason, count in Counter(failed).most_common(1):
            if count >= _SAME_FAILURES:
                self.study.set_user_attr(HALTED, f"{count} trials failed alike: {reason}")
                return True
        return False

    def _run_one(self, lock: ExitStack) -> None:
        """Let Optuna ask, keep the heartbeat and tell; the lock goes as soon as the trial has its settings."""
        self.given_up = False
        try:
            self.study.optimize(lambda trial: self._objective(trial, lock), n_trials=1, catch=(TrialEndedError,))
        except ValueError:  # Optuna's, for telling a trial that has ended
            if not self.given_up:
                raise
            logger.warning("another worker took this one for lost, and its trial runs anew; so nothing is told")

    def _objective(self, trial: optuna.Trial, lock: ExitStack) -> float:
        trial.set_user_attr(WORKER, self.name)
        folder = trial_folder(self.config, trial.number)
        try:
            settings = trial_settings(self.config, self.space(trial), trial.number)
        except ValueError as error:
            trial.set_user_attr("reason", f"impossible: {error}")
            raise optuna.TrialPruned(f"impossible: {error}") from error
        finally:
            lock.close()
        self._describe(trial, folder, settings)
        outcome = run_trial(folder, {STORAGE_VARIABLE: self.address}, self._stop)
        if self.storage.get_trial(trial._trial_id).state.is_finished():
            self.given_up = True
            raise TrialEndedError("given up by another worker")
        self._note(trial, folder, outcome)
        if outcome.kind == "complete":
            return objective(outcome.metrics)
        if outcome.kind == "pruned":
            raise optuna.TrialPruned(outcome.reason)
        raise TrialEndedError(f"{outcome.kind}: {outcome.reason}")

    def _describe(self, trial: optuna.Trial, folder: Path, settings: SummaryTrainingConfig) -> None:
        """Write what the trial's process and notebook need; an attempt that was cut short lends what it had done."""
        folder.mkdir(parents=True, exist_ok=True)
        before = self.storage.get_trial(trial._trial_id).system_attrs.get("retry_history", [])
        if before:
            take_over(trial_folder(self.config, before[-1]), folder)
        (folder / "settings.json").write_text(settings.to_json(), encoding="utf-8")
        write_json(
            folder / "trial.json",
            {
                "study": self.study.study_name,
                "trial_id": trial._trial_id,
                "notebook": str(self.config.notebook),
                "parameters": notebook_parameters(folder, settings),
                "evals_per_epoch": settings.evals_per_epoch,
                "reports": settings.evals_per_epoch * settings.max_epochs,
                "startup_trials": self.config.startup_trials,
                "warmup_reports": self.config.warmup_reports,
            },
        )

    def _note(self, trial: optuna.Trial, folder: Path, outcome: Outcome) -> None:
        """Keep how it ended with the trial, and what there is to see."""
        for path in folder.glob("*_step_*") if outcome.kind in ("complete", "pruned") else ():
            path.unlink()  # only an attempt that is cut short is gone on with
        trial.set_user_attr("outcome", outcome.kind)
        trial.set_user_attr("folder", str(folder))
        for name in ("reason", "details"):
            if value := getattr(outcome, name):
                trial.set_user_attr(name, value)
        for name, value in outcome.metrics.items():
            trial.set_user_attr(name, value)
        publish(trial, folder, outcome, self.config.folder / "artifacts")


def trial_folder(config: StudyConfig, number: int) -> Path:
    """Where trial `number` keeps its notebook and its run."""
    return config.folder / f"trial-{number:04d}"


def take_over(earlier: Path, folder: Path) -> None:
    """Move the run of an attempt that was cut short into the folder of the next one."""
    for pattern in ("*_step_*", "best_*", "metrics.jsonl", "predictions.jsonl"):
        for path in earlier.glob(pattern):
            path.rename(folder / path.name)


def notebook_parameters(folder: Path, settings: SummaryTrainingConfig) -> dict[str, Any]:
    """What papermill puts into the trial's notebook; the rest of `settings` is in settings.json, which wins there."""
    return {
        "data_dir": settings.summary_data_path,
        "checkpoint_dir": str(folder),
        "trial_dir": str(folder),
        "settings_file": str(folder / "settings.json"),
        "resume_from": "latest",
        "llm_model": settings.llm_model_name,
        "epochs": settings.max_epochs,
        "learning_rate": settings.learning_rate,
        "batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "hidden_dim": settings.hidden_dim,
        "dropout": settings.dropout_rate,
        "residual_scale": settings.residual_scale,
        "contrastive_weight": settings.contrastive_weight,
        "drift_weight": settings.text_drift_weight,
        "drift_target_similarity": settings.text_drift_target_similarity,
        "eval_samples": settings.eval_samples,
        "use_wandb": settings.use_wandb,
        "seed": settings.seed,
    }


def work(config: StudyConfig, address: str | None = None, deadline: float = float("inf")) -> None:
    """A whole worker process: SIGINT lets the running trial end, SIGTERM stops it to be taken up later.

    Without `address` the storage's comes from the environment.
    """
    worker = Worker(config, address or os.environ[STORAGE_VARIABLE], deadline)

    def drain(*_: object) -> None:
        worker.draining = True

    def interrupt(*_: object) -> None:
        worker.interrupted = True

    with contextlib.suppress(ValueError):  # only a main thread takes signals
        signal.signal(signal.SIGINT, drain)
        signal.signal(signal.SIGTERM, interrupt)
    worker.run()
    with turn(worker.storage, config.folder):
        write_results(worker.study, config)  # on a cluster nobody else is there to do it
