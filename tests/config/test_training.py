"""Settings are checked where they are made, and survive a round trip through JSON."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from elmlib.config import CorpusConfig, InputError, SummaryTrainingConfig


def test_json_round_trip(tmp_path: Path) -> None:
    config = SummaryTrainingConfig(learning_rate=1.5e-4, max_epochs=3, use_wandb=True, llm_model_name="Qwen/Qwen3-4B")
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert SummaryTrainingConfig.from_json(path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"learning_rat": 1}', "unknown setting learning_rat"),
        ('{"batch_size": "8"}', "batch_size is '8'; expected int"),
        ('{"batch_size": true}', "batch_size is True; expected int"),
        ('{"batch_size": 0}', "batch_size is 0; expected a number from 1"),
        ("[1]", "expected one mapping of settings"),
        ("{", "not valid JSON"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        SummaryTrainingConfig.from_json(path)
    assert "bad.json" in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": -1.0},
        {"learning_rate": math.nan},
        {"dropout_rate": 1.0},
        {"text_drift_target_similarity": 1.5},
        {"spike_factor": 1.0},
        {"eval_samples": 1},
        {"persistent_workers": True},
        {"log_level": "LOUD"},
    ],
)
def test_impossible_values_are_refused_by_name(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        SummaryTrainingConfig(**values)


def test_corpus_must_leave_something_to_train_on() -> None:
    with pytest.raises(InputError, match="leaves nothing to train on"):
        CorpusConfig(val_fraction=0.5, test_fraction=0.5)


def test_the_guides_examples_are_settings() -> None:
    """The guide's configuration, memory and speed examples, name by name."""
    SummaryTrainingConfig(
        llm_model_name="Qwen/Qwen3-4B-Instruct", embedding_dim=2560, hidden_dim=4096, summary_only=True,
        summary_data_path="data/summary_filtered", max_epochs=2, use_text_drift_loss=True, text_drift_weight=0.03,
        text_drift_target_similarity=0.75, bertscore_model="microsoft/deberta-xlarge-mnli", bertscore_batch_size=16,
        use_contrastive_loss=True, contrastive_weight=0.1, dropout_rate=0.3, residual_scale=0.5,
    )  # fmt: skip
    SummaryTrainingConfig(
        batch_size=4, gradient_accumulation_steps=8, use_bf16=True, use_gradient_checkpointing=True, max_seq_length=1024
    )
    SummaryTrainingConfig(num_workers=8, pin_memory=True, persistent_workers=True, prefetch_factor=4)


def test_identity_knows_every_field_or_leaves_it_out_on_purpose() -> None:
    """Moving data or changing the log level does not make another run; changing anything that trains does."""
    config = SummaryTrainingConfig()
    assert dataclasses.replace(config, checkpoint_dir="x", log_level="DEBUG").identity() == config.identity()
    assert dataclasses.replace(config, seed=1).identity() != config.identity()
    assert json.loads(config.to_json()).keys() >= config.identity().keys()


def test_from_dict_reads_earlier_names_with_a_warning() -> None:
    """Adapters that were saved before settings were renamed or removed load."""
    old = {"soft_token_place": "text", "warm_start_views": False, "use_teacher_kl": False, "teacher_top_k": 32}
    with pytest.warns(UserWarning, match="is now called"):
        config = SummaryTrainingConfig.from_dict(old | {"pretrain_epochs": 0, "pretrain_tokens": 32})
    assert (config.soft_token_position, config.warm_start_whitening) == ("in_prompt", False)
    with pytest.raises(InputError, match="use_teacher_kl is gone"):
        SummaryTrainingConfig.from_dict({"use_teacher_kl": True})


@pytest.mark.parametrize("changes", [{"use_bf16": "no"}, {"max_epochs": 1.5}, {"learning_rate": True}])
def test_the_constructor_refuses_another_type(changes: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(changes))):
        SummaryTrainingConfig(**changes)
