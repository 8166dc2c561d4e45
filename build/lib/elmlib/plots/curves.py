"""Curves of a run, also while it trains, and the map of its texts. No torch here: a plot needs only files."""

import time
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from elmlib.training.loggers import MetricsRow, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUE, SHUFFLED, TRAIN = "#1f5fa8", "#d1662a", "#9a9a9a"

_PAUSE = 10.0  # least seconds between two drawings of the training loss
_SHARE = 0.03  # of the time that these drawings may take


class Series(NamedTuple):
    """One line of a plot: (n,) optimizer steps and (n,) values."""

    steps: np.ndarray
    values: np.ndarray


class Curves(NamedTuple):
    """A run's curves; each validation figure has its shuffled control."""

    train_nll: Series
    val_nll: Series
    val_nll_shuffled: Series
    predicted: Series
    """What the drift loss sees, in place of the similarity of a written summary; empty without that loss."""
    val_drift: Series
    val_drift_shuffled: Series
    bertscore: Series
    bertscore_shuffled: Series


def curves_info(run: Path) -> Curves:
    """The curves in `run`/metrics.jsonl; raises FileNotFoundError where there is none."""
    rows = read_metrics(Path(run) / "metrics.jsonl")
    predicted = _series(rows, "step", "predicted_similarity")
    return Curves(
        train_nll=_series(rows, "step", "nll"),
        val_nll=_series(rows, "eval", "val_nll"),
        val_nll_shuffled=_series(rows, "eval", "val_nll_shuffled"),
        # Runs of earlier versions call it drift_similarity.
        predicted=predicted if len(predicted.steps) else _series(rows, "step", "drift_similarity"),
        val_drift=_series(rows, "eval", "drift_similarity"),
        val_drift_shuffled=_series(rows, "eval", "drift_similarity_shuffled"),
        bertscore=_series(rows, "eval", "bertscore_f1"),
        bertscore_shuffled=_series(rows, "eval", "bertscore_f1_shuffled"),
    )


def _series(rows: list[MetricsRow], kind: str, name: str) -> Series:
    pairs = [(row.step, row.values[name]) for row in rows if row.kind == kind and name in row.values]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return Series(np.array(steps, dtype=int), np.array(values, dtype=float))


def smooth(series: Series, window: int = 20) -> Series:
    """Running mean over the last `window` values, over fewer at the beginning."""
    import pandas

    return Series(series.steps, pandas.Series(series.values).rolling(window, min_periods=1).mean().to_numpy())


def plot_curves(curves: Curves, axes: "Sequence[Axes]") -> None:
    """Draw NLL, drift similarity and BERTScore F1, each with its shuffled control, and what the drift loss sees.

    These are four axes; the last one is left out where `curves.predicted` is empty. It is an axis of its own because
    it is another quantity than the drift similarity of validation.
    """
    panels: list[tuple[str, Series | None, Series | None, Series | None]] = [
        ("NLL (nats per token)", curves.train_nll, curves.val_nll, curves.val_nll_shuffled),
        ("drift similarity of the summaries (cosine)", None, curves.val_drift, curves.val_drift_shuffled),
        ("BERTScore F1 (raw)", None, curves.bertscore, curves.bertscore_shuffled),
    ]
    if len(curves.predicted.steps):
        panels.append(("predicted similarity in the loss (cosine)", curves.predicted, None, None))
    for ax, (title, train, true, shuffled) in zip(axes, panels, strict=True):
        if train is not None and len(train.steps):
            ax.plot(*smooth(train), color=TRAIN, label="training")
        if true is not None and shuffled is not None:
            ax.plot(*true, color=TRUE, marker="o", label="validation, true embeddings")
            ax.plot(*shuffled, color=SHUFFLED, marker="o", linestyle="--", label="validation, shuffled embeddings")
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel("optimizer step")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)


def draw_curves(run: Path) -> "Figure":
    """One figure with the panels of `plot_curves`."""
    from matplotlib.figure import Figure

    curves = curves_info(run)
    count = 4 if len(curves.predicted.steps) else 3
    figure = Figure(figsize=(4.3 * count, 4), layout="constrained")
    axes = list(figure.subplots(1, count))
    plot_curves(curves, axes)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


class LiveCurves:
    """A `RunLogger` that shows the curves of `run` in a notebook while it trains.

    They are drawn at each evaluation, and between evaluations so rarely that drawing takes at most 3 % of the time.
    """

    def __init__(self, run: Path):
        self.run = Path(run)
        self._shown: Any = None
        self._next = 0.0

    def log(self, row: MetricsRow) -> None:
        """Draw all rows so far, if it is time to."""
        if row.kind == "eval" or time.monotonic() > self._next:
            self._draw()

    def close(self) -> None:
        """Draw the run as it ended."""
        self._draw()

    def _draw(self) -> None:
        from IPython.display import DisplayHandle, Image

        started = time.monotonic()
        picture = Image(data=to_png(draw_curves(self.run), dpi=80))
        if self._shown:
            self._shown.update(picture)
        else:
            self._shown = DisplayHandle()
            self._shown.display(picture)
        now = time.monotonic()
        self._next = now + max(_PAUSE, (now - started) / _SHARE)


def to_png(figure: "Figure", dpi: int = 110) -> bytes:
    """The figure as the bytes of a PNG file."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def plot_map(points: np.ndarray, groups: Sequence[str], chosen: int, ax: "Axes", shown: int = 8) -> None:
    """Draw points (n, 2), the `shown` largest groups in colours of their own, and a ring around the chosen one."""
    common = [group for group, _ in Counter(groups).most_common(shown)]
    others = np.array([group not in common for group in groups])
    if others.any():
        ax.scatter(points[others, 0], points[others, 1], s=12, color="#cccccc", label="others")
    for group in common:
        own = np.array(groups) == group
        ax.scatter(points[own, 0], points[own, 1], s=14, label=group)
    x, y = points[chosen]
    ax.scatter(x, y, s=160, facecolors="none", edgecolors="black", linewidths=2)
    ax.set_xlabel("first principal component")
    ax.set_ylabel("second principal component")
    ax.legend(fontsize="small", frameon=False, loc="best")
    ax.spines[["top", "right"]].set_visible(False)


def draw_map(points: np.ndarray, groups: Sequence[str], chosen: int) -> "Figure":
    """One figure with `plot_map`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    plot_map(points, groups, chosen, figure.subplots())
    return figure
