"""Every system is scored alike, controls score as their definitions demand, and figures equal their naive twins."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.test_metrics import naive_ranks

from elmlib.config import InputError, SummaryTrainingConfig
from elmlib.data.dataset import SummaryDataset
from elmlib.data.prompts import PromptIds
from elmlib.data.records import Record
from elmlib.evaluation.metrics import COPY, SHUFFLED, TRUE, BERTScores, Identification
from elmlib.evaluation.report import (
    Report,
    examples_frame,
    sample_frame,
    score_adapters,
    score_baselines,
    score_checkpoint,
    score_frame,
)
from elmlib.models.adapter import EmbeddingAdapter, load_adapter, save_adapter
from elmlib.models.elm import Sampling
from elmlib.training.trainer import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def card(trained_run: Path, small_data: Path) -> Report:
    best = trained_run / "best_summary_model.safetensors"
    return score_checkpoint(best, str(small_data), "test", 0, Sampling(count=3), CPU)


def test_a_scorecard_holds_every_system_on_the_same_samples(card: Report) -> None:
    names, written = list(card.frame.index), summaries(card)
    assert names[:2] == [TRUE, SHUFFLED] and COPY in names and names[-1] == "best of 3 candidates"
    assert {"mean embedding", "no training", "LLM reads the text", "first sentence"} < set(names)
    assert list(written) == names and {len(texts) for texts in written.values()} == {24}
    assert sorted(written[TRUE]) == sorted(written[SHUFFLED])
    assert len(set(written["mean embedding"])) == 1
    frame = card.frame
    f1 = [text["bertscore_f1"][TRUE] for text in card.texts]
    assert frame.loc[TRUE, "bertscore_f1"] == pytest.approx(np.mean(f1))
    assert (frame["bertscore_f1_low"] <= frame["bertscore_f1"]).all()
    assert frame.p_value[TRUE] == 1.0 and 0 < frame.p_value[COPY] <= 1
    assert frame.p_copy[COPY] == 1.0 and frame.p_copy[TRUE] == frame.p_value[COPY]
    text = card.display_frame().to_string()
    assert all(name in text for name in names) and "chance, 1 of 24" in text and "top-1 of 24" in text
    # The split has no more sources than a pool, so that both are the same.
    assert (frame["reference_mrr"] == frame["reference_all_mrr"]).all()
    assert (frame["source_mrr"] == frame["source_all_mrr"]).all()


def summaries(card: Report) -> dict[str, list[str]]:
    """The summaries of each system."""
    return {name: [text["summaries"][name] for text in card.texts] for name in card.frame.index}


def make_dataset(references: list[str], embeddings: np.ndarray, sources: list[str]) -> SummaryDataset:
    records = [
        Record("summary", "{text}", row, text, 0, 0.0, 1.0, 1, sources[row], "") for row, text in enumerate(references)
    ]
    numbers = {source: number for number, source in enumerate(dict.fromkeys(sources))}
    return SummaryDataset(
        records=records,
        answers=[[1]] * len(records),
        sources=[numbers[source] for source in sources],
        prompts=[PromptIds([1], [2], 0)] * len(records),
        embeddings=torch.from_numpy(embeddings),
        too_long=0,
        fingerprint="",
    )


class ShortCut:
    """In the place of BERTScore: F1 is whether prediction and reference are the same."""

    def score_pairs(self, predictions: list[str], references: list[str]) -> BERTScores:
        same = np.array([float(p == r) for p, r in zip(predictions, references, strict=True)])
        return BERTScores(same, same, same)


def test_a_scorecard_ranks_in_pools_and_among_the_whole_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elmlib.evaluation.report.POOL", 6)
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

    systems = {"adapter": lambda: predictions, "copy": lambda: [references[row] for row in rows]}
    card = score_baselines(systems, ShortCut(), embed, make_dataset(references, embeddings, sources), rows)
    assert embedded[0] == references and len(embedded) == 3  # the split's references once, then each system's own
    given = np.stack([vectors[text] if text else np.zeros(6) for text in predictions])
    pool = np.stack([vectors[text] for text in references])
    frame = card.frame
    for part, targets in (("reference", pool), ("source", embeddings)):
        naive = Identification(np.array(naive_ranks(given, targets, sources, rows)), 15)
        for name, figures in ((part, naive.figures(6)), (f"{part}_all", naive.figures())):
            row = frame.loc["adapter", [f"{name}_{figure}" for figure in figures]].tolist()
            assert row == list(figures.values())
    assert frame.loc["copy", "reference_all_top_1"] == 1.0
    assert [text["bertscore_f1"]["adapter"] for text in card.texts] == [1, 0, 0, 0, 0]
    assert np.isnan(frame.p_copy["adapter"])  # no system is named as the copy
    assert frame.loc["adapter", "reference_all_chance"] == pytest.approx(1 / 15)
    assert frame.loc["adapter", "source_top_1"] > frame.loc["adapter", "source_all_top_1"]
    shown = card.display_frame()
    assert shown.loc["chance, 1 of 6", "top-1 of 15"] == "0.067"


def test_score_baselines_logs_every_system(caplog: pytest.LogCaptureFixture) -> None:
    texts = ["a b c d e", "f g h i j"]
    baselines = {name: lambda: texts for name in ("first", "second")}
    dataset = make_dataset(texts, np.eye(2), ["x", "y"])
    with caplog.at_level("INFO", logger="elmlib"):
        score_baselines(baselines, ShortCut(), lambda given: np.eye(2)[: len(given)], dataset, [0, 1])
    assert [record.message for record in caplog.records] == ["report, 1 of 2: first", "report, 2 of 2: second"]


def test_write_texts_holds_every_summary_beside_its_reference(card: Report, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    card.write_texts(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == card.texts
    assert all(line["reference"] and line["source_id"] for line in lines)
    assert lines[0]["summaries"].keys() == lines[0]["bertscore_f1"].keys() == set(card.frame.index)


def test_a_constant_adapter_scores_as_the_mean_embedding(tiny_config: SummaryTrainingConfig, tmp_path: Path) -> None:
    best = train(replace(tiny_config, max_epochs=1)).best
    file = load_adapter(best)
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
    save_adapter(constant, adapter, file.config, file.step, file.data_fingerprint)
    card = score_checkpoint(constant, tiny_config.summary_data_path, "val", 0, None, CPU)
    written, frame = summaries(card), card.frame
    assert written[TRUE] == written["mean embedding"] == written[SHUFFLED]
    assert frame.bertscore_composite[TRUE] == frame.bertscore_composite["mean embedding"]
    assert frame.p_value[SHUFFLED] == 1.0


def test_reports_of_two_training_seeds_are_of_the_same_texts(
    tiny_config: SummaryTrainingConfig, tmp_path: Path
) -> None:
    data = tiny_config.summary_data_path
    small = replace(tiny_config, max_epochs=1, seed=1)
    first = train(small).best
    second = train(replace(small, seed=2, checkpoint_dir=str(tmp_path / "second"))).best
    cards = [score_checkpoint(path, data, "test", 8, None, CPU) for path in (first, second)]
    assert summaries(cards[0])["first sentence"] == summaries(cards[1])["first sentence"]


def test_adapters_stand_beside_each_other_as_they_stand_alone(
    tiny_config: SummaryTrainingConfig, tmp_path: Path
) -> None:
    data = tiny_config.summary_data_path
    small = replace(tiny_config, max_epochs=1)
    other = replace(small, hidden_dim=16, seed=1, checkpoint_dir=str(tmp_path / "other"))
    files = {"first": train(small).best, "second": train(other).best}
    card = score_adapters(files, data, "test", 0, CPU)
    assert list(card.frame.index) == ["first", SHUFFLED, "second"]
    for name, path in files.items():
        alone = score_checkpoint(path, data, "test", 0, None, CPU)
        assert summaries(card)[name] == summaries(alone)[TRUE]
        assert card.frame.bertscore_f1[name] == alone.frame.bertscore_f1[TRUE]
    elsewhere = replace(small, soft_token_position="in_prompt", checkpoint_dir=str(tmp_path / "elsewhere"))
    files["third"] = train(elsewhere).best
    with pytest.raises(InputError, match=r"elsewhere.*has soft_token_position 'in_prompt', .* 'before_answer'"):
        score_adapters(files, data, "test", 0, CPU)


def test_score_frame_has_the_control_and_the_difference() -> None:
    frame = score_frame({"bertscore_f1": 0.3, "bertscore_f1_shuffled": 0.1, "empty_prediction_rate": 0.25})
    assert frame.loc["BERTScore F1"].tolist() == [0.3, 0.1, 0.2]
    assert frame.loc["empty rate", "true"] == 0.25 and np.isnan(frame.loc["empty rate", "shuffled"])


def test_sample_frame_shows_the_first_summaries(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps({"source_id": "a.b", "prediction": "", "target_text": "Open a file."}) + "\n")
    assert sample_frame(path).to_dict("records") == [
        {"source_id": "a.b", "target_text": "Open a file.", "prediction": ""}
    ]


def example(number: int, f1: float) -> dict[str, object]:
    texts = {"source_id": f"s{number}", "prediction": f"p{number}", "target_text": f"t{number}"}
    return texts | {"bertscore_f1": f1, "rank": number + 1}


@pytest.mark.parametrize(("total", "count", "each"), [(20, 3, 3), (11, 5, 3), (3, 3, 1), (5, 1, 1)])
def test_examples_frame_has_the_best_the_median_and_the_worst(
    tmp_path: Path, total: int, count: int, each: int
) -> None:
    values = np.random.default_rng(total).permutation(total) / total
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(example(number, f1)) + "\n" for number, f1 in enumerate(values)))
    frame = examples_frame(path, count)
    assert frame["group"].tolist() == ["best"] * each + ["median"] * each + ["worst"] * each
    assert frame["source_id"].nunique() == 3 * each
    ranked, f1 = sorted(values, reverse=True), frame["bertscore_f1"].tolist()
    assert f1[:each] == ranked[:each] and f1[2 * each :] == ranked[-each:]
    middle = f1[each : 2 * each]
    assert abs(sum(v > middle[0] for v in values) - sum(v < middle[-1] for v in values)) <= 1
    for row in frame.drop(columns="group").to_dict("records"):
        assert row == example(int(row["source_id"][1:]), row["bertscore_f1"])


def test_examples_frame_refuses_a_file_without_scores_or_too_short(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(example(0, 0.5)) + "\n" + json.dumps({"source_id": "x", "prediction": "y"}) + "\n")
    with pytest.raises(InputError, match=r"predictions\.jsonl, line 2 has no 'bertscore_f1'"):
        examples_frame(path)
    path.write_text((json.dumps(example(0, 0.5)) + "\n") * 2)
    with pytest.raises(InputError, match="2 lines; best, median and worst need at least 3"):
        examples_frame(path)
    with pytest.raises(InputError, match="count is 0"):
        examples_frame(path, 0)


def test_score_checkpoint_refuses_a_wrong_folder_before_it_looks_for_the_llm(
    tiny_config: SummaryTrainingConfig, tmp_path: Path
) -> None:
    adapter = EmbeddingAdapter(384, 32, 8, 32, 0.0, 0.1)
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, adapter, replace(tiny_config, llm_model_name=str(tmp_path / "no-llm")), 1, "")
    with pytest.raises(InputError, match="no-data"):
        score_checkpoint(path, str(tmp_path / "no-data"), "test", 0, None, CPU)


def test_score_checkpoint_takes_the_best_adapter_of_a_folder(
    tiny_config: SummaryTrainingConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, llm_model_name=str(tmp_path / "no-llm"))
    save_adapter(tmp_path / "best_summary_model.safetensors", EmbeddingAdapter(384, 32, 8, 32, 0.0, 0.1), config, 1, "")
    with pytest.raises(InputError, match="no-data"):  # so it has read the adapter
        score_checkpoint(tmp_path, str(tmp_path / "no-data"), "test", 0, None, CPU)
