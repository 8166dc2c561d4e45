"""The reference implementations give what elmlib gives: what benchmarks compare is the same work."""

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.run import filter_jobs
from reference import batched_summaries, naive_bertscore, naive_losses, naive_summaries
from safetensors.numpy import load_file

from elmlib.config import SummaryTrainingConfig
from elmlib.data import SPLITS, read_records
from elmlib.training import TrainingComponents, build_components
from elmlib.training.losses import compute_losses, total_loss
from elmlib.training.validation import validate


@pytest.fixture
def components(tiny_config: SummaryTrainingConfig) -> TrainingComponents:
    components = build_components(tiny_config, torch.device("cpu"))
    components.model.adapter.eval()  # no dropout: the same every time
    return components


def test_naive_losses_and_their_gradients_equal_elmlibs(
    components: TrainingComponents, tiny_config: SummaryTrainingConfig
) -> None:
    batch = components.train.collate(list(range(6)))
    results = []
    for compute in (naive_losses, compute_losses):
        sums = compute(components, batch, tiny_config)
        total_loss(sums, {"token": batch.num_tokens, "row": len(batch.labels)}, tiny_config).backward()
        slopes = {name: weight.grad.clone() for name, weight in components.model.adapter.named_parameters()}
        components.model.adapter.zero_grad()
        results.append((sums, slopes))
    (naive, naive_slopes), (ours, slopes) = results
    assert naive.keys() == ours.keys() and all(x.item() > 0 for x in ours.values())
    for name in naive:
        torch.testing.assert_close(naive[name], ours[name], rtol=1e-4, atol=1e-4)
    for name, slope in slopes.items():
        torch.testing.assert_close(naive_slopes[name], slope, rtol=1e-3, atol=1e-6, msg=name)


def test_summaries_of_generate_equal_elmlibs(components: TrainingComponents) -> None:
    batch = components.val.collate_prompts(list(range(5)))
    expected = components.model.generate(batch, 10)
    assert naive_summaries(components.model, batch, 10) == batched_summaries(components.model, batch, 10) == expected


def test_naive_bertscore_equals_elmlibs(components: TrainingComponents) -> None:
    references = [record.target_text for record in components.val.records[:9]]
    predictions = [record.target_text for record in components.train.records[:9]]
    library = naive_bertscore(components, predictions, references)
    np.testing.assert_allclose(library, components.evaluator.score_pairs(predictions, references), atol=1e-5)


def test_naive_filter_keeps_what_elmlib_keeps(tmp_path: Path) -> None:
    ours, naive = filter_jobs(tmp_path, 900)
    ours()
    naive()
    for split in SPLITS:
        lines, vectors = f"{split}_synthesis.jsonl", f"{split}_embeddings.safetensors"
        kept, twin = (list(read_records(tmp_path / name / lines, 1000)) for name in ("out", "naive"))
        assert kept == twin and len(kept) == (300 if split == "train" else 33)
        kept, twin = (load_file(tmp_path / name / vectors)["embeddings"] for name in ("out_embeddings", "naive"))
        np.testing.assert_array_equal(kept, twin)


def test_naive_losses_give_the_nll_of_an_evaluation(
    components: TrainingComponents, tiny_config: SummaryTrainingConfig
) -> None:
    val_nll = validate(components, tiny_config, torch.device("cpu")).val_nll
    components.model.adapter.eval()
    rows = components.val.subset(tiny_config.eval_nll_samples, tiny_config.eval_seed)
    batches = [components.val.collate(rows[start : start + 3]) for start in range(0, len(rows), 3)]
    with torch.no_grad():
        nll = sum(naive_losses(components, batch, tiny_config)["nll"].item() for batch in batches)
    assert nll / sum(batch.num_tokens for batch in batches) == pytest.approx(val_nll, rel=1e-4)
