"""Ranks, similarities and baselines of a run: `*_info` reads files, `plot_*` draws. No torch here."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from elmlib.config import InputError
from elmlib.evaluation.metrics import correlation
from elmlib.evaluation.report import read_predictions
from elmlib.plots.curves import SHUFFLED, TRAIN, TRUE, style

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def ranks_info(run: Path) -> "pandas.DataFrame":
    """How the summaries in `run`/predictions.jsonl rank their own reference among all, 1 is best. One row a bin of
    ranks, which double in width: 1, 2, 3-4, 5-8, ...; columns `summaries`, and `chance`: the summaries to expect if
    every rank is equally likely. Raises FileNotFoundError where there is no such file and InputError where its lines
    have no rank or one beyond its sources."""
    import pandas

    path = Path(run) / "predictions.jsonl"
    lines = pandas.DataFrame(read_predictions(path, "rank", "source_id", "embedding_index"))
    # The embedding identifies a record without source_id, as in `Record.source`.
    total = lines.source_id.where(lines.source_id != "", lines.embedding_index).nunique()
    if not lines["rank"].between(1, total).all():
        raise InputError(f"{path}: ranks from {lines['rank'].min()} to {lines['rank'].max()} among {total} sources")
    doubling = 1 + 2 ** np.arange(int(total).bit_length())
    edges = np.array([1, *doubling[doubling <= total], total + 1])
    bins = zip(edges[:-1].tolist(), (edges[1:] - 1).tolist(), strict=True)
    labels = [f"{first}" if first == last else f"{first}-{last}" for first, last in bins]
    counts = np.histogram(lines["rank"], edges)[0]
    return pandas.DataFrame({"summaries": counts, "chance": len(lines) * np.diff(edges) / total}, index=labels)


def plot_ranks(info: "pandas.DataFrame", ax: "Axes") -> None:
    """Draw the ranks of `ranks_info` as bars, and as a line what chance would give."""
    first, by_chance = info.iloc[0] / info.summaries.sum()
    ax.bar(info.index, info.summaries, color=TRUE, label="summaries")
    ax.plot(info.index, info.chance, color=SHUFFLED, marker="o", linestyle="--", label="chance")
    ax.set_title(f"own reference first in {first:.1%}, by chance in {by_chance:.1%}")
    style(ax, f"rank of the own reference among {round(1 / by_chance)}", "summaries")
    ax.legend(frameon=False)


def similarity_info(run: Path) -> "pandas.DataFrame":
    """Similarity of each summary in `run`/predictions.jsonl and its source (cosine, -1 to 1). `predicted_similarity` is
    what the drift loss sees under teacher forcing, `drift_similarity` that of the re-embedded summary, 0 for an empty
    one. Raises as `read_predictions` does."""
    import pandas

    path = Path(run) / "predictions.jsonl"
    old, names = "training_similarity", ["predicted_similarity", "drift_similarity"]
    if old not in pandas.DataFrame(read_predictions(path, names[1])):  # the name in earlier versions
        return pandas.DataFrame(read_predictions(path, *names))[names]
    return pandas.DataFrame(read_predictions(path)).rename(columns={old: names[0]})[names]


def plot_similarity(info: "pandas.DataFrame", ax: "Axes") -> None:
    """Draw a dot for each summary of `similarity_info` and the line of equal similarities; the title is Pearson's r."""
    predicted, true = (info[name].to_numpy() for name in ("predicted_similarity", "drift_similarity"))
    ax.axline((0, 0), slope=1, color=TRAIN, linestyle="--", linewidth=1, label="equal")
    ax.plot(predicted, true, "o", color=TRUE, alpha=0.6, label="one summary")
    ax.set_title(f"Pearson r = {correlation(predicted, true):.2f} over {len(info)} summaries")
    style(ax, "predicted similarity, of the loss (cosine)", "drift similarity, of the summary (cosine)")
    ax.legend(frameon=False)


def draw_report(path: Path) -> "Figure":
    """The mean F1 of each system in the CSV that `elm report --output` wrote, with its 95 % interval. The dashed line
    is the mean of the adapter, the first system. Raises InputError for another table."""
    import pandas
    from matplotlib.figure import Figure

    try:
        frame = pandas.read_csv(path, index_col=0)
    except ValueError as error:  # of pandas: no table, or other bytes
        raise InputError(f"{path} is no table: {error}") from error
    columns = ["bertscore_f1", "bertscore_f1_low", "bertscore_f1_high"]
    if bad := [column for column in columns if column not in frame or frame[column].dtype.kind not in "if"]:
        raise InputError(f"{path} has no column {bad[0]!r} of numbers; expected what `elm report --output` writes")
    mean, low, high = (frame[column] for column in columns)
    if frame.empty or not mean.between(low, high).all():
        raise InputError(f"{path}: no system, or a mean outside its interval; expected what `elm report` writes")
    figure = Figure(figsize=(8, 1.2 + 0.36 * len(frame)), layout="constrained")
    ax = figure.subplots()
    for place, (name, mean, low, high) in enumerate(frame[columns].itertuples()):
        colour = TRUE if place == 0 else SHUFFLED if "shuffled" in name else TRAIN
        ax.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, linewidth=2)
    ax.axvline(frame.bertscore_f1.iloc[0], color=TRUE, linestyle="--", linewidth=1)
    ax.set_yticks(range(len(frame)), frame.index)
    ax.invert_yaxis()
    style(ax, "BERTScore F1 (raw), mean and 95% interval")
    return figure
