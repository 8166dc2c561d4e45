"""Controls and scores equal their naive twins."""

import itertools
import math

import numpy as np
import pytest

from elmlib.config import InputError
from elmlib.evaluation.bertscore import BERTScoreEvaluator
from elmlib.evaluation.metrics import (
    Identification,
    bootstrap_interval,
    cosine_rows,
    identify_sources,
    permutation_p,
    quality_metrics,
    score_summaries,
    score_texts,
    swap_sources,
)

REFERENCES = [
    "Return the sum of a list of numbers.",
    "Open a file.",
    "Raise an error when the connection to the server is lost.",
    "Parse a date.",
    "Sort the rows of a table.",
]
PREDICTIONS = [
    "Adds up numbers in a list and returns their total.",
    "Parse a date.",
    "Lost connections.",
    "This function closes the file that was opened before, if there is one.",
    "Sort the rows of a table.",
]


@pytest.fixture(scope="module")
def evaluator() -> BERTScoreEvaluator:
    return BERTScoreEvaluator(batch_size=2, device="cpu")


def test_cosine_rows_equals_its_naive_twin():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7, 5)).astype(np.float32)
    a[3] = 0
    for row, cosine in enumerate(cosine_rows(a, b)):
        dot, norm = math.fsum(a[row].astype(float) * b[row]), math.hypot(*a[row]) * math.hypot(*b[row])
        assert cosine == pytest.approx(dot / norm if norm else 0, abs=1e-14)
    np.testing.assert_allclose(cosine_rows(b, b), 1, rtol=1e-15)


@pytest.mark.parametrize("total", [2, 3, 4, 5, 50, 51])
def test_swap_sources_of_single_rows(total):
    sources = [f"source {row}" for row in range(total)]
    swap = swap_sources(sources, seed=1)
    assert sorted(swap) == list(range(total))
    assert (swap != np.arange(total)).all()
    assert (swap[swap] != np.arange(total)).sum() == (3 if total % 2 else 0)
    np.testing.assert_array_equal(swap, swap_sources(sources, seed=1))
    assert total < 50 or (swap != swap_sources(sources, seed=2)).any()


def test_swap_sources_of_several_rows():
    sources = list("aaabbcccddddde")
    swap = swap_sources(sources, seed=0)
    for row, other in enumerate(swap):
        assert sources[row] != sources[other]
        mine = sources[:row].count(sources[row])
        assert sources[:other].count(sources[other]) == mine % sources.count(sources[other])
    partners = {(sources[row], sources[other]) for row, other in enumerate(swap)}
    assert len(partners) == 5  # all rows of a source go to the same other source


def test_one_source_cannot_be_shuffled():
    with pytest.raises(InputError, match="1 source"):
        swap_sources(["a", "a"], seed=0)


def test_score_texts_adds_the_scores_of_the_shuffled_texts(evaluator):
    predictions, sources = [*PREDICTIONS[:4], ""], list("abcde")
    values = score_texts(evaluator, predictions, REFERENCES, sources, seed=3)
    swapped = [predictions[row] for row in swap_sources(sources, 3)]
    true, shuffled = (evaluator.evaluate_batch(texts, REFERENCES, True) for texts in (predictions, swapped))
    assert shuffled["length_ratio"] != true["length_ratio"]
    assert values == pytest.approx(
        true | {f"{key}_shuffled": shuffled[key] for key in shuffled if key.startswith("bertscore")}, abs=1e-6
    )
    assert values["bertscore_f1"] > values["bertscore_f1_shuffled"]


def test_score_texts_of_a_model_with_a_baseline_has_rescaled_controls():
    evaluator = BERTScoreEvaluator(device="cpu", baseline_texts=REFERENCES)
    values = score_texts(evaluator, PREDICTIONS, REFERENCES, list("abcde"), seed=0)
    assert values["bertscore_f1_rescaled"] > values["bertscore_f1_rescaled_shuffled"]


def test_score_texts_refuses_what_cannot_be_scored_or_shuffled(evaluator):
    with pytest.raises(InputError, match="2 predictions, 1 references"):
        score_texts(evaluator, ["x", "y"], REFERENCES[:1], ["a", "b"], seed=0)
    with pytest.raises(InputError, match="1 source"):
        score_texts(evaluator, ["x", "y"], REFERENCES[:2], ["a", "a"], seed=0)


