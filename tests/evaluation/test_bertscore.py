"""BERTScore equals bert_score's own and survives its traps; the metrics equal their naive twins."""

import json
import shutil

import numpy as np
import pytest
import torch
from bert_score import BERTScorer, utils
from conftest import save_deberta
from tokenizers import ByteLevelBPETokenizer
from transformers import RobertaConfig, RobertaModel

from elmlib.config import OFFLINE_EMBEDDER, InputError, SummaryTrainingConfig
from elmlib.evaluation import bertscore
from elmlib.evaluation.bertscore import BERTScoreEvaluator, create_evaluator
from elmlib.evaluation.metrics import objective, quality_metrics
from elmlib.models.pretrained import find

REFERENCES = [
    "Return the sum of a list of numbers.",
    "Open a file.",
    "Raise an error when the connection to the server, or to any of its replicas, is lost for more than a minute.",
    "Parse a date.",
    "Sort the rows of a table by the values in one of its columns, keeping the order of equal rows.",
]
PREDICTIONS = [
    "Adds up numbers in a list and returns their total, as an integer or as a floating point number.",
    "Parse a date.",
    "Lost connections.",
    "This function closes the file that was opened before, if there is one.",
    "Sort the rows of a table by the values in one of its columns, keeping the order of equal rows.",
]


@pytest.fixture(scope="module")
def evaluator() -> BERTScoreEvaluator:
    return BERTScoreEvaluator(batch_size=2, device="cpu")


def bert_score_twin(folder: str, num_layers: int, predictions: list[str], references: list[str]) -> np.ndarray:
    """(3, n) from bert_score's own class."""
    scorer = BERTScorer(folder, num_layers=num_layers, device="cpu")
    return torch.stack(scorer.score(predictions, references)).numpy()


