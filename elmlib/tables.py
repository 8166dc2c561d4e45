"""Plain-text tables: scores beside their controls, summaries beside their references."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from elmlib.records import parse_line, read_lines

if TYPE_CHECKING:
    import pandas

_ROWS = (
    ("val_nll", "NLL (nats per token)"),
    ("bertscore_precision", "BERTScore precision"),
    ("bertscore_recall", "BERTScore recall"),
    ("bertscore_f1", "BERTScore F1"),
    ("bertscore_composite", "BERTScore composite"),
    ("bertscore_f1_rescaled", "BERTScore F1, rescaled"),
    ("drift_similarity", "drift similarity"),
)
_QUALITY = (
    ("identification_top_1", "own source first (top-1)"),
    ("identification_chance", "top-1 by chance"),
    ("identification_mrr", "own source (MRR)"),
    ("drift_correlation", "drift, trained x true (r)"),
    ("length_ratio", "length ratio"),
    ("empty_prediction_rate", "empty rate"),
    ("short_prediction_rate", "short rate (< 5 words)"),
    ("avg_unique_token_ratio", "unique-token ratio"),
    ("repeated_bigram_rate", "repeated bigrams"),
    ("distinct_prediction_rate", "distinct summaries"),
)
_TEXTS = ("source_id", "target_text", "prediction")


def score_rows(metrics: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Label, score with true embeddings and score with shuffled ones, for each score that has both."""
    return [
        (label, metrics[name], metrics[f"{name}_shuffled"])
        for name, label in _ROWS
        if name in metrics and f"{name}_shuffled" in metrics
    ]


def score_table(metrics: Mapping[str, Any]) -> str:
    """Each score with true embeddings, with shuffled ones, and the difference; then the form of the summaries."""
    lines = [f"{'':<26}{'true':>10}{'shuffled':>10}{'difference':>12}"]
    for label, true, shuffled in score_rows(metrics):
        lines.append(f"{label:<26}{true:>10.3f}{shuffled:>10.3f}{true - shuffled:>+12.3f}")
    lines += [f"{label:<26}{metrics[name]:>10.3f}" for name, label in _QUALITY if name in metrics]
    if "bertscore_hash" in metrics:
        lines.append(f"BERTScore settings: {metrics['bertscore_hash']}")
    return "\n".join(lines)


def read_predictions(path: Path, *fields: str) -> list[dict[str, Any]]:
    """The lines of a predictions file, each with at least `fields`.

    Raises FileNotFoundError for no such file and ValueError for an empty one or, naming it, for a line without them.
    """
    found = []
    for number, line in read_lines(path):
        values = parse_line(line, f"{path}, line {number}")
        if missing := [field for field in fields if field not in values]:
            raise ValueError(f"{path}, line {number} has no {missing[0]!r}, which a training run's predictions have")
        found.append(values)
    return found


def sample_table(predictions: Path, count: int = 5, width: int = 100) -> str:
    """The first `count` summaries of a predictions file, each under its reference."""
    lines = read_predictions(predictions, *_TEXTS)[:count]
    return "\n\n".join(
        _block(values["source_id"], values["target_text"], values["prediction"], width) for values in lines
    )


class Example(NamedTuple):
    """One summary and how it scored."""

    group: str
    """`best`, `median` or `worst`."""
    f1: float
    """BERTScore F1, raw."""
    rank: int
    """Of its own reference among all, 1 is best."""
    source_id: str
    target_text: str
    prediction: str


def examples_info(predictions: Path, count: int = 3) -> list[Example]:
    """By F1, the `count` best, middle and worst summaries of a predictions file, best first; none stands in two groups.

    A file of fewer than 3 x `count` lines gives a third of its lines to each group. Raises as `read_predictions` does,
    and ValueError for fewer than three lines or a `count` below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; expected at least 1")
    lines = read_predictions(predictions, "bertscore_f1", "rank", *_TEXTS)
    if len(lines) < 3:
        raise ValueError(f"{predictions} has {len(lines)} lines; best, median and worst need at least 3")
    lines.sort(key=lambda values: -values["bertscore_f1"])
    size = min(count, len(lines) // 3)
    starts = {"best": 0, "median": (len(lines) - size) // 2, "worst": len(lines) - size}
    return [
        Example(group, values["bertscore_f1"], values["rank"], *(values[name] for name in _TEXTS))
        for group, start in starts.items()
        for values in lines[start : start + size]
    ]


def examples_frame(examples: Sequence[Example]) -> "pandas.DataFrame":
    """One row an example."""
    import pandas

    return pandas.DataFrame(examples, columns=Example._fields).rename(columns={"f1": "bertscore_f1"})


def examples_table(examples: Sequence[Example], width: int = 100) -> str:
    """Each example's summary under its reference, with its F1 and rank."""
    return "\n\n".join(
        _block(f"{it.group}: F1 {it.f1:.3f}, rank {it.rank}, {it.source_id}", it.target_text, it.prediction, width)
        for it in examples
    )


def _block(head: str, reference: str, generated: str, width: int) -> str:
    wrapped = [
        textwrap.fill(f"{label}: {text or '(empty)'}", width, subsequent_indent=" " * 11)
        for label, text in (("reference", reference), ("generated", generated))
    ]
    return "\n".join([head, *wrapped])
