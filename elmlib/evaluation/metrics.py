"""Metrics of summaries: form, shuffled control, semantic consistency, identification, and confidence.

Semantic consistency, here the drift similarity: Tennenholtz et al., ICLR 2024, https://arxiv.org/abs/2310.04475.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import stats

from elmlib.config import InputError

if TYPE_CHECKING:
    from elmlib.evaluation.bertscore import BERTScoreEvaluator

Texts = Sequence[str]
Embed = Callable[[list[str]], np.ndarray]  # n texts -> (n, dim)

SHORT_WORDS = 5  # a prediction of fewer words counts as short
POOL = 100  # sources in one identification task: figures of splits of any size can be compared
RESAMPLES = 10_000  # of every bootstrap and permutation test
TRUE, SHUFFLED, COPY = "true embeddings", "shuffled embeddings", "nearest training neighbour"  # rows of every report
_COMPARED, _RESAMPLED = 512, 500  # summaries compared with the targets, and resamples in memory, at once


class BERTScores(NamedTuple):
    """Raw scores of n pairs, each float64 (n,), at most 1; all three are 0 for an empty prediction."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def check_pairs(predictions: Texts, references: Texts) -> None:
    """Raise InputError for unequal lengths, for no pairs, and for an empty reference (naming its index)."""
    if len(predictions) != len(references):
        raise InputError(f"{len(predictions)} predictions, {len(references)} references; expected as many of each")
    if not len(predictions):
        raise InputError("no predictions; expected at least one pair")
    for index, text in enumerate(references):
        if not text.strip():
            raise InputError(f"reference {index} is empty; expected a text")


def bertscore_means(scores: BERTScores) -> dict[str, float]:
    """bertscore_precision, _recall, _f1: raw means over all pairs; bertscore_composite: 0.3 P + 0.3 R + 0.4 F1."""
    precision, recall, f1 = (float(values.mean()) for values in scores)
    means = {"bertscore_precision": precision, "bertscore_recall": recall, "bertscore_f1": f1}
    return means | {"bertscore_composite": 0.3 * precision + 0.3 * recall + 0.4 * f1}


def quality_metrics(predictions: Texts, references: Texts) -> dict[str, float]:
    """Figures of the predictions' form; words are separated by white space. Raises as `check_pairs` does.

    length_ratio: mean of words in the prediction / words in its reference. short_prediction_rate: under 5 words, empty
    ones too. avg_unique_token_ratio: different words / words, mean over non-empty predictions, 0 where all are empty.
    repeated_bigram_rate: share of word pairs that occur earlier in the same prediction, mean over those of two words
    or more. distinct_prediction_rate: different predictions / predictions; near 0 is mode collapse. Lengths: words.
    """
    check_pairs(predictions, references)
    words = [text.split() for text in predictions]
    lengths = np.array([len(text) for text in words])
    reference_lengths = np.array([len(text.split()) for text in references])
    unique = [len(set(text)) / len(text) for text in words if text]
    repeated = [1 - len(set(pairwise(text))) / (len(text) - 1) for text in words if len(text) > 1]
    return {
        "length_ratio": float((lengths / reference_lengths).mean()),
        "empty_prediction_rate": float((lengths == 0).mean()),
        "short_prediction_rate": float((lengths < SHORT_WORDS).mean()),
        "avg_unique_token_ratio": float(np.mean(unique or 0)),
        "repeated_bigram_rate": float(np.mean(repeated or 0)),
        "distinct_prediction_rate": len(set(predictions)) / len(predictions),
        "avg_prediction_length": float(lengths.mean()),
        "avg_reference_length": float(reference_lengths.mean()),
        "num_samples": float(len(predictions)),
    }


def objective(metrics: dict[str, float]) -> float:
    """What a study maximises: composite - 0.5 x empty rate - 0.1 x short rate, -0.6 to 1."""
    empty, short = metrics["empty_prediction_rate"], metrics["short_prediction_rate"]
    return metrics["bertscore_composite"] - 0.5 * empty - 0.1 * short


