"""Plots of a study: `*_info` reads its trials, `plot_*` draws. Optuna's own plots are used where there is one."""

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

from elmlib.plots.curves import SHUFFLED, TRAIN, TRUE
from elmlib.study.results import best_trial, importance
from elmlib.study.search_space import DEFAULTS

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN = 6  # parameters in the slices, those of most importance
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
    """Drift similarity and BERTScore of every trial."""

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
    """All plots of a study by name: history, reports, drift, and with enough complete trials importance, parallel,
    slice and contour. Raises ValueError for a study without a complete trial."""
    best = best_trial(study)
    if best is None:
        raise ValueError(f"study {study.study_name!r} has no complete trial; there is nothing to draw yet")
    figures = {"reports": _figure(lambda ax: plot_reports(reports_info(study), best.number, ax))}
    figures["drift"] = _figure(lambda ax: plot_drift(drift_info(study), ax), 5)
    from optuna.visualization import matplotlib as drawn

    ranked = list(importance(study)) or list(best.params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        figures["history"] = _closed(drawn.plot_optimization_history(study), (8, 3.6))
        if importance(study):
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            figures["importance"] = _closed(drawn.plot_param_importances(study, evaluator=evaluator), (8, 3.6))
            figures["parallel"] = _closed(drawn.plot_parallel_coordinate(study, ranked[:_SHOWN]), (11, 4))
            figures["slice"] = _closed(drawn.plot_slice(study, ranked[:_SHOWN]), (13, 3.2))
            figures["contour"] = _closed(drawn.plot_contour(study, ranked[:_CONTOURS]), (9, 8))
    return figures


def draw_variants(cells: "pandas.DataFrame") -> "Figure":
    """F1 gap and NLL gap of each variant of a grid: a grey dot a seed, a blue bar at the mean, and a dashed line at the
    mean of the defaults. `cells` is the frame of `cells_frame`: one row a variant and seed."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(cells.variant))
    figure = Figure(figsize=(11, 1.6 + 0.42 * len(names)), layout="constrained")
    panels = {"f1_gap": "BERTScore F1 - F1 shuffled", "nll_gap": "NLL shuffled - NLL (nats per token)"}
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (figure_name, label) in zip(axes, panels.items(), strict=True):
        means = cells.groupby("variant", sort=False)[figure_name].mean()
        ax.plot(cells[figure_name], cells.variant.map(names.index), "o", color=TRAIN, alpha=0.8, label="one seed")
        ax.plot(means.to_numpy(), range(len(names)), "|", color=TRUE, ms=16, mew=3, label="mean over seeds")
        if DEFAULTS in means:
            ax.axvline(means[DEFAULTS], color=TRUE, linestyle="--", linewidth=1, label=f"mean of the {DEFAULTS}")
        _style(ax, label, "")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()  # shared, so of both
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _closed(axes: Any, size: tuple[float, float]) -> "Figure":
    """The figure that Optuna drew, closed in pyplot, so that a notebook shows it once."""
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