def test_score_summaries_is_the_score_of_each_side(evaluator):
    vectors = {text: np.eye(5)[row] + 0.1 for row, text in enumerate(PREDICTIONS)}
    predictions = [PREDICTIONS[0], PREDICTIONS[1], "", PREDICTIONS[1], PREDICTIONS[4]]
    embeddings = np.eye(5, dtype=np.float32) + 0.2
    sources = list("abcde")
    embedded: list[str] = []

    def embed(texts: list[str]) -> np.ndarray:
        embedded.extend(texts)
        return np.stack([vectors[text] for text in texts])

    scored = score_summaries(evaluator, embed, predictions, REFERENCES, embeddings, sources, seed=3)
    assert sorted(embedded) == sorted({text for text in predictions if text})
    swapped = [predictions[row] for row in swap_sources(sources, 3)]
    true, shuffled = (evaluator.evaluate_batch(texts, REFERENCES, True) for texts in (predictions, swapped))
    controls = {f"{key}_shuffled": value for key, value in shuffled.items() if key.startswith("bertscore")}
    drift = ("drift_similarity", "drift_similarity_shuffled")
    assert {k: v for k, v in scored.metrics.items() if k not in drift} == pytest.approx(true | controls, abs=1e-6)
    np.testing.assert_allclose(scored.pairs.f1.mean(), true["bertscore_f1"], atol=1e-6)

    def mean_cosine(texts: list[str]) -> float:
        rows = (
            vectors[text] @ e / np.linalg.norm(vectors[text]) / np.linalg.norm(e) if text else 0
            for text, e in zip(texts, embeddings, strict=True)
        )
        return sum(rows) / len(texts)

    values = scored.metrics
    assert values["drift_similarity"] == pytest.approx(mean_cosine(predictions))
    assert values["drift_similarity_shuffled"] == pytest.approx(mean_cosine(swapped))
    assert values["bertscore_composite"] > values["bertscore_composite_shuffled"]
    assert all(isinstance(value, float) for value in values.values())


def test_score_summaries_of_nothing_but_empty_texts(evaluator):
    def embed(texts: list[str]) -> np.ndarray:
        raise AssertionError(texts)

    values = score_summaries(evaluator, embed, [""] * 2, REFERENCES[:2], np.eye(2), ["a", "b"], seed=0).metrics
    assert values["drift_similarity"] == values["bertscore_f1"] == 0
    assert values["empty_prediction_rate"] == 1


def test_score_summaries_refuses_sizes_that_differ(evaluator):
    with pytest.raises(InputError, match="2 predictions, 3 embeddings, 2 sources"):
        score_summaries(evaluator, None, ["x", "y"], REFERENCES[:2], np.eye(3), ["a", "b"], seed=0)
    with pytest.raises(InputError, match="the embeddings have 2 columns"):
        score_summaries(
            evaluator, lambda texts: np.eye(2, 3), ["x", "y"], REFERENCES[:2], np.eye(2), ["a", "b"], seed=0
        )


def naive_ranks(
    summaries: np.ndarray, targets: np.ndarray, sources: list[str], rows: list[int] | None = None
) -> list[int]:
    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        return float(a @ b / norms) if norms else 0.0

    ranks = []
    for row, summary in zip(rows or range(len(targets)), summaries, strict=True):
        own = cosine(summary, targets[row])
        better = {s for t, s in zip(targets, sources, strict=True) if s != sources[row] and cosine(summary, t) >= own}
        ranks.append(1 + len(better))
    return ranks


