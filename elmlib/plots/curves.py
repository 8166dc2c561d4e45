"""Curves of a run, also while it trains, and the map of its texts. No torch here: a plot needs only files."""

import time
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elmlib.training.loggers import MetricsRow, read_metrics

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUE, SHUFFLED, TRAIN = "#1f5fa8", "#d1662a", "#9a9a9a"

_PANELS = (
    # Title, figure of a step, figure of an evaluation, which has a shuffled control.
    ("NLL (nats per token)", "nll", "val_nll"),
    ("drift similarity of the summaries (cosine)", "", "drift_similarity"),
    ("BERTScore F1 (raw)", "", "bertscore_f1"),
    # An axis of its own: another quantity than the drift similarity of validation.
    ("predicted similarity in the loss (cosine)", "predicted_similarity", ""),
)
_SMOOTHED = 20  # steps in the running mean of a training curve
_PAUSE = 10.0  # least seconds between two drawings of the training loss
_SHARE = 0.03  # of the time that these drawings may take


def curves_info(run: Path) -> "tuple[pandas.DataFrame, pandas.DataFrame]":
    """All figures in `run`/metrics.jsonl by optimizer step: of the steps, and of the evaluations. Raises
    FileNotFoundError where there is no such file."""
    import pandas

    rows = read_metrics(Path(run) / "metrics.jsonl")
    steps, evaluations = (
        pandas.DataFrame([{"step": row.step} | row.values for row in rows if row.kind == kind])
        for kind in ("step", "eval")
    )
    return steps.rename(columns={"drift_similarity": "predicted_similarity"}), evaluations  # its name in old runs


def draw_curves(run: Path) -> "Figure":
    """NLL, drift similarity and BERTScore F1, each with its shuffled control, and what the drift loss sees. The last
    panel is left out for a run without the drift loss."""
    from matplotlib.figure import Figure

    steps, evaluations = curves_info(run)
    panels = [panel for panel in _PANELS if panel[2] or panel[1] in steps]
    figure = Figure(figsize=(4.3 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for ax, (title, trained, evaluated) in zip(axes, panels, strict=True):
        if trained in steps:
            smooth = steps[trained].rolling(_SMOOTHED, min_periods=1).mean()
            ax.plot(steps.step, smooth, color=TRAIN, label="training")
        if {evaluated, f"{evaluated}_shuffled"} <= {*evaluations}:
            x, true, shuffled = (evaluations[name] for name in ("step", evaluated, f"{evaluated}_shuffled"))
            ax.plot(x, true, color=TRUE, marker="o", label="validation, true embeddings")
            ax.plot(x, shuffled, color=SHUFFLED, marker="o", linestyle="--", label="validation, shuffled embeddings")
        ax.set_title(title, fontsize="medium")
        style(ax, "optimizer step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def style(ax: "Axes", across: str, up: str = "") -> None:
    """Label the axes, and draw a light grid and no frame."""
    ax.set(xlabel=across, ylabel=up)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


class LiveCurves:
    """A `RunLogger` that shows the curves of `run` in a notebook while it trains. They are drawn at each evaluation,
    and between evaluations so rarely that drawing takes at most 3 % of the time."""

    def __init__(self, run: Path):
        self.run = Path(run)
        self._shown: Any = None
        self._next = 0.0

    def log(self, row: MetricsRow) -> None:
        """Draw all rows so far, if it is time to."""
        if row.kind == "eval" or time.monotonic() > self._next:
            self.close()

    def close(self) -> None:
        """Draw the run as it is."""
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


def draw_map(points: np.ndarray, groups: Sequence[str], chosen: int, shown: int = 8) -> "Figure":
    """Points (n, 2), the `shown` largest groups in colours of their own, and a ring around the chosen one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    ax = figure.subplots()
    common = [group for group, _ in Counter(groups).most_common(shown)]
    labels = np.array([group if group in common else "others" for group in groups])
    for label in ["others", *common]:
        if (own := labels == label).any():
            ax.scatter(
                points[own, 0], points[own, 1], s=14, color="#cccccc" if label == "others" else None, label=label
            )
    ax.scatter(points[chosen, 0], points[chosen, 1], s=160, facecolors="none", edgecolors="black", linewidths=2)
    style(ax, "first principal component", "second principal component")
    ax.legend(fontsize="small", frameon=False, loc="best")
    return figure
