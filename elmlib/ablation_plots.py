"""What an ablation found: its cells as one row a variant, in text and in a picture. No torch here: files are enough."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

DEFAULTS = "defaults"
"""The variant that the others are compared to."""

_SEED, _MEAN = "#9a9a9a", "#1f5fa8"


class Cell(NamedTuple):
    """One finished run of an ablation: a variant at a seed."""

    variant: str
    seed: int
    changes: dict[str, Any]
    """The settings in which the variant differs from the base, and their values."""
    metrics: dict[str, float]
    """Of the evaluation at the end of training, with `steps` and `train_seconds`."""
    environment: str
    """The machine and the torch that it ran on."""


FIGURES: dict[str, Callable[[Mapping[str, float]], float]] = {
    "f1": lambda metrics: metrics["bertscore_f1"],
    "f1_gap": lambda metrics: metrics["bertscore_f1"] - metrics["bertscore_f1_shuffled"],
    "nll_gap": lambda metrics: metrics["val_nll_shuffled"] - metrics["val_nll"],
    "top_1": lambda metrics: metrics["identification_top_1"],
    "mrr": lambda metrics: metrics["identification_mrr"],
    "consistency": lambda metrics: metrics["drift_similarity"],
}
"""Name -> what it is of one cell's metrics; more is better in all of them."""


class Spread(NamedTuple):
    """A figure over the seeds of a variant."""

    mean: float
    deviation: float
    """Sample standard deviation; NaN for one seed."""


class Row(NamedTuple):
    """One variant over its finished seeds."""

    variant: str
    seeds: int
    """Finished."""
    steps: float
    """Optimizer steps within the training time, mean."""
    f1: Spread
    """BERTScore F1, raw."""
    f1_gap: Spread
    """F1 minus F1 with shuffled embeddings."""
    nll_gap: Spread
    """NLL with shuffled embeddings minus NLL, nats per token."""
    top_1: Spread
    """Share of summaries that are nearest to their own reference."""
    mrr: Spread
    """Mean reciprocal rank of the own reference."""
    consistency: Spread
    """Cosine of the re-embedded summary to its source."""
    difference: float
    """F1 minus the defaults' F1 at the same seed, mean; NaN for the defaults and where no seed is common."""
    pairs: int
    """Seeds in that mean."""
    defaults_better: int
    """Those of them at which the defaults have the higher F1."""


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of at least one value."""
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan)


def aggregate(cells: Sequence[Cell]) -> list[Row]:
    """One row a variant, in the order in which the variants first appear among `cells`."""
    default_f1 = {cell.seed: FIGURES["f1"](cell.metrics) for cell in cells if cell.variant == DEFAULTS}
    rows = []
    for variant in dict.fromkeys(cell.variant for cell in cells):
        own = [cell for cell in cells if cell.variant == variant]
        differences = [
            FIGURES["f1"](cell.metrics) - default_f1[cell.seed]
            for cell in own
            if cell.seed in default_f1 and variant != DEFAULTS
        ]
        rows.append(
            Row(
                variant=variant,
                seeds=len(own),
                steps=float(np.mean([cell.metrics["steps"] for cell in own])),
                **{name: spread([figure(cell.metrics) for cell in own]) for name, figure in FIGURES.items()},
                difference=float(np.mean(differences)) if differences else math.nan,
                pairs=len(differences),
                defaults_better=sum(difference < 0 for difference in differences),
            )
        )
    return rows


def cells_frame(cells: Sequence[Cell]) -> "pandas.DataFrame":
    """One row a cell with all its metrics; `changes` is JSON."""
    import pandas

    return pandas.DataFrame(
        {"variant": cell.variant, "seed": cell.seed, "changes": json.dumps(cell.changes)}
        | cell.metrics
        | {"environment": cell.environment}
        for cell in cells
    )


def to_frame(rows: Sequence[Row]) -> "pandas.DataFrame":
    """One row a variant; a figure's standard deviation over seeds is `..._deviation` beside it."""
    import pandas

    return pandas.DataFrame([_flat(row) for row in rows]).set_index("variant")


def _flat(row: Row) -> dict[str, Any]:
    values = row._asdict()
    for name in FIGURES:
        values |= {name: values[name].mean, f"{name}_deviation": values[name].deviation}
    return values


def to_markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, its columns explained below it."""
    head = (
        "variant", "seeds", "steps", "F1", "F1 - shuffled", "NLL gap", "top-1", "MRR", "consistency",
        f"F1 - {DEFAULTS}", f"{DEFAULTS} better",
    )  # fmt: skip
    lines = [head, ("---",) + ("---:",) * (len(head) - 1)]
    for row in rows:
        compared = (f"{row.difference:+.3f}", f"{row.defaults_better} of {row.pairs}") if row.pairs else ("", "")
        figures = (_text(row.f1), _text(row.f1_gap, "+"), _text(row.nll_gap, "+"))
        means = (f"{row.top_1.mean:.2f}", f"{row.mrr.mean:.2f}", f"{row.consistency.mean:.3f}")
        lines.append((row.variant, str(row.seeds), f"{row.steps:.0f}", *figures, *means, *compared))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{table}\n\n"
        "Mean ± sample standard deviation over seeds. F1 is raw BERTScore F1; NLL gap is the NLL with shuffled\n"
        "embeddings minus the NLL, in nats per token; top-1 and MRR ask whether a summary is nearest to its own\n"
        f"reference; consistency is the cosine of the re-embedded summary to its source. F1 - {DEFAULTS} is paired\n"
        f"by seed, and the last column counts the seeds at which the {DEFAULTS} have the higher F1.\n"
    )


def _text(figure: Spread, sign: str = "") -> str:
    mean = f"{figure.mean:{sign}.3f}"
    return mean if math.isnan(figure.deviation) else f"{mean} ± {figure.deviation:.3f}"


def draw_ablation(cells: Sequence[Cell]) -> "Figure":
    """Each variant's F1 minus shuffled and NLL gap: a grey dot a seed, a blue bar at the mean, the defaults' mean as a
    vertical line."""
    from matplotlib.figure import Figure

    rows = aggregate(cells)
    figure = Figure(figsize=(11, 1.6 + 0.42 * len(rows)), layout="constrained")
    panels = (("f1_gap", "BERTScore F1 - F1 shuffled"), ("nll_gap", "NLL shuffled - NLL (nats per token)"))
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (name, label) in zip(axes, panels, strict=True):
        for place, row in enumerate(rows):
            values = [FIGURES[name](cell.metrics) for cell in cells if cell.variant == row.variant]
            ax.plot(values, [place] * len(values), "o", color=_SEED, alpha=0.8, label="" if place else "one seed")
            mean = getattr(row, name).mean
            ax.plot([mean], [place], "|", color=_MEAN, ms=16, mew=3, label="" if place else "mean over seeds")
            if row.variant == DEFAULTS:
                ax.axvline(mean, color=_MEAN, linestyle="--", linewidth=1, label=f"mean of the {DEFAULTS}")
        ax.set_xlabel(label)
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), [row.variant for row in rows])
    axes[0].invert_yaxis()  # shared, so of both
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure
