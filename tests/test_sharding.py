"""Two processes train as one does, the LLM in each or dealt out over both; only the adapter's gradients travel."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from elmlib.config import SummaryTrainingConfig
from elmlib.tracking import read_metrics
from elmlib.trainer import train

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def launch(*command: str, **environment: str) -> str:
    variables = os.environ | {"ACCELERATE_USE_CPU": "true"} | environment
    done = subprocess.run([*LAUNCH, *command], env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def two_processes(config: SummaryTrainingConfig, folder: Path, **changes: object) -> Path:
    """A settings file for the same run in another folder, each step's batches dealt out over two processes."""
    other = replace(config, checkpoint_dir=str(folder / "run"), gradient_accumulation_steps=1, **changes)
    folder.mkdir()
    (folder / "two.json").write_text(other.to_json())
    return folder / "two.json"


@pytest.fixture
def config(tiny_config: SummaryTrainingConfig) -> SummaryTrainingConfig:
    """Without dropout, which every process draws for itself."""
    return replace(tiny_config, gradient_accumulation_steps=2, dropout_rate=0.0, max_epochs=1)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", ["false", pytest.param("true", marks=pytest.mark.heavy)])
def test_two_processes_have_the_losses_of_one(config: SummaryTrainingConfig, tmp_path: Path, fsdp: str) -> None:
    train(config)
    settings = two_processes(config, tmp_path / "two")
    told = launch("-m", "elmlib", "train", "--config", str(settings), ACCELERATE_USE_FSDP=fsdp)
    assert told.count("best adapter") == 1  # one process tells
    one, two = (
        read_metrics(Path(folder) / "metrics.jsonl") for folder in (config.checkpoint_dir, tmp_path / "two/run")
    )
    assert [(row.kind, row.step) for row in one] == [(row.kind, row.step) for row in two]
    for mine, theirs in zip(one, two, strict=True):
        for name in ("loss", "nll", "contrastive", "drift", "grad_norm", "val_nll", "bertscore_f1"):
            if name in mine.values:
                assert theirs.values[name] == pytest.approx(mine.values[name], abs=1e-4), (mine.kind, mine.step, name)


@pytest.mark.heavy
def test_only_the_adapters_gradients_travel_once_a_step(config: SummaryTrainingConfig, tmp_path: Path) -> None:
    settings = two_processes(config, tmp_path / "two")
    settings.write_text(replace(SummaryTrainingConfig.from_json(settings), gradient_accumulation_steps=2).to_json())
    told = launch(str(Path(__file__).with_name("travel.py")), str(settings))
    sent, expected = next(line.split()[1:] for line in told.splitlines() if line.startswith("sent"))
    assert int(sent) == int(expected) > 0
