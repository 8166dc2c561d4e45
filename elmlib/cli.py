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

from elmlib import actions, benchmark_commands, commands, study_commands
from elmlib.config import SummaryTrainingConfig

logger = logging.getLogger("elmlib")


class Command(NamedTuple):
    """A sub-command: its settings, what it does, and an example."""

    config: type[Any]
    run: Callable[[Any], None]
    example: str


COMMANDS = {
    "corpus": Command(commands.CorpusConfig, actions.corpus, "elm corpus --limit 6000"),
    "filter": Command(commands.FilterConfig, actions.filter_, "elm filter --input-dir data/synthesis"),
    "train": Command(SummaryTrainingConfig, actions.train, "elm train --data-dir data/summary_filtered --epochs 2"),
    "generate": Command(
        commands.GenerateConfig, actions.generate,
        "elm generate --checkpoint data/checkpoints/best_summary_model.safetensors "
        "--input data/summary_filtered/test_synthesis.jsonl --output results/predictions.jsonl",
    ),
    "evaluate": Command(
        commands.EvaluateConfig, actions.evaluate,
        "elm evaluate --predictions results/predictions.jsonl "
        "--references data/summary_filtered/test_synthesis.jsonl",
    ),
    "report": Command(
        commands.ReportConfig, actions.report,
        "elm report --checkpoint data/checkpoints/best_summary_model.safetensors --candidates 8",
    ),
    "ablate": Command(commands.AblateConfig, actions.ablate, "elm ablate --train-seconds 150 --seeds 3"),
    "study": Command(study_commands.StudyConfig, actions.study, "elm study --trials 50 --jobs 2 --timeout 24"),
    "dashboard": Command(study_commands.DashboardConfig, actions.dashboard, "elm dashboard"),
    "reap": Command(study_commands.ReapConfig, actions.reap, "elm reap"),
    "plan": Command(
        benchmark_commands.PlanConfig, actions.plan,
        "elm plan --llm-model Qwen/Qwen3-4B-Instruct-2507 --batch-size 8 --gpu-memory 16GiB",
    ),
    "benchmark": Command(benchmark_commands.BenchmarkConfig, actions.benchmark, "elm benchmark --turns 3"),
    "demo": Command(commands.DemoConfig, actions.demo, "elm demo"),
    "study-demo": Command(study_commands.StudyDemoConfig, actions.study_demo, "elm study-demo"),
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


if __name__ == "__main__":
    main()
