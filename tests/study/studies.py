"""Helpers of the tests of studies: a launcher as a process, its trial processes, the state of a finished study."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import psutil
from optuna.trial import FrozenTrial, TrialState

from elmlib.config import StudyConfig
from elmlib.study.results import last_attempts, open_study, outcome_of, tally

ROOT = Path(__file__).parents[2]
STUDY = """
import json, sys
from elmlib.config import StudyConfig, make_config
from elmlib.study import run_study, submit_launchers
config = make_config(StudyConfig, json.loads(sys.argv[1]))
(submit_launchers if config.slurm else run_study)(config)
"""


def start(config: StudyConfig, **environment: str) -> subprocess.Popen:
    """A launcher as a process of its own."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()}
    return subprocess.Popen(
        [sys.executable, "-c", STUDY, json.dumps(values)],
        cwd=ROOT, start_new_session=True, env=os.environ | environment,
    )  # fmt: skip


def processes(launcher: subprocess.Popen) -> dict[str, list[psutil.Process]]:
    """The trials' processes and their kernels."""
    found: dict[str, list[psutil.Process]] = {"trial": [], "kernel": []}
    with contextlib.suppress(psutil.Error):  # of a process that ends just now
        for child in psutil.Process(launcher.pid).children(recursive=True):
            command = " ".join(child.cmdline())
            found["kernel" if "ipykernel_launcher" in command else "trial"].append(child)
    return found


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Return once `condition` holds."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, condition
        time.sleep(0.05)


def begun(config: StudyConfig) -> list[FrozenTrial]:
    """The trials of a study that have begun."""
    return [trial for trial in open_study(config).trials if trial.state != TrialState.WAITING]


def check_ended_once(study: optuna.Study, config: StudyConfig) -> list[FrozenTrial]:
    """Each trial has ended, as many as asked for have for good, and a retried one kept its parameters."""
    trials = study.get_trials()
    assert all(trial.state.is_finished() for trial in trials), [trial.state for trial in trials]
    assert tally(trials, config.max_retries)["finished"] == config.trials
    for trial in trials:
        if history := trial.system_attrs.get("retry_history"):
            before = trials[history[-1]]
            assert before.state == TrialState.FAIL
            assert trial.params.items() >= before.params.items()
        if trial.state == TrialState.FAIL:
            assert outcome_of(trial) in ("killed", "failed", "interrupted", "timed out")
        else:
            settings = json.loads(Path(trial.user_attrs["folder"], "settings.json").read_text())
            assert settings.items() >= trial.params.items()
    ended = [trial for trial in last_attempts(trials) if trial.state != TrialState.FAIL]
    assert len({tuple(sorted(trial.params.items())) for trial in ended}) == len(ended), "one trial was run twice"
    return trials
