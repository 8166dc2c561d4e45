"""A run learns, is the same run however often it is stopped, and says clearly why it cannot go on."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import StopAt

from elmlib.config import InputError, SummaryTrainingConfig
from elmlib.models import elm
from elmlib.models.adapter import load_adapter
from elmlib.training import checkpoint, losses, trainer
from elmlib.training.loggers import MetricsRow, read_metrics
from elmlib.training.losses import Predictions, compute_losses
from elmlib.training.setup import build_components
from elmlib.training.trainer import UnstableTrainingError, train
from elmlib.training.validation import Validation, drift_warning


def test_a_run_leaves_its_files_and_every_score_has_its_control(tiny_config: SummaryTrainingConfig) -> None:
    result = train(tiny_config)
    folder = Path(tiny_config.checkpoint_dir)
    saved = json.loads((folder / "result.json").read_text())
    for name in ("val_nll", "bertscore_f1", "bertscore_composite", "drift_similarity"):
        assert {name, f"{name}_shuffled"} <= saved.keys()
    assert saved["num_parameters_trained"] == sum(
        t.numel() for name, t in load_adapter(result.best).weights.items() if name not in ("mean", "std")
    )
    assert saved["steps"] == 24  # 96 rows in batches of 8, twice
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row.step for row in rows if row.kind == "step"] == list(range(1, 25))
    assert [row.step for row in rows if row.kind == "eval"] == [0, 6, 12, 18, 24]
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == tiny_config.eval_samples
    assert len(checkpoint.step_checkpoints(folder)) == tiny_config.keep_checkpoints


def test_training_lowers_the_loss(tiny_config: SummaryTrainingConfig) -> None:
    train(replace(tiny_config, max_epochs=4, warm_start=False, learning_rate=5e-3))
    losses = [
        r.values["nll"] for r in read_metrics(Path(tiny_config.checkpoint_dir) / "metrics.jsonl") if r.kind == "step"
    ]
    assert sum(losses[-6:]) < sum(losses[:6])


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("step", [1, 5, 14])
def test_a_stopped_run_ends_in_the_same_bytes(
    tiny_config: SummaryTrainingConfig, tmp_path: Path, step: int, accumulation: int
) -> None:
    whole = replace(
        tiny_config, gradient_accumulation_steps=accumulation, max_epochs=2 * accumulation, early_stopping_patience=6
    )
    stopped = replace(whole, checkpoint_dir=str(tmp_path / "stopped"))
    first = train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, [StopAt(step)])
    second = train(replace(stopped, resume_from="latest"))
    assert first.last.name == second.last.name
    assert first.last.read_bytes() == second.last.read_bytes()
    assert first.best.read_bytes() == second.best.read_bytes()
    logs = [read_metrics(result.last.parent / "metrics.jsonl") for result in (first, second)]
    assert logs[0] == logs[1]


def test_killed_and_resumed_ends_in_the_same_bytes(tiny_config: SummaryTrainingConfig, tmp_path: Path) -> None:
    """SIGKILL at a moment that the clock chooses, twice, in a process of its own."""
    config = replace(tiny_config, max_epochs=6, save_interval=1, early_stopping_patience=6)
    whole = train(config)
    killed = replace(config, checkpoint_dir=str(tmp_path / "killed"))
    settings = tmp_path / "settings.json"
    settings.write_text(replace(killed, resume_from="latest").to_json())
    command = [sys.executable, "-m", "elmlib.cli", "train", "--config", str(settings)]
    for wanted in (3, 30):  # kill as soon as this many steps are logged, whatever it is doing then
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        log = Path(killed.checkpoint_dir) / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not log.exists() or log.read_bytes().count(b'"kind": "step"') < wanted:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline, "the run made no progress"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    last = train(replace(killed, resume_from="latest")).last
    assert last.read_bytes() == whole.last.read_bytes()
    assert read_metrics(log) == read_metrics(whole.last.parent / "metrics.jsonl")


def test_a_new_run_moves_the_earlier_one_aside(tiny_config: SummaryTrainingConfig) -> None:
    config = replace(tiny_config, max_epochs=1)
    first = train(config).best.read_bytes()
    train(replace(config, seed=1))
    folder = Path(config.checkpoint_dir)
    assert (folder / "earlier-run-1" / checkpoint.BEST).read_bytes() == first
    assert (folder / checkpoint.BEST).read_bytes() != first


def test_resume_refuses_other_settings(tiny_config: SummaryTrainingConfig) -> None:
    config = replace(tiny_config, max_epochs=1)
    train(config)
    with pytest.raises(InputError, match=r"batch_size was 8, is 4.*start a new run"):
        train(replace(config, resume_from="latest", batch_size=4))


def test_resume_from_a_missing_file(tiny_config: SummaryTrainingConfig) -> None:
    with pytest.raises(InputError, match="adapter_step_9"):
        train(replace(tiny_config, resume_from="adapter_step_9.safetensors"))


def test_wrong_data_fails_before_a_model_is_loaded(
    tiny_config: SummaryTrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elm, "load_llm", lambda *_: pytest.fail("an LLM was loaded"))
    with pytest.raises(InputError, match="no train_synthesis"):
        train(replace(tiny_config, summary_data_path="nowhere"))
    with pytest.raises(InputError, match="pass --embedding-dim 384"):
        train(replace(tiny_config, embedding_dim=8))


def test_a_finished_run_resumed_changes_nothing(tiny_config: SummaryTrainingConfig) -> None:
    config = replace(tiny_config, max_epochs=1)
    before = train(config).last.read_bytes()
    assert train(replace(config, resume_from="latest")).last.read_bytes() == before


def test_a_killed_run_leaves_no_file_for_good(tiny_config: SummaryTrainingConfig, tmp_path: Path) -> None:
    folder, unlink = Path(tiny_config.checkpoint_dir), Path.unlink
    whole = train(replace(tiny_config, checkpoint_dir=str(tmp_path / "whole"))).last.parent

    def unlink_one(path: Path, missing_ok: bool = False) -> None:
        if "_step_" in path.name and path.suffix != ".tmp":
            patch.undo()
            unlink(path, missing_ok)
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", unlink_one)
        train(tiny_config)
    for name in [path.name for path in whole.iterdir()]:
        (folder / f".{name}.7.tmp").touch()  # what a process 7 was writing
    train(replace(tiny_config, resume_from="latest"))
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def scaled(predictions: Predictions, factor: float) -> Predictions:
    """The same predictions with another loss."""
    return predictions._replace(nll=predictions.nll * factor)


def test_a_loss_that_is_not_finite_stops_the_run(
    tiny_config: SummaryTrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = losses.predict
    monkeypatch.setattr(losses, "predict", lambda *given: scaled(real(*given), float("nan")))
    with pytest.raises(UnstableTrainingError, match=r"step 1: the loss is nan.*learning-rate"):
        train(tiny_config)


def test_a_spike_names_the_last_good_checkpoint(
    tiny_config: SummaryTrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = losses.predict, itertools.count(1)
    monkeypatch.setattr(losses, "predict", lambda *given: scaled(real(*given), 100 if next(calls) == 23 else 1))
    with pytest.raises(UnstableTrainingError, match=r"step 23: .*adapter_step_20\.safetensors"):
        train(tiny_config)


def test_early_stopping_counts_epochs_without_a_better_composite(
    tiny_config: SummaryTrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, composites = trainer.validate, iter([0.5, 0.6] + [0.4] * 100)

    def scripted(*arguments: object) -> Validation:
        result = real(*arguments)
        result.scores.metrics["bertscore_composite"] = next(composites)
        return result

    monkeypatch.setattr(trainer, "validate", scripted)
    result = train(replace(tiny_config, max_epochs=9, eval_interval=1000, early_stopping_patience=2))
    assert result.metrics["steps"] == 36  # better in epoch 1, not in 2 and 3
    assert result.metrics["best_step"] == 12


def evaluations(nlls: list[float], composites: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Script what each evaluation finds."""
    real, scripted = trainer.validate, iter(zip(nlls, composites, strict=True))

    def validate(*arguments: object) -> Validation:
        nll, composite = next(scripted)
        result = real(*arguments)
        result.scores.metrics["bertscore_composite"] = composite
        return result._replace(val_nll=nll)

    monkeypatch.setattr(trainer, "validate", validate)


