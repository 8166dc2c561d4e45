"""The `elm` command: one table of commands. Flags and help come from each command's settings class."""

import argparse
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, replace
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple, NoReturn

import tyro

from elmlib.config import InputError, SummaryTrainingConfig, base_config, commands, files

logger = logging.getLogger("elmlib")

EXIT_CODES = (
    "0 done, 1 bad input or a missing file, 2 a wrong flag, 3 training or the study failed, 130 interrupted and saved"
)


def corpus(config: commands.CorpusConfig) -> None:
    """Make a multi-task corpus with embeddings from docstrings, a JSONL file or a Hugging Face dataset.

    elm corpus --limit 6000
    elm corpus --source texts.jsonl --text-field body --summary-field abstract
    elm corpus --source abisee/cnn_dailymail --dataset-config 3.0.0 --text-field article --summary-field highlights
    """
    from elmlib.data import build_corpus
    from elmlib.models import count_cut, default_device, encode, load_embedder

    embedder = load_embedder(config.embedding_model_name, default_device())
    embed = partial(encode, embedder, batch_size=config.embedding_batch_size)
    report = build_corpus(config, embed, count_cut=partial(count_cut, embedder))
    print(f"{report.to_frame().to_string()}\n{report.summary()}")


def filter_(config: commands.FilterConfig) -> None:
    """Keep one task of a corpus and its embeddings, and check that no source is in two splits.

    elm filter --input-dir data/synthesis
    elm filter --skip-bad
    """
    from elmlib.data import filter_corpus

    report = filter_corpus(config)
    print("\n".join([report.to_frame().to_string(), *(f"leak: {leak}" for leak in report.leaks or ("none",))]))


def train(config: SummaryTrainingConfig) -> None:
    """Train an adapter; --config FILE or --resume-from CHECKPOINT gives the settings, flags beside it win.

    elm train --data-dir data/summary_filtered --epochs 2
    elm train --preset qwen3-4b --evaluation-device cpu --gradient-checkpointing
    elm train --config settings.yaml --resume-from latest
    elm train --dry-run
    """
    from accelerate import PartialState

    from elmlib.evaluation import score_frame
    from elmlib.plots import draw_curves
    from elmlib.training import train

    result = train(config)
    if PartialState().is_main_process:  # one of several processes prints
        curves = result.best.with_name("curves.png")
        draw_curves(curves.parent).savefig(curves, dpi=120)
        print(f"{score_frame(result.metrics).to_string(na_rep='')}\nbest adapter: {result.best}\ncurves: {curves}")
    if result.stopped == "interrupted":
        raise KeyboardInterrupt


def generate(config: commands.GenerateConfig) -> None:
    """Write a summary for every record of a split, or for every row of a file of embeddings.

    elm generate --checkpoint data/checkpoints/best_summary_model.safetensors \\
        --input data/summary_filtered/test_synthesis.jsonl --output results/predictions.jsonl
    elm generate --checkpoint a.safetensors --input vectors.safetensors --output out.jsonl --candidates 8
    """
    from elmlib.inference import generate_file

    count = generate_file(
        config.checkpoint, config.input, config.output, config.embeddings, config.batch_size,
        config.max_new_tokens or None, sampling=_sampling(config),
    )  # fmt: skip
    print(f"{count} summaries written to {config.output}")


def evaluate(config: commands.EvaluateConfig) -> None:
    """Score predictions against their references with BERTScore, beside the same predictions shuffled.

    elm evaluate --predictions results/predictions.jsonl --references data/summary_filtered/test_synthesis.jsonl
    """
    from elmlib.data import write_json
    from elmlib.evaluation import BERTScoreEvaluator, score_frame, score_texts
    from elmlib.inference import read_pairs
    from elmlib.models import default_device

    pairs = read_pairs(config.predictions, config.references)
    evaluator = BERTScoreEvaluator(
        config.bertscore_model, config.bertscore_batch_size, default_device(), pairs.references
    )
    result = score_texts(evaluator, *pairs, config.seed) | {"bertscore_hash": evaluator.hash}
    print(f"{score_frame(result).to_string(na_rep='')}\nBERTScore settings: {evaluator.hash}")
    if config.output:
        write_json(config.output, result)


