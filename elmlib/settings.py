"""Settings out of files and presets: what a command starts from before its flags are read."""

from pathlib import Path
from typing import Any, Literal

from elmlib.config import SummaryTrainingConfig, read_settings

Preset = Literal["", "qwen3-4b"]

PRESETS: dict[str, dict[str, Any]] = {
    "": {},
    # The guide's models; on a card of 16 GiB with evaluation_device cpu besides (see `elm plan`).
    "qwen3-4b": {
        "llm_model_name": "Qwen/Qwen3-4B-Instruct-2507",
        "embedding_model_name": "Qwen/Qwen3-Embedding-4B",
        "embedding_dim": 2560,
        "bertscore_model": "microsoft/deberta-xlarge-mnli",
        "hidden_dim": 4096,
        "batch_size": 8,
        "gradient_accumulation_steps": 4,
        "use_bf16": True,
        "max_new_tokens": 160,
        "embedding_batch_size": 128,
    },
}
"""Named sets of settings; a command takes those that it has."""


def base_config(preset: Preset = "", path: Path | None = None) -> SummaryTrainingConfig:
    """The defaults of a training run, changed by `preset` and then by the settings file at `path`.

    Raises FileNotFoundError for no such file and ValueError, naming it, for what it should not hold.
    """
    values = take(preset, SummaryTrainingConfig) | (read_settings(path) if path else {})
    return SummaryTrainingConfig.from_dict(values, origin=str(path) if path else preset)


def take(preset: str, config: type[Any]) -> dict[str, Any]:
    """The settings of `preset` that `config` has; ValueError for a preset that there is not."""
    if preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}; there are {', '.join(filter(None, PRESETS))}")
    return {name: value for name, value in PRESETS[preset].items() if name in config.__dataclass_fields__}


def as_flags(values: dict[str, Any], config: type[Any], origin: str) -> list[str]:
    """The command-line flags that say the same as `values`; ValueError for a setting that `config` does not have."""
    fields = config.__dataclass_fields__
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{origin}: unknown setting {', '.join(unknown)}; known are {', '.join(fields)}")
    flags: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return flags