def test_loss_that_improves_while_quality_falls_is_told(
    tiny_config: SummaryTrainingConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    evaluations([5.0, 4.0, 3.0, 2.0, 1.5], [0.2, 0.5, 0.4, 0.3, 0.35], monkeypatch)
    train(tiny_config)
    (told,) = [r.getMessage() for r in caplog.records if "drifting away" in r.message]
    assert "step 18" in told and "from 4.000 to 2.000" in told and "from 0.500 to 0.300" in told and "step 6" in told


def test_a_resumed_run_remembers_the_evaluations_before_the_stop(
    tiny_config: SummaryTrainingConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    evaluations([5.0, 4.0, 3.0, 2.0, 1.5], [0.2, 0.5, 0.4, 0.3, 0.35], monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config, [StopAt(17)])
    assert "drifting away" not in caplog.text
    train(replace(tiny_config, resume_from="latest"))
    assert caplog.text.count("drifting away") == 1


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([(3, 0.3), (2, 0.2), (1, 0.1)], True),
        ([(9, 0.1), (3, 0.3), (2, 0.2), (1, 0.1)], True),
        ([(3, 0.3), (2, 0.2)], False),
        ([(3, 0.3), (2, 0.2), (2, 0.1)], False),
        ([(3, 0.3), (2, 0.35), (1, 0.1)], False),
        ([(1, 0.3), (2, 0.2), (3, 0.1)], False),
    ],
)
def test_drift_warning(history: list[tuple[float, float]], expected: bool) -> None:
    assert bool(drift_warning(history)) is expected


