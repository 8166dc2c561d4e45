"""A benchmark's results as pictures."""

import math
from typing import TYPE_CHECKING, Any

from elmlib.benchmark_tables import GIB, MEMORY, Comparison, Result, compare, filter_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, TWIN, BOUND = "#1f5fa8", "#d1662a", "#555555"


def plot_ratios(comparisons: list[Comparison], ax: "Axes") -> None:
    """How many times faster than its twin each part is, on a logarithmic axis, with what was asked as a mark."""
    shown = [it for it in comparisons if "naive" in it.what or "row by row" in it.what or "library" in it.what
             or "GGUF" in it.what or "first" in it.what][::-1]  # fmt: skip
    ax.barh([it.what for it in shown], [it.value for it in shown], color=OURS)
    for place, it in enumerate(shown):
        ax.plot([it.low, it.high], [place, place], color="black", linewidth=1)
        if not math.isnan(it.at_least):
            ax.plot([it.at_least] * 2, [place - 0.4, place + 0.4], color=TWIN, linewidth=2)
        ax.annotate(f" {it.value:.1f}", (it.high, place), va="center", fontsize=8)
    ax.set_xscale("log")
    ax.axvline(1, color=BOUND, linewidth=0.8)
    ax.set_xlabel("times as fast (line: least and most of the turns; orange: asked)")


def plot_filter(results: list[Result], ax: "Axes") -> None:
    """Cost of a line against the size of the corpus: flat, where nothing grows faster than the corpus."""
    lines = [result.facts["lines"] for result in results]
    for name, colour in (("naive", TWIN), ("elmlib", OURS)):
        costs = [1e6 * result.timing(name).median / result.facts["lines"] for result in results]
        ax.plot(lines, costs, marker="o", color=colour, label=name)
    ax.set_xscale("log")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("lines in the corpus")
    ax.set_ylabel("microseconds a line")
    ax.legend()


def plot_memory(points: list[dict[str, Any]], ax: "Axes") -> None:
    """Peak memory of a step against batch size x answer length, measured and as `elm plan` foretells it."""
    for checkpointing, colour in ((False, OURS), (True, TWIN)):
        mine = sorted((p for p in points if p["checkpointing"] == checkpointing), key=_tokens)
        label = "gradient checkpointing" if checkpointing else "plain"
        ax.plot([_tokens(p) for p in mine], [p["peak_bytes"] / GIB for p in mine], "o", color=colour, label=label)
        planned = [p["planned_bytes"] / GIB for p in mine]
        ax.plot([_tokens(p) for p in mine], planned, color=colour, linewidth=1, label=f"{label}, planned")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("batch size x answer tokens")
    ax.set_ylabel("peak memory of a step (GiB)")
    ax.legend()


def _tokens(point: dict[str, Any]) -> int:
    return point["batch_size"] * point["answer_tokens"]


def draw_benchmark(about: dict[str, Any], results: dict[str, Result]) -> "Figure":
    """All pictures that the results allow, side by side."""
    from matplotlib.figure import Figure

    draws = [lambda ax: plot_ratios(compare(about, results), ax)]
    if filters := filter_results(results):
        draws.append(lambda ax: plot_filter(filters, ax))
    if MEMORY in results:
        draws.append(lambda ax: plot_memory(results[MEMORY].facts["points"], ax))
    figure = Figure(figsize=(6.5 * len(draws), 5), layout="constrained")
    for draw, ax in zip(draws, figure.subplots(1, len(draws), squeeze=False)[0], strict=True):
        draw(ax)
        ax.spines[["top", "right"]].set_visible(False)
    return figure