def report(config: commands.ReportConfig) -> None:
    """Compare an adapter with its baselines, from shuffled embeddings to the LLM that reads the text.

    elm report --checkpoint data/checkpoints/best_summary_model.safetensors --candidates 8
    """
    from elmlib.evaluation import score_checkpoint
    from elmlib.models import default_device
    from elmlib.plots import draw_report

    card = score_checkpoint(
        config.checkpoint, config.data_dir, config.split, config.samples, _sampling(config), default_device()
    )
    print(card.display_frame().to_string(na_rep=""))
    if config.output:
        card.write_csv(config.output)
        picture, texts = config.output.with_suffix(".png"), config.output.with_name(f"{config.output.stem}_texts.jsonl")
        draw_report(config.output).savefig(picture, dpi=120)
        card.write_texts(texts)
        print(f"table: {config.output}\npicture: {picture}\nsummaries of every system: {texts}")


def study(config: commands.StudyConfig) -> None:
    """Search hyperparameters, or train a grid of variants; each trial is an executed notebook, and a study resumes.

    elm study --trials 50 --jobs 2 --timeout 24
    elm study --grid ablation.yaml --seeds 3
    elm study --slurm --jobs 64 --slurm-partition gpu --trials 2000
    """
    from elmlib.study import results_frame, run_study, submit_launchers

    if config.slurm:
        jobs = submit_launchers(config)
        print(f"launchers submitted: {', '.join(jobs)}\nwatch them: elm dashboard --study-name {config.study_name}")
        return
    done = run_study(config)
    print(f"{results_frame(done).to_string(na_rep='')}\nresults: {config.results_dir or config.folder}")


def dashboard(config: commands.DashboardConfig) -> None:
    """Watch a study in a browser, with each trial's curves, summaries and notebook.

    elm dashboard --port 8081
    """
    from elmlib.study import serve_dashboard

    print(f"http://127.0.0.1:{config.port}/dashboard  (Ctrl-C ends it)", flush=True)
    serve_dashboard(config)


def plan(config: commands.PlanConfig) -> None:
    """Estimate the memory of a training step from the LLM's config alone, and the batch sizes that fit each card.

    elm plan --preset qwen3-4b --evaluation-device cpu --gpu-memory 16
    """
    from elmlib.models import plan_training

    print(
        f"{config.llm_model_name}: a step of {config.batch_size} rows of {config.answer_tokens} answer tokens, GiB.\n"
        "Totals and largest batch sizes include a margin of 10 % and 0.5 GiB for CUDA's context.\n"
        f"{plan_training(config).to_string()}"
    )


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "corpus": (commands.CorpusConfig, corpus),
    "filter": (commands.FilterConfig, filter_),
    "train": (SummaryTrainingConfig, train),
    "generate": (commands.GenerateConfig, generate),
    "evaluate": (commands.EvaluateConfig, evaluate),
    "report": (commands.ReportConfig, report),
    "study": (commands.StudyConfig, study),
    "dashboard": (commands.DashboardConfig, dashboard),
    "plan": (commands.PlanConfig, plan),
}
"""Sub-command -> its settings and its function, whose docstring is the help and ends with examples."""


class Call(NamedTuple):
    """What the command line asks for."""

    run: Callable[[Any], None]
    config: Any


def parse(arguments: Sequence[str]) -> Call:
    """The sub-command and its checked settings; exits with 2 for a wrong flag, and with 0 after `--help`."""
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        is_help = name in ("-h", "--help")
        print(_overview() if is_help or not name else f"elm: no command {name!r}; there are {', '.join(COMMANDS)}")
        sys.exit(0 if is_help else 2)
    kind, run = COMMANDS[name]
    default, rest = _default(kind, list(arguments[1:]))
    summary, _, examples = str(inspect.getdoc(run)).partition("\n\n")
    dry = "--dry-run prints the settings and the number of steps, and does nothing. " if name == "train" else ""
    if dry and "--dry-run" in rest:
        rest.remove("--dry-run")
        run = _dry_run
    help_text = (
        f"{summary}\n\nExamples:\n{indent(examples, '  ')}\n\n--config FILE (JSON or YAML) and --preset NAME give "
        f"settings; flags win. {dry}Exit codes: {EXIT_CODES}."
    )
    return Call(run, tyro.cli(kind, args=rest, prog=f"elm {name}", description=help_text, default=default))


