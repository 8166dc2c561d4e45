"""The `elm` command: a sub-command a stage, flags made from a config dataclass, help from its docstrings.

Exit codes: 0 done, 1 bad input or a missing file, 2 a wrong flag, 3 unstable training, 130 interrupted.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from elmlib.commands import (
    AblateConfig,
    CorpusConfig,
    DemoConfig,
    EvaluateConfig,
    FilterConfig,
    GenerateConfig,
    ReportConfig,
)
from elmlib.config import SummaryTrainingConfig
from elmlib.study_commands import DashboardConfig, ReapConfig, StudyConfig, StudyDemoConfig

logger = logging.getLogger("elmlib")


def corpus(config: CorpusConfig) -> None:
    """Make a multi-task corpus with embeddings from docstrings, a JSONL file or a Hugging Face dataset."""
    from elmlib.corpus import build_corpus
    from elmlib.pretrained import encode, load_embedder

    embedder = load_embedder(config.embedding_model_name, _device())
    print(build_corpus(config, lambda texts: encode(embedder, texts, config.embedding_batch_size)).to_table())


def filter_(config: FilterConfig) -> None:
    """Keep one task of a corpus and its embeddings, and check that no source stands in two splits."""
    from elmlib.filtering import filter_corpus

    print(filter_corpus(config).to_table())


def train(config: SummaryTrainingConfig) -> None:
    """Train an adapter; --config FILE or --resume-from CHECKPOINT gives the settings, flags beside it win."""
    from accelerate import PartialState

    from elmlib.plots import draw_curves
    from elmlib.tables import score_table
    from elmlib.trainer import train

    result = train(config)
    if not PartialState().is_main_process:  # one of several processes is enough to tell
        return
    curves = result.best.with_name("curves.png")
    draw_curves(curves.parent).savefig(curves, dpi=120)
    print(f"{score_table(result.metrics)}\nbest adapter: {result.best}\ncurves: {curves}")


def generate(config: GenerateConfig) -> None:
    """Write a summary for every record of a split, or for every row of a file of embeddings."""
    from elmlib.generation import generate_file

    made = generate_file(
        config.checkpoint, config.input, config.output, config.embeddings, config.batch_size,
        config.max_new_tokens or None, _device(), _sampling(config),
    )  # fmt: skip
    print(f"{made} summaries written to {config.output}")


def evaluate(config: EvaluateConfig) -> None:
    """Score predictions against their references with BERTScore, beside the same predictions shuffled."""
    from elmlib.bertscore import BERTScoreEvaluator
    from elmlib.evaluation import score_texts
    from elmlib.generation import read_pairs
    from elmlib.records import write_json
    from elmlib.tables import score_table

    pairs = read_pairs(config.predictions, config.references)
    evaluator = BERTScoreEvaluator(config.bertscore_model, config.bertscore_batch_size, _device(), pairs.references)
    metrics = score_texts(evaluator, *pairs, config.seed)
    result = metrics | {"bertscore_hash": evaluator.hash}
    print(score_table(result))
    if config.output:
        write_json(config.output, result)


def report(config: ReportConfig) -> None:
    """Hold an adapter against its controls, from shuffled embeddings to the LLM that reads the text."""
    from elmlib.report_plots import draw_scorecard
    from elmlib.scorecard import score_checkpoint

    card = score_checkpoint(
        config.checkpoint, config.data_dir, config.split, config.samples, _sampling(config), _device()
    )
    print(card.to_text())
    if config.output:
        card.write_csv(config.output)
        picture = config.output.with_suffix(".png")
        draw_scorecard(config.output).savefig(picture, dpi=120)
        print(f"table: {config.output}\npicture: {picture}")


def ablate(config: AblateConfig) -> None:
    """Train variants of the settings for equal time at several seeds: what each part of the defaults is worth."""
    from elmlib.ablation import run_ablation

    print(f"{run_ablation(config)}\ntable and picture: {config.output_dir}/ablation.*")


def study(config: StudyConfig) -> None:
    """Search hyperparameters: each trial is an executed notebook; killed, the study goes on where it was."""
    from elmlib.study import report, run_study, submit_workers

    if config.slurm:
        jobs = submit_workers(config)
        print(f"workers submitted: {', '.join(jobs)}\nto watch them: elm dashboard --study-name {config.study_name}")
        return
    print(report(run_study(config), config))


def dashboard(config: DashboardConfig) -> None:
    """Watch a study in a browser, with each trial's curves, summaries and notebook."""
    from elmlib.study import serve_dashboard

    print(f"http://127.0.0.1:{config.port}/dashboard  (Ctrl-C ends it)", flush=True)
    serve_dashboard(config)


def reap(config: ReapConfig) -> None:
    """Fail the trials of a study whose worker is gone, and put them back into the queue."""
    from elmlib.study import reap_study

    lost = reap_study(config)
    print(f"{len(lost)} trials had lost their worker" + (f": {', '.join(map(str, lost))}" if lost else ""))


def demo(config: DemoConfig) -> None:
    """Run notebooks 00 to 02 through papermill, from docstrings to summaries written from their vectors."""
    from elmlib.demo import demo_stages, report, run_stages

    run_stages(demo_stages(config), config.output_dir, Path("notebooks"))
    print(f"\n{report(config.output_dir)}")