def test_a_batch_of_one_row_is_told_once(tiny_config: SummaryTrainingConfig, caplog: pytest.LogCaptureFixture) -> None:
    config = replace(tiny_config, batch_size=1, max_epochs=1, eval_interval=1000)
    train(config)
    assert caplog.text.count("a batch of one row has no negatives") == 1
    rows = read_metrics(Path(config.checkpoint_dir) / "metrics.jsonl")
    assert {row.values["contrastive"] for row in rows if row.kind == "step"} == {0.0}


def test_a_stop_at_a_due_evaluation_loses_none(tiny_config: SummaryTrainingConfig, tmp_path: Path) -> None:
    def evaluated(folder: str) -> list[MetricsRow]:
        return [row for row in read_metrics(Path(folder) / "metrics.jsonl") if row.kind == "eval"]

    whole = train(tiny_config)
    stopped = replace(tiny_config, checkpoint_dir=str(tmp_path / "stopped"))

    class Watch:
        step = 0

        def log(self, row: MetricsRow) -> None:
            self.step = row.step

        def close(self) -> None:
            pass

    watch = Watch()
    train(stopped, [watch], stop=lambda: "by hand" if watch.step >= 6 else "")  # an evaluation is due at step 6
    assert evaluated(stopped.checkpoint_dir)[-1].step == 6
    resumed = train(replace(stopped, resume_from="latest"))
    assert evaluated(stopped.checkpoint_dir) == evaluated(tiny_config.checkpoint_dir)
    assert resumed.best.read_bytes() == whole.best.read_bytes()
    assert resumed.last.read_bytes() == whole.last.read_bytes()


