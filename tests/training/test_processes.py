"""Several processes: each holds its share of the LLM, all agree on every token, and a run resumes on as many."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training.test_setup import launch, two_processes

from elmlib.config import InputError, SummaryTrainingConfig
from elmlib.training import trainer, validation
from elmlib.training.setup import build_components
from elmlib.training.trainer import train

heavy = pytest.mark.heavy
LONGEST_EVALUATION = 3600.0  # seconds that the other processes may wait for the first


@pytest.fixture
def config(tiny_config: SummaryTrainingConfig) -> SummaryTrainingConfig:
    """Half an epoch, which ends in an evaluation."""
    return replace(tiny_config, max_epochs=1, train_rows=48, eval_first=False)


def watch(config: SummaryTrainingConfig, folder: Path, *mode: str) -> list[dict[str, Any]]:
    """What each of two processes found in a run on a sharded LLM."""
    settings = two_processes(config, folder)
    script = Path(__file__).with_name("watched_run.py")
    launch(str(script), str(settings), str(folder / "found-{rank}.json"), *mode, ACCELERATE_USE_FSDP="true")
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def watched(tiny_llm: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    from conftest import tiny_settings

    folder = tmp_path_factory.mktemp("watched")
    config = replace(tiny_settings(tiny_llm, small_data, folder), max_epochs=1, train_rows=48, eval_first=False)
    return watch(config, folder / "two")


@heavy
def test_a_process_never_holds_more_of_the_layers_than_its_share_and_one_layer(watched: list[dict[str, Any]]) -> None:
    for found in watched:
        assert max(found["during"]) <= found["share"] + found["layer"], found
        assert set(found["between"]) == {found["share"]}, "the losses are computed while layers are whole"


@heavy
def test_processes_wait_longer_than_an_evaluation_takes(watched: list[dict[str, Any]]) -> None:
    assert all(found["timeout"] >= LONGEST_EVALUATION for found in watched)


@heavy
def test_processes_that_draw_other_tokens_do_not_hang(config: SummaryTrainingConfig, tmp_path: Path) -> None:
    watch(config, tmp_path / "two", "disagree")
    lines = (tmp_path / "two/run/predictions.jsonl").read_text().splitlines()
    assert any(json.loads(line)["prediction"] for line in lines)


@heavy
def test_two_processes_resume_to_the_same_bytes_with_dropout(config: SummaryTrainingConfig, tmp_path: Path) -> None:
    command = ("-m", "elmlib.cli", "train", "--config")
    config = replace(config, train_rows=96, dropout_rate=0.3, save_interval=3, keep_checkpoints=9)
    launch(*command, str(two_processes(config, tmp_path / "whole")))
    half = tmp_path / "whole/run/adapter_step_3.safetensors"
    launch(*command, str(two_processes(config, tmp_path / "resumed", resume_from=str(half))))
    whole, resumed = (tmp_path / name / "run/adapter_step_6.safetensors" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()


@heavy
def test_a_run_refuses_to_resume_on_another_number_of_processes(config: SummaryTrainingConfig, tmp_path: Path) -> None:
    config = replace(config, gradient_accumulation_steps=1, save_interval=2, keep_checkpoints=9)
    launch("-m", "elmlib.cli", "train", "--config", str(two_processes(config, tmp_path / "two")))
    saved = tmp_path / "two/run/adapter_step_2.safetensors"
    with pytest.raises(InputError, match="2 processes"):
        train(replace(config, resume_from=str(saved)))


def test_an_evaluation_decodes_in_batches(tiny_config: SummaryTrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "DECODED", 5)
    components = build_components(tiny_config, torch.device("cpu"))
    sizes, generate = [], components.model.generate
    monkeypatch.setattr(
        components.model, "generate", lambda batch, n: sizes.append(len(batch[0])) or generate(batch, n)
    )
    found = trainer.validate(components, tiny_config, torch.device("cpu"))
    assert sum(sizes) == len(found.predictions) == tiny_config.eval_samples and max(sizes) <= 5
