"""Metrics of summaries: form, shuffled control, semantic consistency, identification, and confidence.

Semantic consistency, here the drift similarity: Tennenholtz et al., ICLR 2024, https://arxiv.org/abs/2310.04475.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from elmlib.evaluation.bertscore import BERTScoreEvaluator

SHORT_WORDS = 5
"""A prediction of fewer words counts as short."""

POOL = 100
"""Sources in one identification task, so that figures of splits of any size can be compared."""

RESAMPLES = 10_000
"""Of every bootstrap and permutation test."""
TRUE, SHUFFLED, COPY = "true embeddings", "shuffled embeddings", "nearest training neighbour"
"""Names of rows in every report."""

_COMPARED, _RESAMPLED = 512, 500  # summaries compared with the pool, and resamples in memory, at once


class BERTScores(NamedTuple):
    """Raw scores of n pairs, each float64 (n,), at most 1; all three are 0 for an empty prediction."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Raise ValueError for unequal lengths, for no pairs, and for an empty reference (naming its index)."""
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
    means = {"bertscore_precision": precision, "bertscore_recall": recall, "bertscore_f1": f1}
    return means | {"bertscore_composite": 0.3 * precision + 0.3 * recall + 0.4 * f1}


def quality_metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Figures of the predictions' form; words are separated by white space. Raises as `check_pairs` does.

    length_ratio: mean of words in the prediction / words in its reference. empty_prediction_rate and
    short_prediction_rate (under 5 words, empty ones too): 0 to 1. avg_unique_token_ratio: mean over non-empty
    predictions of different words / words, 0 where all are empty. repeated_bigram_rate: mean over predictions of at
    least two words of the share of word pairs that occur earlier in the same prediction. distinct_prediction_rate:
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
    """What a study maximises: composite - 0.5 x empty rate - 0.1 x short rate, -0.6 to 1."""
    return (
        metrics["bertscore_composite"] - 0.5 * metrics["empty_prediction_rate"] - 0.1 * metrics["short_prediction_rate"]
    )


def swap_sources(sources: Sequence[str], seed: int) -> np.ndarray:
    """For each of n rows, a row of ANOTHER source: the permutation of the shuffled control, (n,).

    Sources are paired at random and swapped; with an odd number of sources the last three rotate. Row j of a source
    gets row j, modulo their number, of its partner. Under greedy decoding a summary depends on its embedding alone,
    so `predictions[swap]` are the summaries of the shuffled embeddings, and no second generation is needed.
    Raises ValueError for fewer than two sources.
    """
    rows: dict[str, list[int]] = {}
    for row, source in enumerate(sources):
        rows.setdefault(source, []).append(row)
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} source; shuffled embeddings need at least 2")
    groups = list(rows.values())
    groups = [groups[place] for place in np.random.default_rng(seed).permutation(len(groups))]
    cycles = [groups[start : start + 2] for start in range(0, len(groups) - 1, 2)]
    if len(groups) % 2:
        cycles[-1].append(groups[-1])
    swap = np.full(len(sources), -1)
    for cycle in cycles:
        for mine, theirs in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            swap[mine] = [theirs[place % len(theirs)] for place in range(len(mine))]
    assert (swap >= 0).all(), swap
    return swap


def score_texts(
    evaluator: "BERTScoreEvaluator",
    predictions: Sequence[str],
    references: Sequence[str],
    sources: Sequence[str],
    seed: int,
) -> dict[str, float]:
    """`evaluate_batch` with all details, and `..._shuffled`: the BERTScores of the predictions of other sources.

    Raises ValueError as `check_pairs` and `swap_sources` do.
    """
    metrics = evaluator.evaluate_batch(predictions, references, return_detailed=True)
    swapped = [predictions[row] for row in swap_sources(sources, seed)]
    return metrics | _shuffled(evaluator.evaluate_batch(swapped, references, return_detailed=True))


def _shuffled(metrics: dict[str, float]) -> dict[str, float]:
    return {f"{key}_shuffled": value for key, value in metrics.items() if key.startswith("bertscore")}


@dataclass(frozen=True)
class SummaryScores:
    """One evaluation of n summaries, beside its shuffled control: the same summaries assigned to other sources."""

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

    def to_dict(self) -> dict[str, float]:
        """All means, flat: the metrics, their BERTScores `..._shuffled`, drift_similarity and its control."""
        drift = {"drift_similarity": self.drift, "drift_similarity_shuffled": self.shuffled_drift}
        means = {name: float(values.mean()) for name, values in drift.items()}
        return self.metrics | _shuffled(self.shuffled_metrics) | means


