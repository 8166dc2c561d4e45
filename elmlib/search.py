"""What all trials of a study have in common, and the settings of one of them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage

from elmlib.config import SummaryTrainingConfig
from elmlib.layout import find_split
from elmlib.live import make_pruner
from elmlib.settings import base_config
from elmlib.space import Settings, first_trials, load_space
from elmlib.storage import open_storage, turn
from elmlib.study_commands import StudyConfig

EPOCHS = 2
"""Passes over the data of each trial, as the guide fixes them."""

CONTRACT = "contract"
"""Attribute of a study: what its trials have in common, without which their scores would not compare."""


def base_settings(config: StudyConfig) -> SummaryTrainingConfig:
    """The training settings of the study but for what is searched: the defaults, the preset's, the file's."""
    base = base_config(config.preset, config.config)
    return replace(
        base,
        summary_data_path=config.data_dir,
        max_epochs=EPOCHS,
        max_train_seconds=0.0,
        early_stopping_patience=EPOCHS,
        eval_samples=config.eval_samples,
        evals_per_epoch=config.evals_per_epoch,
        eval_first=False,
        seed=config.seed,
        resume_from="latest",
        use_wandb=config.wandb,
        wandb_project=config.project,
        wandb_group=config.study_name,
    )


def trial_settings(config: StudyConfig, suggested: Settings, number: int) -> SummaryTrainingConfig:
    """The settings of one trial, with what was suggested and nothing else in its place.

    Raises ValueError for a combination that `SummaryTrainingConfig` does not allow.
    """
    name = f"trial-{number:04d}"
    own: Settings = {"checkpoint_dir": str(config.folder / name), "wandb_run_name": f"{config.study_name}-{name}"}
    return replace(base_settings(config), **suggested, **own)


def begin(config: StudyConfig, address: str) -> tuple[optuna.Study, BaseStorage]:
    """The study in the storage at `address`, made if there is none, and that storage.

    Raises ValueError where the study is of other data or settings, or exists and `config.resume` is off; and
    ValueError or FileNotFoundError for data, settings, a space or a storage that do not fit.
    """
    base = base_settings(config)
    space = load_space(config.space)
    if not config.notebook.is_file():
        raise FileNotFoundError(f"no notebook {config.notebook}; run this in the repository's folder, or --notebook")
    contract = base.identity() | {"data": _digest(config.data_dir)}
    config.folder.mkdir(parents=True, exist_ok=True)
    storage = open_storage(address, config.heartbeat)
    with turn(storage, config.folder):
        study = optuna.create_study(
            study_name=config.study_name,
            storage=storage,
            direction="maximize",
            pruner=make_pruner(config.startup_trials, config.warmup_reports),
            load_if_exists=True,
        )
        if CONTRACT in study.user_attrs:
            _check_contract(config, study.user_attrs[CONTRACT], contract)
        else:
            for first in first_trials(space, base):
                study.enqueue_trial(first.params, user_attrs={"origin": first.origin})
            study.set_user_attr(CONTRACT, contract)  # last: a study that was cut short here begins again
    return study, storage


def _check_contract(config: StudyConfig, then: dict[str, Any], now: dict[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    differences = [f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in now if now[name] != then.get(name)]
    if differences:
        raise ValueError(
            f"study {config.study_name!r} was begun otherwise: {'; '.join(differences)}. Scores would not compare: "
            "use the same settings, or another --study-name"
        )


def _digest(data_dir: str) -> str:
    """Hash of the training and the validation data."""
    digest = hashlib.sha256()
    for path in _files(data_dir):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _files(data_dir: str) -> Iterator[Path]:
    for split in ("train", "val"):
        yield from find_split(Path(data_dir), split)
