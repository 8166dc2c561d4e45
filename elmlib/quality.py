"""What summaries are judged by: the means of BERTScore, the form of the texts, and the one figure a study maximises."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

SHORT_WORDS = 5
"""A prediction of fewer words counts as short."""


class BERTScores(NamedTuple):
    """Raw scores of n pairs, each float64 (n,), at most 1; all three are 0 for an empty prediction."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Raise ValueError for unequal lengths, for no pairs, and for an empty reference, which is bad data."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, {len(references)} references; expected as many of each")
    if not len(predictions):
        raise ValueError("no predictions; expected at least one pair")
    for index, text in enumerate(references):
        if not text.strip():
            raise ValueError(f"reference {index} is empty; expected a text")


def bertscore_means(scores: BERTScores) -> dict[str, float]:
    """bertscore_precision, _recall, _f1: raw means over all pairs; bertscore_composite: 0.3 P + 0.3 R + 0.4 F1."""
    precision, recall, f1 = (float(values.mean()) for values in scores)
    return {
        "bertscore_precision": precision,
        "bertscore_recall": recall,
        "bertscore_f1": f1,
        "bertscore_composite": 0.3 * precision + 0.3 * recall + 0.4 * f1,
    }


def quality_metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Figures of the predictions' form; a word is what stands between white space. Raises as `check_pairs` does.

    length_ratio: mean of words in the prediction / words in its reference. empty_prediction_rate and
    short_prediction_rate (under 5 words, empty ones too): 0 to 1. avg_unique_token_ratio: mean over non-empty
    predictions of different words / words, 0 where all are empty. repeated_bigram_rate: mean over predictions of two
    words and more of the share of word pairs that stood before in the same prediction. distinct_prediction_rate:
    different predictions / predictions; near 0 is mode collapse. avg_..._length: words.
    """
    check_pairs(predictions, references)
    words = [text.split() for text in predictions]
    lengths = np.array([len(text) for text in words])
    reference_lengths = np.array([len(text.split()) for text in references])
    unique = [len(set(text)) / len(text) for text in words if text]
    bigrams = [list(pairwise(text)) for text in words if len(text) > 1]
    repeated = [1 - len(set(pairs)) / len(pairs) for pairs in bigrams]
    return {
        "length_ratio": float((lengths / reference_lengths).mean()),
        "empty_prediction_rate": float((lengths == 0).mean()),
        "short_prediction_rate": float((lengths < SHORT_WORDS).mean()),
        "avg_unique_token_ratio": float(np.mean(unique)) if unique else 0.0,
        "repeated_bigram_rate": float(np.mean(repeated)) if repeated else 0.0,
        "distinct_prediction_rate": len(set(predictions)) / len(predictions),
        "avg_prediction_length": float(lengths.mean()),
        "avg_reference_length": float(reference_lengths.mean()),
        "num_samples": float(len(predictions)),
    }


def objective(metrics: dict[str, float]) -> float:
    """What a study maximises: the composite less 0.5 x the empty rate and 0.1 x the short rate, -0.6 to 1."""
    return (
        metrics["bertscore_composite"] - 0.5 * metrics["empty_prediction_rate"] - 0.1 * metrics["short_prediction_rate"]
    )