def _default(kind: type[Any], arguments: list[str]) -> tuple[Any, list[str]]:
    """The settings where no flag is given, and the arguments without --config and --preset."""
    known, rest = _split_off(arguments, "--config", "--preset")
    path = Path(known.config) if known.config else None
    if kind is SummaryTrainingConfig:
        return _training_default(known.preset or "", path, rest), rest
    if "preset" in kind.__dataclass_fields__ and known.preset:  # a setting of its own
        rest, known.preset = [*rest, "--preset", known.preset], None
    if path is None and not known.preset:
        return tyro.MISSING_NONPROP, rest
    values = files.preset_settings(known.preset or "", kind)
    values |= files.check_settings(kind, files.read_settings(path), str(path)) if path else {}
    required = {name: tyro.MISSING for name, it in kind.__dataclass_fields__.items() if it.default is MISSING}
    try:
        return kind(**required | values), rest
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _training_default(preset: str, path: Path | None, arguments: list[str]) -> Any:
    """The defaults, the settings of the preset or the file, or those of the run that is resumed."""
    if preset or path:
        return base_config(preset, path)
    known, _ = _split_off(arguments, "--resume-from", "--checkpoint-dir")
    if known.resume_from:
        from elmlib.models import load_adapter
        from elmlib.training import find_checkpoint

        config = SummaryTrainingConfig(resume_from=known.resume_from)
        checkpoint = find_checkpoint(replace(config, checkpoint_dir=known.checkpoint_dir or config.checkpoint_dir))
        if checkpoint:
            folder = known.checkpoint_dir or str(checkpoint.parent)
            return replace(load_adapter(checkpoint).config, checkpoint_dir=folder)
    return SummaryTrainingConfig()


def _split_off(arguments: list[str], *flags: str) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in flags:
        parser.add_argument(flag)
    return parser.parse_known_args(arguments)


def _dry_run(config: SummaryTrainingConfig) -> None:
    from elmlib.data import find_split, read_lines

    count = sum(1 for _ in read_lines(find_split(Path(config.summary_data_path), "train").records))
    rows = min(count, config.train_rows or count)
    per_step = config.batch_size * config.gradient_accumulation_steps
    steps = -(-rows // per_step) * config.max_epochs
    print(f"{config.to_json()}{rows:,} training rows, about {steps:,} steps of {per_step} rows; nothing is written")


def _sampling(config: commands.GenerateConfig | commands.ReportConfig) -> Any:
    from elmlib.models import Sampling

    return Sampling(config.candidates, config.temperature, config.top_p) if config.candidates else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one sub-command; bad input becomes one line on standard error and an exit code."""
    try:
        run, config = parse(sys.argv[1:] if arguments is None else arguments)
        _log_to_stderr(getattr(config, "log_level", "INFO"))
        run(config)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (InputError, OSError) as error:
        _fail(error, 1)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("elmlib"):
            raise
        _fail(ModuleNotFoundError(f"{error}; get it with: pip install -e '.[summary,notebooks]'"), 1)
    except RuntimeError as error:
        # By name: importing them would load torch for every command.
        if type(error).__name__ not in ("UnstableTrainingError", "StudyFailedError"):
            raise
        _fail(error, 3)
    except KeyboardInterrupt:
        print("\nelm: interrupted; finished work is kept", file=sys.stderr)
        sys.exit(130)


def _fail(error: Exception, code: int) -> NoReturn:
    logger.debug("traceback:", exc_info=error)
    print("elm: error:", *map(str.strip, str(error).splitlines()), file=sys.stderr)
    sys.exit(code)


def _log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("elm: %(levelname)s: %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
    warnings.showwarning = lambda message, *_, **__: logger.warning("%s", message)


def _overview() -> str:
    lines = "\n".join(f"  {name:<12}{str(run.__doc__).splitlines()[0]}" for name, (_, run) in COMMANDS.items())
    return (
        f"usage: elm COMMAND [--help] ...\n\ncommands, in the order of the work:\n{lines}\n\n"
        f"presets: {', '.join(filter(None, files.PRESETS))}\nexit codes: {EXIT_CODES}"
    )


if __name__ == "__main__":
    main()
