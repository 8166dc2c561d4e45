"""Controls and scores equal their naive twins."""

import math

import numpy as np
import pytest

from elmlib.bertscore import BERTScoreEvaluator
from elmlib.evaluation import cosine_rows, score_summaries, score_texts, swap_sources

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
    with pytest.raises(ValueError, match="1 source"):
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
    with pytest.raises(ValueError, match="2 predictions, 1 references"):
        score_texts(evaluator, ["x", "y"], REFERENCES[:1], ["a", "b"], seed=0)
    with pytest.raises(ValueError, match="1 source"):
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
    assert scored.metrics == pytest.approx(true, abs=1e-6)
    assert scored.shuffled_metrics == pytest.approx(shuffled, abs=1e-6)
    np.testing.assert_allclose(scored.scores.f1.mean(), true["bertscore_f1"], atol=1e-6)

    def mean_cosine(texts: list[str]) -> float:
        rows = (
            vectors[text] @ e / np.linalg.norm(vectors[text]) / np.linalg.norm(e) if text else 0
            for text, e in zip(texts, embeddings, strict=True)
        )
        return sum(rows) / len(texts)

    values = scored.to_dict()
    assert values["drift_similarity"] == pytest.approx(mean_cosine(predictions))
    assert values["drift_similarity_shuffled"] == pytest.approx(mean_cosine(swapped))
    assert values["bertscore_f1_shuffled"] == scored.shuffled_metrics["bertscore_f1"]
    assert values["bertscore_composite"] > values["bertscore_composite_shuffled"]
    assert values["length_ratio"] == scored.metrics["length_ratio"]
    assert all(isinstance(value, float) for value in values.values())


def test_score_summaries_of_nothing_but_empty_texts(evaluator):
    def embed(texts: list[str]) -> np.ndarray:
        raise AssertionError(texts)

    values = score_summaries(evaluator, embed, [""] * 2, REFERENCES[:2], np.eye(2), ["a", "b"], seed=0).to_dict()
    assert values["drift_similarity"] == values["bertscore_f1"] == 0
    assert values["empty_prediction_rate"] == 1


def test_score_summaries_refuses_sizes_that_differ(evaluator):
    with pytest.raises(ValueError, match="2 predictions, 3 embeddings, 2 sources"):
        score_summaries(evaluator, None, ["x", "y"], REFERENCES[:2], np.eye(3), ["a", "b"], seed=0)
    with pytest.raises(ValueError, match="the embeddings have 2 columns"):
        score_summaries(
            evaluator, lambda texts: np.eye(2, 3), ["x", "y"], REFERENCES[:2], np.eye(2), ["a", "b"], seed=0
        )