def test_identification_equals_its_naive_twin() -> None:
    rng = np.random.default_rng(0)
    summaries, targets = rng.normal(size=(2, 30, 5))
    summaries[3] = 0
    sources = [str(row // 2) for row in range(30)]
    found = identify_sources(summaries, targets, sources)
    assert found.ranks.tolist() == naive_ranks(summaries, targets, sources)
    assert found.ranks[3] == found.num_sources == 15
    figures = found.figures()
    assert figures["top_1"] == np.mean(found.ranks == 1) and figures["top_5"] == np.mean(found.ranks <= 5)
    assert figures["mrr"] == pytest.approx(np.mean([1 / rank for rank in found.ranks]))


def test_identification_in_a_larger_pool_equals_its_naive_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elmlib.evaluation.metrics._COMPARED", 4)  # several chunks and a short last one
    rng = np.random.default_rng(5)
    targets = rng.normal(size=(40, 3))
    targets[7] = targets[8]  # two sources of one text: neither can win
    sources = [str(number) for number in rng.integers(0, 25, 40)]
    rows = [39, 0, 8, 7, 3, 3, 20, 11, 12, 30]
    summaries = targets[rows] + rng.normal(size=(10, 3))
    summaries[2:4] = targets[8]
    found = identify_sources(summaries, targets, sources, rows)
    assert found.ranks.tolist() == naive_ranks(summaries, targets, sources, rows)
    assert found.num_sources == len(set(sources)) and found.figures()["chance"] == 1 / found.num_sources
    assert (found.ranks[2:4] > 1).all() or sources[7] == sources[8]
    few = identify_sources(summaries[[0, 1]], targets[rows[:2]], [sources[row] for row in rows[:2]])
    assert (few.ranks <= found.ranks[:2]).all()  # more rivals never help


def test_figures_in_pools_equal_their_means_over_all_pools() -> None:
    found = Identification(np.array([1, 2, 5, 8, 3]), num_sources=8)
    pools = list(itertools.combinations(range(7), 3))  # three of seven others; the first rank - 1 are nearer
    ranks = np.array([[1 + sum(other < rank - 1 for other in pool) for pool in pools] for rank in found.ranks])
    few = found.figures(4)
    assert few["mrr"] == pytest.approx((1 / ranks).mean()) and few["top_1"] == pytest.approx((ranks == 1).mean())
    assert few["top_5"] == 1.0
    assert few["chance"] == 1 / 4 and few["chance_mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    every = Identification(np.arange(1, 9), num_sources=8).figures(4)  # each rank once, which is what chance gives
    assert (every["top_1"], every["mrr"]) == (pytest.approx(every["chance"]), pytest.approx(every["chance_mrr"]))
    pools = list(itertools.combinations(range(7), 5))
    ranks = np.array([[1 + sum(other < rank - 1 for other in pool) for pool in pools] for rank in found.ranks])
    assert found.figures(6)["top_5"] == pytest.approx((ranks <= 5).mean())


def test_a_pool_of_all_sources_or_more_is_all_sources() -> None:
    found = Identification(np.array([1, 2, 5, 8, 3]), num_sources=8)
    figures = found.figures(100)
    assert figures == found.figures() == found.figures(8) and figures["chance"] == 1 / 8
    assert (figures["top_1"], figures["top_5"]) == (0.2, 0.8)
    assert figures["mrr"] == pytest.approx(np.mean(1 / found.ranks))


def test_rows_of_the_own_source_do_not_compete_in_a_larger_pool() -> None:
    targets = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    summary = np.array([[1.0, 0.01]])
    assert identify_sources(summary, targets, list("aabc"), [1]).ranks.tolist() == [1]
    assert identify_sources(summary, targets, list("abcd"), [1]).ranks.tolist() == [2]


def test_identification_of_noise_is_chance_and_of_the_targets_themselves_is_perfect() -> None:
    rng = np.random.default_rng(1)
    summaries, targets = rng.normal(size=(2, 2000, 8))
    noise = identify_sources(summaries[:, :8], targets, [str(row % 50 + 50 * (row // 50)) for row in range(2000)])
    noise = noise.figures()
    assert noise["top_1"] < 0.005 and noise["mrr"] == pytest.approx(noise["chance_mrr"], abs=0.01)
    perfect = identify_sources(targets * 3.0, targets, [str(row) for row in range(2000)]).figures()
    assert perfect["top_1"] == perfect["mrr"] == 1.0


def test_permuting_the_samples_permutes_the_ranks() -> None:
    rng = np.random.default_rng(2)
    summaries, targets = rng.normal(size=(2, 20, 4))
    order = rng.permutation(20)
    sources = np.array([str(row) for row in range(20)])
    ranks = identify_sources(summaries, targets, sources.tolist()).ranks
    assert (identify_sources(summaries[order], targets[order], sources[order].tolist()).ranks == ranks[order]).all()


def test_the_permutation_test_equals_all_sign_flips() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(2, 10))
    first += 0.7
    difference = first - second
    flips = np.array(list(itertools.product((-1, 1), repeat=10)))
    exact = np.mean(np.abs(flips @ difference) >= abs(difference.sum()) - 1e-9)
    assert permutation_p(first, second) == pytest.approx(exact, abs=0.01)
    assert permutation_p(first, first) == 1.0
    assert permutation_p(first + 9, first) == pytest.approx(2 / 2**10, abs=0.002)


def test_the_bootstrap_interval_is_about_two_standard_errors_wide() -> None:
    values = np.random.default_rng(4).normal(5, 2, 400)
    mean, low, high = bootstrap_interval(values)
    assert mean == values.mean() and low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)
    assert bootstrap_interval(np.ones(5)) == (1, 1, 1)


def test_repetition_and_collapse_are_seen() -> None:
    references = ["a b c"] * 3
    looping = quality_metrics(["x y x y x y", "x y x y x y", "x y x y x y"], references)
    assert looping["repeated_bigram_rate"] == pytest.approx(3 / 5)
    assert looping["distinct_prediction_rate"] == pytest.approx(1 / 3)
    varied = quality_metrics(["a b c", "d e f", "g"], references)
    assert varied["repeated_bigram_rate"] == 0 and varied["distinct_prediction_rate"] == 1
