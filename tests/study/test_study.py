"""A study of real processes, notebooks and kernels: its files, how its trials end, how it resumes."""

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

import pandas
import psutil
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from study.studies import begun, check_ended_once, start, wait_for
from wandb_files import read_run

from elmlib.config import InputError, StudyConfig, SummaryTrainingConfig
from elmlib.study import (
    StudyFailedError,
    cells_frame,
    results,
    results_frame,
    run_study,
    submit_launchers,
    variants_frame,
)
from elmlib.study.results import default_trial, open_study, outcome_of, trials_frame
from elmlib.study.study import Launcher
from elmlib.training import train


def space_of(config: StudyConfig, spike_factor: str) -> StudyConfig:
    """`config` with a space of learning rates and this `spike_factor`, which is the fate of the stub's trials."""
    assert config.space
    config.space.write_text(f"learning_rate: {{low: 1.0e-4, high: 1.0e-2}}\nspike_factor: {spike_factor}\n")
    return config


@pytest.mark.slow
def test_run_study_resumes_and_its_best_settings_give_its_best_score(study_config: StudyConfig) -> None:
    assert len(run_study(replace(study_config, trials=1)).trials) == 1
    config = replace(study_config, trials=2)
    study = run_study(config)
    check_ended_once(study, config)
    best = study.best_trial
    folder = Path(best.user_attrs["folder"])
    names = {path.name for path in folder.iterdir()}
    assert {
        "02_train.ipynb", "result.json", "metrics.jsonl", "predictions.jsonl", "best_summary_model.safetensors",
        "curves.png", "settings.json", "samples.csv", "parameters.yaml", "trial.log",
    } <= names  # fmt: skip
    assert best.intermediate_values.keys() == {1, 2, 3, 4}
    assert not [name for name in names if "_step_" in name]
    results = json.loads((config.folder / "tiny_results.json").read_text())
    assert results["best"]["value"] == best.value and results["trials"]["finished"] == 2
    frame = pandas.read_csv(config.folder / "tiny_trials.csv")
    assert frame["number"].tolist() == [0, 1] and set(frame["outcome"]) <= {"complete", "pruned"}
    again = SummaryTrainingConfig.from_json(config.folder / "tiny_best_config.json")
    settings = SummaryTrainingConfig.from_json(folder / "settings.json")
    assert again == replace(
        settings, checkpoint_dir="data/checkpoints", resume_from="", wandb_group="", wandb_run_name=""
    )
    metrics = train(replace(again, checkpoint_dir=str(config.folder / "again"))).metrics
    for name, value in metrics.items():
        if "seconds" not in name:
            assert value == best.user_attrs[name], name


@pytest.mark.heavy
def test_run_study_samples_the_same_after_a_stop(stub_config: StudyConfig) -> None:
    whole = run_study(replace(stub_config, trials=5, startup_trials=3))
    stopped = replace(stub_config, study_name="stopped", trials=3, startup_trials=3)
    run_study(stopped)
    other = run_study(replace(stopped, trials=5))
    assert [trial.params for trial in whole.trials] == [trial.params for trial in other.trials]
    assert [trial.value for trial in whole.trials] == [trial.value for trial in other.trials]
    assert len({tuple(trial.params.values()) for trial in whole.trials}) == 5


def test_run_study_stores_how_each_trial_ended(stub_config: StudyConfig) -> None:
    config = replace(space_of(stub_config, "{choices: [3.0, 95.0, 85.0]}"), trials=3, jobs=3)
    launcher = Launcher(config)
    for number, fate in enumerate((3.0, 95.0, 85.0)):  # complete, failed, killed
        launcher.study.enqueue_trial({"learning_rate": 1e-3 * (number + 1), "spike_factor": fate})
    study = run_study(config)
    complete, failed, killed, retried = check_ended_once(study, config)
    assert (complete.state, complete.value) == (
        TrialState.COMPLETE,
        pytest.approx(50 * complete.params["learning_rate"]),
    )
    assert (failed.state, outcome_of(failed)) == (TrialState.FAIL, "failed") and failed.value is None
    assert failed.user_attrs["reason"].startswith("ValueError: no luck") and failed.user_attrs["details"]
    assert outcome_of(killed) == "killed" and "ernel" in killed.user_attrs["reason"]
    assert retried.state == TrialState.COMPLETE and retried.params == killed.params
    assert retried.user_attrs["resumed"] == 1 and retried.user_attrs["retry"] == "trial 2 again, which was killed"
    frame = trials_frame(study)
    assert frame["outcome"].tolist() == ["complete", "failed", "killed", "complete"]
    assert results_frame(study).index[0] == max((complete, retried), key=lambda trial: trial.value or 0).number