def study_demo(config: StudyDemoConfig) -> None:
    """Run a small study, its trials and its analysis through papermill: notebooks 00, 01, 03 and 04."""
    from elmlib.demo import run_stages, study_stages

    notebooks = Path("notebooks")
    run_stages(study_stages(config, notebooks), config.output_dir, notebooks)
    print(f"\nanalysis: {config.output_dir / '04_analysis.ipynb'}")


class Command(NamedTuple):
    """A sub-command: its settings, what it does, and an example."""

    config: type[Any]
    run: Callable[[Any], None]
    example: str


COMMANDS = {
    "corpus": Command(CorpusConfig, corpus, "elm corpus --limit 6000"),
    "filter": Command(FilterConfig, filter_, "elm filter --input-dir data/synthesis"),
    "train": Command(SummaryTrainingConfig, train, "elm train --data-dir data/summary_filtered --epochs 2"),
    "generate": Command(
        GenerateConfig, generate,
        "elm generate --checkpoint data/checkpoints/best_summary_model.safetensors "
        "--input data/summary_filtered/test_synthesis.jsonl --output results/predictions.jsonl",
    ),
    "evaluate": Command(
        EvaluateConfig, evaluate,
        "elm evaluate --predictions results/predictions.jsonl "
        "--references data/summary_filtered/test_synthesis.jsonl",
    ),
    "report": Command(
        ReportConfig, report, "elm report --checkpoint data/checkpoints/best_summary_model.safetensors --candidates 8"
    ),
    "ablate": Command(AblateConfig, ablate, "elm ablate --train-seconds 150 --seeds 3"),
    "study": Command(StudyConfig, study, "elm study --trials 50 --jobs 2 --timeout 24"),
    "dashboard": Command(DashboardConfig, dashboard, "elm dashboard"),
    "reap": Command(ReapConfig, reap, "elm reap"),
    "demo": Command(DemoConfig, demo, "elm demo"),
    "study-demo": Command(StudyDemoConfig, study_demo, "elm study-demo"),
}  # fmt: skip


def parse(arguments: Sequence[str]) -> tuple[Command, Any]:
    """The sub-command and its checked settings; exits with 2 for a wrong flag, and with 0 after `--help`."""
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        asked = name in ("-h", "--help")
        print(_overview() if asked or not name else f"elm: no command {name!r}; there are {', '.join(COMMANDS)}")
        sys.exit(0 if asked else 2)
    command, rest = COMMANDS[name], list(arguments[1:])
    default = None
    if command.config is SummaryTrainingConfig:
        default, rest = _base_settings(rest)
    about = f"{command.run.__doc__}\n\nExample: {command.example}"
    options = {} if default is None else {"default": default}
    return command, tyro.cli(command.config, args=rest, prog=f"elm {name}", description=about, **options)


def _base_settings(arguments: list[str]) -> tuple[SummaryTrainingConfig | None, list[str]]:
    """What flags left unsaid means for `elm train`: a settings file, or the run that is resumed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--config", "--resume-from", "--checkpoint-dir"):
        parser.add_argument(flag)
    known, _ = parser.parse_known_args(arguments)
    if known.config:
        rest = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        rest.add_argument("--config")
        return SummaryTrainingConfig.from_json(Path(known.config)), rest.parse_known_args(arguments)[1]
    if known.resume_from:
        from elmlib.checkpoint import find_checkpoint, load_adapter

        plain = SummaryTrainingConfig(resume_from=known.resume_from)
        found = find_checkpoint(replace(plain, checkpoint_dir=known.checkpoint_dir or plain.checkpoint_dir))
        if found:
            folder = known.checkpoint_dir or str(found.parent)
            return replace(load_adapter(found).config, checkpoint_dir=folder), arguments
    return None, arguments


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one sub-command; bad input becomes one line on standard error and an exit code."""
    try:
        command, config = parse(sys.argv[1:] if arguments is None else arguments)
        _log_to_stderr(getattr(config, "log_level", "INFO"))
        command.run(config)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(_fail(error, 1))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("elmlib"):
            raise
        sys.exit(_fail(ModuleNotFoundError(f"{error}; get it with: pip install -e '.[summary,notebooks]'"), 1))
    except RuntimeError as error:
        # By name: importing them would load torch for every command.
        if type(error).__name__ not in ("UnstableTrainingError", "WorkersFailedError"):
            raise
        sys.exit(_fail(error, 3))
    except KeyboardInterrupt:
        print("\nelm: interrupted; what was finished is kept", file=sys.stderr)
        sys.exit(130)


def _fail(error: Exception, code: int) -> int:
    logger.debug("where it happened", exc_info=error)
    print(f"elm: error: {error}", file=sys.stderr)
    return code


def _log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("elm: %(levelname)s: %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
    warnings.showwarning = lambda message, *_, **__: logger.warning("%s", message)


def _overview() -> str:
    lines = [f"  {name:<10}{(command.run.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: elm COMMAND [--help] ...", "", "commands, in the order of the work:", *lines, "", "examples:"]
        + [f"  {command.example}" for command in COMMANDS.values()]
    )


def _sampling(config: GenerateConfig | ReportConfig) -> Any:
    from elmlib.decoding import Sampling

    return Sampling(config.candidates, config.temperature, config.top_p) if config.candidates else None


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
