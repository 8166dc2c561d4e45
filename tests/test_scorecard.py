"""Every system is scored alike, controls score as their definitions demand, and figures equal their naive twins."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from elmlib.config import SummaryTrainingConfig
from elmlib.controls import COPY, SHUFFLED, TRUE, first_sentence, nearest_summaries, rerank
from elmlib.identification import identify_sources
from elmlib.model import Sampling
from elmlib.quality import quality_metrics
from elmlib.scorecard import Scorecard, score_checkpoint
from elmlib.significance import bootstrap_interval, permutation_p
from elmlib.trainer import train
from elmlib.workbench import prepare

CPU = torch.device("cpu")


def naive_ranks(summaries: np.ndarray, targets: np.ndarray, sources: list[str]) -> list[int]:
    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        return float(a @ b / norms) if norms else 0.0

    ranks = []
    for row, summary in enumerate(summaries):
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
    assert found.top_1 == np.mean(found.ranks == 1) and found.top_5 == np.mean(found.ranks <= 5)
    assert found.mrr == pytest.approx(np.mean([1 / rank for rank in found.ranks]))


def test_identification_of_noise_is_chance_and_of_the_targets_themselves_is_perfect() -> None:
    rng = np.random.default_rng(1)
    summaries, targets = rng.normal(size=(2, 2000, 8))
    noise = identify_sources(summaries[:, :8], targets, [str(row % 50 + 50 * (row // 50)) for row in range(2000)])
    assert noise.top_1 < 0.005 and noise.mrr == pytest.approx(noise.chance_mrr, abs=0.01)
    perfect = identify_sources(targets * 3.0, targets, [str(row) for row in range(2000)])
    assert perfect.top_1 == perfect.mrr == 1.0


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


def test_first_sentence_and_rerank() -> None:
    assert first_sentence("Opens the\n  file. Then reads it.") == "Opens the file."
    assert first_sentence("See numpy.ndarray for more") == "See numpy.ndarray for more"
    vectors = {"x": [1.0, 0.0], "y": [0.0, 1.0]}
    chosen = rerank(lambda texts: np.array([vectors[t] for t in texts]), [["y", "x", ""], ["", ""]], np.eye(2))
    assert chosen == ["x", ""]


def test_the_nearest_neighbour_of_a_training_vector_is_itself(tiny_config: SummaryTrainingConfig) -> None:
    train_split = prepare(tiny_config, CPU).train
    rows = [5, 50, 95]
    found = nearest_summaries(train_split, train_split.vectors(rows).numpy())
    assert found == [train_split.records[row].target_text for row in rows]


@pytest.fixture
def card(tiny_config: SummaryTrainingConfig) -> Scorecard:
    best = train(replace(tiny_config, max_epochs=1)).best
    return score_checkpoint(best, tiny_config.summary_data_path, "test", 0, Sampling(count=3), CPU)


def test_a_scorecard_holds_every_system_on_the_same_samples(card: Scorecard) -> None:
    names = [system.name for system in card.systems]
    assert names[:2] == [TRUE, SHUFFLED] and COPY in names and names[-1] == "best of 3 candidates"
    assert {"mean embedding", "no training", "LLM reads the text", "first sentence"} < set(names)
    assert {len(system.predictions) for system in card.systems} == {24}
    assert sorted(card[TRUE].predictions) == sorted(card[SHUFFLED].predictions)
    assert len(set(card["mean embedding"].predictions)) == 1
    frame = card.to_frame()
    assert list(frame.index) == names
    assert frame.loc[TRUE, "bertscore_f1"] == pytest.approx(card[TRUE].f1.mean())
    assert (frame["bertscore_f1_low"] <= frame["bertscore_f1"]).all()
    assert card[TRUE].p_value == 1.0 and 0 < card[COPY].p_value <= 1
    text = card.to_text()
    assert all(name in text for name in names) and "chance, 1 of 24" in text


def test_a_constant_adapter_scores_as_the_mean_embedding(tiny_config: SummaryTrainingConfig, tmp_path: Path) -> None:
    from elmlib import checkpoint
    from elmlib.adapter import EmbeddingAdapter

    best = train(replace(tiny_config, max_epochs=1)).best
    file = checkpoint.load_adapter(best)
    weights = {
        name: torch.zeros_like(tensor) if name in ("linear.weight", "up.weight") else tensor
        for name, tensor in file.weights.items()
    }
    shape = file.config
    adapter = EmbeddingAdapter(
        shape.embedding_dim, 32, shape.num_soft_tokens, shape.hidden_dim, 0.0, shape.residual_scale
    )
    adapter.load_state_dict(weights)
    constant = tmp_path / "constant.safetensors"
    checkpoint.save_adapter(constant, adapter, file.config, file.step, file.data_fingerprint)
    card = score_checkpoint(constant, tiny_config.summary_data_path, "val", 0, None, CPU)
    assert card[TRUE].predictions == card["mean embedding"].predictions == card[SHUFFLED].predictions
    assert card[TRUE].composite == card["mean embedding"].composite
    assert card[SHUFFLED].p_value == 1.0
