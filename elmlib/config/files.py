"""Settings out of files and presets, checked against the dataclass of a command."""

import json
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from tyro import MISSING

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


class InputError(ValueError):
    """Bad input of a person: the message names the file, line or value, what was expected and what to do. The command
    line prints it as one line; every other error is a bug or the machine's and keeps its traceback."""


class Settings:
    """What the settings of all commands share: types are checked, and `~` before a path or name is the home folder."""

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not MISSING}  # of a flag yet to be read
        for name, value in check_settings(type(self), given, type(self).__name__).items():
            object.__setattr__(self, name, value)
            if isinstance(value, str | Path) and str(value).startswith("~"):
                try:
                    object.__setattr__(self, name, type(value)(Path(value).expanduser()))
                except RuntimeError as error:
                    raise InputError(f"{name} is {str(value)!r}; there is no such home folder") from error


def require(config: Any, low: float, *names: str, high: float = float("inf")) -> None:
    """Raise InputError unless each of the fields `names` of `config` lies between `low` and `high`."""
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:  # written so that NaN fails too
            raise InputError(f"{name} is {value!r}; expected a number from {low:g} to {high:g}")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a JSON or (`.yaml`, `.yml`) YAML file. Raises FileNotFoundError for no such file, and InputError,
    naming it, for one that is broken or holds no mapping."""
    import yaml

    path = Path(path).expanduser()
    is_yaml = path.suffix in (".yaml", ".yml")
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) if is_yaml else json.loads(text)
    # Beside its own errors YAML lets through those of int(), datetime() and a search for tags.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not valid {'YAML' if is_yaml else 'JSON'}: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"{path}: expected one mapping of settings, found {values!r:.80}")
    return values


def preset_settings(preset: str, config: type[Any]) -> dict[str, Any]:
    """The settings of `preset` that the dataclass `config` has; InputError for an unknown preset."""
    if preset not in PRESETS:
        raise InputError(f"no preset {preset!r}; there are {', '.join(filter(None, PRESETS))}")
    return {name: value for name, value in PRESETS[preset].items() if name in config.__dataclass_fields__}


def check_settings(config: type[Any], values: dict[str, Any], origin: str) -> dict[str, Any]:
    """`values` with text turned into paths and lists into tuples where the dataclass `config` has those types. Raises
    InputError, naming `origin`, for a setting that `config` does not have or that has another type."""
    hints = typing.get_type_hints(config)
    if unknown := sorted(map(str, set(values) - set(hints))):
        raise InputError(f"{origin}: unknown setting {', '.join(unknown)}; known are {', '.join(hints)}")
    checked = {}
    for name, value in values.items():
        try:
            checked[name] = msgspec.convert(value, hints[name], dec_hook=lambda kind, text: kind(text))  # of Path
        except (msgspec.ValidationError, TypeError) as error:
            wanted = getattr(hints[name], "__name__", str(hints[name]).replace("pathlib.", ""))
            if typing.get_origin(hints[name]) is Literal:
                wanted = f"one of {', '.join(typing.get_args(hints[name]))}"
            raise InputError(f"{origin}: {name} is {value!r}; expected {wanted}") from error
    return checked


def make_config(config: type[Config], values: dict[str, Any], origin: str = "settings") -> Config:
    """The dataclass `config` of plain values, as JSON and YAML have them. Raises InputError, naming `origin`, as
    `check_settings` does and for a value out of range."""
    checked = check_settings(config, values, origin)
    try:
        return config(**checked)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from error
