"""A notebook that is a trial reports its evaluations, hears when to stop, and fits itself into a GPU's memory once."""

from dataclasses import replace

import optuna
import pytest
import torch

from elmlib import live
from elmlib.config import SummaryTrainingConfig
from elmlib.live import LiveTrial, join_trial, make_pruner
from elmlib.tracking import Row

CONFIG = SummaryTrainingConfig(batch_size=8, gradient_accumulation_steps=2)
EMPTY = {"empty_prediction_rate": 0.0, "short_prediction_rate": 0.0}


def evaluation(epoch: float, composite: float) -> Row:
    return Row("eval", round(100 * epoch), epoch, EMPTY | {"bertscore_composite": composite})


def test_each_evaluation_is_reported_once_at_its_share_of_the_data() -> None:
    trial = optuna.create_study(direction="maximize").ask()
    joined = LiveTrial(trial, evals_per_epoch=2, reports=4)
    for row in (evaluation(0, 0.1), evaluation(0.5, 0.2), Row("step", 60, 0.6, {}), evaluation(1, 0.3)):
        joined.log(row)
    joined.log(evaluation(1, 0.9))  # of a run that goes on from a checkpoint
    assert trial.study.trials[0].intermediate_values == {1: 0.2, 2: 0.3}
    assert joined.stop_reason() == ""


def test_empty_and_short_summaries_cost_what_the_plan_says() -> None:
    trial = optuna.create_study(direction="maximize").ask()
    rates = {"empty_prediction_rate": 0.2, "short_prediction_rate": 0.5}
    LiveTrial(trial, 1, 2).log(Row("eval", 1, 1.0, {"bertscore_composite": 0.4} | rates))
    assert trial.study.trials[0].intermediate_values[1] == pytest.approx(0.4 - 0.5 * 0.2 - 0.1 * 0.5)


def test_a_trial_below_the_median_stops_after_the_warm_up_and_not_at_its_last_report() -> None:
    study = optuna.create_study(direction="maximize", pruner=make_pruner(startup_trials=1, warmup_reports=2))
    first = LiveTrial(study.ask(), evals_per_epoch=2, reports=4)
    for number in range(1, 5):
        first.log(evaluation(number / 2, 0.4))
    study.tell(first.trial, 0.4)
    worse = LiveTrial(study.ask(), evals_per_epoch=2, reports=4)
    stopped = []
    for number in range(1, 5):
        worse.reason = ""
        worse.log(evaluation(number / 2, 0.1))
        stopped.append(bool(worse.stop_reason()))
    assert stopped == [False, True, True, False]


def test_a_trial_that_does_not_fit_is_run_once_more_in_half_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def train(config: SummaryTrainingConfig, *_: object, **__: object) -> str:
        tried.append((config.batch_size, config.gradient_accumulation_steps))
        if config.batch_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return "trained"

    monkeypatch.setattr(live, "train", train)
    trial = optuna.create_study().ask()
    assert LiveTrial(trial).train(CONFIG) == "trained"
    assert tried == [(8, 2), (4, 4)]
    assert trial.user_attrs["memory"] == "4 x 4 in the place of 8 x 2, which did not fit"
    tried.clear()
    with pytest.raises(torch.OutOfMemoryError):
        LiveTrial(optuna.create_study().ask()).train(replace(CONFIG, batch_size=16))
    assert tried == [(16, 2), (8, 4)]


def test_a_notebook_of_no_study_trains_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "train", lambda config: config)
    assert join_trial("").train(CONFIG) == CONFIG
