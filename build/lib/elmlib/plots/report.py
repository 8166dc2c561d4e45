"""Ranks, similarities and baselines of a run: `*_info` reads files, `plot_*` draws. No torch here."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from elmlib.evaluation.metrics import correlation
from elmlib.evaluation.report import read_predictions
from elmlib.plots.curves import SHUFFLED, TRAIN, TRUE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Ranks(NamedTuple):
    """How n summaries rank their own reference among all, in bins that double in width: 1, 2, 3-4, 5-8, ..."""

    ranks: np.ndarray
    """(n,) int from 1, which is best, to num_sources."""
    num_sources: int
    edges: np.ndarray
    """(bins + 1,) int; bin i holds the ranks from edges[i] to edges[i + 1] - 1."""
    counts: np.ndarray
    """(bins,) summaries."""
    chance: np.ndarray
    """(bins,) summaries to expect if every rank is equally likely."""

    @property
    def labels(self) -> list[str]:
        """(bins,) the ranks in each bin, as text."""
        bins = zip(self.edges[:-1].tolist(), (self.edges[1:] - 1).tolist(), strict=True)
        return [f"{first}" if first == last else f"{first}-{last}" for first, last in bins]


def ranks_info(run: Path) -> Ranks:
    """The ranks in `run`/predictions.jsonl.

    Raises FileNotFoundError where there is none and ValueError where its lines have no rank or one beyond its sources.
    """
    path = Path(run) / "predictions.jsonl"
    lines = read_predictions(path, "rank", "source_id", "embedding_index")
    ranks = np.array([values["rank"] for values in lines], dtype=int)
    # The embedding identifies a record without source_id, as in `Record.source`.
    total = len({values["source_id"] or values["embedding_index"] for values in lines})
    if ranks.min() < 1 or ranks.max() > total:
        raise ValueError(f"{path}: ranks from {ranks.min()} to {ranks.max()} among {total} sources")
    doubling = 1 + 2 ** np.arange(int(total).bit_length())
    edges = np.array([1, *doubling[doubling <= total], total + 1])
    counts = np.histogram(ranks, edges)[0]
    return Ranks(ranks, total, edges, counts, len(ranks) * np.diff(edges) / total)


def plot_ranks(info: Ranks, ax: "Axes") -> None:
    """Draw the ranks as bars, and as a line what chance would give."""
    places = np.arange(len(info.counts))
    ax.bar(places, info.counts, color=TRUE, label="summaries")
    ax.plot(places, info.chance, color=SHUFFLED, marker="o", linestyle="--", label="chance")
    ax.set_xticks(places, info.labels)
    ax.set_title(f"own reference first in {(info.ranks == 1).mean():.1%}, by chance in {1 / info.num_sources:.1%}")
    ax.set_xlabel(f"rank of the own reference among {info.num_sources}")
    ax.set_ylabel("summaries")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


class Similarities(NamedTuple):
    """Similarity of n summaries and their sources: as the drift loss sees it, and as the summaries have it."""

    predicted: np.ndarray
    """(n,) cosine, -1 to 1: what the drift head reads out of the predicted tokens under teacher forcing."""
    true: np.ndarray
    """(n,) cosine, -1 to 1, of the re-embedded summary; 0 for an empty one."""
    correlation: float
    """Pearson's, -1 to 1; 0 where either is constant."""


def similarity_info(run: Path) -> Similarities:
    """Both similarities in `run`/predictions.jsonl; raises as `read_predictions` does."""
    path = Path(run) / "predictions.jsonl"
    lines = read_predictions(path, "drift_similarity")
    name = "predicted_similarity"
    if name not in lines[0]:  # runs of earlier versions have the other name
        name = "training_similarity" if "training_similarity" in lines[0] else name
    lines = read_predictions(path, name, "drift_similarity")
    predicted, true = (np.array([values[column] for values in lines]) for column in (name, "drift_similarity"))
    return Similarities(predicted, true, correlation(predicted, true))


def plot_similarity(info: Similarities, ax: "Axes") -> None:
    """Draw a dot for each summary, Pearson's r as the title, and the line of equal similarities."""
    ax.axline((0, 0), slope=1, color=TRAIN, linestyle="--", linewidth=1, label="equal")
    ax.plot(info.predicted, info.true, "o", color=TRUE, alpha=0.6, label="one summary")
    ax.set_title(f"Pearson r = {info.correlation:.2f} over {len(info.true)} summaries")
    ax.set_xlabel("predicted similarity, of the loss (cosine)")
    ax.set_ylabel("drift similarity, of the summary (cosine)")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


class BaselineF1(NamedTuple):
    """BERTScore F1 of the adapter and each baseline of a report, raw, the adapter first."""

    names: list[str]
    f1: np.ndarray
    """(systems,) means."""
    low: np.ndarray
    """(systems,) lower end of the 95% interval, as `high` is the upper."""
    high: np.ndarray


def report_info(path: Path) -> BaselineF1:
    """F1 in the CSV that `elm report --output` wrote; raises FileNotFoundError, and ValueError for another table."""
    import pandas

    frame = pandas.read_csv(path, index_col=0)
    columns = ("bertscore_f1", "bertscore_f1_low", "bertscore_f1_high")
    if missing := [column for column in columns if column not in frame]:
        raise ValueError(f"{path} has no column {missing[0]!r}; expected what `elm report --output` writes")
    return BaselineF1(frame.index.tolist(), *(frame[column].to_numpy() for column in columns))


def plot_report(info: BaselineF1, ax: "Axes") -> None:
    """Draw each mean with its interval, and the adapter's mean as a vertical line."""
    for place, name in enumerate(info.names):
        colour = TRUE if place == 0 else SHUFFLED if "shuffled" in name else TRAIN
        ax.plot([info.low[place], info.high[place]], [place, place], color=colour, linewidth=2)
        ax.plot([info.f1[place]], [place], "o", color=colour)
    ax.axvline(info.f1[0], color=TRUE, linestyle="--", linewidth=1)
    ax.set_yticks(range(len(info.names)), info.names)
    ax.invert_yaxis()
    ax.set_xlabel("BERTScore F1 (raw), mean and 95% interval")
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def draw_report(path: Path) -> "Figure":
    """One figure with `plot_report` of a CSV file."""
    from matplotlib.figure import Figure

    info = report_info(path)
    figure = Figure(figsize=(8, 1.2 + 0.36 * len(info.names)), layout="constrained")
    plot_report(info, figure.subplots())
    return figure
