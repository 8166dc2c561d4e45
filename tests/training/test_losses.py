"""Each loss equals the formula that its docstring names, in value and in gradient."""

import math
from dataclasses import replace

import pytest
import torch

from elmlib.config import SummaryTrainingConfig
from elmlib.data.prompts import IGNORE_INDEX
from elmlib.training import losses
from elmlib.training.losses import LOSSES, compute_losses, info_nce, predict, total_loss
from elmlib.training.setup import TrainingComponents, build_components

ROWS, LENGTH, VOCAB, DIM = 4, 5, 7, 6
# Answers of 5, 3, 1 and 4 tokens.
LABELS = torch.tensor(
    [
        [1, 2, 3, 4, 5],
        [6, 0, 1, IGNORE_INDEX, IGNORE_INDEX],
        [2] + [IGNORE_INDEX] * 4,
        [3, 3, 0, 6, IGNORE_INDEX],
    ]
)
SOURCES = torch.tensor([0, 1, 0, 2])
TABLE = torch.randn(VOCAB, DIM, generator=torch.Generator().manual_seed(90))
WEIGHTS = torch.tensor([0.0, 1.0, 0.5, 2.0, 0.1, 3.0, 0.7])


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosine(a, b):
    return (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()


def naive_info_nce(anchors, positives, sources, temperature):
    losses = []
    for i in range(len(anchors)):
        rivals = [j for j in range(len(anchors)) if j == i or sources[j] != sources[i]]
        total = sum(torch.exp(cosine(anchors[i], positives[j]) / temperature) for j in rivals)
        losses.append(total.log() - cosine(anchors[i], positives[i]) / temperature)
    return torch.stack(losses)


def naive_predict(hidden, weight, labels, top_k):
    """NLL, top-k log-probabilities and their tokens, position by position."""
    nll, tops, ids = torch.zeros(()), [], []
    for row, t in [(row, t) for row in range(ROWS) for t in range(LENGTH) if labels[row, t] != IGNORE_INDEX]:
        scores = torch.stack([hidden[row, t] @ token for token in weight])
        log_probs = scores - scores.exp().sum().log()
        nll = nll - log_probs[labels[row, t]]
        best = log_probs.argsort(descending=True)[:top_k]
        tops.append(log_probs[best])
        ids.append(best)
    return nll, torch.stack(tops), torch.stack(ids)


def slope(*outputs):
    """A weighted sum, so that no two outputs can stand in for each other."""
    return sum((x * torch.arange(1.0, x.numel() + 1).view_as(x)).sum() for x in outputs)


@pytest.mark.parametrize("chunk", [1, 3, 128])
@pytest.mark.parametrize("top_k", [1, 4, VOCAB + 10])
def test_predict_and_its_gradient_equal_their_naive_twin(top_k, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    weight, answers = normal(VOCAB, DIM, seed=3), LABELS != IGNORE_INDEX
    hidden, other = (normal(ROWS, LENGTH, DIM, seed=4).requires_grad_() for _ in range(2))
    found = predict(hidden, weight, LABELS, top_k)
    assert found.top_log_probs[~answers].isneginf().all()
    values = (found.nll, found.top_log_probs[answers], found.top_ids[answers])
    expected = naive_predict(other, weight, LABELS, top_k)
    for (nll, top, _), given in ((values, hidden), (expected, other)):
        slope(2 * nll, top).backward()
        assert not given.grad[~answers].any()
    for value, wanted in zip((*values, hidden.grad), (*expected, other.grad), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)


def test_predict_sums_so_batches_may_be_split_anywhere():
    hidden, weight = normal(ROWS, LENGTH, DIM, seed=4), normal(VOCAB, DIM, seed=3)
    whole = predict(hidden, weight, LABELS, 2).nll
    for cut in range(1, ROWS):
        parts = [predict(hidden[rows], weight, LABELS[rows], 2).nll for rows in (slice(cut), slice(cut, None))]
        torch.testing.assert_close(sum(parts), whole)


def test_info_nce_equals_its_naive_twin():
    anchors, positives = normal(ROWS, DIM, seed=1), normal(ROWS, DIM, seed=2)
    for sources in (SOURCES, torch.arange(ROWS)):
        losses = info_nce(anchors, positives, sources, 0.5)
        torch.testing.assert_close(losses, naive_info_nce(anchors, positives, sources, 0.5))


def test_info_nce_keeps_the_positive_on_the_diagonal():
    rows = normal(ROWS, DIM, seed=1)
    distinct = torch.arange(ROWS)
    matched = info_nce(rows, rows, distinct, 0.07)
    swapped = info_nce(rows, rows.roll(1, 0), distinct, 0.07)
    assert matched.max() < 0.01
    assert swapped.min() > math.log(ROWS)
    assert swapped.max() < 2 / 0.07 + math.log(ROWS)  # the most that cosines over 0.07 can give: no masked positive


def test_info_nce_of_one_source_or_one_row_is_zero():
    rows = normal(ROWS, DIM, seed=1)
    assert torch.equal(info_nce(rows, rows.flip(0), torch.zeros(ROWS), 0.07), torch.zeros(ROWS))
    assert torch.equal(info_nce(rows[:1], rows[1:2], SOURCES[:1], 0.07), torch.zeros(1))


def test_info_nce_takes_no_notice_of_rows_of_the_same_source():
    anchors, positives = normal(ROWS, DIM, seed=1), normal(ROWS, DIM, seed=2)
    before = info_nce(anchors, positives, SOURCES, 0.5)
    positives[2] = normal(DIM, seed=9)  # of the source of row 0
    after = info_nce(anchors, positives, SOURCES, 0.5)
    torch.testing.assert_close(after[0], before[0])
    assert (after[1:] != before[1:]).all()


def test_permuting_the_batch_permutes_info_nce():
    anchors, positives = normal(ROWS, DIM, seed=1), normal(ROWS, DIM, seed=2)
    order = torch.tensor([2, 0, 3, 1])
    permuted = info_nce(anchors[order], positives[order], SOURCES[order], 0.5)
    torch.testing.assert_close(permuted, info_nce(anchors, positives, SOURCES, 0.5)[order])


def test_info_nce_compares_directions_not_lengths():
    anchors, positives = normal(ROWS, DIM, seed=1), normal(ROWS, DIM, seed=2)
    scaled = info_nce(anchors * 3, positives * 0.1, SOURCES, 0.5)
    torch.testing.assert_close(scaled, info_nce(anchors, positives, SOURCES, 0.5))


def test_info_nce_has_the_gradient_of_finite_differences():
    rows = [normal(ROWS, DIM, seed=seed, dtype=torch.float64).requires_grad_() for seed in (1, 2)]
    assert torch.autograd.gradcheck(lambda a, p: info_nce(a, p, SOURCES, 0.5), rows)


def test_total_loss_is_the_weighted_sum_of_means() -> None:
    sums = {"nll": 12.0, "contrastive": 6.0, "drift": 8.0, "predicted_similarity": 99.0}
    config = SummaryTrainingConfig(contrastive_weight=0.5, text_drift_weight=0.25)
    total = total_loss({name: torch.tensor(x) for name, x in sums.items()}, {"token": 4, "row": 2}, config)
    assert total.item() == pytest.approx(12 / 4 + 0.5 * 6 / 2 + 0.25 * 8 / 2)


def values(components: TrainingComponents, rows: list[int], config: SummaryTrainingConfig) -> list[float]:
    """The sums of all losses over these rows."""
    with torch.no_grad():
        return [float(x) for x in compute_losses(components, components.train.collate(rows), config).values()]


def test_compute_losses_of_a_batch_cut_in_two_adds_up(tiny_config: SummaryTrainingConfig) -> None:
    config = replace(tiny_config, use_contrastive_loss=False, dropout_rate=0.0)  # negatives are those of the batch
    components = build_components(config, torch.device("cpu"))
    rows = components.train.bucket(range(96), 8)[0]
    halves = [values(components, half, config) for half in (rows[:3], rows[3:])]
    for total, *pieces in zip(values(components, rows, config), *halves, strict=True):
        assert total == pytest.approx(sum(pieces), rel=1e-4, abs=1e-4)


def test_compute_losses_does_not_depend_on_the_order_of_rows(tiny_config: SummaryTrainingConfig) -> None:
    config = replace(tiny_config, dropout_rate=0.0)
    components = build_components(config, torch.device("cpu"))
    rows = components.train.bucket(range(96), 8)[0]
    assert values(components, rows, config) == pytest.approx(values(components, rows[::-1], config), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("switch", ["use_contrastive_loss", "use_text_drift_loss"])
def test_compute_losses_leaves_out_a_loss_that_is_off(tiny_config: SummaryTrainingConfig, switch: str) -> None:
    config = replace(tiny_config, **{switch: False})
    components = build_components(config, torch.device("cpu"))
    sums = compute_losses(components, components.train.collate([0, 1]), config)
    assert sums.keys() == {loss.name for loss in LOSSES if loss.switch != switch}
    assert all(x > 0 for name, x in sums.items() if name != "predicted_similarity")