def swap_sources(sources: Texts, seed: int) -> np.ndarray:
    """For each of n rows, a row of ANOTHER source: the permutation of the shuffled control, (n,). Sources are paired at
    random and swapped; of an odd number the last three rotate. Row j of a source gets row j, modulo their number, of
    its partner. Under greedy decoding a summary depends on its embedding alone: the summaries of shuffled embeddings
    are `predictions[swap]`. Raises InputError for fewer than two sources."""
    rows: dict[str, list[int]] = {}
    for row, source in enumerate(sources):
        rows.setdefault(source, []).append(row)
    if len(rows) < 2:
        raise InputError(f"{len(rows)} source; shuffled embeddings need at least 2")
    groups = list(rows.values())
    order = [groups[place] for place in np.random.default_rng(seed).permutation(len(groups))]
    cycles = [order[start : start + 2] for start in range(0, len(order) - 1, 2)]
    cycles[-1] += order[2 * len(cycles) :]
    swap = np.empty(len(sources), int)
    for cycle in cycles:
        for mine, theirs in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            swap[mine] = np.resize(theirs, len(mine))  # repeats theirs where they are fewer
    return swap


def score_texts(
    evaluator: "BERTScoreEvaluator", predictions: Texts, references: Texts, sources: Texts, seed: int
) -> dict[str, float]:
    """`evaluate_batch` with all details, and `..._shuffled`: the BERTScores of the predictions of other sources. Raises
    InputError as `check_pairs` and `swap_sources` do."""
    check_pairs(predictions, references)
    swapped = [predictions[row] for row in swap_sources(sources, seed)]
    metrics, shuffled = (evaluator.evaluate_batch(texts, references, True) for texts in (predictions, swapped))
    return metrics | {f"{key}_shuffled": value for key, value in shuffled.items() if key.startswith("bertscore")}


class SummaryScores(NamedTuple):
    """One evaluation of n summaries."""

    metrics: dict[str, float]  # What `score_texts` gives, drift_similarity and drift_similarity_shuffled
    pairs: BERTScores
    drift: np.ndarray  # (n,) cosine of the re-embedded summary and its source embedding; 0 for an empty summary
    vectors: np.ndarray  # (n, dim) the re-embedded summaries; all zero for an empty one


def score_summaries(
    evaluator: "BERTScoreEvaluator",
    embed: Embed,
    predictions: Texts,
    references: Texts,
    embeddings: np.ndarray,
    sources: Texts,
    seed: int,
) -> SummaryScores:
    """Score n summaries and their shuffled control; `embed` maps texts into the space of `embeddings` (n, dim). Raises
    InputError as `score_texts` and `embed_texts` do, and where embeddings or sources are not n."""
    if not len(predictions) == len(embeddings) == len(sources):
        raise InputError(f"{len(predictions)} predictions, {len(embeddings)} embeddings, {len(sources)} sources")
    metrics = score_texts(evaluator, predictions, references, sources, seed)
    pairs = evaluator.score_pairs(predictions, references)  # encoded already
    vectors = embed_texts(embed, predictions, embeddings.shape[1])
    drift = cosine_rows(vectors, embeddings)
    shuffled = cosine_rows(vectors[swap_sources(sources, seed)], embeddings)
    means = {"drift_similarity": float(drift.mean()), "drift_similarity_shuffled": float(shuffled.mean())}
    return SummaryScores(metrics | means, pairs, drift, vectors)


def embed_texts(embed: Embed, texts: Texts, dim: int) -> np.ndarray:
    """Each different text embedded once: float64 (n, dim), all zero for an empty one, whose cosines then count 0.
    Raises InputError where `embed` gives another size than `dim`."""
    different = list(dict.fromkeys(text for text in texts if text.strip()))
    embedded = np.asarray(embed(different), np.float64) if different else np.zeros((0, dim))
    if embedded.shape != (len(different), dim):
        raise InputError(f"{embedded.shape} vectors of {len(different)} texts; the embeddings have {dim} columns")
    vector_of = dict(zip(different, embedded, strict=True))
    return np.stack([vector_of.get(text, np.zeros(dim)) for text in texts])


def cosine_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of `a` (n, dim) with the same row of `b`: float64 (n,), 0 where either row is all zero."""
    return np.einsum("nd,nd->n", unit_rows(a), unit_rows(b))


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float64; all-zero rows stay zero."""
    rows = np.asarray(rows, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms, norms, 1)


