"""The `elm` command: a sub-command a stage, flags made from a config dataclass, help from its docstrings."""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from elmlib import actions, benchmark_commands, commands, study_commands
from elmlib.config import SummaryTrainingConfig, read_settings
from elmlib.settings import PRESETS, as_flags, base_config, take

logger = logging.getLogger("elmlib")


EXIT_CODES = "0 done, 1 bad input or a missing file, 2 a wrong flag, 3 training or workers broke down, 130 interrupted"


class Command(NamedTuple):
    """A sub-command: its settings, what it does, and examples."""

    config: type[Any]
    run: Callable[[Any], None]
    examples: tuple[str, ...]
    writes_much: bool = False
    """Takes --dry-run."""


COMMANDS = {
    "corpus": Command(
        commands.CorpusConfig, actions.corpus,
        ("elm corpus --limit 6000", "elm corpus --source texts.jsonl --text-field body --summary-field abstract"),
        writes_much=True,
    ),
    "filter": Command(
        commands.FilterConfig, actions.filter_,
        ("elm filter --input-dir data/synthesis --dry-run", "elm filter --skip-bad"), writes_much=True,
    ),
    "train": Command(
        SummaryTrainingConfig, actions.train,
        (
            "elm train --data-dir data/summary_filtered --epochs 2",
            "elm train --preset qwen3-4b --evaluation-device cpu --gradient-checkpointing",
            "elm train --config settings.yaml --resume-from latest",
        ),
        writes_much=True,
    ),
    "generate": Command(
        commands.GenerateConfig, actions.generate,
        (
            "elm generate --checkpoint data/checkpoints/best_summary_model.safetensors "
            "--input data/summary_filtered/test_synthesis.jsonl --output results/predictions.jsonl",
            "elm generate --checkpoint a.safetensors --input vectors.safetensors --output said.jsonl --candidates 8",
        ),
        writes_much=True,
    ),
    "evaluate": Command(
        commands.EvaluateConfig, actions.evaluate,
        (
            "elm evaluate --predictions results/predictions.jsonl "
            "--references data/summary_filtered/test_synthesis.jsonl",
        ),
    ),
    "report": Command(
        commands.ReportConfig, actions.report,
        ("elm report --checkpoint data/checkpoints/best_summary_model.safetensors --candidates 8",),
    ),
    "ablate": Command(
        commands.AblateConfig, actions.ablate,
        ("elm ablate --train-seconds 150 --seeds 3", 'elm ablate --only defaults "random start"'), writes_much=True,
    ),
    "study": Command(
        study_commands.StudyConfig, actions.study,
        (
            "elm study --trials 50 --jobs 2 --timeout 24",
            "elm study --storage sqlite:///optimization.db --preset qwen3-4b --trials 100",
            "elm study --slurm --jobs 64 --slurm-partition gpu --trials 2000",
        ),
        writes_much=True,
    ),
    "dashboard": Command(study_commands.DashboardConfig, actions.dashboard, ("elm dashboard --port 8081",)),
    "reap": Command(study_commands.ReapConfig, actions.reap, ("elm reap --study-name overnight",)),
    "plan": Command(
        benchmark_commands.PlanConfig, actions.plan,
        (
            "elm plan --llm-model Qwen/Qwen3-4B-Instruct-2507 --batch-size 8 --gpu-memory 16GiB",
            "elm plan --preset qwen3-4b --evaluation-device cpu",
        ),
    ),
    "benchmark": Command(
        benchmark_commands.BenchmarkConfig, actions.benchmark,
        ("elm benchmark --data-dir papermill_runs/demo/data/summary_filtered", "elm benchmark --only steps memory"),
        writes_much=True,
    ),
    "demo": Command(commands.DemoConfig, actions.demo, ("elm demo", "elm demo --limit 600 --epochs 1"), True),
    "study-demo": Command(
        study_commands.StudyDemoConfig, actions.study_demo, ("elm study-demo --trials 6",), writes_much=True
    ),
    "tour": Command(commands.TourConfig, actions.tour, ("elm tour",), writes_much=True),
}  # fmt: skip


class Call(NamedTuple):
    """What the command line asks for."""

    command: Command
    config: Any
    dry: bool
    """Tell what would be done, and do nothing."""


def parse(arguments: Sequence[str]) -> Call:
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
    elif "config" not in command.config.__dataclass_fields__:  # a setting of its own, of that name, is a file already
        rest = _file_settings(command, rest)
    dry = command.writes_much and "--dry-run" in rest
    rest = [argument for argument in rest if not dry or argument != "--dry-run"]
    options: dict[str, Any] = {} if default is None else {"default": default}
    config = tyro.cli(command.config, args=rest, prog=f"elm {name}", description=_about(command), **options)
    return Call(command, config, dry)


def _about(command: Command) -> str:
    lines = [str(command.run.__doc__), "", "Examples:", *(f"  {example}" for example in command.examples), ""]
    lines.append("--config FILE (JSON or YAML) and --preset NAME give settings; flags beside them win.")
    if command.writes_much:
        lines.append("--dry-run says what would be read and written, and does nothing.")
    return "\n".join([*lines, f"Exit codes: {EXIT_CODES}."])


def _split_off(arguments: list[str], *flags: str) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in flags:
        parser.add_argument(flag)
    return parser.parse_known_args(arguments)


def _file_settings(command: Command, arguments: list[str]) -> list[str]:
    """The arguments with what --preset and --config stand for before them, where later flags win."""
    known, rest = _split_off(arguments, "--config", "--preset")
    flags: list[str] = []
    if known.preset:
        flags += as_flags(take(known.preset, command.config), command.config, known.preset)
    if known.config:
        flags += as_flags(read_settings(Path(known.config)), command.config, known.config)
    return flags + rest


def _base_settings(arguments: list[str]) -> tuple[SummaryTrainingConfig | None, list[str]]:
    """What flags left unsaid means for `elm train`: a settings file, or the run that is resumed."""
    known, rest = _split_off(arguments, "--config", "--preset")
    if known.config or known.preset:
        return base_config(known.preset or "", Path(known.config) if known.config else None), rest
    known, _ = _split_off(arguments, "--resume-from", "--checkpoint-dir")
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
        command, config, dry = parse(sys.argv[1:] if arguments is None else arguments)
        _log_to_stderr(getattr(config, "log_level", "INFO"))
        if dry:
            from elmlib.foresight import foresee

            print("\n".join(["dry run, nothing is written:", *foresee(config)]))
            return
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
    lines = [f"  {name:<12}{(command.run.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: elm COMMAND [--help] ...", "", "commands, in the order of the work:", *lines, "", "examples:"]
        + [f"  {command.examples[0]}" for command in COMMANDS.values()]
        + ["", f"presets: {', '.join(filter(None, PRESETS))}", f"exit codes: {EXIT_CODES}"]
    )


if __name__ == "__main__":
    main()
