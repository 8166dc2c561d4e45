"""How good summaries are: every score beside its control with shuffled embeddings.

Semantic consistency, here the drift similarity: Tennenholtz et al., ICLR 2024, https://arxiv.org/abs/2310.04475.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from elmlib.bertscore import BERTScoreEvaluator
from elmlib.quality import BERTScores, bertscore_means, check_pairs, quality_metrics


def cosine_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of `a` (n, dim) with the same row of `b`: float64 (n,), 0 where either row is all zero."""
    assert a.shape == b.shape and a.ndim == 2, (a.shape, b.shape)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide(np.einsum("nd,nd->n", a, b), norms, out=np.zeros(len(a)), where=norms > 0)


def swap_sources(sources: Sequence[str], seed: int) -> np.ndarray:
    """For each of n rows, a row of ANOTHER source: the permutation of the shuffled control, (n,).

    Sources are paired at random and swapped, so that it is its own inverse where partners have as many rows; of an odd
    number of sources the last three rotate. Row j of a source gets row j, modulo their number, of its partner.
    Under deterministic decoding a summary depends on its embedding alone. The summaries generated from shuffled
    embeddings are then `predictions[swap]`, and the control needs no second generation.
    Raises ValueError for fewer than two sources.
    """
    rows: dict[str, list[int]] = {}
    for row, source in enumerate(sources):
        rows.setdefault(source, []).append(row)
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} source; shuffled embeddings need at least 2")
    order = list(rows.values())
    order = [order[place] for place in np.random.default_rng(seed).permutation(len(order))]
    pairs = [order[start : start + 2] for start in range(0, len(order) - 1, 2)]
    if len(order) % 2:
        pairs[-1].append(order[-1])
    swap = np.full(len(sources), -1)
    for group in pairs:
        for mine, theirs in zip(group, group[1:] + group[:1], strict=True):
            swap[mine] = [theirs[place % len(theirs)] for place in range(len(mine))]
    assert (swap >= 0).all(), swap
    return swap


def score_texts(
    evaluator: BERTScoreEvaluator,
    predictions: Sequence[str],
    references: Sequence[str],
    sources: Sequence[str],
    seed: int,
) -> dict[str, float]:
    """`evaluate_batch` with all details, and its BERTScores for the predictions dealt to other sources, `..._shuffled`.

    Raises ValueError as `check_pairs` and `swap_sources` do.
    """
    metrics = evaluator.evaluate_batch(predictions, references, return_detailed=True)
    swapped = [predictions[row] for row in swap_sources(sources, seed)]
    control = evaluator.evaluate_batch(swapped, references, return_detailed=True)
    return metrics | {f"{key}_shuffled": value for key, value in control.items() if key.startswith("bertscore")}


@dataclass(frozen=True)
class SummaryScores:
    """One evaluation of n summaries, beside the same summaries dealt to other sources (`swap_sources`)."""

    metrics: dict[str, float]
    """What `evaluate_batch(..., return_detailed=True)` gives."""
    shuffled_metrics: dict[str, float]
    scores: BERTScores
    shuffled_scores: BERTScores
    drift: np.ndarray
    """(n,): cosine of the re-embedded summary and its source embedding, -1 to 1; 0 for an empty summary."""
    shuffled_drift: np.ndarray
    vectors: np.ndarray
    """(n, dim) the re-embedded summaries; all zero for an empty one."""

    @property
    def drift_similarity(self) -> float:
        """Semantic consistency: the mean of `drift`, -1 to 1."""
        return float(self.drift.mean())

    @property
    def drift_similarity_shuffled(self) -> float:
        """The mean of `shuffled_drift`, -1 to 1."""
        return float(self.shuffled_drift.mean())

    def to_dict(self) -> dict[str, float]:
        """All means, flat: the metrics, their BERTScores `..._shuffled`, drift_similarity and its control."""
        shuffled = {
            f"{key}_shuffled": value for key, value in self.shuffled_metrics.items() if key.startswith("bertscore")
        }
        return (
            self.metrics
            | shuffled
            | {
                "drift_similarity": self.drift_similarity,
                "drift_similarity_shuffled": self.drift_similarity_shuffled,
            }
        )


def score_summaries(
    evaluator: BERTScoreEvaluator,
    embed: Callable[[list[str]], np.ndarray],
    predictions: Sequence[str],
    references: Sequence[str],
    embeddings: np.ndarray,
    sources: Sequence[str],
    seed: int,
) -> SummaryScores:
    """Score n summaries and their shuffled control; `embed` maps texts into the space of `embeddings` (n, dim).

    Each different summary is encoded and embedded once. Raises ValueError as `check_pairs` and `swap_sources` do, and
    where embeddings or sources are not n, or `embed` gives another dimension.
    """
    check_pairs(predictions, references)
    if not len(predictions) == len(embeddings) == len(sources):
        raise ValueError(f"{len(predictions)} predictions, {len(embeddings)} embeddings, {len(sources)} sources")
    swap = swap_sources(sources, seed)
    swapped = [predictions[row] for row in swap]
    scores, shuffled_scores = (evaluator.score_pairs(texts, references) for texts in (predictions, swapped))
    vectors = embed_predictions(embed, predictions, embeddings.shape[1])

    def metrics(scores: BERTScores, texts: Sequence[str]) -> dict[str, float]:
        means = bertscore_means(scores)
        return means | evaluator.rescaled_means(means) | quality_metrics(texts, references)

    return SummaryScores(
        metrics=metrics(scores, predictions),
        shuffled_metrics=metrics(shuffled_scores, swapped),
        scores=scores,
        shuffled_scores=shuffled_scores,
        drift=cosine_rows(vectors, embeddings),
        shuffled_drift=cosine_rows(vectors[swap], embeddings),
        vectors=vectors,
    )


def embed_predictions(embed: Callable[[list[str]], np.ndarray], predictions: Sequence[str], dim: int) -> np.ndarray:
    """Each different text embedded once: (n, dim), all zero, whose cosine with anything counts 0, for an empty one.

    Raises ValueError where `embed` gives another size than `dim`.
    """
    vectors = np.zeros((len(predictions), dim))
    texts = list(dict.fromkeys(text for text in predictions if text.strip()))
    if not texts:
        return vectors
    embedded = embed(texts)
    if embedded.shape != (len(texts), dim):
        raise ValueError(
            f"the embedder gave {embedded.shape} for {len(texts)} texts; the embeddings have {dim} columns"
        )
    places = {text: place for place, text in enumerate(texts)}
    for row, text in enumerate(predictions):
        if text in places:
            vectors[row] = embedded[places[text]]
    return vectors