def test_run_study_stops_at_three_failures_of_one_kind(stub_config: StudyConfig) -> None:
    config = replace(space_of(stub_config, "95.0"), trials=8, jobs=3)
    with pytest.raises(StudyFailedError, match=r"3 trials failed alike: ValueError: no luck at step \d+"):
        run_study(config)
    assert 3 <= len(begun(config)) <= 5  # those that ran beside the third one end
    with pytest.raises(InputError, match="--no-resume"):
        run_study(replace(config, resume=False))
    with pytest.raises(InputError, match=r"eval_samples was 100, is 9"):
        run_study(replace(config, eval_samples=9))


def test_start_marks_impossible_settings_as_failed(stub_config: StudyConfig) -> None:
    launcher = Launcher(stub_config)
    launcher.plan = launcher.plan._replace(space={"spike_factor": FloatDistribution(0.5, 0.5)})
    trial = launcher._ask()
    assert trial
    launcher._start(trial, 0, {})
    (frozen,) = launcher.study.trials
    assert outcome_of(frozen) == "failed" and "impossible settings: spike_factor" in frozen.user_attrs["reason"]


def test_run_study_of_a_grid_trains_each_variant_at_each_seed(stub_config: StudyConfig, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("faster: {learning_rate: 3.0e-3}\n")
    folder = tmp_path / "runs {a}"
    study = run_study(replace(stub_config, grid=tmp_path / "grid.yaml", seeds=1, jobs=2, checkpoint_dir=folder))
    assert (folder / "tiny" / "study.db").is_file()
    assert cells_frame(study)[["variant", "seed"]].to_numpy().tolist() == [["defaults", 0], ["faster", 0]]
    frame = variants_frame(study)
    assert frame.difference["faster"] == pytest.approx(50 * (3e-3 - SummaryTrainingConfig().learning_rate))
    assert frame.pairs.tolist() == [0, 1] and frame.defaults_better.tolist() == [0, 0]
    assert default_trial(study) == study.trials[0]


@pytest.mark.heavy
def test_run_study_stops_when_its_time_is_up_and_resumes(stub_config: StudyConfig) -> None:
    assert stub_config.training_config
    stub_config.training_config.write_text("weight_decay: 8.0\n")
    config = replace(stub_config, trials=1)
    run_study(replace(config, timeout=7 / 3600))
    assert outcome_of(begun(config)[0]) == "timed out"
    first, again = check_ended_once(run_study(config), config)
    assert again.params == first.params and again.user_attrs["resumed"] == 1


@pytest.mark.heavy
def test_run_study_lets_trials_end_at_the_first_interrupt_and_stops_them_at_the_second(
    stub_config: StudyConfig,
) -> None:
    assert stub_config.training_config
    stub_config.training_config.write_text("weight_decay: 3.0\n")

    def interrupt(number: int, times: int) -> str:
        launcher = start(stub_config)
        wait_for(lambda: (stub_config.folder / f"trial-{number:04d}" / "adapter_step_1.safetensors").is_file())
        for _ in range(times):
            launcher.send_signal(signal.SIGINT)
            time.sleep(0.5)
        assert launcher.wait(60) == 0
        return outcome_of(begun(stub_config)[number])

    assert interrupt(0, 1) == "complete" and len(begun(stub_config)) == 1
    assert interrupt(1, 2) == "interrupted"
    trials = check_ended_once(run_study(stub_config), stub_config)
    assert trials[2].params == trials[1].params and trials[2].user_attrs["resumed"] == 1


@pytest.mark.heavy
def test_run_study_with_wandb_logs_each_trial_as_a_run_of_the_studys_group(study_config: StudyConfig) -> None:
    config = replace(study_config, trials=2, wandb=True, project="p")
    assert start(config, WANDB_MODE="offline").wait(240) == 0
    for trial in check_ended_once(open_study(config), config):
        folder = Path(trial.user_attrs["folder"])
        (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        run = read_run(log)
        assert (run.project, run.name, run.group) == ("p", f"tiny-{folder.name}", "tiny")
        assert trial.value is None or trial.user_attrs["bertscore_f1"] in [
            row.get("val/bertscore_f1") for row in run.history
        ]


@contextmanager
def dashboard(config: StudyConfig) -> Iterator[tuple[int, str]]:
    """`elm dashboard` in a process of its own: its process id and address, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--study-name", config.study_name, "--checkpoint-dir", str(config.checkpoint_dir)]
    server = subprocess.Popen([sys.executable, "-m", "elmlib.cli", "dashboard", *flags, "--port", str(port)])
    try:
        wait_for(lambda: psutil.Process(server.pid).net_connections("inet"))
        yield server.pid, f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.heavy
def test_serve_dashboard_is_for_this_machine_alone_and_shows_note_and_notebook(stub_config: StudyConfig) -> None:
    study = run_study(replace(stub_config, trials=1))
    with dashboard(stub_config) as (pid, address):
        assert {each.laddr.ip for each in psutil.Process(pid).net_connections("inet")} == {"127.0.0.1"}

        def get(path: str) -> bytes:
            with urllib.request.urlopen(address + path, timeout=10) as answer:
                return answer.read()

        (trial,) = json.loads(get(f"/api/studies/{study._study_id}?after=0"))["trials"][:1]
        note = trial["note"]["body"]
        assert "**complete**" in note and "| BERTScore F1 | " in note
        (link,) = re.findall(r"\[stub\.ipynb\]\((.+)\)", note)
        assert json.loads(get(link))["cells"]


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium (Debian: apt-get install chromium)")
def test_serve_dashboard_shows_a_trials_curves_and_summaries_in_a_browser(
    study_config: StudyConfig, tmp_path: Path
) -> None:
    study = run_study(replace(study_config, trials=1))
    (trial,) = study.trials
    picture = tmp_path / "trial.png"
    with dashboard(study_config) as (_, address):
        flags = ["--headless", "--no-sandbox", "--virtual-time-budget=20000", "--dump-dom", f"--screenshot={picture}"]
        page = f"{address}/dashboard/studies/{study._study_id}/trials?numbers=0"
        command = ["chromium", *flags, page]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    shown = re.sub("<[^>]*>", " ", dom)
    for words in (
        "Trial 0",
        "Complete",
        "best evaluation",
        "BERTScore F1",
        "shuffled",
        "samples.csv",
        "02_train.ipynb",
    ):
        assert words in shown, words
    assert f"{trial.user_attrs['bertscore_f1']:.3f}" in shown
    assert re.search(r'<img[^>]+src="/artifacts/', dom), "no picture of the curves"
    assert picture.stat().st_size > 20_000


@pytest.mark.heavy
def test_run_study_trains_and_scores_the_same_for_one_seed(study_config: StudyConfig) -> None:
    config = replace(study_config, trials=3, startup_trials=1, warmup_reports=0)
    one, other = (run_study(replace(config, study_name=name)).trials for name in ("one", "other"))
    for name in ("params", "values", "state", "intermediate_values"):
        assert [getattr(trial, name) for trial in one] == [getattr(trial, name) for trial in other], name


def test_submit_launchers_needs_postgres(stub_config: StudyConfig) -> None:
    with pytest.raises(InputError, match="PostgreSQL"):
        submit_launchers(stub_config)


@pytest.mark.heavy
def test_submit_launchers_run_the_study_together(
    stub_config: StudyConfig, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELM_STUDY_STORAGE", postgres)
    config = replace(stub_config, study_name="cluster", trials=4, jobs=2, slurm=True, slurm_cluster="local")
    assert start(config).wait(60) == 0
    wait_for(lambda: (config.folder / "cluster_results.json").is_file() and len(begun(config)) >= 4, 180)
    wait_for(lambda: all(trial.state.is_finished() for trial in open_study(config).trials))
    check_ended_once(open_study(config), config)


def test_run_study_keeps_the_score_of_a_trial_whose_note_cannot_be_written(
    stub_config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "publish", fail)
    (trial,) = run_study(replace(stub_config, trials=1)).trials
    assert trial.state == TrialState.COMPLETE and trial.value


def test_a_notebook_edited_while_a_study_runs_changes_no_trial(stub_config: StudyConfig, tmp_path: Path) -> None:
    mine = Path(shutil.copy(stub_config.notebook, tmp_path / "mine.ipynb"))
    launcher = Launcher(replace(stub_config, notebook=mine))
    before = mine.read_bytes()
    mine.write_bytes(b"edited")
    assert launcher.notebook.read_bytes() == before
