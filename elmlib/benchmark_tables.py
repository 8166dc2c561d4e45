"""A benchmark's results as tables of ratios. Reads benchmark.json; no torch here."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from elmlib.racing import Timing, ratio

if TYPE_CHECKING:
    import pandas

RESULTS = "benchmark.json"
SHORT, LONG = (f"training steps, {length} answers" for length in ("short", "long"))
MEMORY = "memory of a training step"
GIB = 2**30


class Result(NamedTuple):
    """One race, or a table of measurements."""

    name: str
    seconds: dict[str, list[float]]
    """Of each contestant, turn by turn."""
    facts: dict[str, Any]
    """Everything else that was measured, by name."""

    def timing(self, contestant: str) -> Timing:
        """How long one contestant took."""
        return Timing(tuple(self.seconds[contestant]))


class Comparison(NamedTuple):
    """A figure, and what it was asked to be."""

    what: str
    value: float
    low: float
    """The least of the turns; `value` itself where there are none."""
    high: float
    at_least: float = math.nan
    """NaN where nothing was asked."""
    at_most: float = math.nan

    @property
    def holds(self) -> str:
        """`yes` or `no`; empty where nothing was asked."""
        if math.isnan(self.at_least) and math.isnan(self.at_most):
            return ""
        return "no" if self.value < self.at_least or self.value > self.at_most else "yes"


_RATIOS: tuple[tuple[str, str, str, str, dict[str, float]], ...] = (
    ("short answers, NLL alone: naive / elmlib", SHORT, "naive, NLL", "elmlib, NLL", {"at_least": 4.0}),
    ("short answers, all losses: naive / elmlib", SHORT, "naive, all losses", "elmlib, all losses", {"at_least": 4.0}),
    ("short answers: all losses / NLL alone", SHORT, "elmlib, all losses", "elmlib, NLL", {"at_most": 1.25}),
    ("short answers: elmlib / bare LLM", SHORT, "elmlib, NLL", "floor, NLL", {"at_most": 1.08}),
    ("long answers, NLL alone: naive / elmlib", LONG, "naive, NLL", "elmlib, NLL", {"at_least": 1.4}),
    ("long answers, all losses: naive / elmlib", LONG, "naive, all losses", "elmlib, all losses", {"at_least": 1.4}),
    ("long answers: all losses / NLL alone", LONG, "elmlib, all losses", "elmlib, NLL", {"at_most": 1.25}),
    ("long answers: elmlib / bare LLM", LONG, "elmlib, NLL", "floor, NLL", {"at_most": 1.08}),
    ("generation: row by row / elmlib", "generation", "naive", "elmlib", {"at_least": 5.0}),
    ("BERTScore: library / elmlib", "BERTScore", "naive", "elmlib", {"at_least": 1.9}),
    ("BERTScore: library, encoder kept / elmlib", "BERTScore", "naive, encoder kept", "elmlib", {}),
    ("whole evaluation: naive / elmlib", "whole evaluation", "naive", "elmlib", {}),
    ("loading the LLM: GGUF / converted", "loading the LLM", "GGUF", "converted", {}),
    ("a study's trial: first / second", "trials of a study", "first", "second", {}),
)  # fmt: skip


def read_benchmark(folder: Path) -> tuple[dict[str, Any], dict[str, Result]]:
    """What `folder`/benchmark.json says of the machine, and its results by name; FileNotFoundError where it is not."""
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; `elm benchmark` writes it")
    values = json.loads(path.read_text(encoding="utf-8"))
    results = [Result(**result) for result in values["results"]]
    return values["about"], {result.name: result for result in results}


def compare(about: dict[str, Any], results: dict[str, Result]) -> list[Comparison]:
    """Every figure that the results allow, in the order of the work."""
    found = []
    for what, name, slow, fast, asked in _RATIOS:
        if name in results:
            found.append(_ratio(what, results[name], slow, fast, **asked))
    if "BERTScore" in results:
        found.append(_single("BERTScore: largest difference", results["BERTScore"].facts["difference"], at_most=1e-5))
    if (share := evaluation_share(about, results)) is not None:
        found.append(_single("a whole evaluation's share of a run", share, at_most=0.10))
    if filters := filter_results(results):
        largest = filters[-1]
        lines = largest.facts["lines"]
        found.append(_ratio(f"filter, {lines:,} lines: naive / elmlib", largest, "naive", "elmlib", at_least=3.0))
        peak = largest.facts["peak_bytes"]["elmlib"] / 1e6
        found.append(_single(f"filter, {lines:,} lines: peak memory (MB)", peak, at_most=500))
        if len(filters) > 1:
            costs = [result.timing("elmlib").median / result.facts["lines"] for result in filters]
            what = f"filter, cost of a line: {lines:,} / {filters[0].facts['lines']:,} lines"
            found.append(_single(what, costs[-1] / costs[0], at_most=1.25))
    if MEMORY in results:
        shares = [point["planned_bytes"] / point["peak_bytes"] for point in results[MEMORY].facts["points"]]
        middle = float(np.median(shares))
        found.append(Comparison("planned memory / measured", middle, min(shares), max(shares), 0.85, 1.15))
    return found


def _ratio(what: str, result: Result, slow: str, fast: str, **asked: float) -> Comparison:
    turns = np.divide(result.seconds[slow], result.seconds[fast])
    return Comparison(what, ratio(result.timing(slow), result.timing(fast)), turns.min(), turns.max(), **asked)


def _single(what: str, value: float, at_most: float) -> Comparison:
    return Comparison(what, value, value, value, at_most=at_most)


def evaluation_share(about: dict[str, Any], results: dict[str, Result]) -> float | None:
    """One whole evaluation's share of a run like the demo's: two epochs, five evaluations; None where unknown."""
    if not {"whole evaluation", SHORT} <= set(results):
        return None
    evaluation = results["whole evaluation"].timing("elmlib").median
    step = results[SHORT].timing("elmlib, all losses").median / results[SHORT].facts["batches"]
    training = 2 * math.ceil(about["training_rows"] / about["batch_size"]) * step
    return evaluation / (training + 5 * evaluation)


def filter_results(results: dict[str, Result]) -> list[Result]:
    """The filter's races, smallest corpus first."""
    found = [result for result in results.values() if result.name.startswith("filter, ")]
    return sorted(found, key=lambda result: result.facts["lines"])


