"""What the tests of studies share: a small search space, a stub of a trial, and how a study has to have ended."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import optuna
import psutil
from optuna.trial import TrialState

from elmlib.storage import open_storage
from elmlib.study import storage_address
from elmlib.study_commands import StudyConfig
from elmlib.tally import last_attempts, outcome_of, tally

ROOT = Path(__file__).parent.parent
SPACE = """
learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
hidden_dim: {choices: [16, 32]}
batch_size: {choices: [4, 8]}
gradient_accumulation_steps: {choices: [2, 4]}
dropout_rate: {low: 0.0, high: 0.3}
"""
# A notebook that is as a trial's without a model: what is under test here are workers, kernels and storages.
STUB = """
import json, os, time
from pathlib import Path
settings = json.loads(Path(settings_file).read_text())
time.sleep(settings["weight_decay"])
if 70 < settings["spike_factor"] <= 80:  # waits for the second trial, which only another worker can begin meanwhile
    give_up = time.monotonic() + 60
    while not Path(trial_dir).with_name("trial-0001").exists():
        assert time.monotonic() < give_up, "no other worker has come"
        time.sleep(0.1)
if settings["spike_factor"] > 90:
    raise ValueError("no such luck")
if settings["spike_factor"] > 80:
    os.kill(os.getpid(), 9)
score = settings["learning_rate"] * 50
metrics = {f"{name}{end}": score for name in ("bertscore_composite", "bertscore_f1", "val_nll", "drift_similarity")
           for end in ("", "_shuffled")}
metrics |= {"empty_prediction_rate": 0.0, "short_prediction_rate": 0.0, "stopped": ""}
temporary = Path(trial_dir, "result.tmp")
temporary.write_text(json.dumps(metrics))
temporary.rename(Path(trial_dir, "result.json"))
"""


def check_ended_once(study: optuna.Study, config: StudyConfig) -> list[optuna.trial.FrozenTrial]:
    """Every trial that began has ended, as many as were asked for have for good, and who was run again kept its
    parameters. Trials to begin with that were never reached may still wait."""
    trials = [
        trial
        for trial in study.get_trials()
        if trial.state != TrialState.WAITING or "retry_history" in trial.system_attrs
    ]
    assert all(trial.state.is_finished() for trial in trials), [trial.state for trial in trials]
    assert tally(study, config.max_retries).finished == config.trials
    of_number = {trial.number: trial for trial in trials}
    for trial in trials:
        if history := trial.system_attrs.get("retry_history"):
            before = of_number[history[-1]]
            assert before.state == TrialState.FAIL
            assert trial.params.items() >= before.params.items()
        if trial.state == TrialState.FAIL:
            assert outcome_of(trial) in ("killed", "failed", "interrupted", "timed out")
    ended = [trial for trial in last_attempts(trials) if trial.state != TrialState.FAIL]
    assert len({tuple(sorted(trial.params.items())) for trial in ended}) == len(ended), "one trial was run twice"
    return trials


STUDY = """
import json, sys
from pathlib import Path
from elmlib.study_commands import StudyConfig
from elmlib.study import run_study, submit_workers
values = json.loads(sys.argv[1])
paths = ("checkpoint_dir", "config", "space", "notebook")
config = StudyConfig(**values | {name: Path(values[name]) for name in paths})
(submit_workers if config.slurm else run_study)(config)
"""


def start(config: StudyConfig) -> subprocess.Popen:
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()}
    return subprocess.Popen([sys.executable, "-c", STUDY, json.dumps(values)], cwd=ROOT, start_new_session=True)


def kernels_and_workers(launcher: subprocess.Popen) -> dict[str, list[psutil.Process]]:
    """The study's processes by what they are: a worker has a server, which forks trials, which fork a kernel each."""
    found: dict[str, list[psutil.Process]] = {"worker": [], "server": [], "trial": [], "kernel": []}
    with contextlib.suppress(psutil.Error):  # of a process that ends just now
        found["worker"] = [
            it for it in psutil.Process(launcher.pid).children() if "spawn_main" in " ".join(it.cmdline())
        ]
        for worker in found["worker"]:
            found["server"] += [it for it in worker.children() if "forkserver" in " ".join(it.cmdline())]
        for name, parents in (("trial", "server"), ("kernel", "trial")):
            for parent in found[parents]:
                found[name] += parent.children()
    return found


def run_on_cluster(config: StudyConfig, seconds: float = 240) -> list[optuna.trial.FrozenTrial]:
    """The trials of a study whose workers were submitted, by a process that is gone, once all of it has ended.

    The first trial waits for a second worker: a quick one would be through with all of them before another has started.
    """
    settings = json.loads(config.config.read_text()) | {"spike_factor": 75.0}
    config.config.write_text(json.dumps(settings))
    assert start(config).wait(60) == 0
    study = optuna.load_study(study_name=config.study_name, storage=open_storage(storage_address(config)))
    results = config.folder / f"{config.study_name}_results.json"
    give_up = time.monotonic() + seconds
    while tally(study, config.max_retries).finished < config.trials or not results.is_file():
        assert time.monotonic() < give_up, [trial.state for trial in study.trials]
        time.sleep(0.5)
    return check_ended_once(study, config)
