"""The notebook's side of a trial: it joins the trial while it runs, reports to it, and hears when to stop."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import optuna
from accelerate.utils import find_executable_batch_size
from optuna.pruners import MedianPruner

from elmlib.config import SummaryTrainingConfig
from elmlib.quality import objective
from elmlib.storage import STORAGE_VARIABLE, open_storage
from elmlib.tracking import Row, Tracker, read_metrics
from elmlib.trainer import TrainResult, train


class View(Tracker, Protocol):
    """Shows a run to the person before it, who may stop it."""

    def show(self) -> Self:
        """Begin to show."""

    def stop_reason(self) -> str:
        """Why the run should stop; empty while it should not."""


@dataclass
class LiveTrial:
    """What a training run tells to and hears from its trial, as one of its trackers; outside a study nothing."""

    trial: optuna.Trial | None = None
    evals_per_epoch: int = 1
    reports: int = 0
    """Reports that a whole run makes."""
    reason: str = ""
    """Why the run should stop; empty while it should not."""

    def log(self, row: Row) -> None:
        """Report the objective of an evaluation, and ask the pruner, but not after the last one: all is spent then."""
        if self.trial is None or row.kind != "eval":
            return
        number = round(row.epoch * self.evals_per_epoch)
        if number == 0 or number in self._reported():
            return
        value = objective(row.values)
        self.trial.report(value, number)
        if number < self.reports and self.trial.should_prune():
            self.reason = (
                f"pruned at report {number} of {self.reports}: {value:.4f}, and what it reached before is below the "
                "median of the trials before it"
            )

    def _reported(self) -> dict[int, float]:
        assert self.trial
        return self.trial.study._storage.get_trial(self.trial._trial_id).intermediate_values

    def stop_reason(self) -> str:
        """Asked by the run after each evaluation."""
        return self.reason

    def close(self) -> None:
        """The worker ends the trial, not its notebook."""

    def train(self, config: SummaryTrainingConfig, view: View | None = None) -> TrainResult:
        """Train; a trial that does not fit into the GPU's memory is run once more in half batches of twice as many.

        Its optimizer steps see the same rows; the trial's attribute `memory` says so. Outside a study `view` shows
        the run while it trains, and may stop it.
        """
        trial = self.trial
        if trial is None:
            return train(config, [view.show()], stop=view.stop_reason) if view else train(config)

        def halve() -> int:
            if halved or config.batch_size % 2:
                raise
            halved.append(config.batch_size // 2)
            return halved[0]

        @find_executable_batch_size(starting_batch_size=config.batch_size, reduce_batch_size_fn=halve)
        def attempt(batch_size: int) -> TrainResult:
            batches = config.gradient_accumulation_steps * config.batch_size // batch_size
            if halved:
                note = f"{batch_size} x {batches} in the place of {config.batch_size} x "
                trial.set_user_attr("memory", f"{note}{config.gradient_accumulation_steps}, which did not fit")
            fitting = replace(config, batch_size=batch_size, gradient_accumulation_steps=batches)
            return train(fitting, [self], stop=self.stop_reason)

        halved: list[int] = []
        return attempt()


def join_trial(folder: str) -> LiveTrial:
    """The trial whose folder that is, as the study's worker made it; for an empty one a `LiveTrial` of no study.

    The storage's address comes in the environment, since a notebook's parameters can be read by all. What an earlier
    attempt at the trial reported is reported again.
    """
    if not folder:
        return LiveTrial()
    told = json.loads(Path(folder, "trial.json").read_text(encoding="utf-8"))
    study = optuna.load_study(
        study_name=told["study"],
        storage=open_storage(os.environ[STORAGE_VARIABLE]),
        sampler=optuna.samplers.RandomSampler(),  # nothing is sampled here
        pruner=make_pruner(told["startup_trials"], told["warmup_reports"]),
    )
    live = LiveTrial(optuna.Trial(study, told["trial_id"]), told["evals_per_epoch"], told["reports"])
    metrics = Path(folder, "metrics.jsonl")
    for row in read_metrics(metrics) if metrics.is_file() else ():
        live.log(row)
    return replace(live, reason="")


def make_pruner(startup_trials: int, warmup_reports: int) -> MedianPruner:
    """Prunes a trial whose best report so far is below the median of the finished trials at the same report."""
    return MedianPruner(n_startup_trials=startup_trials, n_warmup_steps=warmup_reports)
