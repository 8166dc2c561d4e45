"""A trial's process runs this Python with its parameters; its callback reports, prunes and survives a full GPU."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import optuna
import pytest
import torch
from study.studies import processes

from elmlib.config import StudyConfig, SummaryTrainingConfig
from elmlib.study.study import trial_environments
from elmlib.study.trial import (
    OptunaCallback,
    TrialProcess,
    is_out_of_memory,
    make_pruner,
    run_files,
)
from elmlib.training import trainer
from elmlib.training.loggers import MetricsRow

CONFIG = SummaryTrainingConfig(batch_size=8, gradient_accumulation_steps=2)
EMPTY = {"empty_prediction_rate": 0.0, "short_prediction_rate": 0.0}
PRUNER = {"startup_trials": 1, "warmup_reports": 2}


def evaluation(epoch: float, composite: float) -> MetricsRow:
    return MetricsRow("eval", round(100 * epoch), epoch, EMPTY | {"bertscore_composite": composite})


def test_log_reports_each_evaluation_once_at_its_share_of_the_data() -> None:
    trial = optuna.create_study(direction="maximize").ask()
    callback = OptunaCallback(trial, evals_per_epoch=2, reports=4)
    for row in (evaluation(0, 0.1), evaluation(0.5, 0.2), MetricsRow("step", 60, 0.6, {}), evaluation(1, 0.3)):
        callback.log(row)
    callback.log(evaluation(1, 0.9))  # of a run that resumes from a checkpoint
    assert trial.study.trials[0].intermediate_values == {1: 0.2, 2: 0.3}
    assert callback.reason == ""


def test_log_reports_the_objective() -> None:
    trial = optuna.create_study(direction="maximize").ask()
    rates = {"empty_prediction_rate": 0.2, "short_prediction_rate": 0.5}
    OptunaCallback(trial, 1, 2).log(MetricsRow("eval", 1, 1.0, {"bertscore_composite": 0.4} | rates))
    assert trial.study.trials[0].intermediate_values[1] == pytest.approx(0.4 - 0.5 * 0.2 - 0.1 * 0.5)


def test_log_prunes_below_the_median_after_the_warmup_and_not_at_the_last_report() -> None:
    study = optuna.create_study(direction="maximize", pruner=make_pruner(PRUNER))
    first = OptunaCallback(study.ask(), evals_per_epoch=2, reports=4)
    for number in range(1, 5):
        first.log(evaluation(number / 2, 0.4))
    assert first.trial
    study.tell(first.trial, 0.4)
    worse = OptunaCallback(study.ask(), evals_per_epoch=2, reports=4)
    stopped = []
    for number in range(1, 5):
        worse.reason = ""
        worse.log(evaluation(number / 2, 0.1))
        stopped.append(bool(worse.reason))
    assert stopped == [False, True, True, False]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_train_starts_again_with_half_the_batch_and_no_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def train(config: SummaryTrainingConfig, *_: object, **__: object) -> str:
        attempts.append((config.batch_size, config.gradient_accumulation_steps, len(list(tmp_path.iterdir()))))
        if config.batch_size > 4:
            (tmp_path / "adapter_step_4.safetensors").touch()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return "trained"

    monkeypatch.setattr(trainer, "train", train)
    config = replace(CONFIG, checkpoint_dir=str(tmp_path))
    trial = optuna.create_study().ask()
    assert OptunaCallback(trial).train(config) == "trained"
    assert attempts == [(8, 2, 0), (4, 4, 0)]
    assert trial.user_attrs["memory"].startswith("starts again with 4 x 4 rows: 8 did not fit (CUDA out of memory")
    assert OptunaCallback(trial).train(config) == "trained" and attempts[2] == (4, 4, 0)  # the next attempt at it
    with pytest.raises(torch.OutOfMemoryError):
        OptunaCallback(optuna.create_study().ask()).train(replace(config, batch_size=9))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_is_out_of_memory_by_type_and_message(error: RuntimeError, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_train_outside_a_study_only_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "train", lambda config, loggers: (config, loggers))
    assert OptunaCallback.join("", CONFIG).train(CONFIG, ["x"]) == (CONFIG, ["x"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("devices", "expected"), [("2,3", ["2", "3", "2"]), ("GPU-8f, MIG-1a", ["GPU-8f", "MIG-1a", "GPU-8f"])]
)
def test_trial_environments_use_the_gpus_that_were_given(
    devices: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in trial_environments(3)] == expected
    assert trial_environments(1) == [{}]


def test_trial_environments_share_the_processors_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert trial_environments(1000) == [{"OMP_NUM_THREADS": "1"}] * 1000


def test_run_files_are_the_run_and_not_its_result(tmp_path: Path) -> None:
    names = ["adapter_step_4.safetensors", "best_summary_model.safetensors", "metrics.jsonl"]
    for name in (*names, "result.json", "settings.json", "trial.log"):
        (tmp_path / name).touch()
    assert sorted(path.name for path in run_files(tmp_path)) == names


@pytest.fixture
def trial() -> optuna.Trial:
    return optuna.create_study(study_name="s").ask()


def test_process_trains_its_parameters_in_this_python_whatever_kernels_and_folders_there_are(
    trial: optuna.Trial, stub_config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("python3", "elm"):
        folder = tmp_path / "foreign" / "kernels" / name
        folder.mkdir(parents=True)
        spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": name, "language": "python"}
        (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "foreign"))
    (scratch := tmp_path / ("t" * (76 - len(str(tmp_path)) % 70))).mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    settings = SummaryTrainingConfig(
        checkpoint_dir=str(tmp_path / "study {a}" / "t"), learning_rate=1e-5, weight_decay=0.0
    )
    process = TrialProcess(trial, stub_config.notebook, settings, {})
    process.process.wait(60)
    outcome = process.outcome()
    assert outcome
    assert (outcome.kind, outcome.reason) == ("complete", ""), (process.folder / "trial.log").read_text()
    assert outcome.metrics["bertscore_composite"] == 50 * 1e-5
    cells = nbformat.read(process.folder / "stub.ipynb", 4).cells
    assert "learning_rate = 1e-05" in next(cell.source for cell in cells if "injected" in str(cell.metadata))


def test_process_tells_a_failure_from_a_dead_kernel_and_takes_its_kernel_with_it(
    trial: optuna.Trial, stub_config: StudyConfig, tmp_path: Path
) -> None:
    def run(name: str, **changes: float) -> TrialProcess:
        settings = SummaryTrainingConfig(
            **{"weight_decay": 0.0, "checkpoint_dir": str(tmp_path / "s" / name)} | changes
        )  # type: ignore[arg-type]
        return TrialProcess(trial, stub_config.notebook, settings, {})

    failing, dying, long = run("a", spike_factor=95.0), run("b", spike_factor=85.0), run("c", weight_decay=600.0)
    for each in (failing, dying):
        each.process.wait(60)
    outcome = failing.outcome()
    assert outcome and outcome.kind == "failed" and outcome.reason.startswith("ValueError: no luck at step")
    assert "spike_factor" in outcome.details
    assert (outcome := dying.outcome()) and outcome.kind == "killed"
    while not (long.folder / "adapter_step_1.safetensors").exists():
        assert long.outcome() is None
    (kernel,) = processes(long.process)["kernel"]
    long.kill()
    assert not kernel.is_running() and not Path(f"/proc/{long.process.pid}").exists()
    assert (outcome := long.outcome()) and outcome.kind == "killed"


def test_train_after_a_lack_of_memory_ends_as_if_begun_with_half_the_batch(
    tiny_config: SummaryTrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real training: the memory runs out after the first checkpoint."""
    config = replace(tiny_config, max_epochs=1, eval_first=False, checkpoint_dir=str(tmp_path / "run"))
    real = trainer.compute_losses
    steps = iter(range(100))

    def full(components: Any, batch: Any, *rest: Any) -> Any:
        if len(batch.labels) > 4 and next(steps) == 5:
            assert (tmp_path / "run/adapter_step_4.safetensors").is_file()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(components, batch, *rest)

    monkeypatch.setattr(trainer, "compute_losses", full)
    result = OptunaCallback(optuna.create_study().ask(), config.evals_per_epoch or 1).train(config)
    half = replace(config, batch_size=4, gradient_accumulation_steps=2, checkpoint_dir=str(tmp_path / "half"))
    assert result.last.read_bytes() == trainer.train(half).last.read_bytes()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"stopped": ""}', '{"stopped": "", "bertscore_composite": null}'])
def test_a_result_of_another_form_fails_the_trial(tmp_path: Path, content: str) -> None:
    trial = TrialProcess.__new__(TrialProcess)
    trial.folder, trial.process = tmp_path, subprocess.Popen(["true"], stdin=subprocess.PIPE)
    (tmp_path / "result.json").write_text(content)
    trial.process.wait()
    outcome = trial.outcome()
    assert outcome.kind == "failed" and "result.json" in outcome.reason