def test_the_evaluation_before_the_first_step_is_no_improvement_of_epoch_1(
    tiny_config: SummaryTrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations([1.0] * 9, [0.5] + [0.4] * 8, monkeypatch)
    result = train(replace(tiny_config, max_epochs=9, eval_interval=1000, early_stopping_patience=2))
    assert result.metrics["steps"] == 24 and result.metrics["best_step"] == 0


def test_predictions_carry_their_scores(tiny_config: SummaryTrainingConfig) -> None:
    result = train(replace(tiny_config, max_epochs=1, eval_nll_samples=2))
    lines = [json.loads(line) for line in (result.best.parent / "predictions.jsonl").read_text().splitlines()]
    metrics = result.metrics
    mean = {name: sum(line[name] for line in lines) / len(lines) for name in ("bertscore_f1", "drift_similarity")}
    assert mean["bertscore_f1"] == pytest.approx(metrics["bertscore_f1"], abs=1e-6)
    assert mean["drift_similarity"] == pytest.approx(metrics["drift_similarity"], abs=1e-6)
    assert sum(line["rank"] == 1 for line in lines) / len(lines) == pytest.approx(metrics["identification_top_1"])
    pairs = np.array([[line["predicted_similarity"], line["drift_similarity"]] for line in lines])
    assert np.corrcoef(pairs.T)[0, 1] == pytest.approx(metrics["drift_correlation"], abs=1e-6)


def test_the_predicted_similarity_is_what_the_loss_sees(tiny_config: SummaryTrainingConfig) -> None:
    components = build_components(tiny_config, torch.device("cpu"))
    components.model.adapter.eval()
    found = trainer.validate(components, tiny_config, torch.device("cpu"))
    for row, similarity in list(zip(found.rows, found.predicted_similarity, strict=True))[:4]:
        alone = compute_losses(components, components.val.collate([row]), tiny_config)
        assert similarity == pytest.approx(alone["predicted_similarity"].item(), abs=1e-5)


def test_the_means_of_predictions_jsonl_are_the_figures_of_the_validation(
    tiny_config: SummaryTrainingConfig, tmp_path: Path
) -> None:
    components = build_components(tiny_config, torch.device("cpu"))
    found = trainer.validate(components, tiny_config, torch.device("cpu"))
    found.write_predictions(tmp_path / "predictions.jsonl", components.val)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == found.predictions
    values = found.values()
    for name in ("bertscore_precision", "bertscore_recall", "bertscore_f1", "drift_similarity"):
        assert sum(line[name] for line in lines) / len(lines) == pytest.approx(values[name], abs=1e-9)
    assert sum(1 / line["rank"] for line in lines) / len(lines) == pytest.approx(values["identification_mrr"])


@pytest.mark.heavy
def test_two_processes_train_as_one_with_twice_the_accumulation(
    tiny_config: SummaryTrainingConfig, tmp_path: Path
) -> None:
    """Losses are sums over counts, so how a window is spread over processes does not change the adapter."""
    one = replace(tiny_config, gradient_accumulation_steps=2, max_epochs=1, dropout_rate=0.0)
    two = replace(one, gradient_accumulation_steps=1, checkpoint_dir=str(tmp_path / "two"))
    settings = tmp_path / "two.json"
    settings.write_text(two.to_json())
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "elmlib.cli", "train"]
    on_cpu = os.environ | {"ACCELERATE_USE_CPU": "true"}
    run = subprocess.run([*launch, "--config", settings], capture_output=True, text=True, env=on_cpu, check=False)
    assert run.returncode == 0, run.stderr
    expected = load_adapter(train(one).last).weights
    found = load_adapter(Path(two.checkpoint_dir) / "adapter_step_6.safetensors").weights
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)


def test_evaluations_per_epoch_come_at_equal_shares_of_the_data(tiny_config: SummaryTrainingConfig) -> None:
    config = replace(tiny_config, evals_per_epoch=3, batch_size=4, gradient_accumulation_steps=1, eval_first=False)
    folder = train(config).best.parent  # 96 rows, so 24 steps an epoch
    evals = [row for row in read_metrics(folder / "metrics.jsonl") if row.kind == "eval"]
    assert [row.step for row in evals] == [8, 16, 24, 32, 40, 48]
    assert [row.epoch for row in evals] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(
    tiny_config: SummaryTrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = losses.predict

    def predict(*given: object) -> Predictions:
        predictions = real(*given)
        if predictions.nll.requires_grad:
            predictions.nll.register_hook(lambda gradient: gradient * float("nan"))
        return predictions

    monkeypatch.setattr(losses, "predict", predict)
    with pytest.raises(UnstableTrainingError, match=r"step 1: .*gradient"):
        train(replace(tiny_config, eval_first=False), stop=lambda: "enough")


def test_no_setting_of_accelerate_changes_a_step(
    tiny_config: SummaryTrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    for count in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", count)
        config = replace(tiny_config, eval_first=False, checkpoint_dir=str(tmp_path / count))
        train(config, stop=lambda: "enough")
        norms.append(read_metrics(tmp_path / count / "metrics.jsonl")[0].values["grad_norm"])
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    trainer.Accelerator()  # its state is shared
    assert norms[0] == norms[1]


def test_resume_refuses_another_number_of_processes(
    tiny_config: SummaryTrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Two(trainer.Accelerator):
        num_processes = property(lambda self: 2)

    train(replace(tiny_config, eval_first=False), stop=lambda: "enough")
    monkeypatch.setattr(trainer, "Accelerator", Two)
    with pytest.raises(InputError, match=r"1 process.* 2"):
        train(replace(tiny_config, eval_first=False, resume_from="latest"))


def test_persistent_workers_stay_from_epoch_to_epoch(tiny_config: SummaryTrainingConfig) -> None:
    class Workers:
        seen: ClassVar[set[int | None]] = set()

        def log(self, row: MetricsRow) -> None:
            self.seen.update(process.pid for process in multiprocessing.active_children())

        def close(self) -> None:
            pass

    train(replace(tiny_config, eval_first=False, num_workers=1, persistent_workers=True), [Workers()])
    assert len(Workers.seen) == 1
