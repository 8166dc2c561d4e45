"""The naive twins give what elmlib gives: what the benchmark compares is the same work."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from elmlib.config import SummaryTrainingConfig
from elmlib.contests import _naive_evaluation, floor, long_steps, short_steps, training
from elmlib.files_contests import FilterJob, make_corpus
from elmlib.layout import SPLITS
from elmlib.naive import naive_bertscore, naive_loss, naive_summaries
from elmlib.objective import loss_parts, total_loss
from elmlib.records import parse_line, read_lines
from elmlib.validation import validate
from elmlib.workbench import Workbench, prepare

CPU = torch.device("cpu")


@pytest.fixture
def bench(tiny_config: SummaryTrainingConfig) -> Workbench:
    bench = prepare(tiny_config, CPU)
    bench.elm.adapter.eval()  # no dropout: the same every time
    return bench


def test_the_naive_loss_and_its_gradients_are_elmlibs(bench: Workbench, tiny_config: SummaryTrainingConfig) -> None:
    batch = bench.train.collate(list(range(6)))
    found = []
    for loss in (naive_loss, loss_parts):
        parts = loss(bench, batch, tiny_config)
        total_loss(parts, parts.tokens, parts.rows, tiny_config).backward()
        slopes = {name: weight.grad.clone() for name, weight in bench.elm.adapter.named_parameters()}
        bench.elm.adapter.zero_grad()
        found.append((parts, slopes))
    (naive, naive_slopes), (ours, slopes) = found
    for name in ("nll", "contrastive", "drift", "drift_similarity"):
        torch.testing.assert_close(getattr(naive, name), getattr(ours, name), rtol=1e-4, atol=1e-4)
        assert getattr(ours, name).item() > 0, name
    for name, slope in slopes.items():
        torch.testing.assert_close(naive_slopes[name], slope, rtol=1e-3, atol=1e-6, msg=name)


def test_naive_summaries_are_elmlibs(bench: Workbench) -> None:
    batch = bench.val.collate_prompts(list(range(5)))
    assert naive_summaries(bench.elm, batch, 10) == bench.elm.generate(batch, 10)


def test_the_librarys_scores_are_elmlibs(bench: Workbench) -> None:
    references = [record.target_text for record in bench.val.records[:9]]
    predictions = [record.target_text for record in bench.train.records[:9]]
    library = naive_bertscore(bench, predictions, references)
    np.testing.assert_allclose(library, bench.evaluator.score_pairs(predictions, references), atol=1e-5)


def test_the_naive_evaluation_measures_the_same_nll(bench: Workbench, tiny_config: SummaryTrainingConfig) -> None:
    ours = validate(bench, tiny_config, CPU)
    bench.elm.adapter.eval()
    naive = _naive_evaluation(bench, tiny_config, CPU)
    assert naive == pytest.approx((ours.val_nll + ours.val_nll_shuffled) / 2, rel=1e-4)


def test_the_naive_filter_keeps_what_elmlib_keeps(tmp_path) -> None:
    make_corpus(tmp_path / "corpus", 900, seed=0)
    ours, naive = (FilterJob(tmp_path / "corpus", tmp_path / name) for name in ("ours", "naive"))
    ours.ours()
    naive.naive()
    for split in SPLITS:
        lines = f"{split}_synthesis.jsonl"
        kept = [
            [parse_line(line) for _, line in read_lines(path)]
            for path in (ours.out / "synthesis" / lines, naive.out / lines)
        ]
        assert kept[0] == kept[1] and len(kept[0]) == (294 if split == "train" else 3)
        vectors = f"{split}_embeddings.safetensors"
        mine, twin = (
            load_file(path)["embeddings"] for path in (ours.out / "embeddings" / vectors, naive.out / vectors)
        )
        np.testing.assert_array_equal(mine, twin)


def test_contestants_step_over_the_same_rows(bench: Workbench, tiny_config: SummaryTrainingConfig) -> None:
    steps = short_steps(bench, tiny_config, 4)
    rows = [sorted(row for batch in batches for row in batch.rows) for batches in steps]
    assert rows[0] == rows[1] and len(set(rows[0])) == 32
    assert steps.answer_tokens == sum(batch.num_tokens for batch in steps.mixed)
    padded = [sum(batch.labels.numel() for batch in batches) for batches in steps]
    assert padded[0] <= padded[1]  # rows of like length are together
    for job in floor(bench, steps.bucketed):
        job()
    assert all(weight.grad is None for weight in bench.elm.adapter.parameters())
    before = {name: weight.clone() for name, weight in bench.elm.adapter.state_dict().items()}
    for job in training(bench, tiny_config, loss_parts, steps.bucketed):
        job()
    for name, weight in bench.elm.adapter.state_dict().items():
        assert torch.equal(weight, before[name]), "a contestant trained another's adapter"


def test_one_step_is_the_least_that_is_timed(bench: Workbench, tiny_config: SummaryTrainingConfig) -> None:
    assert [len(short_steps(bench, tiny_config, count).bucketed) for count in (0, 1)] == [1, 1]


def test_texts_too_short_for_long_answers_are_told(bench: Workbench, tiny_config: SummaryTrainingConfig) -> None:
    with pytest.raises(
        ValueError, match="0 training texts have more than 96 tokens; expected at least the batch size, 8"
    ):
        long_steps(bench, tiny_config, 2)
