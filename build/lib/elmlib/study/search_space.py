"""What a study trains: the guide's search space, another one from a file, or a grid of variants, on common settings."""

import hashlib
import json
import runpy
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.trial import BaseTrial, FixedTrial

from elmlib.config import StudyConfig, SummaryTrainingConfig, base_config, read_settings
from elmlib.data.records import file_digest, find_split

Settings = dict[str, Any]

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

DEFAULTS = "defaults"
"""The trial, or the variant of a grid, with no setting changed."""

_PROBES = 20  # trials that are sampled from a Python space to check it


class Space(NamedTuple):
    """A checked search space."""

    suggest: Callable[[BaseTrial], Settings]
    """Suggests the settings of one trial, by the names of `SummaryTrainingConfig`."""
    ranges: Settings
    """Setting -> its distribution as Optuna's JSON, or its fixed value."""


class FirstTrial(NamedTuple):
    """A trial that is enqueued, before or in the place of a search."""

    params: Settings
    attributes: Settings
    """Attributes of the trial: `origin`, and in a grid `variant`, `changes` and `seed`."""


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
    `high` (with `log: true` or a `step`), or one value, which is then not searched.
    Raises FileNotFoundError, and ValueError that names file and setting.
    """
    if path is None:
        return _probed(suggest, "the guide's space")
    if not path.is_file():
        raise FileNotFoundError(f"no search space {path}; give a YAML or Python file, or leave --space out")
    if path.suffix == ".py":
        function = runpy.run_path(str(path)).get("suggest")
        if not callable(function):
            raise ValueError(f"{path} defines no function suggest(trial); expected one that returns settings")
        return _probed(function, str(path))
    specs = read_settings(path)
    if not specs:
        raise ValueError(f"{path}: expected settings and their ranges, found none")
    ranges = {name: _read_range(name, spec, str(path)) for name, spec in specs.items()}

    def sample(trial: BaseTrial) -> Settings:
        return {name: _suggest_one(trial, name, value) for name, value in ranges.items()}

    return Space(sample, {name: _to_plain(value) for name, value in ranges.items()})


def _probed(function: Callable[[BaseTrial], Settings], origin: str) -> Space:
    """`function` as a space, after sampling from it in memory; ValueError where it returns unusable settings."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    optuna.logging.set_verbosity(verbosity)
    ranges: Settings = {}
    for _ in range(_PROBES):
        trial = study.ask()
        try:
            settings = function(trial)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error
        _check(settings, origin)
        ranges |= {name: _to_plain(value) for name, value in trial.distributions.items()}
    return Space(function, ranges)


def _check(settings: Any, origin: str) -> None:
    if not isinstance(settings, dict):
        raise ValueError(f"{origin}: settings are {type(settings).__name__}; expected a dict of names and values")
    if owned := sorted(_OWNED.keys() & settings.keys() - {"seed"}):
        raise ValueError(f"{origin}: {', '.join(owned)} cannot be searched: the study sets it")
    SummaryTrainingConfig.from_dict(settings, origin=origin)


def _read_range(name: str, spec: Any, origin: str) -> Any:
    """The distribution of one setting of a YAML space, or its fixed value; ValueError names file and setting."""
    kinds = {field.name: type(field.default) for field in fields(SummaryTrainingConfig)}
    if not isinstance(spec, dict):
        _check({name: spec}, origin)
        return spec
    numeric = kinds.get(name, int) in (int, float) and {"low", "high"} <= set(spec) <= {"low", "high", "log", "step"}
    if set(spec) != {"choices"} and not numeric:
        raise ValueError(
            f"{origin}: {name} is {spec!r}; expected a value, `choices`, or for a number `low` and `high` "
            "with `log` or `step`"
        )
    values = spec["choices"] if "choices" in spec else [spec["low"], spec["high"]]
    if not isinstance(values, list) or not values:
        raise ValueError(f"{origin}: {name}: choices is {values!r}; expected a list of values")
    for value in values:
        _check({name: value}, origin)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Optuna warns where a step does not divide the range, and changes the range
            if "choices" in spec:
                return CategoricalDistribution(values)
            return (IntDistribution if kinds[name] is int else FloatDistribution)(**spec)
    except (ValueError, TypeError, UserWarning) as error:
        raise ValueError(f"{origin}: {name} is {spec!r}: {error}") from error


