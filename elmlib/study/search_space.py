"""What a study trains: a search space or a grid of variants, on settings that all trials have in common."""

import hashlib
import json
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from elmlib.config import InputError, StudyConfig, SummaryTrainingConfig, base_config, make_config, read_settings
from elmlib.data.records import file_digest, find_split

Settings = dict[str, Any]
Space = dict[str, BaseDistribution]

GUIDE_SPACE: Space = {
    "learning_rate": FloatDistribution(1e-5, 5e-3, log=True),
    "hidden_dim": CategoricalDistribution([2048, 4096, 6144]),
    "dropout_rate": FloatDistribution(0.0, 0.3),
    "residual_scale": FloatDistribution(0.05, 0.5),
    "contrastive_weight": FloatDistribution(0.0, 0.1),
    "text_drift_weight": FloatDistribution(0.01, 0.1),
    "text_drift_target_similarity": FloatDistribution(0.7, 0.9),
    "batch_size": CategoricalDistribution([4, 8, 16]),
    "gradient_accumulation_steps": CategoricalDistribution([2, 4, 8]),
}
"""The guide's search space."""

GUIDE_BEST: Settings = {
    "learning_rate": 1.5e-4,
    "hidden_dim": 4096,
    "dropout_rate": 0.12,
    "residual_scale": 0.15,
    "contrastive_weight": 0.008,
    "text_drift_weight": 0.045,
    "text_drift_target_similarity": 0.78,
    "batch_size": 8,
    "gradient_accumulation_steps": 4,
}
"""The guide's typical best configuration."""

DEFAULTS = "defaults"  # the trial, or the variant of a grid, with no setting changed


class StudyPlan(NamedTuple):
    """All that a study's launchers have in common, read once: an edit of a file does not change a study that runs."""

    base: SummaryTrainingConfig
    space: Space  # empty for a grid
    first: list[FrozenTrial]  # waiting trials that come before those of the sampler
    target: int  # trials that the study is to finish
    contract: Settings  # what makes the scores of two trials comparable, as plain values


