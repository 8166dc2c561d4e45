"""What a command would read and write: `--dry-run` says it, and nothing is written."""

from functools import singledispatch
from pathlib import Path
from typing import Any

from elmlib.benchmark_commands import BenchmarkConfig
from elmlib.commands import AblateConfig, CorpusConfig, DemoConfig, FilterConfig, GenerateConfig, TourConfig
from elmlib.config import SummaryTrainingConfig
from elmlib.layout import SPLITS, find_split
from elmlib.records import read_lines
from elmlib.study_commands import StudyConfig, StudyDemoConfig


@singledispatch
def foresee(config: Any) -> list[str]:
    """The lines that tell what the command of `config` would do.

    Raises FileNotFoundError and ValueError as the command itself does for what it would read.
    """
    raise NotImplementedError(type(config).__name__)


@foresee.register
def _(config: CorpusConfig) -> list[str]:
    paths = [config.output_dir / f"{split}_synthesis.jsonl" for split in SPLITS]
    paths += [config.output_embeddings_dir / f"{split}_embeddings.safetensors" for split in SPLITS]
    pairs = f"at most {config.limit:,} pairs" if config.limit else "all pairs"
    return [f"read: {pairs} of {config.source}", f"embed with: {config.embedding_model_name}", *_writes(paths)]


@foresee.register
def _(config: FilterConfig) -> list[str]:
    lines, paths = [], []
    for split in SPLITS:
        source = config.input_dir / f"{split}_synthesis.jsonl"
        if source.is_file():
            lines.append(f"read: {source}, {_count_lines(source):,} lines")
            paths.append(config.output_dir / source.name)
            paths.append(config.output_embeddings_dir / f"{split}_embeddings.safetensors")
    if not lines:
        raise FileNotFoundError(f"no SPLIT_synthesis.jsonl in {config.input_dir}; `elm corpus` writes it")
    return [*lines, f"keep: task {config.task_type!r}", *_writes(paths)]


@foresee.register
def _(config: SummaryTrainingConfig) -> list[str]:
    from elmlib.checkpoint import find_checkpoint

    rows = {split: _count_lines(find_split(Path(config.summary_data_path), split).records) for split in SPLITS[:2]}
    train = min(rows["train"], config.train_rows or rows["train"])
    step_rows = config.batch_size * config.gradient_accumulation_steps
    steps = -(-train // step_rows) * config.max_epochs
    found, folder = find_checkpoint(config), Path(config.checkpoint_dir)
    beginning = f"go on from: {found}" if found else f"begin anew in: {folder}"
    if not found and (folder / "metrics.jsonl").is_file():
        beginning += " (the run that lies there is moved into a folder of its own)"
    return [
        f"read: {train:,} training and {rows['val']:,} validation rows of {config.summary_data_path}",
        f"models: {config.llm_model_name}, {config.embedding_model_name}, {config.bertscore_model}",
        f"train: {config.max_epochs} epochs, about {steps:,} steps of {step_rows} rows",
        beginning,
        "write: metrics.jsonl, predictions.jsonl, result.json, curves.png, best_summary_model.safetensors and the "
        f"newest {config.keep_checkpoints} step checkpoints",
    ]


@foresee.register
def _(config: GenerateConfig) -> list[str]:
    for path in (config.checkpoint, config.input):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
    done = _count_lines(config.output) if config.output.is_file() else 0
    wanted = "its vectors" if config.input.suffix == ".safetensors" else f"{_count_lines(config.input):,} lines"
    return [
        f"read: {config.checkpoint}; {config.input}, {wanted}",
        f"write: {config.output}" + (f", behind the {done:,} lines that are there" if done else ""),
    ]


@foresee.register
def _(config: AblateConfig) -> list[str]:
    from elmlib.ablation import base_settings, variants

    names = [variant.name for variant in variants(base_settings(config))]
    chosen = [name for name in names if not config.only or name in config.only]
    minutes = len(chosen) * config.seeds * config.train_seconds / 60
    return [
        f"read: {config.data_dir}",
        f"train: {', '.join(chosen)}; {config.seeds} seeds each, {minutes:.0f} minutes of training in all",
        f"write: {config.output_dir}/ablation.* and runs/, finished ones of which are not run again",
    ]


@foresee.register
def _(config: StudyConfig) -> list[str]:
    from elmlib.search import base_settings
    from elmlib.storage import without_password
    from elmlib.study import storage_address

    base = base_settings(config)
    way = "SLURM jobs" if config.slurm else "worker processes"
    return [
        f"read: {config.data_dir}; notebook {config.notebook}; space {config.space or 'of the guide'}",
        f"models: {base.llm_model_name}, {base.embedding_model_name}, {base.bertscore_model}",
        f"run: up to {config.trials} finished trials in all, in {config.jobs} {way}"
        + (f", for {config.timeout:g} hours" if config.timeout else ""),
        f"storage: {without_password(storage_address(config))}",
        f"write: {config.folder}/trial-NNNN/ and, in {config.results_dir or config.folder}, {config.study_name}_*",
    ]


@foresee.register
def _(config: BenchmarkConfig) -> list[str]:
    return [
        f"read: {config.data_dir}",
        f"time: {', '.join(config.only) or 'all contests'}, {config.turns} turns each",
        f"write: {config.output_dir}/benchmark.json, .txt, .png",
    ]


@foresee.register(DemoConfig)
@foresee.register(StudyDemoConfig)
@foresee.register(TourConfig)
def _(config: DemoConfig | StudyDemoConfig | TourConfig) -> list[str]:
    from elmlib.demo import demo_stages, study_stages, tour_stages

    notebooks = Path("notebooks")
    if isinstance(config, DemoConfig):
        stages = demo_stages(config)
    else:
        stages = (
            study_stages(config, notebooks) if isinstance(config, StudyDemoConfig) else tour_stages(config, notebooks)
        )
    return [f"execute: notebooks/{stage.notebook}.ipynb, which leaves {stage.result}" for stage in stages]


def _writes(paths: list[Path]) -> list[str]:
    return [f"write: {path}" + (" (replaces the one that is there)" if path.exists() else "") for path in paths]


def _count_lines(path: Path) -> int:
    return sum(1 for _ in read_lines(path))
