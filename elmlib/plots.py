"""Curves of a run: `curves_info` reads them, `plot_curves` draws them. No torch here: a plot needs only files."""

from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from elmlib.tracking import Row, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUE, SHUFFLED, TRAIN = "#1f5fa8", "#d1662a", "#9a9a9a"


class Series(NamedTuple):
    """One line of a plot: (n,) optimizer steps and (n,) values."""

    steps: np.ndarray
    values: np.ndarray


class Curves(NamedTuple):
    """A run's curves; each validation figure comes with its shuffled control."""

    train_nll: Series
    val_nll: Series
    val_nll_shuffled: Series
    train_drift: Series
    """Empty where the run had no text drift loss."""
    val_drift: Series
    val_drift_shuffled: Series
    bertscore: Series
    bertscore_shuffled: Series


def curves_info(run: Path) -> Curves:
    """The curves in `run`/metrics.jsonl; raises FileNotFoundError where there is none."""
    rows = read_metrics(Path(run) / "metrics.jsonl")
    return Curves(
        train_nll=_series(rows, "step", "nll"),
        val_nll=_series(rows, "eval", "val_nll"),
        val_nll_shuffled=_series(rows, "eval", "val_nll_shuffled"),
        train_drift=_series(rows, "step", "drift_similarity"),
        val_drift=_series(rows, "eval", "drift_similarity"),
        val_drift_shuffled=_series(rows, "eval", "drift_similarity_shuffled"),
        bertscore=_series(rows, "eval", "bertscore_f1"),
        bertscore_shuffled=_series(rows, "eval", "bertscore_f1_shuffled"),
    )


def _series(rows: list[Row], kind: str, name: str) -> Series:
    found = [(row.step, row.values[name]) for row in rows if row.kind == kind and name in row.values]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return Series(np.array(steps, dtype=int), np.array(values, dtype=float))


def smooth(series: Series, window: int = 20) -> Series:
    """Running mean over the last `window` values, over fewer at the beginning."""
    sums = np.cumsum(np.concatenate([[0.0], series.values]))
    stop = np.arange(1, len(series.values) + 1)
    start = np.maximum(0, stop - window)
    return Series(series.steps, (sums[stop] - sums[start]) / (stop - start))


def plot_curves(curves: Curves, axes: "list[Axes]") -> None:
    """Draw loss, drift similarity and BERTScore F1 on three axes, the shuffled control as the second line."""
    panels = (
        ("NLL (nats per token)", curves.train_nll, curves.val_nll, curves.val_nll_shuffled),
        ("drift similarity (cosine)", curves.train_drift, curves.val_drift, curves.val_drift_shuffled),
        ("BERTScore F1 (raw)", None, curves.bertscore, curves.bertscore_shuffled),
    )
    for ax, (title, train, true, shuffled) in zip(axes, panels, strict=True):
        if train is not None and len(train.steps):
            ax.plot(*smooth(train), color=TRAIN, label="training, as the loss sees it")
        ax.plot(*true, color=TRUE, marker="o", label="validation, true embeddings")
        ax.plot(*shuffled, color=SHUFFLED, marker="o", linestyle="--", label="validation, shuffled embeddings")
        ax.set_title(title)
        ax.set_xlabel("optimizer step")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)


def draw_curves(run: Path) -> "Figure":
    """One figure with the three panels of `plot_curves`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = list(figure.subplots(1, 3))
    plot_curves(curves_info(run), axes)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def to_png(figure: "Figure", dpi: int) -> bytes:
    """The figure as a PNG file's bytes, for a widget to show."""
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
