"""How far a study is: which trials are finished, which are lost and run again."""

import warnings
from pathlib import Path
from typing import NamedTuple

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

WORKER, HALTED = "worker", "halted"
"""Attributes: of a trial, the worker that runs it; of a study, why all of its workers are to stop."""

_CUT_SHORT = ("timed out", "interrupted")  # on purpose: gone on with however often


class Tally(NamedTuple):
    """A study's trials; a trial that was run again counts once, as its last attempt."""

    complete: int
    pruned: int
    failed: int
    running: int
    waiting: int
    to_retry: int
    """Cut short, and not yet put back into the queue."""
    total: int
    """All attempts."""

    @property
    def finished(self) -> int:
        """Trials that have ended for good."""
        return self.complete + self.pruned + self.failed


def tally(study: optuna.Study, max_retries: int) -> Tally:
    """Count the trials of `study`; `max_retries` attempts follow one that was killed."""
    trials = study.get_trials(deepcopy=False)
    last = last_attempts(trials)
    states = [trial.state for trial in last]
    retried = sum(is_retried(trial, max_retries) for trial in last)
    return Tally(
        complete=states.count(TrialState.COMPLETE),
        pruned=states.count(TrialState.PRUNED),
        failed=states.count(TrialState.FAIL) - retried,
        running=states.count(TrialState.RUNNING),
        waiting=states.count(TrialState.WAITING),
        to_retry=retried,
        total=len(trials),
    )


def last_attempts(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Those that no other trial takes up."""
    taken_up = {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}
    return [trial for trial in trials if trial.number not in taken_up]


def outcome_of(trial: FrozenTrial) -> str:
    """How a trial ended, as its worker noted it; of one whose worker could not, `killed`."""
    if trial.state == TrialState.FAIL:
        return trial.user_attrs.get("outcome", "killed")
    return trial.state.name.lower()


def is_retried(trial: FrozenTrial, max_retries: int) -> bool:
    """Whether a failed trial is to be run again with its parameters: it did not fail by itself."""
    if trial.state != TrialState.FAIL:
        return False
    outcome = outcome_of(trial)
    killed = outcome == "killed" and len(trial.system_attrs.get("retry_history", ())) < max_retries
    return killed or outcome in _CUT_SHORT


def reap(study: optuna.Study, storage: BaseStorage, folder: Path, max_retries: int) -> list[int]:
    """Fail the trials whose worker is gone, put all that were cut short back into the queue; numbers of the failed.

    A database knows a lost worker by its heartbeat; on the worker's own machine its lock tells at once, as it does for
    a journal file. Only inside `turn`.
    """
    before = {trial.number for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        fail_stale_trials(study)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if _is_lost(trial, storage, folder):
                storage.set_trial_user_attr(trial._trial_id, "reason", "its worker was gone")
                storage.set_trial_user_attr(trial._trial_id, "outcome", "killed")
                study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        trials = study.get_trials(deepcopy=True)
        put_back = RetryHeartbeatStaleTrialCallback()
        for trial in last_attempts(trials):
            if is_retried(trial, max_retries):
                trial.user_attrs = {"origin": f"trial {trial.number} again, which was {outcome_of(trial)}"}
                put_back(study, trial)
    after = {trial.number for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))}
    return sorted(before - after)


def _is_lost(trial: FrozenTrial, storage: BaseStorage, folder: Path) -> bool:
    worker = trial.user_attrs.get(WORKER)
    if worker is None:
        return True  # a worker puts its name to a trial before it lets others take their turn
    path = _lock_path(folder, worker)
    if not path.exists():
        return isinstance(storage, JournalStorage)
    try:
        with FileLock(path, timeout=0):
            return True
    except Timeout:
        return False


def worker_lock(folder: Path, name: str) -> FileLock:
    """Held by a worker as long as it lives, and free the moment it does not."""
    path = _lock_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


def _lock_path(folder: Path, name: str) -> Path:
    return folder / "workers" / f"{name}.lock"
