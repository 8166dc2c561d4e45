"""What each part of the defaults is worth: variants trained for equal time at several seeds, resumable cell by cell."""

import hashlib
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from elmlib import trainer
from elmlib.ablation_plots import DEFAULTS, Cell, aggregate, cells_frame, draw_ablation, to_markdown
from elmlib.commands import AblateConfig
from elmlib.config import SummaryTrainingConfig
from elmlib.records import atomic_path, parse_line, write_json
from elmlib.settings import base_config
from elmlib.tracking import read_metrics
from elmlib.workbench import Workbench, prepare

logger = logging.getLogger(__name__)

_NEVER = 10**9  # steps: more than any cell makes
_STEPS_PER_SECOND = 200  # more than an LLM makes on any machine, so that the clock ends a cell and not its epochs


class StageTooLongError(RuntimeError):
    """The paraphrase stage left no time for summaries."""


class Variant(NamedTuple):
    """The base settings with some changed."""

    name: str
    changes: dict[str, Any]
    """Settings that differ from the base, and their values here."""


class Job(NamedTuple):
    """A cell of the table: a variant at a seed."""

    variant: Variant
    config: SummaryTrainingConfig
    file: Path
    """Holds its result once it is finished; its name has a hash of the settings and the data, so that a result of
    others is neither taken for this one nor lost to it."""

    @property
    def name(self) -> str:
        """For a person."""
        return f"{self.variant.name}, seed {self.config.seed}"


def variants(base: SummaryTrainingConfig) -> tuple[Variant, ...]:
    """The base itself, then each of its choices undone alone, then the plain settings.

    Names say what is other than in `base`; a variant that would equal the base or an earlier one is left out.
    """
    plain_loss: dict[str, Any] = {"use_contrastive_loss": False, "use_text_drift_loss": False, "use_teacher_kl": False}
    guide: dict[str, Any] = {
        "num_soft_tokens": 1, "warm_start": False, "soft_token_place": "text", "use_teacher_kl": False,
        "pretrain_epochs": 0,
    }  # fmt: skip
    other_place = "text" if base.soft_token_place == "answer" else "answer"
    asked: list[tuple[str, dict[str, Any]]] = [
        (DEFAULTS, {}),
        ("random start" if base.warm_start else "warm start", {"warm_start": not base.warm_start}),
        ("one view", {"warm_start_views": False} if base.warm_start and base.num_soft_tokens > 1 else {}),
        *((f"{count} soft token{'s' if count > 1 else ''}", {"num_soft_tokens": count}) for count in (1, 4, 8)),
        (f"in the {other_place}'s place", {"soft_token_place": other_place}),
        _toggle(base, "use_contrastive_loss", "contrastive loss"),
        _toggle(base, "use_text_drift_loss", "drift loss"),
        ("NLL only", plain_loss),
        _toggle(base, "use_teacher_kl", "teacher KL"),
        (
            "no paraphrase stage" if base.pretrain_epochs else "paraphrase stage",
            {"pretrain_epochs": 0 if base.pretrain_epochs else 1},
        ),
        ("guide's plain settings", guide),
    ]
    found: list[Variant] = []
    for name, settings in asked:
        changes = {setting: value for setting, value in settings.items() if getattr(base, setting) != value}
        if changes not in [variant.changes for variant in found]:
            found.append(Variant(name, changes))
    return tuple(found)


def _toggle(base: SummaryTrainingConfig, setting: str, part: str) -> tuple[str, dict[str, Any]]:
    on = getattr(base, setting)
    return f"no {part}" if on else part, {setting: not on}


def base_settings(config: AblateConfig) -> SummaryTrainingConfig:
    """The settings that the variants change: the defaults or the file's, with this ablation's data and sample.

    Raises FileNotFoundError and ValueError as `base_config` does.
    """
    base = base_config(config.preset, config.config)
    return replace(
        base,
        summary_data_path=config.data_dir,
        max_train_seconds=config.train_seconds,
        eval_samples=config.eval_samples,
        eval_first=False,
        eval_interval=_NEVER,
        save_interval=_NEVER,
        resume_from="",
    )


def plan(config: AblateConfig, base: SummaryTrainingConfig, rows: int, fingerprints: Sequence[str]) -> tuple[Job, ...]:
    """All cells, one seed of every variant before the next seed, so that an early look compares all variants.

    `rows` are the training rows, which with the time limit give a number of epochs that the clock never lets happen.
    """
    rows_per_step = base.batch_size * base.gradient_accumulation_steps
    epochs = 1 + math.ceil(config.train_seconds * _STEPS_PER_SECOND * rows_per_step / rows)
    jobs = []
    for seed in range(config.seeds):
        for variant in variants(base):
            slug = re.sub(r"[^a-z0-9]+", "-", f"{variant.name} seed {seed}".lower().replace("'", ""))
            settings = replace(
                base,
                **variant.changes,
                seed=seed,
                max_epochs=epochs,
                early_stopping_patience=epochs,
                checkpoint_dir=str(config.output_dir / "runs" / slug),
            )
            identity = json.dumps([settings.identity(), *fingerprints], sort_keys=True)
            key = hashlib.sha256(identity.encode()).hexdigest()[:12]
            jobs.append(Job(variant, settings, config.output_dir / "cells" / f"{slug}-{key}.json"))
    return tuple(jobs)