def _suggest_one(trial: BaseTrial, name: str, value: Any) -> Any:
    if isinstance(value, CategoricalDistribution):
        return trial.suggest_categorical(name, value.choices)
    if isinstance(value, IntDistribution):
        return trial.suggest_int(name, value.low, value.high, step=value.step, log=value.log)
    if isinstance(value, FloatDistribution):
        return trial.suggest_float(name, value.low, value.high, step=value.step, log=value.log)
    return value


def _to_plain(value: Any) -> Any:
    return json.loads(distribution_to_json(value)) if isinstance(value, BaseDistribution) else value


def first_trials(space: Space, base: SummaryTrainingConfig) -> tuple[FirstTrial, ...]:
    """The guide's typical best and the defaults (`base`), each where `space` allows it.

    The guide's space has no accumulation of 1: the defaults' step of one batch becomes one of two half batches.
    """
    defaults = {name: getattr(base, name) for name in GUIDE_BEST}
    origin = DEFAULTS
    if defaults["gradient_accumulation_steps"] == 1 and defaults["batch_size"] % 2 == 0:
        defaults |= {"batch_size": defaults["batch_size"] // 2, "gradient_accumulation_steps": 2}
        origin = f"{DEFAULTS}, {base.batch_size} rows a step in two batches"
    candidates = {"guide's typical best": GUIDE_BEST, origin: defaults}
    allowed = {name: _allowed(space, params) for name, params in candidates.items()}
    return tuple(FirstTrial(params, {"origin": name}) for name, params in allowed.items() if params)


def _allowed(space: Space, params: Settings) -> Settings:
    """Those of `params` that `space` asks for; none where one is outside its range or is missing."""
    trial = FixedTrial(params)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Optuna only warns of a value outside its range
            space.suggest(trial)
    except (ValueError, UserWarning):
        return {}
    return trial.params


def load_grid(path: Path, seeds: int) -> tuple[FirstTrial, ...]:
    """The trials of an ablation: each variant of a YAML file at each seed, one seed of all variants before the next.

    The file maps a variant's name to the training settings that it changes; `defaults: {}` is always the first.
    Raises FileNotFoundError, and ValueError that names file and variant.
    """
    values = read_settings(path)
    variants: Settings = {DEFAULTS: {}} | values.get("variants", values)
    for name, changes in variants.items():
        _check(changes, f"{path}: {name}")
        if "seed" in changes or (name == DEFAULTS and changes):
            raise ValueError(f"{path}: {name} is {changes!r}; expected no seed, and no change of {DEFAULTS}")
    return tuple(
        FirstTrial({}, {"origin": f"{name}, seed {seed}", "variant": name, "changes": changes, "seed": seed})
        for seed in range(seeds)
        for name, changes in variants.items()
    )


def grid_settings(trial: BaseTrial) -> Settings:
    """The settings of a trial of a grid, in the place of a space's `suggest`."""
    return trial.user_attrs["changes"] | {"seed": trial.user_attrs["seed"]}


_OWNED = {
    "summary_data_path": "--data-dir",
    "checkpoint_dir": "--checkpoint-dir",
    "resume_from": "nothing: a trial resumes by itself",
    "seed": "--seed",
    "eval_samples": "--eval-samples",
    "evals_per_epoch": "--evals-per-epoch",
    "use_wandb": "--wandb",
    "wandb_project": "--project",
    "wandb_group": "--study-name",
    "wandb_run_name": "--study-name",
}
"""Training setting that the study sets -> what sets it."""


def base_settings(config: StudyConfig) -> SummaryTrainingConfig:
    """The training settings that all trials have in common: the defaults, the preset's, those of `training_config`.

    Raises ValueError for a setting in `training_config` that the study sets itself, and as `base_config` does.
    """
    base = base_config(config.preset, config.training_config)
    named = read_settings(config.training_config) if config.training_config else {}
    own: Settings = {
        "summary_data_path": config.data_dir,
        "resume_from": "latest",
        "seed": config.seed,
        "eval_samples": config.eval_samples,
        "evals_per_epoch": config.evals_per_epoch,
        "use_wandb": config.wandb,
        "wandb_project": config.project,
        "wandb_group": config.study_name,
    }
    plain = SummaryTrainingConfig()
    for name, instead in _OWNED.items():
        if name in named and named[name] not in (own.get(name), getattr(plain, name)):
            raise ValueError(f"{config.training_config}: {name} is set by the study; remove it and use {instead}")
    if config.wandb:
        _check_wandb()
    if "eval_first" not in named:
        own["eval_first"] = False
    if "early_stopping_patience" not in named:
        own["early_stopping_patience"] = base.max_epochs  # trials are compared at equal lengths: the pruner stops them
    return replace(base, **own)


def _check_wandb() -> None:
    """Raise ValueError if wandb would ask for a key: no trial could answer."""
    import wandb

    settings = wandb.setup().settings
    if settings.mode not in ("offline", "disabled") and not wandb.api.api_key:
        raise ValueError("--wandb needs an account: run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline")


class StudyPlan(NamedTuple):
    """All that a study's launchers have in common, read once: an edit of a file does not change a study that runs."""

    base: SummaryTrainingConfig
    first: tuple[FirstTrial, ...]
    suggest: Callable[[BaseTrial], Settings]
    target: int
    """Trials that the study is to finish."""
    contract: Settings
    """What makes the scores of two trials comparable: settings, data, notebook and search space, as plain values."""


def plan_study(config: StudyConfig) -> StudyPlan:
    """Read and check everything that a study needs; raises FileNotFoundError or ValueError for what does not fit."""
    base = base_settings(config)
    if not config.notebook.is_file():
        raise FileNotFoundError(f"no notebook {config.notebook}; run this in the repository's folder, or --notebook")
    if config.grid:
        first = load_grid(config.grid, config.seeds)
        ranges = {trial.attributes["variant"]: trial.attributes["changes"] for trial in first}
        return StudyPlan(base, first, grid_settings, len(first), _contract(config, base, ranges))
    space = load_space(config.space)
    contract = _contract(config, base, space.ranges)
    return StudyPlan(base, first_trials(space, base), space.suggest, config.trials, contract)


def _contract(config: StudyConfig, base: SummaryTrainingConfig, ranges: Settings) -> Settings:
    files = [path for split in ("train", "val") for path in find_split(Path(config.data_dir), split)]
    cells = json.loads(config.notebook.read_text(encoding="utf-8"))["cells"]
    sources = json.dumps(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])
    contract = base.identity() | {
        "data": hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()[:16],
        "notebook": hashlib.sha256(sources.encode()).hexdigest()[:16],
    }
    return json.loads(json.dumps(contract | {f"space: {name}": value for name, value in ranges.items()}))


def check_contract(study_name: str, before: Settings | None, now: Settings) -> None:
    """Raise ValueError, naming the differences, unless a study that was begun as `before` is resumed as it was."""
    if before is None:
        return
    names = dict.fromkeys([*before, *now])
    differences = [f"{n} was {before.get(n)!r}, is {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]
    if differences:
        raise ValueError(
            f"study {study_name!r} was begun with other settings: {'; '.join(differences)}. Scores would not compare: "
            "use the same settings, or another --study-name"
        )
