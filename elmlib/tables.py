"""Plain-text tables: scores beside their controls, summaries beside their references."""

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    ("length_ratio", "length ratio"),
    ("empty_prediction_rate", "empty rate"),
    ("short_prediction_rate", "short rate (< 5 words)"),
    ("avg_unique_token_ratio", "unique-token ratio"),
    ("repeated_bigram_rate", "repeated bigrams"),
    ("distinct_prediction_rate", "distinct summaries"),
)


def score_table(metrics: Mapping[str, Any]) -> str:
    """Each score with true embeddings, with shuffled ones, and the difference; then the form of the summaries."""
    lines = [f"{'':<26}{'true':>10}{'shuffled':>10}{'difference':>12}"]
    for name, label in _ROWS:
        if name in metrics and f"{name}_shuffled" in metrics:
            true, shuffled = metrics[name], metrics[f"{name}_shuffled"]
            lines.append(f"{label:<26}{true:>10.3f}{shuffled:>10.3f}{true - shuffled:>+12.3f}")
    lines += [f"{label:<26}{metrics[name]:>10.3f}" for name, label in _QUALITY if name in metrics]
    if "bertscore_hash" in metrics:
        lines.append(f"BERTScore settings: {metrics['bertscore_hash']}")
    return "\n".join(lines)


def sample_table(predictions: Path, count: int = 5, width: int = 100) -> str:
    """The first `count` summaries of a predictions file, each under its reference."""
    blocks = []
    for line in Path(predictions).read_text(encoding="utf-8").splitlines()[:count]:
        values = json.loads(line)
        wrapped = [
            textwrap.fill(f"{label}: {text or '(empty)'}", width, subsequent_indent=" " * 11)
            for label, text in (("reference", values["target_text"]), ("generated", values["prediction"]))
        ]
        blocks.append("\n".join([values["source_id"], *wrapped]))
    return "\n\n".join(blocks)
