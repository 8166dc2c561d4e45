"""Settings out of files and presets, checked against the dataclass of a command."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

Config = TypeVar("Config")
Preset = Literal["", "qwen3-4b"]

PRESETS: dict[str, dict[str, Any]] = {
    "": {},
    # The guide's models; a card of 16 GiB also needs evaluation_device cpu (see `elm plan`).
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


def require(config: Any, low: float, *names: str, high: float = float("inf")) -> None:
    """Raise ValueError unless each of the fields `names` of `config` lies between `low` and `high`."""
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:  # written so that NaN fails too
            raise ValueError(f"{name} is {value!r}; expected a number from {low:g} to {high:g}")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a JSON or (`.yaml`, `.yml`) YAML file.

    Raises FileNotFoundError for no such file, and ValueError, naming it, for one that is broken or holds no mapping.
    """
    text, wanted = Path(path).read_text(encoding="utf-8"), "JSON object"
    if Path(path).suffix in (".yaml", ".yml"):
        import yaml

        wanted = "mapping"
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not valid YAML: {error}") from error
    else:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected one {wanted} of settings, found {type(values).__name__}")
    return values


def preset_settings(preset: str, config: type[Any]) -> dict[str, Any]:
    """The settings of `preset` that the dataclass `config` has; ValueError for an unknown preset."""
    if preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}; there are {', '.join(filter(None, PRESETS))}")
    return {name: value for name, value in PRESETS[preset].items() if name in config.__dataclass_fields__}


def check_settings(config: type[Any], values: dict[str, Any], origin: str) -> dict[str, Any]:
    """`values` with text turned into paths and lists into tuples where the dataclass `config` has those types.

    Raises ValueError, naming `origin`, for a setting that `config` does not have or that has another type.
    """
    hints = typing.get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config)]
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"{origin}: unknown setting {', '.join(unknown)}; known are {', '.join(names)}")
    return {name: _converted(hints[name], value, f"{origin}: {name}") for name, value in values.items()}


def make_config(config: type[Config], values: dict[str, Any], origin: str = "settings") -> Config:
    """The dataclass `config` of plain values, as JSON and YAML have them.

    Raises ValueError, naming `origin`, as `check_settings` does and for a value out of range.
    """
    checked = check_settings(config, values, origin)
    try:
        return config(**checked)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def _converted(hint: Any, value: Any, where: str) -> Any:
    origin, kinds = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in kinds:
            return None
        (hint,) = (kind for kind in kinds if kind is not type(None))
        return _converted(hint, value, where)
    if origin is Literal:
        if value in kinds:
            return value
        raise ValueError(f"{where} is {value!r}; expected one of {', '.join(kinds)}")
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_converted(kinds[0], item, where) for item in value)
        raise ValueError(f"{where} is {value!r}; expected a list")
    if hint is Path:
        hint, value = (Path, Path(value)) if isinstance(value, str) else (Path, value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    if hint is float and type(value) is int:
        return value
    raise ValueError(f"{where} is {value!r}; expected {hint.__name__}")
