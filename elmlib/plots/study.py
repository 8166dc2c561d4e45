"""Plots of a study and of a grid of variants. Optuna's own plots are used where there is one."""

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from elmlib.config import InputError
from elmlib.plots.curves import SHUFFLED, TRAIN, TRUE, style
from elmlib.study.results import best_trial, importance
from elmlib.study.search_space import DEFAULTS

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN = 6  # parameters in the slices, those of most importance
_CONTOURS = 3


def plot_reports(study: optuna.Study, ax: "Axes") -> None:
    """Draw the reports of each ended trial as a line, the best one bold, and a cross where one was pruned."""
    best, pruned = best_trial(study), 0
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        if points := sorted(trial.intermediate_values.items()):
            x, y = zip(*points, strict=True)
            shown: dict[str, Any] = {"color": TRAIN, "linewidth": 1}
            if best and trial.number == best.number:
                shown = {"color": TRUE, "linewidth": 2.5, "zorder": 3, "label": f"trial {trial.number}, the best"}
            ax.plot(x, y, **shown)
            if trial.state == TrialState.PRUNED:
                pruned += 1
                ax.plot(x[-1:], y[-1:], "x", color=SHUFFLED, zorder=4)
    ax.plot([], [], "x", color=SHUFFLED, label=f"pruned ({pruned})")
    style(ax, "report (equal shares of the data)", "objective")
    ax.legend(frameon=False)


def plot_drift(study: optuna.Study, ax: "Axes") -> None:
    """Draw drift similarity and BERTScore composite of each trial's best evaluation as a dot, and its control."""
    for name, colour, label in (
        ("bertscore_composite", TRUE, "true embeddings"),
        ("bertscore_composite_shuffled", SHUFFLED, "shuffled embeddings"),
    ):
        values = [trial.user_attrs for trial in study.get_trials(deepcopy=False) if name in trial.user_attrs]
        x, y = ([each[column] for each in values] for column in ("drift_similarity", name))
        ax.plot(x, y, "o", color=colour, alpha=0.7, label=label)
    style(ax, "drift similarity (cosine)", "BERTScore composite (raw)")
    ax.legend(frameon=False)


def draw_study(study: optuna.Study) -> "dict[str, Figure]":
    """All plots of a study by name: history, reports, drift, and with enough complete trials importance, parallel,
    slice and contour. Raises InputError for a study without a complete trial."""
    from matplotlib.figure import Figure
    from optuna.visualization import matplotlib as drawn

    if best_trial(study) is None:
        raise InputError(f"study {study.study_name!r} has no complete trial; there is nothing to draw yet")
    figures = {
        "reports": Figure(figsize=(8, 3.6), layout="constrained"),
        "drift": Figure(figsize=(5, 3.6), layout="constrained"),
    }
    plot_reports(study, figures["reports"].subplots())
    plot_drift(study, figures["drift"].subplots())
    ranked = list(importance(study))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        figures["history"] = _closed(drawn.plot_optimization_history(study), (8, 3.6))
        if ranked:
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
        style(ax, label)
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
