"""Every row is seen once an epoch, however many processes share it; several processes train as one does."""

import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elmlib.config import InputError, SummaryTrainingConfig
from elmlib.data.dataset import SummaryDataset
from elmlib.data.records import EmbeddingFile, write_embeddings
from elmlib.training.loggers import read_metrics
from elmlib.training.setup import accumulation_groups, build_components, learning_rate
from elmlib.training.trainer import train

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.fixture
def dataset(tiny_config: SummaryTrainingConfig) -> SummaryDataset:
    return build_components(tiny_config, torch.device("cpu")).train


def test_each_row_is_seen_once_an_epoch(dataset: SummaryDataset, tiny_config: SummaryTrainingConfig) -> None:
    for accumulation in (1, 3, 5):
        groups = accumulation_groups(dataset, replace(tiny_config, gradient_accumulation_steps=accumulation), 0)
        rows = [row for group in groups for batch in group for row in batch]
        assert sorted(rows) == list(range(96))
        assert all(len(group) == accumulation for group in groups[:-1])


def test_processes_share_what_one_would_accumulate(dataset: SummaryDataset, tiny_config: SummaryTrainingConfig) -> None:
    alone = accumulation_groups(dataset, replace(tiny_config, gradient_accumulation_steps=3), 1)
    shared = [accumulation_groups(dataset, tiny_config, 1, process, 3) for process in range(3)]
    assert [[batch for (batch,) in group] for group in zip(*shared, strict=True)] == alone
    assert accumulation_groups(dataset, tiny_config, 1) != accumulation_groups(dataset, tiny_config, 2)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = SummaryTrainingConfig(learning_rate=1.0, warmup_fraction=0.1)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[100] == pytest.approx(0.0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize("whitening", [True, False])
def test_build_components_starts_soft_tokens_at_maps_of_their_own_or_equal(
    tiny_config: SummaryTrainingConfig, whitening: bool
) -> None:
    config = replace(tiny_config, warm_start_whitening=whitening, num_soft_tokens=3, dropout_rate=0.0)
    components = build_components(config, torch.device("cpu"))
    with torch.no_grad():
        first, *others = components.model.adapter(components.train.vectors([0, 1])).unbind(1)
    assert all(torch.allclose(first, other, atol=1e-5) is not whitening for other in others)


def test_build_components_gives_the_model_every_setting(tiny_config: SummaryTrainingConfig) -> None:
    """A published ablation once trained the defaults under the name of another soft-token position."""
    default, other = (
        build_components(replace(tiny_config, **changes), torch.device("cpu"))
        for changes in ({}, {"soft_token_position": "in_prompt", "use_gradient_checkpointing": True})
    )
    assert (default.model.position, other.model.position) == ("before_answer", "in_prompt")
    assert other.model.llm.is_activation_checkpointing and not default.model.llm.is_activation_checkpointing
    batch = default.train.collate([0, 1])
    with torch.no_grad():
        hidden = [components.model(batch)[1] for components in (default, other)]
    assert not torch.allclose(*hidden, atol=1e-3)


def launch(*command: str, **environment: str) -> str:
    variables = os.environ | {"ACCELERATE_USE_CPU": "true"} | environment
    done = subprocess.run([*LAUNCH, *command], env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def two_processes(config: SummaryTrainingConfig, folder: Path, **changes: object) -> Path:
    """A settings file for the same run in another folder, each step's batches shared by two processes."""
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
def test_train_in_two_processes_has_the_losses_of_one(config: SummaryTrainingConfig, tmp_path: Path, fsdp: str) -> None:
    train(config)
    settings = two_processes(config, tmp_path / "two")
    output = launch("-m", "elmlib.cli", "train", "--config", str(settings), ACCELERATE_USE_FSDP=fsdp)
    assert output.count("best adapter") == 1  # one process prints
    one, two = (
        read_metrics(Path(folder) / "metrics.jsonl") for folder in (config.checkpoint_dir, tmp_path / "two/run")
    )
    assert [(row.kind, row.step) for row in one] == [(row.kind, row.step) for row in two]
    for mine, theirs in zip(one, two, strict=True):
        for name in ("loss", "nll", "contrastive", "drift", "grad_norm", "val_nll", "bertscore_f1"):
            if name in mine.values:
                assert theirs.values[name] == pytest.approx(mine.values[name], abs=1e-4), (mine.kind, mine.step, name)


@pytest.mark.heavy
def test_share_adapter_sends_only_its_gradients_once_a_step(config: SummaryTrainingConfig, tmp_path: Path) -> None:
    settings = two_processes(config, tmp_path / "two")
    settings.write_text(replace(SummaryTrainingConfig.from_json(settings), gradient_accumulation_steps=2).to_json())
    output = launch(str(Path(__file__).with_name("count_sent.py")), str(settings))
    sent, expected = next(line.split()[1:] for line in output.splitlines() if line.startswith("sent"))
    assert int(sent) == int(expected) > 0


def test_train_refuses_vectors_of_another_embedder(config: SummaryTrainingConfig, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(config.summary_data_path, tmp_path / "data"))
    path = folder / "embeddings/train_embeddings.safetensors"
    with EmbeddingFile(path) as file:
        rows = file.rows(0, file.num_rows)
    write_embeddings(path, rows.shape, [rows.tobytes()], metadata={"embedding_model": "other/model"})
    with pytest.raises(InputError, match=r"other/model.*all-minilm"):
        build_components(replace(config, summary_data_path=str(folder)), torch.device("cpu"))