def run_ablation(config: AblateConfig) -> str:
    """Fill the cells that are not finished, and return the table as Markdown.

    `ablation.csv`, `.md` and `.png` are written anew after each cell, from all finished cells of this ablation. A run
    that becomes unstable, or has no time after its paraphrase stage, is warned of and leaves its cell empty. Raises
    ValueError for an unknown variant, and FileNotFoundError and ValueError as loading settings, models and data does.
    """
    base = base_settings(config)
    known = [variant.name for variant in variants(base)]
    if unknown := [name for name in config.only if name not in known]:
        raise ValueError(f"no variant {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, known))}")
    bench = prepare(base, PartialState().device)
    jobs = plan(config, base, len(bench.train), [bench.train.fingerprint, bench.val.fingerprint])
    logger.info("%d of %d cells are finished", sum(job.file.is_file() for job in jobs), len(jobs))
    todo = [job for job in jobs if not job.file.is_file() and job.variant.name in (config.only or known)]
    if any(job.config.use_teacher_kl for job in todo):
        bench.train.source_texts("teacher_kl")  # raises now and not when its turn comes, an hour later
    with tqdm(todo, desc="ablation", unit="cell") as bar:
        for job in bar:
            bar.set_postfix_str(job.name)
            try:
                cell = _run_cell(job, bench)
            except (trainer.UnstableTrainingError, StageTooLongError) as error:
                logger.warning("%s: left empty: %s", job.name, error)
                continue
            write_results(config, jobs)
            f1, shuffled = cell.metrics["bertscore_f1"], cell.metrics["bertscore_f1_shuffled"]
            bar.write(f"{job.name}: {cell.metrics['steps']:.0f} steps, F1 {f1:.3f}, shuffled {shuffled:.3f}")
    return write_results(config, jobs)  # a kill may have come between a cell and its table


def _run_cell(job: Job, bench: Workbench) -> Cell:
    folder = Path(job.config.checkpoint_dir)
    if folder.is_dir():  # of a killed run, or of other settings
        shutil.rmtree(folder)
    result = trainer.train(job.config, bench=bench)
    assert result.metrics["train_seconds"] >= job.config.max_train_seconds, "out of epochs before out of time"
    # The last evaluation and not the best: a choice among several would favour variants that pass over the data often.
    last = [row for row in read_metrics(folder / "metrics.jsonl") if row.kind == "eval"][-1]
    if last.epoch <= job.config.pretrain_epochs > 0:
        raise StageTooLongError(
            f"its {job.config.max_train_seconds:g} s ended within the paraphrase stage (epoch {last.epoch:.2f} of "
            f"{job.config.pretrain_epochs}): give a higher --train-seconds, or fewer train_rows in --config"
        )
    for path in folder.glob("*_step_*"):  # nothing resumes a cell; the best adapter stays
        path.unlink()
    cell = Cell(job.variant.name, job.config.seed, job.variant.changes, result.metrics | last.values, _environment())
    write_json(job.file, cell._asdict())
    return cell


def write_results(config: AblateConfig, jobs: Sequence[Job]) -> str:
    """Write table and picture of the finished cells, variants in the order of `jobs`; returns the Markdown."""
    order = list(dict.fromkeys(job.variant.name for job in jobs))
    finished = [job.file for job in jobs if job.file.is_file()]
    cells = [Cell(**parse_line(file.read_bytes(), str(file))) for file in finished]
    cells.sort(key=lambda cell: order.index(cell.variant))
    machines = "; ".join(dict.fromkeys(cell.environment for cell in cells))
    text = (
        f"{to_markdown(aggregate(cells))}\n"
        f"{config.train_seconds:g} seconds of training in each cell (loading, closed-form fits, the teacher's\n"
        f"predictions and evaluations are not counted), {jobs[0].config.llm_model_name}, {config.eval_samples} "
        f"validation samples, {config.seeds} seeds.\nRun on {machines}.\nMade by `{command_line(config)}`.\n"
    )
    with atomic_path(config.output_dir / "ablation.csv") as temporary:
        cells_frame(cells).to_csv(temporary, index=False)
    with atomic_path(config.output_dir / "ablation.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    with atomic_path(config.output_dir / "ablation.png") as temporary:
        draw_ablation(cells).savefig(temporary, format="png", dpi=120)
    return text


def _environment() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    processor = platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


def command_line(config: AblateConfig) -> str:
    """The `elm ablate` command that means `config`."""
    words = ["elm", "ablate"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            words += [f"--{field.name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)
