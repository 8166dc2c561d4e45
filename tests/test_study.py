"""A study of real processes, notebooks and kernels: what it leaves, how its trials end, how it goes on."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import optuna
import pandas
import psutil
import pytest
from optuna.trial import TrialState
from studies import check_ended_once, start
from wandb_files import read_run

from elmlib.config import SummaryTrainingConfig
from elmlib.results import best_settings, importance, trials_frame
from elmlib.search import begin, trial_settings
from elmlib.storage import open_storage
from elmlib.study import run_study, storage_address
from elmlib.study_commands import StudyConfig
from elmlib.tally import outcome_of, tally
from elmlib.trainer import train


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


@pytest.mark.heavy
def test_two_studies_of_one_seed_are_the_same_and_a_stop_changes_nothing(stub_config: StudyConfig) -> None:
    whole = run_study(replace(stub_config, trials=5, startup_trials=3))
    stopped = replace(stub_config, study_name="stopped", trials=3, startup_trials=3)
    run_study(stopped)
    other = run_study(replace(stopped, trials=5))
    assert [trial.params for trial in whole.trials] == [trial.params for trial in other.trials]
    assert [trial.value for trial in whole.trials] == [trial.value for trial in other.trials]
    assert len({tuple(trial.params.values()) for trial in whole.trials}) == 5


@pytest.mark.heavy
def test_a_trial_lost_before_it_had_settings_shares_its_new_ones_with_no_other(stub_config: StudyConfig) -> None:
    study, _ = begin(stub_config, storage_address(stub_config))
    while any(trial.state == TrialState.WAITING for trial in study.trials):
        study.tell(study.ask(), 0.0)
    lost = study.ask()
    config = replace(stub_config, trials=len(study.trials) + 2, startup_trials=20)
    run_study(config)
    again, *others = study.trials[lost.number + 1 :]
    assert again.system_attrs["retry_history"] == [lost.number] and len(others) == 2
    assert len({tuple(trial.params.values()) for trial in (again, *others)}) == 3


@pytest.mark.heavy
def test_two_studies_of_one_seed_train_and_score_the_same(study_config: StudyConfig) -> None:
    config = replace(study_config, trials=8, startup_trials=2, warmup_reports=1)
    one, other = (run_study(replace(config, study_name=name)).trials for name in ("one", "other"))
    for name in ("params", "values", "state", "intermediate_values"):
        assert [getattr(trial, name) for trial in one] == [getattr(trial, name) for trial in other], name
    assert {trial.state for trial in one} == {TrialState.COMPLETE, TrialState.PRUNED}


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


@pytest.mark.heavy
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


@pytest.mark.heavy
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


@pytest.mark.heavy
def test_a_study_does_not_go_on_with_other_data_or_settings(stub_config: StudyConfig) -> None:
    run_study(replace(stub_config, trials=1))
    with pytest.raises(ValueError, match=r"eval_samples was 8, is 9"):
        run_study(replace(stub_config, eval_samples=9))
    with pytest.raises(ValueError, match="--no-resume"):
        run_study(replace(stub_config, resume=False))


@pytest.mark.heavy
def test_time_that_is_up_stops_a_trial_which_the_next_run_takes_up(stub_config: StudyConfig, tmp_path: Path) -> None:
    space = tmp_path / "space.py"
    text = "def suggest(trial):\n    return {{'learning_rate': trial.suggest_float('learning_rate', 1e-4, 1e-2){}}}\n"
    space.write_text(text.format(", 'weight_decay': 60.0"))
    config = replace(stub_config, space=space, trials=1)
    study = run_study(replace(config, timeout=1e-6))
    assert not study.trials or outcome_of(study.trials[0]) == "timed out" or study.trials[0].state == TrialState.WAITING
    space.write_text(text.format(""))
    check_ended_once(run_study(config), config)


@pytest.mark.heavy
def test_the_first_interrupt_lets_a_trial_end_and_the_second_stops_it(stub_config: StudyConfig, tmp_path: Path) -> None:
    space = tmp_path / "space.py"
    text = "def suggest(trial):\n    return {{'learning_rate': trial.suggest_float('learning_rate', 1e-4, 1e-2){}}}\n"

    def interrupt(trial: int, seconds: float, times: int) -> list[optuna.trial.FrozenTrial]:
        """The trials begun, after so many Ctrl-C in the middle of that one, which takes so many seconds."""
        space.write_text(text.format(f", 'weight_decay': {seconds}"))
        study_process = start(replace(stub_config, space=space))
        give_up = time.monotonic() + 60
        while not (stub_config.folder / f"trial-{trial:04d}" / "trial.log").is_file():
            assert time.monotonic() < give_up and study_process.poll() is None
            time.sleep(0.1)
        for _ in range(times):
            study_process.send_signal(signal.SIGINT)
            time.sleep(1)
        assert study_process.wait(60) == 0
        storage = open_storage(storage_address(stub_config))
        trials = optuna.load_study(study_name=stub_config.study_name, storage=storage).trials
        return [trial for trial in trials if trial.state != TrialState.WAITING]

    (first,) = interrupt(0, 3.0, 1)
    assert first.state == TrialState.COMPLETE
    _, second = interrupt(1, 60.0, 2)
    assert (second.state, outcome_of(second)) == (TrialState.FAIL, "interrupted")
    space.write_text(text.format(""))
    trials = check_ended_once(run_study(replace(stub_config, space=space)), stub_config)
    assert trials[2].params == second.params and trials[2].state == TrialState.COMPLETE


@pytest.mark.heavy
def test_wandb_has_a_run_of_the_study_and_one_of_each_trial_in_its_group(
    stub_config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = replace(stub_config, trials=5, wandb=True, project="p")
    assert start(config).wait(240) == 0
    (log,) = config.folder.glob("wandb/offline-run-*/run-*.wandb")
    run = read_run(log)
    assert (run.project, run.name, run.group) == ("p", "tiny", "tiny")
    study = optuna.load_study(study_name="tiny", storage=open_storage(storage_address(config)))
    best = [row["study/best_so_far"] for row in run.history]
    assert best == sorted(best) and best[-1] == study.best_value
    shares = {
        name.removeprefix("importance/"): value for name, value in run.history[-1].items() if "importance" in name
    }
    assert shares == pytest.approx(importance(study)) and shares.keys() == study.best_params.keys()
    settings = trial_settings(config, study.best_params, 3)
    assert settings.use_wandb and (settings.wandb_project, settings.wandb_group) == ("p", "tiny")
    assert settings.wandb_run_name == "tiny-trial-0003"


@contextmanager
def dashboard(config: StudyConfig) -> Iterator[tuple[int, int]]:
    """`elm dashboard` in a process of its own, whose number and port these are, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--study-name", config.study_name, "--checkpoint-dir", str(config.checkpoint_dir)]
    server = subprocess.Popen([sys.executable, "-m", "elmlib", "dashboard", *flags, "--port", str(port)])
    try:
        give_up = time.monotonic() + 60
        while not psutil.Process(server.pid).net_connections("inet"):
            assert time.monotonic() < give_up and server.poll() is None
            time.sleep(0.2)
        yield server.pid, port
    finally:
        server.terminate()
        server.wait()


