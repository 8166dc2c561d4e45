"""A run learns, is the same run however often it is stopped, and says clearly why it cannot go on."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elmlib import checkpoint, trainer
from elmlib.config import SummaryTrainingConfig
from elmlib.losses import Predictions
from elmlib.tracking import Row, read_metrics
from elmlib.trainer import UnstableTrainingError, learning_rate, train


class StopAt:
    """A tracker that fails at a step, as a crash would."""

    def __init__(self, step: int):
        self.step = step

    def log(self, row: Row) -> None:
        if row.kind == "step" and row.step == self.step:
            raise KeyboardInterrupt

    def close(self) -> None:
        pass


def test_a_run_leaves_its_files_and_every_score_has_its_control(tiny_config: SummaryTrainingConfig) -> None:
    result = train(tiny_config)
    folder = Path(tiny_config.checkpoint_dir)
    saved = json.loads((folder / "result.json").read_text())
    for name in ("val_nll", "bertscore_f1", "bertscore_composite", "drift_similarity"):
        assert {name, f"{name}_shuffled"} <= saved.keys()
    assert saved["num_parameters_trained"] == sum(
        t.numel() for name, t in checkpoint.load_adapter(result.best).weights.items() if name not in ("mean", "std")
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
    whole = replace(tiny_config, gradient_accumulation_steps=accumulation, max_epochs=2 * accumulation)
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
    with pytest.raises(ValueError, match=r"batch_size was 8, is 4.*start a new run"):
        train(replace(config, resume_from="latest", batch_size=4))


def test_resume_from_a_missing_file(tiny_config: SummaryTrainingConfig) -> None:
    with pytest.raises(FileNotFoundError, match="adapter_step_9"):
        train(replace(tiny_config, resume_from="adapter_step_9.safetensors"))


def test_a_finished_run_resumed_changes_nothing(tiny_config: SummaryTrainingConfig) -> None:
    config = replace(tiny_config, max_epochs=1)
    before = train(config).last.read_bytes()
    assert train(replace(config, resume_from="latest")).last.read_bytes() == before


def scaled(predictions: Predictions, factor: float) -> Predictions:
    """The same predictions with another loss."""
    return predictions._replace(nll=predictions.nll * factor)


def test_a_loss_that_is_not_finite_stops_the_run(
    tiny_config: SummaryTrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trainer.predict
    monkeypatch.setattr(trainer, "predict", lambda *given: scaled(real(*given), float("nan")))
    with pytest.raises(UnstableTrainingError, match=r"step 1: the loss is nan.*learning-rate"):
        train(tiny_config)


def test_a_spike_names_the_last_good_checkpoint(
    tiny_config: SummaryTrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = trainer.predict, itertools.count(1)
    monkeypatch.setattr(trainer, "predict", lambda *given: scaled(real(*given), 100 if next(calls) == 23 else 1))
    with pytest.raises(UnstableTrainingError, match=r"step 23: .*adapter_step_20\.safetensors"):
        train(tiny_config)


def test_early_stopping_counts_epochs_without_a_better_composite(
    tiny_config: SummaryTrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, composites = trainer.validate, iter([0.5, 0.6] + [0.4] * 100)

    def scripted(*arguments: object) -> trainer.Validation:
        result = real(*arguments)
        result.scores.metrics["bertscore_composite"] = next(composites)
        return result

    monkeypatch.setattr(trainer, "validate", scripted)
    result = train(replace(tiny_config, max_epochs=9, eval_interval=1000, early_stopping_patience=2))
    assert result.metrics["steps"] == 36  # better in epoch 1, not in 2 and 3
    assert result.metrics["best_step"] == 12


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = SummaryTrainingConfig(learning_rate=1.0, warmup_fraction=0.1)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[100] == pytest.approx(0.0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.slow
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
    expected = checkpoint.load_adapter(train(one).last).weights
    found = checkpoint.load_adapter(Path(two.checkpoint_dir) / "adapter_step_6.safetensors").weights
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