def test_scores_equal_bert_score(evaluator):
    scores = evaluator.score_pairs(PREDICTIONS, REFERENCES)
    expected = bert_score_twin(find(OFFLINE_EMBEDDER), 6, PREDICTIONS, REFERENCES)
    np.testing.assert_allclose(np.stack(scores), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose([values[4] for values in scores], 1, atol=1e-5)  # a text against itself


def test_scores_equal_bert_score_in_several_batches_of_mixed_length(evaluator):
    texts = [*REFERENCES, *PREDICTIONS]
    pairs = [(prediction, reference) for prediction in texts for reference in texts]
    predictions, references = map(list, zip(*pairs, strict=True))
    expected = bert_score_twin(find(OFFLINE_EMBEDDER), 6, predictions, references)
    np.testing.assert_allclose(np.stack(evaluator.score_pairs(predictions, references)), expected, rtol=0, atol=1e-5)
    # Empty predictions among them change nothing for the others.
    scores = np.stack(
        evaluator.score_pairs([text for p in predictions for text in (p, "")], np.repeat(references, 2).tolist())
    )
    np.testing.assert_allclose(scores[:, ::2], expected, rtol=0, atol=1e-5)
    assert not scores[:, 1::2].any()


def test_scores_do_not_depend_on_cache_or_batch_size(evaluator):
    first = np.stack(evaluator.score_pairs(PREDICTIONS, REFERENCES))
    np.testing.assert_array_equal(np.stack(evaluator.score_pairs(PREDICTIONS, REFERENCES)), first)
    large = BERTScoreEvaluator(batch_size=64, device="cpu")
    np.testing.assert_allclose(np.stack(large.score_pairs(PREDICTIONS, REFERENCES)), first, rtol=0, atol=1e-5)


def test_references_and_repeated_predictions_are_encoded_once(monkeypatch):
    evaluator = BERTScoreEvaluator(device="cpu")
    encoded: list[str] = []
    embed = utils.get_bert_embedding

    def spy(texts, *args, **kwargs):
        encoded.extend(texts)
        return embed(texts, *args, **kwargs)

    monkeypatch.setattr(utils, "get_bert_embedding", spy)
    evaluator.score_pairs(["one", "two"], REFERENCES[:2])
    evaluator.score_pairs(["two", "one"], REFERENCES[:2])
    evaluator.score_pairs(["three", "four", "five"], REFERENCES[:3])
    assert sorted(encoded) == sorted(["one", "two", "three", "four", "five", *REFERENCES[:3]])


def test_references_beyond_the_cache_are_scored_too(monkeypatch, evaluator):
    monkeypatch.setattr(bertscore, "CACHED_REFERENCES", 2)
    small = BERTScoreEvaluator(device="cpu")
    for _ in range(2):
        scores = np.stack(small.score_pairs(PREDICTIONS, REFERENCES))
        np.testing.assert_allclose(scores, np.stack(evaluator.score_pairs(PREDICTIONS, REFERENCES)), atol=1e-5)
    assert len(small._references) == 2


def test_empty_predictions_score_zero_and_count(evaluator):
    full = evaluator.evaluate_batch(PREDICTIONS, REFERENCES)
    half = evaluator.evaluate_batch([*PREDICTIONS, "", " \n", "", "\u200b", ""], REFERENCES * 2)
    assert full.keys() == {"bertscore_precision", "bertscore_recall", "bertscore_f1", "bertscore_composite"}
    for key, value in full.items():
        assert half[key] == pytest.approx(value / 2, abs=1e-6)
    assert set(evaluator.evaluate_batch(["", ""], REFERENCES[:2]).values()) == {0.0}


def test_a_random_pair_scores_far_below_a_match(evaluator):
    matching = evaluator.evaluate_batch(PREDICTIONS[:1], REFERENCES[:1])["bertscore_f1"]
    random = evaluator.evaluate_batch(PREDICTIONS[:1], REFERENCES[1:2])["bertscore_f1"]
    assert matching > random + 0.2


def test_bad_pairs_are_refused(evaluator):
    with pytest.raises(InputError, match="2 predictions, 1 references"):
        evaluator.evaluate_batch(["a", "b"], ["a"])
    with pytest.raises(InputError, match="at least one pair"):
        evaluator.evaluate_batch([], [])
    with pytest.raises(InputError, match="reference 1 is empty"):
        evaluator.evaluate_batch(["a", "b"], ["a", "  "])
    with pytest.raises(InputError, match=r"reference 1 is .*no token"):
        evaluator.evaluate_batch(["a", "b"], ["a", "\u200b"])
    with pytest.raises(InputError, match="batch_size is 0"):
        BERTScoreEvaluator(batch_size=0)
    with pytest.raises(InputError, match="1 different baseline_texts"):
        BERTScoreEvaluator(baseline_texts=["a", "a"])


def test_composite_and_quality_equal_their_naive_twins(evaluator):
    predictions = [*PREDICTIONS[:3], "", "a a a b"]
    metrics = evaluator.evaluate_batch(predictions, REFERENCES, return_detailed=True)
    p, r, f1 = (metrics[f"bertscore_{name}"] for name in ("precision", "recall", "f1"))
    assert metrics["bertscore_composite"] == pytest.approx(0.3 * p + 0.3 * r + 0.4 * f1)
    words = [len(text.split()) for text in predictions]
    reference_words = [len(text.split()) for text in REFERENCES]
    assert metrics["length_ratio"] == pytest.approx(sum(a / b for a, b in zip(words, reference_words, strict=True)) / 5)
    assert metrics["empty_prediction_rate"] == 0.2
    assert metrics["short_prediction_rate"] == pytest.approx(0.8)
    assert metrics["avg_unique_token_ratio"] == pytest.approx((17 / 19 + 1 + 1 + 2 / 4) / 4)
    assert metrics["avg_prediction_length"] == sum(words) / 5
    assert metrics["avg_reference_length"] == sum(reference_words) / 5
    assert metrics["num_samples"] == 5
    assert not any(key.endswith("_rescaled") for key in metrics)  # MiniLM has no baseline of its own
    assert objective(metrics) == pytest.approx(metrics["bertscore_composite"] - 0.5 * 0.2 - 0.1 * 0.8)
    assert quality_metrics([""], ["a"])["avg_unique_token_ratio"] == 0


def test_the_baseline_of_texts_puts_unrelated_texts_at_zero():
    texts = [*REFERENCES, *PREDICTIONS[:4]]
    evaluator = BERTScoreEvaluator(device="cpu", batch_size=64, baseline_texts=texts)
    every = [(a, b) for a in dict.fromkeys(texts) for b in dict.fromkeys(texts) if a != b]
    metrics = evaluator.evaluate_batch(*map(list, zip(*every, strict=True)), return_detailed=True)
    for name, base in zip(("precision", "recall", "f1"), evaluator.baseline, strict=True):
        assert metrics[f"bertscore_{name}_rescaled"] == pytest.approx(0, abs=0.02)
        empty = evaluator.evaluate_batch([""], REFERENCES[:1], return_detailed=True)
        assert empty[f"bertscore_{name}_rescaled"] == pytest.approx(-base / (1 - base))
    assert evaluator.hash.startswith("all-minilm-l6-v2_L6_no-idf_version=")
    plain, digest = evaluator.hash.split("-custom-rescaled-")
    assert BERTScoreEvaluator().hash == plain and len(digest) == 8
    other = BERTScoreEvaluator(device="cpu", baseline_texts=texts[1:])  # another baseline, so another hash
    assert other.hash.startswith(f"{plain}-custom-rescaled-") and other.hash != evaluator.hash
    again = BERTScoreEvaluator(device="cpu", batch_size=64, baseline_texts=texts)
    np.testing.assert_array_equal(again.baseline, evaluator.baseline)


@pytest.mark.parametrize("origin", [{"_name_or_path": "microsoft/deberta-xlarge-mnli"}, {}])
def test_a_local_copy_of_a_known_model_has_its_layer_and_baseline(tmp_path, origin):
    folder = tmp_path / ("my-copy" if origin else "deberta-xlarge-mnli")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "deberta", "num_hidden_layers": 48} | origin))
    evaluator = BERTScoreEvaluator(str(folder), device="cpu")
    assert evaluator.encoder_id == (str(folder), "microsoft/deberta-xlarge-mnli", 40)
    assert evaluator.hash.startswith("microsoft/deberta-xlarge-mnli_L40_no-idf") and evaluator.hash.endswith(
        "-rescaled"
    )
    assert "custom" not in evaluator.hash
    np.testing.assert_allclose(evaluator.baseline, [0.5169066, 0.5170288, 0.5150192])