@pytest.mark.heavy
def test_the_dashboard_is_for_this_machine_alone_and_shows_each_trials_note_and_notebook(
    stub_config: StudyConfig,
) -> None:
    study = run_study(replace(stub_config, trials=1))
    with dashboard(stub_config) as (pid, port):
        assert {it.laddr.ip for it in psutil.Process(pid).net_connections("inet")} == {"127.0.0.1"}

        def get(path: str) -> bytes:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return answer.read()

        (trial,) = json.loads(get(f"/api/studies/{study._study_id}?after=0"))["trials"][:1]
        note = trial["note"]["body"]
        assert "**complete**" in note and "| BERTScore F1 | " in note
        (link,) = re.findall(r"\[stub\.ipynb\]\((.+)\)", note)
        assert json.loads(get(link))["cells"]
        assert [artifact["filename"] for artifact in trial["artifacts"]] == ["stub.ipynb"]


@pytest.mark.heavy
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium (Debian: apt-get install chromium)")
def test_a_browser_shows_a_trials_note_its_curves_and_its_summaries(study_config: StudyConfig, tmp_path: Path) -> None:
    (trial,) = run_study(replace(study_config, trials=1)).trials
    picture = tmp_path / "trial.png"
    with dashboard(study_config) as (_, port):
        flags = ["--headless", "--no-sandbox", "--virtual-time-budget=20000", "--dump-dom", f"--screenshot={picture}"]
        page = f"http://127.0.0.1:{port}/dashboard/studies/0/trials?numbers=0"
        dom = subprocess.run(["chromium", *flags, page], capture_output=True, text=True, timeout=120, check=True).stdout
    shown = re.sub("<[^>]*>", " ", dom)
    for text in ("Trial 0", "Complete", "best evaluation", "BERTScore F1", "shuffled", "samples.csv", "02_train.ipynb"):
        assert text in shown, text
    assert f"{trial.user_attrs['bertscore_f1']:.3f}" in shown
    assert re.search(r'<img[^>]+src="/artifacts/', dom), "no picture of the curves"
    assert picture.stat().st_size > 20_000
