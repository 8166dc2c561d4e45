"""How well a run's summaries tell their sources: `*_info` reads files, `plot_*` draws. No torch here."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from elmlib.plots import SHUFFLED, TRAIN, TRUE
from elmlib.significance import correlation
from elmlib.tables import read_predictions

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
    """(bins,) summaries to expect where they tell nothing and every rank is as likely."""

    @property
    def labels(self) -> list[str]:
        """(bins,) the ranks in each bin, for a person."""
        bins = zip(self.edges[:-1].tolist(), (self.edges[1:] - 1).tolist(), strict=True)
        return [f"{first}" if first == last else f"{first}-{last}" for first, last in bins]


def ranks_info(run: Path) -> Ranks:
    """The ranks in `run`/predictions.jsonl.

    Raises FileNotFoundError where there is none and ValueError where its lines have no rank or one beyond its sources.
    """
    path = Path(run) / "predictions.jsonl"
    lines = read_predictions(path, "rank", "source_id", "embedding_index")
    ranks = np.array([values["rank"] for values in lines], dtype=int)
    # A record without source_id is told apart by its embedding, as `Record.source` does it.
    total = len({values["source_id"] or values["embedding_index"] for values in lines})
    if ranks.min() < 1 or ranks.max() > total:
        raise ValueError(f"{path}: ranks from {ranks.min()} to {ranks.max()} among {total} sources")
    doubling = 1 + 2 ** np.arange(int(total).bit_length())
    edges = np.array([1, *doubling[doubling <= total], total + 1])
    counts = np.histogram(ranks, edges)[0]
    return Ranks(ranks, total, edges, counts, len(ranks) * np.diff(edges) / total)


def plot_ranks(info: Ranks, ax: "Axes") -> None:
    """Draw the ranks as bars, and what chance alone would give as the second line."""
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
    """The drift similarity of n summaries to their sources, as the loss predicts it and as it came out."""

    predicted: np.ndarray
    """(n,) cosine, -1 to 1: what the drift head reads out of the predicted tokens under teacher forcing."""
    true: np.ndarray
    """(n,) cosine, -1 to 1, of the re-embedded summary; 0 for an empty one."""
    correlation: float
    """Pearson's, -1 to 1; 0 where either is constant."""


def similarity_info(run: Path) -> Similarities:
    """Both similarities in `run`/predictions.jsonl; raises as `read_predictions` does."""
    lines = read_predictions(Path(run) / "predictions.jsonl", "training_similarity", "drift_similarity")
    predicted, true = (np.array([v[name] for v in lines]) for name in ("training_similarity", "drift_similarity"))
    return Similarities(predicted, true, correlation(predicted, true))


def plot_similarity(info: Similarities, ax: "Axes") -> None:
    """Draw a dot a summary, Pearson's r in the title, and the line on which both similarities are equal."""
    ax.axline((0, 0), slope=1, color=TRAIN, linestyle="--", linewidth=1, label="equal")
    ax.plot(info.predicted, info.true, "o", color=TRUE, alpha=0.6, label="one summary")
    ax.set_title(f"Pearson r = {info.correlation:.2f} over {len(info.true)} summaries")
    ax.set_xlabel("predicted in training (cosine)")
    ax.set_ylabel("of the re-embedded summary (cosine)")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


class SystemF1(NamedTuple):
    """BERTScore F1 of each system of a scorecard, raw, the adapter first."""

    names: list[str]
    f1: np.ndarray
    """(systems,) means."""
    low: np.ndarray
    """(systems,) lower end of the 95% interval, as `high` is the upper."""
    high: np.ndarray


def scorecard_info(path: Path) -> SystemF1:
    """F1 in the CSV that `elm report --output` wrote; raises FileNotFoundError, and ValueError for another table."""
    import pandas

    frame = pandas.read_csv(path)
    columns = ("system", "bertscore_f1", "bertscore_f1_low", "bertscore_f1_high")
    if missing := [column for column in columns if column not in frame]:
        raise ValueError(f"{path} has no column {missing[0]!r}; expected what `elm report --output` writes")
    return SystemF1(frame["system"].tolist(), *(frame[column].to_numpy() for column in columns[1:]))


def plot_scorecard(info: SystemF1, ax: "Axes") -> None:
    """Draw a point with its interval a system, and the adapter's mean as a vertical line."""
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


def draw_scorecard(path: Path) -> "Figure":
    """One figure with `plot_scorecard` of a CSV file."""
    from matplotlib.figure import Figure

    info = scorecard_info(path)
    figure = Figure(figsize=(8, 1.2 + 0.36 * len(info.names)), layout="constrained")
    plot_scorecard(info, figure.subplots())
    return figure