@pytest.mark.parametrize("name", ["deberta", "robert5"])  # bert_score takes a path with "t5" in it for a T5
def test_a_local_deberta_is_scored(tmp_path, name):
    folder = save_deberta(tmp_path / name)
    evaluator = BERTScoreEvaluator(str(folder), device="cpu")
    assert evaluator.encoder_id == (str(folder), name, 2)
    scores = evaluator.score_pairs(["cat sat", "", "word " * 2000], ["the cat sat", "x", "a dog"])
    assert all(np.isfinite(values).all() and values[1] == 0 and values[0] > 0.3 for values in scores)
    encoder = evaluator._encoder[0]
    assert encoder.dtype == torch.float32 and not encoder.training  # stored in half precision
    plain = save_deberta(tmp_path / "plain")
    expected = BERTScoreEvaluator(str(plain), device="cpu").score_pairs(["cat sat"], ["the cat sat"])
    np.testing.assert_allclose([values[0] for values in scores], np.ravel(expected), atol=1e-6)


def test_what_is_kept_on_disk_is_not_encoded_again_and_gives_the_same_bits(monkeypatch):
    plain = BERTScoreEvaluator(batch_size=2, device="cpu", baseline_texts=REFERENCES)
    kept = BERTScoreEvaluator(batch_size=2, device="cpu", baseline_texts=REFERENCES, keep=True)
    expected = plain.evaluate_batch(PREDICTIONS, REFERENCES, return_detailed=True)
    assert kept.evaluate_batch(PREDICTIONS, REFERENCES, return_detailed=True) == expected
    encoded, encode = [], BERTScoreEvaluator._encode
    monkeypatch.setattr(BERTScoreEvaluator, "_encode", lambda self, texts: encoded.append(texts) or encode(self, texts))
    again = BERTScoreEvaluator(batch_size=2, device="cpu", baseline_texts=REFERENCES, keep=True)
    assert again.evaluate_batch(PREDICTIONS, REFERENCES, return_detailed=True) == expected
    assert [set(texts) for texts in encoded] == [{text for text in PREDICTIONS if text.strip()}]  # no reference
    BERTScoreEvaluator(batch_size=3, device="cpu", keep=True).score_pairs(PREDICTIONS, REFERENCES)
    assert len(encoded) == 3  # another batch size gives other last bits: the references are encoded again


def test_roberta_reads_the_first_word_as_a_word(tmp_path):
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    lines = ["the cat sat on the mat", "a dog ran to the cat"] * 5
    tokenizer.train_from_iterator(lines, vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.save_model(str(tmp_path))
    config = RobertaConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=514,
    )
    RobertaModel(config).save_pretrained(tmp_path)
    evaluator = BERTScoreEvaluator(str(tmp_path), device="cpu")
    loaded = evaluator._encoder[1]
    assert loaded.tokenize("cat sat") == ["Ġcat", "Ġsat"]
    assert loaded.model_max_length == 512
    assert np.isfinite(evaluator.score_pairs(["cat " * 2000], ["the cat"]).f1).all()


def test_create_evaluator_reads_the_config_and_loads_nothing():
    config = SummaryTrainingConfig(bertscore_model="microsoft/deberta-xlarge-mnli", bertscore_batch_size=3)
    evaluator = create_evaluator(config)
    assert (evaluator.model, evaluator.batch_size) == ("microsoft/deberta-xlarge-mnli", 3)
    assert utils.model2layers[evaluator.model] == 40


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_an_encoder_whose_files_are_git_lfs_pointers_is_one_line(tmp_path, name):
    folder = shutil.copytree(find(OFFLINE_EMBEDDER), tmp_path / "encoder")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(InputError, match="encoder"):
        BERTScoreEvaluator(str(folder)).score_pairs(["a text"], ["a text"])
