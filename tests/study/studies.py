"""Helpers of the tests of studies: a launcher as a process, its trial processes, the state of a finished study."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO

import optuna
import psutil
from optuna.trial import FrozenTrial, TrialState

from elmlib.config import StudyConfig, SummaryTrainingConfig
from elmlib.study.results import last_attempts, open_study, outcome_of, tally

ROOT = Path(__file__).parents[2]
SPACE = """
learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
hidden_dim: {choices: [16, 32]}
batch_size: {choices: [4, 8]}
gradient_accumulation_steps: {choices: [2, 4]}
dropout_rate: {low: 0.0, high: 0.3}
"""
STUDY = """
import json, sys
from elmlib.config import StudyConfig, make_config
from elmlib.study import run_study, submit_launchers
config = make_config(StudyConfig, json.loads(sys.argv[1]))
(submit_launchers if config.slurm else run_study)(config)
"""


def tiny_study(config: SummaryTrainingConfig, folder: Path) -> StudyConfig:
    """A study of the tiny model that `config` trains; its files go into `folder`."""
    base = replace(config, use_text_drift_loss=False, checkpoint_dir="data/checkpoints")
    (folder / "base.json").write_text(base.to_json())
    (folder / "space.yaml").write_text(SPACE)
    return StudyConfig(
        study_name="tiny",
        data_dir=config.summary_data_path,
        checkpoint_dir=folder / "runs",
        trials=3,
        eval_samples=8,
        evals_per_epoch=2,
        training_config=folder / "base.json",
        space=folder / "space.yaml",
        notebook=ROOT / "notebooks" / "02_train.ipynb",
        heartbeat=2,
    )


def start(config: StudyConfig, log: IO[bytes] | None = None, **environment: str) -> subprocess.Popen:
    """A launcher as a process of its own, which prints into `log`."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()}
    return subprocess.Popen(
        [sys.executable, "-c", STUDY, json.dumps(values)],
        cwd=ROOT, start_new_session=True, env=os.environ | environment, stdout=log, stderr=log,
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


def kill_launcher(launcher: subprocess.Popen) -> None:
    """SIGKILL for a launcher alone; its trials' processes and kernels have to end by themselves."""
    family = [each for group in processes(launcher).values() for each in group]
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    wait_for(lambda: not any(map(_runs, family)), 10)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


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