def comparison_frame(comparisons: list[Comparison]) -> "pandas.DataFrame":
    """One row a figure."""
    import pandas

    rows = [{**comparison._asdict(), "holds": comparison.holds} for comparison in comparisons]
    return pandas.DataFrame(rows).set_index("what")


def tried_frame(results: dict[str, Result]) -> "pandas.DataFrame":
    """What was tried to make a step faster: its time over that of the step as it is, for short and for long answers."""
    import pandas

    rows: dict[str, dict[str, Any]] = {}
    for length in ("short", "long"):
        result = results[f"tried, {length} answers"]
        for name, notes in result.facts.items():
            row = rows.setdefault(name, {"kept": notes["kept"], "what": notes["about"]})
            if name in result.seconds:
                row[f"{length}: time / as it is"] = ratio(result.timing(name), Timing(tuple(notes["as_it_is"])))
                row[f"{length}: first turn (s)"] = notes["first_seconds"]
    return pandas.DataFrame.from_dict(rows, orient="index")


def work_frame(results: dict[str, Result]) -> "pandas.DataFrame":
    """Answer tokens and rows a second of elmlib's steps, and how much of the device's matrix products they use."""
    import pandas

    rows = {}
    for name in (SHORT, LONG):
        facts, seconds = results[name].facts, results[name].timing("elmlib, NLL").median
        rows[name] = {
            "step (s)": seconds / facts["batches"],
            "rows / s": facts["rows"] / seconds,
            "answer tokens / s": facts["answer_tokens"] / seconds,
            "TFLOP / s": facts["flops"] / seconds / 1e12,
            "utilisation": facts["flops"] / seconds / facts["matmul_flops_per_second"],
        }
        if "peak_bytes" in facts:
            rows[name]["peak memory (GiB)"] = facts["peak_bytes"] / GIB
    return pandas.DataFrame.from_dict(rows, orient="index")


def to_text(about: dict[str, Any], results: dict[str, Result]) -> str:
    """All tables, plain, the machine first."""
    parts = [", ".join(f"{name} {value}" for name, value in about.items())]
    if comparisons := compare(about, results):
        lines = [f"{'':<52}{'median':>10}{'turns':>24}{'asked':>18}{'holds':>7}"]
        for it in comparisons:
            bounds = (">=", it.at_least), ("<=", it.at_most)
            asked = ", ".join(f"{sign} {bound:g}" for sign, bound in bounds if not math.isnan(bound))
            turns = f"{it.low:.3g} to {it.high:.3g}"
            lines.append(f"{it.what:<52}{it.value:>10.3g}{turns:>24}{asked:>18}{it.holds:>7}")
        parts.append("\n".join(lines))
    if {SHORT, LONG} <= set(results):
        parts.append(work_frame(results).to_string(float_format="{:.3g}".format))
    if "tried, long answers" in results:
        parts.append(tried_frame(results).drop(columns="what").to_string(float_format="{:.3g}".format, na_rep="-"))
    return "\n\n".join(parts)