def plan_study(config: StudyConfig) -> StudyPlan:
    """Read and check everything that a study needs; raises InputError for what does not fit."""
    base, space = base_settings(config), Space()
    if config.grid:
        first = load_grid(config.grid, config.seeds)
        ranges = {t.user_attrs["variant"]: t.user_attrs["changes"] for t in first if t.user_attrs["seed"] == 0}
    else:
        space, fixed = load_space(config.space)
        base = replace(base, **fixed)
        first = first_trials(space, base)
        ranges = {name: repr(distribution) for name, distribution in space.items()}
    files = [path for split in ("train", "val") for path in find_split(Path(config.data_dir), split)]
    if not config.notebook.is_file():
        raise InputError(f"no notebook {config.notebook}; run this in the repository's folder, or --notebook")
    try:
        cells = json.loads(config.notebook.read_text(encoding="utf-8"))["cells"]
        sources = json.dumps(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{config.notebook} is no notebook: {error!r}") from error
    contract = base.identity() | {f"space: {name}": value for name, value in ranges.items()}
    contract["data"] = hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()[:16]
    contract["notebook"] = hashlib.sha256(sources.encode()).hexdigest()[:16]
    target = len(first) if config.grid else config.trials
    return StudyPlan(base, space, first, target, json.loads(json.dumps(contract)))


def check_contract(study_name: str, before: Settings | None, now: Settings) -> None:
    """Raise InputError, naming the differences, unless a study that was begun as `before` is resumed as it was."""
    before = before or now
    pairs = {name: (before.get(name), now.get(name)) for name in before | now}
    if differences := [f"{name} was {was!r}, is {new!r}" for name, (was, new) in pairs.items() if was != new]:
        raise InputError(
            f"study {study_name!r} was begun with other settings: {'; '.join(differences)}. Scores would not compare: "
            "use the same settings, or another --study-name"
        )


def base_settings(config: StudyConfig) -> SummaryTrainingConfig:
    """The training settings of all trials: the defaults, the preset's, those of `training_config`, the study's own."""
    base = base_config(config.preset, config.training_config)
    named = read_settings(config.training_config) if config.training_config else {}
    own, plain = _own_settings(config), SummaryTrainingConfig()
    for name, value in own.items():
        if name in named and named[name] not in (value, getattr(plain, name)):
            raise InputError(f"{config.training_config}: {name} is set by the study; remove it, see `elm study --help`")
    if config.wandb:
        import wandb

        try:
            mode = wandb.setup().settings.mode
        except ValueError as error:  # of wandb, for a variable that it does not know
            raise InputError(f"wandb's settings in the environment (WANDB_...): {error}") from error
        if mode not in ("offline", "disabled") and not wandb.api.api_key:
            raise InputError("--wandb needs an account: run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline")
    if "eval_first" not in named:
        own["eval_first"] = False
    if "early_stopping_patience" not in named:
        own["early_stopping_patience"] = base.max_epochs  # trials are compared at equal lengths: the pruner stops them
    return replace(base, **own)


def _own_settings(config: StudyConfig) -> Settings:
    return {
        "summary_data_path": config.data_dir,
        "checkpoint_dir": str(config.folder),  # a trial's is in it
        "resume_from": "latest",
        "seed": config.seed,
        "eval_samples": config.eval_samples,
        "evals_per_epoch": config.evals_per_epoch,
        "use_wandb": config.wandb,
        "wandb_project": config.project,
        "wandb_group": config.study_name,
        "wandb_run_name": config.study_name,  # a trial's has its number too
    }


def load_space(path: Path | None) -> tuple[Space, Settings]:
    """Searched and fixed settings of the guide's space, or of a YAML file; InputError names file and setting. In the
    file a setting has a list of `choices`, a range `low` and `high` (with `log: true` or a `step`), or a value."""
    if path is None:
        return GUIDE_SPACE, {}
    specs = read_settings(path)
    if not specs:
        raise InputError(f"{path}: expected settings and their ranges, found none")
    fixed = {name: value for name, value in specs.items() if not isinstance(value, dict)}
    _check(fixed, str(path))
    return {name: _read_range(name, specs[name], str(path)) for name in specs if name not in fixed}, fixed


def _read_range(name: str, spec: Settings, origin: str) -> BaseDistribution:
    kind: type[BaseDistribution] = CategoricalDistribution
    if "choices" not in spec and type(default := getattr(SummaryTrainingConfig(), name, None)) in (int, float):
        kind = IntDistribution if isinstance(default, int) else FloatDistribution
    try:
        if not isinstance(spec.get("choices", []), list) or not isinstance(spec.get("log", False), bool):
            raise TypeError("choices is no list, or log neither true nor false")
        if isinstance(spec.get("step"), bool):
            raise TypeError("step is no number")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Optuna warns where a step does not divide the range, and changes the range
            distribution = kind(**spec)
    except (ValueError, TypeError, ArithmeticError, UserWarning) as error:
        raise InputError(
            f"{origin}: {name} is {spec!r}; expected a value, `choices`, or for a number `low` and `high` with `log` "
            f"or `step`: {error}"
        ) from error
    for value in spec["choices"] if "choices" in spec else (spec["low"], spec["high"]):
        _check({name: value}, origin)
    return distribution


def _check(settings: Any, origin: str) -> None:
    if not isinstance(settings, dict):
        raise InputError(f"{origin}: settings are {type(settings).__name__}; expected a dict of names and values")
    if owned := sorted((_own_settings(StudyConfig()).keys() - {"seed"}) & settings.keys()):
        raise InputError(f"{origin}: {', '.join(owned)} cannot be searched: the study sets it")
    make_config(SummaryTrainingConfig, settings, origin)  # today's names only: a trial has no others


def first_trials(space: Space, base: SummaryTrainingConfig) -> list[FrozenTrial]:
    """The guide's typical best and the defaults (`base`), each where `space` allows it. The guide's space has no
    accumulation of 1: the defaults' step of one batch becomes one of two half batches."""
    defaults, origin = {name: getattr(base, name) for name in GUIDE_BEST}, DEFAULTS
    if base.gradient_accumulation_steps == 1 and base.batch_size % 2 == 0:
        defaults |= {"batch_size": base.batch_size // 2, "gradient_accumulation_steps": 2}
        origin = f"{DEFAULTS}, {base.batch_size} rows a step in two batches"
    trials = []
    for name, settings in (("guide's typical best", GUIDE_BEST), (origin, defaults)):
        params = {setting: settings[setting] for setting in space if setting in settings}
        with suppress(ValueError):  # Optuna's, for a value outside its range or a missing one
            trials.append(_waiting({"origin": name}, params=params, distributions=space))
    return trials


def load_grid(path: Path, seeds: int) -> list[FrozenTrial]:
    """The trials of an ablation: each variant of a YAML file at each seed, one seed of all variants before the next.
    The file maps a variant's name to the training settings that it changes; `defaults: {}` is always the first."""
    values = read_settings(path)
    if not isinstance(named := values.get("variants", values), dict):
        raise InputError(f"{path}: variants is {named!r}; expected names and the settings that they change")
    variants: Settings = {DEFAULTS: {}} | named
    for name, changes in variants.items():
        _check(changes, f"{path}: {name}")
        if "seed" in changes or (name == DEFAULTS and changes):
            raise InputError(f"{path}: {name} is {changes!r}; expected no seed, and no change of {DEFAULTS}")
    return [
        _waiting({"origin": f"{name}, seed {seed}", "variant": name, "changes": changes | {"seed": seed}, "seed": seed})
        for seed in range(seeds)
        for name, changes in variants.items()
    ]


def _waiting(attributes: Settings, **values: Any) -> FrozenTrial:
    return create_trial(state=TrialState.WAITING, user_attrs=attributes, **values)
