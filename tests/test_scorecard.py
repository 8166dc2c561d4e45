"""Every system is scored alike, controls score as their definitions demand, and figures equal their naive twins."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from elmlib.config import SummaryTrainingConfig
from elmlib.controls import COPY, SHUFFLED, TRUE, System, first_sentence, nearest_summaries, rerank
from elmlib.decoding import Sampling
from elmlib.identification import Identification, identify_sources
from elmlib.quality import BERTScores, quality_metrics
from elmlib.scorecard import Scorecard, score_adapters, score_checkpoint, score_systems
from elmlib.significance import bootstrap_interval, permutation_p
from elmlib.trainer import train
from elmlib.workbench import prepare

CPU = torch.device("cpu")


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
    assert found.top_1 == np.mean(found.ranks == 1) and found.top_5 == np.mean(found.ranks <= 5)
    assert found.mrr == pytest.approx(np.mean([1 / rank for rank in found.ranks]))


def test_identification_in_a_larger_pool_equals_its_naive_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elmlib.identification._COMPARED", 4)  # so that there are several chunks and a short last one
    rng = np.random.default_rng(5)
    targets = rng.normal(size=(40, 3))
    targets[7] = targets[8]  # two sources of one text: neither can win
    sources = [str(number) for number in rng.integers(0, 25, 40)]
    rows = [39, 0, 8, 7, 3, 3, 20, 11, 12, 30]
    summaries = targets[rows] + rng.normal(size=(10, 3))
    summaries[2:4] = targets[8]
    found = identify_sources(summaries, targets, sources, rows)
    assert found.ranks.tolist() == naive_ranks(summaries, targets, sources, rows)
    assert found.num_sources == len(set(sources)) and found.chance == 1 / found.num_sources
    assert (found.ranks[2:4] > 1).all() or sources[7] == sources[8]
    few = identify_sources(summaries[[0, 1]], targets[rows[:2]], [sources[row] for row in rows[:2]])
    assert (few.ranks <= found.ranks[:2]).all()  # more rivals never help


def test_figures_in_pools_equal_their_means_over_all_pools() -> None:
    found = Identification(np.array([1, 2, 5, 8, 3]), num_sources=8, pool=8)
    pools = list(itertools.combinations(range(7), 3))  # three of seven others; the first rank - 1 are nearer
    ranks = np.array([[1 + sum(other < rank - 1 for other in pool) for pool in pools] for rank in found.ranks])
    few = found.among(4)
    assert few.mrr == pytest.approx((1 / ranks).mean())
    assert [few.top(count) for count in (1, 2, 3)] == pytest.approx([(ranks <= count).mean() for count in (1, 2, 3)])
    assert few.top(4) == few.top_5 == 1.0
    assert few.chance == 1 / 4 and few.chance_mrr == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    every = Identification(np.arange(1, 9), num_sources=8, pool=4)  # each rank once, which is what chance gives
    assert (every.top_1, every.mrr) == (pytest.approx(every.chance), pytest.approx(every.chance_mrr))


def test_a_pool_of_all_sources_or_more_is_all_sources() -> None:
    found = Identification(np.array([1, 2, 5, 8, 3]), num_sources=8, pool=8)
    assert found.among(100).pool == 8
    assert (found.top_1, found.top_5) == (0.2, 0.8)
    assert found.mrr == pytest.approx(np.mean(1 / found.ranks))


def test_rows_of_the_own_source_do_not_compete_in_a_larger_pool() -> None:
    targets = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    summary = np.array([[1.0, 0.01]])
    assert identify_sources(summary, targets, list("aabc"), [1]).ranks.tolist() == [1]
    assert identify_sources(summary, targets, list("abcd"), [1]).ranks.tolist() == [2]


def test_the_frame_of_an_identification_has_its_mrr() -> None:
    rng = np.random.default_rng(6)
    summaries, targets = rng.normal(size=(2, 12, 4))
    found = identify_sources(summaries, targets, [str(row) for row in range(12)])
    frame = found.to_frame()
    assert frame["rank"].tolist() == found.ranks.tolist()
    assert frame["reciprocal_rank"].mean() == pytest.approx(found.mrr)


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
    assert card[COPY].p_copy == 1.0 and card[TRUE].p_copy == card[COPY].p_value
    text = card.to_text()
    assert all(name in text for name in names) and "chance, 1 of 24" in text and "top-1 of 24" in text
    # The split has no more sources than a pool, so that both are the same.
    assert (frame["reference_mrr"] == frame["reference_all_mrr"]).all()
    assert (frame["source_mrr"] == frame["source_all_mrr"]).all()


class ShortCut:
    """In the place of BERTScore: F1 is whether prediction and reference are the same."""

    def score_pairs(self, predictions: list[str], references: list[str]) -> BERTScores:
        same = np.array([float(p == r) for p, r in zip(predictions, references, strict=True)])
        return BERTScores(same, same, same)


def test_a_scorecard_ranks_in_pools_and_among_the_whole_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elmlib.scorecard.POOL", 6)
    rng = np.random.default_rng(7)
    references = [f"text {row}" for row in range(30)]
    vectors = dict(zip([*references, "noise a", "noise b"], rng.normal(size=(32, 6)), strict=True))
    sources, rows = [str(row // 2) for row in range(30)], [4, 21, 9, 28, 0]
    embeddings = np.stack([vectors[text] for text in references]) + rng.normal(size=(30, 6))
    predictions = [references[4], "noise a", "", "noise b", references[1]]
    embedded: list[list[str]] = []

    def embed(texts: list[str]) -> np.ndarray:
        embedded.append(texts)
        return np.stack([vectors[text] for text in texts])

    systems = [System("adapter", lambda: predictions), System("copy", lambda: [references[row] for row in rows])]
    card = score_systems(systems, ShortCut(), embed, references, embeddings, sources, rows)
    assert embedded[0] == references and len(embedded) == 3  # the split's references once, then each system's own
    given = np.stack([vectors[text] if text else np.zeros(6) for text in predictions])
    pool = np.stack([vectors[text] for text in references])
    found = card["adapter"]
    for part, targets in (("reference", pool), ("source", embeddings)):
        every = getattr(found, f"by_{part}")
        assert every.ranks.tolist() == naive_ranks(given, targets, sources, rows)
        assert every.num_sources == every.pool == 15
    assert card["copy"].by_reference.top_1 == 1.0
    assert found.f1.tolist() == [1, 0, 0, 0, 0]
    assert np.isnan(found.p_copy)  # no system is named as the copy
    frame = card.to_frame()
    assert frame.loc["adapter", "reference_all_chance"] == pytest.approx(1 / 15)
    assert frame.loc["adapter", "source_all_top_1"] == found.by_source.top_1
    assert frame.loc["adapter", "source_top_1"] == found.by_source.among(6).top_1 > found.by_source.top_1
    header, *_, chance = card.to_text().splitlines()
    assert "top-1 of 15" in header and "chance, 1 of 6" in chance and chance.split()[-1] == "0.067"
    assert max(map(len, card.to_text().splitlines())) <= 120


def test_a_report_without_a_terminal_says_in_plain_lines_what_it_does(caplog: pytest.LogCaptureFixture) -> None:
    texts = ["a b c d e", "f g h i j"]
    systems = [System(name, lambda: texts) for name in ("first", "second")]
    with caplog.at_level("INFO", logger="elmlib"):
        score_systems(systems, ShortCut(), lambda given: np.eye(2)[: len(given)], texts, np.eye(2), ["x", "y"], [0, 1])
    assert [record.message for record in caplog.records] == ["report, 1 of 2: first", "report, 2 of 2: second"]


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


def test_reports_of_two_training_seeds_are_of_the_same_texts(
    tiny_config: SummaryTrainingConfig, tmp_path: Path
) -> None:
    data = tiny_config.summary_data_path
    small = replace(tiny_config, max_epochs=1, max_train_seconds=0.1, seed=1)
    first = train(small).best
    second = train(replace(small, seed=2, checkpoint_dir=str(tmp_path / "second"))).best
    written = [
        score_checkpoint(path, data, "test", 8, None, CPU)["first sentence"].predictions for path in (first, second)
    ]
    assert written[0] == written[1]


def test_adapters_stand_beside_each_other_as_they_stand_alone(
    tiny_config: SummaryTrainingConfig, tmp_path: Path
) -> None:
    data = tiny_config.summary_data_path
    small = replace(tiny_config, max_epochs=1)
    other = replace(small, hidden_dim=16, seed=1, checkpoint_dir=str(tmp_path / "other"))
    files = {"first": train(small).best, "second": train(other).best}
    card = score_adapters(files, data, "test", 0, CPU)
    assert [system.name for system in card.systems] == ["first", SHUFFLED, "second"]
    for name, path in files.items():
        alone = score_checkpoint(path, data, "test", 0, None, CPU)[TRUE]
        assert card[name].predictions == alone.predictions and (card[name].f1 == alone.f1).all()
    elsewhere = replace(small, soft_token_place="text", checkpoint_dir=str(tmp_path / "elsewhere"))
    files["third"] = train(elsewhere).best
    with pytest.raises(ValueError, match=r"elsewhere.*has soft_token_place 'text', .* 'answer'"):
        score_adapters(files, data, "test", 0, CPU)
