"""Loggers of a run: a progress bar, metrics.jsonl, Weights & Biases. This module imports no torch."""

import json
from pathlib import Path
from typing import NamedTuple, Protocol

from tqdm.auto import tqdm

from elmlib.config import InputError, SummaryTrainingConfig
from elmlib.data.records import atomic_path, parse_line


class MetricsRow(NamedTuple):
    """One line of metrics.jsonl."""

    kind: str  # `step` or `eval`
    step: int  # Optimizer steps done
    epoch: float  # Passes over the training rows done
    values: dict[str, float]


class RunLogger(Protocol):
    """Takes the rows of a run."""

    def log(self, row: MetricsRow) -> None:
        """Take one row."""

    def close(self) -> None:
        """Called when the run ends, also when it fails."""


class ProgressBar:
    """A tqdm bar: text in a terminal, a widget in a notebook."""

    def __init__(self, total_steps: int, done_steps: int):
        self._bar = tqdm(total=total_steps, initial=done_steps, desc="train", unit="step")
        self._shown: dict[str, str] = {}

    def log(self, row: MetricsRow) -> None:
        """Advance at a step; show the loss, and the composite beside its shuffled control."""
        if row.kind == "step":
            self._bar.update(1)
            self._shown["loss"] = f"{row.values['loss']:.3f}"
        else:
            composite, control = row.values["bertscore_composite"], row.values["bertscore_composite_shuffled"]
            self._shown["composite"] = f"{composite:.3f} (shuffled {control:.3f})"
        self._bar.set_postfix(self._shown, refresh=row.kind == "eval")

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class MetricsLog:
    """metrics.jsonl, one row a line, flushed as it is written."""

    def __init__(self, path: Path, done_steps: int):
        """Rows after `done_steps`, and an incomplete last line, are removed: a resumed run repeats them."""
        kept = [row for row in read_metrics(path) if row.step <= done_steps] if done_steps and path.exists() else []
        with atomic_path(path) as temporary:
            temporary.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)

    def log(self, row: MetricsRow) -> None:
        """Append one line."""
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(row: MetricsRow) -> str:
    return json.dumps({"kind": row.kind, "step": row.step, "epoch": row.epoch} | row.values) + "\n"


def read_metrics(path: Path) -> list[MetricsRow]:
    """The rows of a metrics.jsonl; an incomplete last line, of a killed run, is left out. Raises FileNotFoundError for
    no such file and InputError for a broken line, naming it."""
    rows = []
    for number, line in enumerate(Path(path).expanduser().read_bytes().splitlines(keepends=True), start=1):
        if line.endswith(b"\n"):
            values = parse_line(line, f"{path}, line {number}")
            named = values if isinstance(values, dict) else {}
            kind, step, epoch = (named.pop(name, None) for name in ("kind", "step", "epoch"))
            numbers = all(isinstance(value, int | float) for value in (epoch, *named.values()))
            if not isinstance(kind, str) or not isinstance(step, int) or not numbers:
                raise InputError(f"{path}, line {number}: expected a kind, a step and numbers, found {line!r:.80}")
            rows.append(MetricsRow(kind, step, epoch, named))
    return rows


class WandbLog:
    """A Weights & Biases run; WANDB_MODE=offline needs neither network nor account."""

    def __init__(self, config: SummaryTrainingConfig):
        import wandb  # only here: without --wandb it is never imported

        try:
            self._run = wandb.init(
                project=config.wandb_project, name=config.wandb_run_name or None, group=config.wandb_group or None,
                dir=config.checkpoint_dir, config=config.identity(),
            )  # fmt: skip
        except (wandb.Error, ValueError) as error:  # of wandb: account, server, a variable that it does not know
            raise InputError(f"wandb does not start (WANDB_... in the environment): {error}") from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, row: MetricsRow) -> None:
        """Log `train/...` at a step and `val/...` at an evaluation, over the optimizer step."""
        prefix = "train" if row.kind == "step" else "val"
        self._run.log({"step": row.step, "epoch": row.epoch} | {f"{prefix}/{k}": v for k, v in row.values.items()})

    def close(self) -> None:
        """Finish the run: everything is on disk or uploaded."""
        self._run.finish()
