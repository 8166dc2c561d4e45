"""A finished study in pictures: `*_info` reads its trials, `plot_*` draws; what Optuna draws well is Optuna's."""

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

from elmlib.plots import SHUFFLED, TRAIN, TRUE
from elmlib.results import best_trial, importance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN = 6  # parameters in the slices, of those that matter most
_CONTOURS = 3


class TrialCurve(NamedTuple):
    """What one trial reported."""

    number: int
    pruned: bool
    reports: np.ndarray
    """(n,) int from 1."""
    values: np.ndarray
    """(n,) the objective."""


def reports_info(study: optuna.Study) -> list[TrialCurve]:
    """The reports of every trial that ended complete or pruned."""
    return [
        TrialCurve(
            trial.number,
            trial.state == TrialState.PRUNED,
            np.array(sorted(trial.intermediate_values), dtype=int),
            np.array([value for _, value in sorted(trial.intermediate_values.items())]),
        )
        for trial in _ended(study)
        if trial.intermediate_values
    ]


def plot_reports(curves: list[TrialCurve], best: int, ax: "Axes") -> None:
    """Draw a line a trial, the best one bold, and a cross where one was pruned."""
    for curve in curves:
        is_best = curve.number == best
        ax.plot(
            curve.reports, curve.values, color=TRUE if is_best else TRAIN, linewidth=2.5 if is_best else 1,
            zorder=3 if is_best else 1, label=f"trial {curve.number}, the best" if is_best else None,
        )  # fmt: skip
        if curve.pruned:
            ax.plot(curve.reports[-1:], curve.values[-1:], "x", color=SHUFFLED, zorder=4)
    ax.plot([], [], "x", color=SHUFFLED, label=f"pruned ({sum(curve.pruned for curve in curves)})")
    _style(ax, "report (equal shares of the data)", "objective")
    ax.legend(frameon=False)


class DriftAgainstScore(NamedTuple):
    """Over trials: does a summary that points where its source does also score?"""

    numbers: np.ndarray
    """(trials,) int."""
    drift: np.ndarray
    """(trials,) cosine of the re-embedded summary to its source, at the best evaluation."""
    composite: np.ndarray
    """(trials,) BERTScore composite, raw, and its shuffled control."""
    shuffled: np.ndarray


def drift_info(study: optuna.Study) -> DriftAgainstScore:
    """The best evaluation of every trial that had one."""
    rows = [trial for trial in _ended(study) if "drift_similarity" in trial.user_attrs]
    names = ("drift_similarity", "bertscore_composite", "bertscore_composite_shuffled")
    return DriftAgainstScore(
        np.array([trial.number for trial in rows], dtype=int),
        *(np.array([trial.user_attrs[name] for trial in rows], dtype=float) for name in names),
    )


def plot_drift(info: DriftAgainstScore, ax: "Axes") -> None:
    """Draw a dot a trial, and its control as a second dot."""
    ax.plot(info.drift, info.composite, "o", color=TRUE, label="true embeddings")
    ax.plot(info.drift, info.shuffled, "o", color=SHUFFLED, alpha=0.6, label="shuffled embeddings")
    _style(ax, "drift similarity (cosine)", "BERTScore composite (raw)")
    ax.legend(frameon=False)


def draw_study(study: optuna.Study) -> "dict[str, Figure]":
    """All pictures of a study by name: history, reports, drift, and with enough complete trials importance, parallel,
    slice and contour. Raises ValueError for a study without a complete trial."""
    best = best_trial(study)
    if best is None:
        raise ValueError(f"study {study.study_name!r} has no complete trial; there is nothing to show yet")
    figures = {"reports": _figure(lambda ax: plot_reports(reports_info(study), best.number, ax))}
    figures["drift"] = _figure(lambda ax: plot_drift(drift_info(study), ax), 5)
    from optuna.visualization import matplotlib as drawn

    ranked = list(importance(study)) or list(best.params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        figures["history"] = _taken(drawn.plot_optimization_history(study), (8, 3.6))
        if importance(study):
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            figures["importance"] = _taken(drawn.plot_param_importances(study, evaluator=evaluator), (8, 3.6))
            figures["parallel"] = _taken(drawn.plot_parallel_coordinate(study, ranked[:_SHOWN]), (11, 4))
            figures["slice"] = _taken(drawn.plot_slice(study, ranked[:_SHOWN]), (13, 3.2))
            figures["contour"] = _taken(drawn.plot_contour(study, ranked[:_CONTOURS]), (9, 8))
    return figures


def _taken(axes: Any, size: tuple[float, float]) -> "Figure":
    """The figure that Optuna drew, out of pyplot's hands, so that a notebook shows it where it is asked for."""
    from matplotlib import pyplot as plt

    figure = np.ravel(axes)[0].figure
    figure.set_size_inches(size)
    plt.close(figure)
    return figure


def _figure(draw: Any, width: float = 8) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.6), layout="constrained")
    draw(figure.subplots())
    return figure


def _style(ax: "Axes", across: str, up: str) -> None:
    ax.set_xlabel(across)
    ax.set_ylabel(up)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def _ended(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