def score_summaries(
    evaluator: "BERTScoreEvaluator",
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
    vectors = embed_texts(embed, predictions, embeddings.shape[1])
    return SummaryScores(
        metrics=evaluator.detailed_metrics(scores, predictions, references),
        shuffled_metrics=evaluator.detailed_metrics(shuffled_scores, swapped, references),
        scores=scores,
        shuffled_scores=shuffled_scores,
        drift=cosine_rows(vectors, embeddings),
        shuffled_drift=cosine_rows(vectors[swap], embeddings),
        vectors=vectors,
    )


def embed_texts(embed: Callable[[list[str]], np.ndarray], texts: Sequence[str], dim: int) -> np.ndarray:
    """Each different text embedded once: float64 (n, dim), all zero for an empty one, whose cosines then count 0.

    Raises ValueError where `embed` gives another size than `dim`.
    """
    different = list(dict.fromkeys(text for text in texts if text.strip()))
    embedded = np.asarray(embed(different), np.float64) if different else np.zeros((0, dim))
    if embedded.shape != (len(different), dim):
        raise ValueError(
            f"the embedder gave {embedded.shape} for {len(different)} texts; the embeddings have {dim} columns"
        )
    vector_of = dict(zip(different, embedded, strict=True))
    return np.stack([vector_of.get(text, np.zeros(dim)) for text in texts])


def cosine_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of `a` (n, dim) with the same row of `b`: float64 (n,), 0 where either row is all zero."""
    assert a.shape == b.shape and a.ndim == 2, (a.shape, b.shape)
    return np.einsum("nd,nd->n", unit_rows(a), unit_rows(b))


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float64; all-zero rows stay zero."""
    rows = np.asarray(rows, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


@dataclass(frozen=True, eq=False)
class Identification:
    """How n summaries rank their own source among `num_sources`, or in pools of `pool` sources drawn from them.

    A pool holds the own source and pool - 1 others. How many of those others rank better is hypergeometric; the
    figures are expectations over all such pools, so that no draw of one pool makes them noisy.
    """

    ranks: np.ndarray
    """(n,) int among all `num_sources`, 1 is best; a tie counts as lost."""
    num_sources: int
    pool: int
    """Sources in one pool, the own one among them: 2 to `num_sources`."""

    def among(self, pool: int) -> "Identification":
        """The same ranks in pools of `pool` sources, or of all where there are fewer."""
        return replace(self, pool=min(pool, self.num_sources))

    @property
    def top_1(self) -> float:
        """Share of summaries nearest to their own source, 0 to 1."""
        return self.top(1)

    @property
    def top_5(self) -> float:
        """Share of summaries whose own source is among the nearest five, 0 to 1."""
        return self.top(5)

    def top(self, count: int) -> float:
        """Share of summaries whose own source is among the nearest `count`, 0 to 1."""
        if self.pool == self.num_sources:  # one pool only: an exact share, without the distribution's rounding
            return float((self.ranks <= count).mean())
        return float(stats.hypergeom.cdf(count - 1, self.num_sources - 1, self.ranks - 1, self.pool - 1).mean())

    @property
    def mrr(self) -> float:
        """Mean reciprocal rank, above 0 to 1: of rank r among M, in pools of N, (1 - C(M-r, N) / C(M, N)) M / (N r)."""
        none_as_good = stats.hypergeom.pmf(0, self.num_sources, self.ranks, self.pool)
        return float(((1 - none_as_good) * self.num_sources / (self.pool * self.ranks)).mean())

    @property
    def chance(self) -> float:
        """Top-1 of a summary without information: 1 / pool."""
        return 1 / self.pool

    @property
    def chance_mrr(self) -> float:
        """MRR of a summary without information: the mean of 1 / rank over all ranks."""
        return float((1 / np.arange(1, self.pool + 1)).mean())


def identify_sources(
    summaries: np.ndarray, targets: np.ndarray, sources: Sequence[str], rows: Sequence[int] | None = None
) -> Identification:
    """Rank each summary's own target among the targets of all sources, by cosine.

    summaries (n, dim); targets (m, dim), a pool that may hold more than the summaries' own; `sources` (m,) names the
    source of each target, and targets of one source do not compete. `rows` (n,) are the positions of the summaries'
    own targets in the pool; without them n = m, row by row. An all-zero summary (an empty text) ranks last.
    Raises ValueError for fewer than two sources.
    """
    own = np.arange(len(targets)) if rows is None else np.asarray(rows)
    assert len(own) == len(summaries) and len(sources) == len(targets), (len(own), summaries.shape, targets.shape)
    names, numbers = np.unique(np.array(sources), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{len(names)} source; identification needs at least 2")
    by_source = np.argsort(numbers, kind="stable")
    starts = np.searchsorted(numbers[by_source], np.arange(len(names)))
    given, pool = unit_rows(summaries), unit_rows(targets)
    ranks = []
    for first in range(0, len(own), _COMPARED):
        mine = own[first : first + _COMPARED]
        similarity = given[first : first + _COMPARED] @ pool.T  # (chunk, m)
        nearest = np.maximum.reduceat(similarity[:, by_source], starts, axis=1)  # of each source: (chunk, sources)
        at = np.arange(len(mine))
        rivals = nearest >= similarity[at, mine][:, None] - 1e-12
        rivals[at, numbers[mine]] = False
        ranks.append(1 + rivals.sum(axis=1))
    return Identification(np.concatenate(ranks), len(names), len(names))


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> Interval:
    """Percentile bootstrap (Efron, 1979) of the mean of `values` (n,), 95 %; a single value is its own interval.

    Raises ValueError for no values.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("no values; a bootstrap needs at least one")
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, mean, mean)
    settings = {"n_resamples": RESAMPLES, "batch": _RESAMPLED, "method": "percentile"}
    found = stats.bootstrap((values,), np.mean, rng=np.random.default_rng(seed), **settings).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def permutation_p(first: np.ndarray, second: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of the paired permutation test (Fisher, 1935) that `first` and `second` have equal means.

    Both (n,), in pairs. Each resample swaps every pair with probability 1/2; up to 13 pairs all swaps are tried.
    Raises ValueError for unequal lengths or fewer than two pairs.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"{len(first)} and {len(second)} values; a paired test needs as many of each, at least two")

    def mean_difference(first: np.ndarray, second: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(first - second, axis=axis)

    settings = {"permutation_type": "samples", "n_resamples": RESAMPLES, "batch": _RESAMPLED, "vectorized": True}
    pairs = (np.asarray(first, np.float64), np.asarray(second, np.float64))
    return float(stats.permutation_test(pairs, mean_difference, rng=np.random.default_rng(seed), **settings).pvalue)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of a and b, each (n,), -1 to 1; 0 where either is constant and none is defined."""
    return 0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else float(stats.pearsonr(a, b).statistic)
