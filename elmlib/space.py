"""What a study searches: one function of `suggest_*` calls, or a space of your own in a YAML or Python file."""

import dataclasses
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from optuna.trial import BaseTrial, FixedTrial

from elmlib.config import SummaryTrainingConfig

Settings = dict[str, Any]
Space = Callable[[BaseTrial], Settings]
"""Suggests the settings of one trial, by the names of `SummaryTrainingConfig`."""

GUIDE_BEST: Settings = {
    "learning_rate": 1.5e-4,
    "hidden_dim": 4096,
    "batch_size": 8,
    "gradient_accumulation_steps": 4,
    "dropout_rate": 0.12,
    "residual_scale": 0.15,
    "contrastive_weight": 0.008,
    "text_drift_weight": 0.045,
    "text_drift_target_similarity": 0.78,
}
"""The guide's typical best configuration."""


def suggest(trial: BaseTrial) -> Settings:
    """The guide's search space, range by range."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 5e-3, log=True),
        "hidden_dim": trial.suggest_categorical("hidden_dim", [2048, 4096, 6144]),
        "dropout_rate": trial.suggest_float("dropout_rate", 0.0, 0.3),
        "residual_scale": trial.suggest_float("residual_scale", 0.05, 0.5),
        "contrastive_weight": trial.suggest_float("contrastive_weight", 0.0, 0.1),
        "text_drift_weight": trial.suggest_float("text_drift_weight", 0.01, 0.1),
        "text_drift_target_similarity": trial.suggest_float("text_drift_target_similarity", 0.7, 0.9),
        "batch_size": trial.suggest_categorical("batch_size", [4, 8, 16]),
        "gradient_accumulation_steps": trial.suggest_categorical("gradient_accumulation_steps", [2, 4, 8]),
    }


def load_space(path: Path | None) -> Space:
    """The guide's space, or that of a YAML or Python file.

    A Python file defines `suggest(trial)`, as above. In YAML each setting is a list of `choices`, a range `low` and
    `high` (with `log: true` or a `step` where wanted), or one value, which is then not searched.
    Raises FileNotFoundError, and ValueError that names file and setting.
    """
    if path is None:
        return suggest
    if not path.is_file():
        raise FileNotFoundError(f"no search space {path}; give a YAML or Python file, or leave --space out")
    if path.suffix == ".py":
        found = runpy.run_path(str(path)).get("suggest")
        if not callable(found):
            raise ValueError(f"{path} defines no function suggest(trial); expected one that returns settings")
        return found
    import yaml

    try:
        ranges = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(ranges, dict) or not ranges:
        raise ValueError(f"{path}: expected settings and their ranges, found {type(ranges).__name__}")
    types = {field.name: type(field.default) for field in dataclasses.fields(SummaryTrainingConfig)}
    for name, spec in ranges.items():
        _check_range(name, spec, types, str(path))
    return lambda trial: {name: _suggest_one(trial, name, spec, types[name]) for name, spec in ranges.items()}


def _check_range(name: str, spec: Any, types: dict[str, type], origin: str) -> None:
    if name not in types:
        raise ValueError(f"{origin}: unknown setting {name!r}; known are {', '.join(types)}")
    if not isinstance(spec, dict):
        SummaryTrainingConfig.from_dict({name: spec}, origin=origin)
        return
    if set(spec) == {"choices"}:
        if not isinstance(spec["choices"], list) or not spec["choices"]:
            raise ValueError(f"{origin}: {name}: choices is {spec['choices']!r}; expected a list of values")
        for value in spec["choices"]:
            SummaryTrainingConfig.from_dict({name: value}, origin=origin)
        return
    if not {"low", "high"} <= set(spec) <= {"low", "high", "log", "step"} or types[name] not in (int, float):
        raise ValueError(
            f"{origin}: {name} is {spec!r}; expected a value, `choices`, or for a number `low` and `high` "
            "with `log` or `step`"
        )
    for end in ("low", "high"):
        SummaryTrainingConfig.from_dict({name: spec[end]}, origin=origin)
    if spec["low"] > spec["high"]:
        raise ValueError(f"{origin}: {name}: low {spec['low']} is above high {spec['high']}")


def _suggest_one(trial: BaseTrial, name: str, spec: Any, kind: type) -> Any:
    if not isinstance(spec, dict):
        return spec
    if "choices" in spec:
        return trial.suggest_categorical(name, spec["choices"])
    return (trial.suggest_int if kind is int else trial.suggest_float)(name, **spec)


class FirstTrial(NamedTuple):
    """A trial that a study begins with, before anything is searched."""

    origin: str
    params: Settings


def first_trials(space: Space, base: SummaryTrainingConfig) -> tuple[FirstTrial, ...]:
    """The guide's typical best and the defaults (`base`), each where `space` admits it.

    The guide's space knows no accumulation of 1: the defaults' step of one batch becomes one of two half batches.
    """
    defaults = {name: getattr(base, name) for name in GUIDE_BEST}
    origin = "defaults"
    if defaults["gradient_accumulation_steps"] == 1 and defaults["batch_size"] % 2 == 0:
        defaults |= {"batch_size": defaults["batch_size"] // 2, "gradient_accumulation_steps": 2}
        origin = f"defaults, a step's {base.batch_size} rows in two batches"
    asked = (FirstTrial("guide's typical best", GUIDE_BEST), FirstTrial(origin, defaults))
    admitted = (FirstTrial(first.origin, params) for first in asked if (params := _admitted(space, first.params)))
    return tuple(admitted)


def _admitted(space: Space, params: Settings) -> Settings:
    """Those of `params` that `space` asks for; none where one lies outside its range or is missing."""
    trial = FixedTrial(params)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Optuna only warns of a value outside its range
            space(trial)
    except (ValueError, UserWarning):
        return {}
    return trial.params
