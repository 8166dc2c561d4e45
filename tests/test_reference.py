"""The reference implementations give what elmlib gives: what benchmarks compare is the same work."""

import numpy as np
import pytest
import torch
from reference import batched_summaries, naive_bertscore, naive_losses, naive_summaries

from elmlib.config import SummaryTrainingConfig
from elmlib.training import TrainingComponents, build_components
from elmlib.training.losses import compute_losses, total_loss


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