class Identification(NamedTuple):
    """How n summaries rank their own source."""

    ranks: np.ndarray  # (n,) int among all `num_sources`, 1 is best; a tie counts as lost
    num_sources: int

    def figures(self, pool: int = 0) -> dict[str, float]:
        """top_1, top_5, mrr, chance and chance_mrr in pools of `pool` sources; 0 or too many: among all sources.

        A pool holds the own source and pool - 1 others. How many of those rank better is hypergeometric: the figures
        are expectations over all pools. top_k: share of summaries whose own source is among the nearest k, 0 to 1.
        mrr: mean reciprocal rank; of rank r among M in pools of N, (1 - C(M-r, N) / C(M, N)) M / (N r).
        chance and chance_mrr: top_1 and mrr of a summary without information, 1 / N and the mean of 1 / rank.
        """
        total, ranks = self.num_sources, self.ranks
        pool = min(pool or total, total)
        none_as_good = stats.hypergeom.pmf(0, total, ranks, pool)
        figures = {f"top_{k}": stats.hypergeom.cdf(k - 1, total - 1, ranks - 1, pool - 1) for k in (1, 5)}
        if pool == total:  # one pool only: exact shares, without the distribution's rounding
            figures = {f"top_{k}": ranks <= k for k in (1, 5)}
        figures |= {"mrr": (1 - none_as_good) * total / (pool * ranks)}
        figures |= {"chance": 1 / pool, "chance_mrr": 1 / np.arange(1, pool + 1)}
        return {name: float(np.mean(values)) for name, values in figures.items()}


def identify_sources(
    summaries: np.ndarray, targets: np.ndarray, sources: Texts, rows: Sequence[int] | None = None
) -> Identification:
    """Rank the own target of each summary among the targets of all sources, by cosine. summaries (n, dim), targets (m,
    dim); `sources` (m,) names the source of each target, and targets of one source do not compete. `rows` (n,) are the
    summaries' own targets, by default the same rows. An all-zero summary ranks last. InputError for one source."""
    own = np.arange(len(targets)) if rows is None else np.asarray(rows)
    assert len(own) == len(summaries) and len(sources) == len(targets), (len(own), summaries.shape, targets.shape)
    names, numbers = np.unique(np.array(sources), return_inverse=True)
    if len(names) < 2:
        raise InputError(f"{len(names)} source; identification needs at least 2")
    summaries, targets = unit_rows(summaries), unit_rows(targets)
    ranks = []
    for start in range(0, len(own), _COMPARED):
        similarity = summaries[start : start + _COMPARED] @ targets.T  # (chunk, m)
        for row, cosines in zip(own[start : start + _COMPARED], similarity, strict=True):
            as_near = numbers[cosines >= cosines[row] - 1e-12]  # the own source among them
            ranks.append(len(np.unique(as_near)))
    return Identification(np.array(ranks), len(names))


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """The mean of `values` (n,) and the ends of its 95 % percentile bootstrap interval (Efron, 1979). A single value is
    its own interval. Raises InputError for no values."""
    values = np.asarray(values, np.float64)
    if not len(values):
        raise InputError("no values; a bootstrap needs at least one")
    mean = float(values.mean())
    if len(values) == 1:
        return mean, mean, mean
    settings = {"n_resamples": RESAMPLES, "batch": _RESAMPLED, "method": "percentile"}
    low, high = stats.bootstrap((values,), np.mean, rng=np.random.default_rng(seed), **settings).confidence_interval
    return mean, float(low), float(high)


def permutation_p(first: np.ndarray, second: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of the paired permutation test (Fisher, 1935) that `first` and `second` have equal means. Both
    (n,), in pairs. Each resample swaps every pair with probability 1/2; up to 13 pairs all swaps are tried. Raises
    InputError for unequal lengths or fewer than two pairs."""
    if len(first) != len(second) or len(first) < 2:
        raise InputError(f"{len(first)} and {len(second)} values; a paired test needs as many of each, at least two")
    pairs = (np.asarray(first, np.float64), np.asarray(second, np.float64))
    settings = {"permutation_type": "samples", "n_resamples": RESAMPLES, "batch": _RESAMPLED, "vectorized": True}
    settings |= {"rng": np.random.default_rng(seed)}
    return float(stats.permutation_test(pairs, lambda a, b, axis: np.mean(a - b, axis=axis), **settings).pvalue)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of a and b, each (n,), -1 to 1; 0 where either is constant and none is defined."""
    return 0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else float(stats.pearsonr(a, b).statistic)
