"""Each loss equals the formula that its docstring names, in value and in gradient."""

import math

import pytest
import torch

from elmlib import losses
from elmlib.adapter import LinearMap
from elmlib.losses import DriftReadout, Predictions, expected_token_embedding, info_nce, predict, text_drift
from elmlib.prompts import IGNORE_INDEX

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


def predictions(seed=0):
    return (3 * normal(ROWS, LENGTH, VOCAB, seed=seed)).log_softmax(-1)


def cosine(a, b):
    return (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()


def naive_info_nce(anchors, positives, sources, temperature):
    losses = []
    for i in range(len(anchors)):
        rivals = [j for j in range(len(anchors)) if j == i or sources[j] != sources[i]]
        total = sum(torch.exp(cosine(anchors[i], positives[j]) / temperature) for j in rivals)
        losses.append(total.log() - cosine(anchors[i], positives[i]) / temperature)
    return torch.stack(losses)


def naive_expectation(log_probs, labels, top_k):
    """sum of p * w * embedding over sum of p * w, over the answer positions and their top_k tokens."""
    means = []
    for row in range(len(labels)):
        total, mass = torch.zeros(DIM), torch.zeros(())
        for t in range(labels.shape[1]):
            if labels[row, t] == IGNORE_INDEX:
                continue
            for token in log_probs[row, t].argsort(descending=True)[:top_k]:
                share = log_probs[row, t, token].exp() * WEIGHTS[token]
                total, mass = total + share * TABLE[token], mass + share
        means.append(total / mass)
    return torch.stack(means)


def naive_drift(meanings, embeddings, target):
    return torch.stack([(target - cosine(v, e)).clamp(min=0) for v, e in zip(meanings, embeddings, strict=True)])


def gradient(function, given):
    """Gradient of a weighted sum of the outputs, so that no two outputs can stand in for each other."""
    given = given.detach().requires_grad_()
    out = function(given)
    (out * torch.arange(1.0, out.numel() + 1).view_as(out)).sum().backward()
    return given.grad


def most_probable(log_probs, labels, top_k):
    """What `predict` would say, from the log-probabilities of the whole vocabulary."""
    top, ids = log_probs.topk(min(top_k, VOCAB))
    padding = (labels == IGNORE_INDEX)[..., None]
    return Predictions(log_probs.new_zeros(()), top.masked_fill(padding, float("-inf")), ids)


def expectation(log_probs, labels, top_k):
    """The expected token embedding, from the log-probabilities of the whole vocabulary."""
    _, top, ids = most_probable(log_probs, labels, top_k)
    return expected_token_embedding(top, ids, TABLE, WEIGHTS)


def naive_predict(hidden, weight, labels, top_k):
    log_probs = (hidden @ weight.T).log_softmax(-1)
    nll = sum(-log_probs[i, t, labels[i, t]] for i, t in (labels != IGNORE_INDEX).nonzero())
    _, top, ids = most_probable(log_probs, labels, top_k)
    return nll, top, ids


@pytest.mark.parametrize("chunk", [1, 3, 128])
@pytest.mark.parametrize("top_k", [1, 4, VOCAB + 10])
def test_predict_and_its_gradient_equal_their_naive_twin(top_k, chunk, monkeypatch):
    monkeypatch.setattr(losses._Predict, "CHUNK", chunk)
    weight, answers = normal(VOCAB, DIM, seed=3), LABELS != IGNORE_INDEX
    slopes = []
    for function in (predict, naive_predict):
        hidden = normal(ROWS, LENGTH, DIM, seed=4).requires_grad_()
        nll, top, ids = function(hidden, weight, LABELS, top_k)
        (2 * nll + (top[answers] * torch.arange(top[answers].numel()).view_as(top[answers])).sum()).backward()
        slopes.append((nll.detach(), top.detach()[answers], ids[answers], hidden.grad))
        assert top[~answers].isneginf().all()
        assert not hidden.grad[~answers].any()
    for found, expected in zip(*slopes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("top_k", [1, 3, VOCAB, VOCAB + 10])
def test_the_expected_embedding_equals_its_naive_twin(top_k):
    log_probs = predictions()
    means = expectation(log_probs, LABELS, top_k)
    torch.testing.assert_close(means, naive_expectation(log_probs, LABELS, top_k))
    slopes = [
        gradient(lambda given: expectation(given, LABELS, top_k), log_probs),
        gradient(lambda given: naive_expectation(given, LABELS, top_k), log_probs),
    ]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)


def test_the_whole_vocabulary_gives_the_full_expectation():
    log_probs = predictions()
    present = (LABELS != IGNORE_INDEX)[..., None]
    mass = (log_probs.exp() * WEIGHTS * present).sum(1)  # (rows, vocab)
    expected = mass @ TABLE / mass.sum(1, keepdim=True)
    torch.testing.assert_close(expectation(log_probs, LABELS, VOCAB), expected)


def test_the_expected_embedding_ignores_padding_and_what_the_labels_say():
    log_probs = predictions()
    other = torch.where((LABELS == IGNORE_INDEX)[..., None], predictions(seed=5), log_probs)
    relabelled = torch.where(LABELS == IGNORE_INDEX, LABELS, (LABELS + 1) % VOCAB)
    expected = expectation(log_probs, LABELS, 3)
    assert torch.equal(expectation(other, relabelled, 3), expected)


def test_the_expected_embedding_of_a_row_does_not_depend_on_the_others():
    log_probs = predictions()
    whole = expectation(log_probs, LABELS, 3)
    for row in range(ROWS):
        length = int((LABELS[row] != IGNORE_INDEX).sum())
        alone = (log_probs[row : row + 1, :length], LABELS[row : row + 1, :length])
        torch.testing.assert_close(expectation(*alone, 3)[0], whole[row])


def test_a_model_sure_of_weightless_tokens_gives_no_nan():
    log_probs = torch.full((1, 2, VOCAB), -1e4)
    log_probs[..., 0] = 0.0  # token 0 weighs nothing
    log_probs.requires_grad_()
    mean = expectation(log_probs, torch.tensor([[0, 0]]), 3)
    mean.sum().backward()
    assert mean.isfinite().all()
    assert log_probs.grad.isfinite().all()


def test_text_drift_equals_its_naive_twin():
    meanings, embeddings = normal(ROWS, DIM, seed=1), normal(ROWS, DIM, seed=2)
    for target in (-1.0, 0.0, 0.75, 1.0):
        losses, similarity = text_drift(meanings, embeddings, target)
        torch.testing.assert_close(losses, naive_drift(meanings, embeddings, target))
        for row in range(ROWS):
            torch.testing.assert_close(similarity[row], cosine(meanings[row], embeddings[row]))


def test_text_drift_above_the_target_has_neither_loss_nor_gradient():
    embeddings = normal(ROWS, DIM, seed=2)
    meanings = embeddings + 0.1 * normal(ROWS, DIM, seed=1)
    meanings[3] = -embeddings[3]  # the one row that falls short
    meanings[3, 0] += 1
    losses, similarity = text_drift(meanings, embeddings, 0.75)
    slope = gradient(lambda given: text_drift(given, embeddings, 0.75)[0], meanings)
    assert similarity[:3].min() > 0.75
    assert not losses[:3].any()
    assert not slope[:3].any()
    assert losses[3] > 0.75
    assert slope[3].any()


def test_a_step_down_the_drift_gradient_raises_the_cosine():
    meanings, embeddings = normal(ROWS, DIM, seed=1), normal(ROWS, DIM, seed=2)
    slope = gradient(lambda given: text_drift(given, embeddings, 1.0)[0], meanings)
    before, after = (text_drift(v, embeddings, 1.0)[1] for v in (meanings, meanings - 0.01 * slope))
    assert (after > before).all()


def test_text_drift_has_the_gradient_of_finite_differences():
    rows = [normal(ROWS, DIM, seed=seed, dtype=torch.float64).requires_grad_() for seed in (1, 2)]
    assert text_drift(*rows, 0.75)[0].min() > 0.01  # away from the kink, where no difference is defined
    assert torch.autograd.gradcheck(lambda v, e: text_drift(v, e, 0.75), rows)


def test_text_drift_is_a_row_by_row_loss_so_batches_may_be_split_anywhere():
    meanings, embeddings = normal(ROWS, DIM, seed=1), normal(ROWS, DIM, seed=2)
    for whole, *parts in zip(
        text_drift(meanings, embeddings, 0.75),
        text_drift(meanings[:1], embeddings[:1], 0.75),
        text_drift(meanings[1:], embeddings[1:], 0.75),
        strict=True,
    ):
        torch.testing.assert_close(sum(part.sum() for part in parts), whole.sum())


def test_the_readout_maps_the_expected_embedding_and_lets_the_gradient_through():
    to_embedding = LinearMap(normal(3, DIM, seed=1), normal(3, seed=2))
    log_probs = predictions()
    readout = DriftReadout(TABLE, WEIGHTS, to_embedding, 4)
    meanings = readout(most_probable(log_probs, LABELS, 4))
    for row, mean in enumerate(naive_expectation(log_probs, LABELS, 4)):
        torch.testing.assert_close(meanings[row], to_embedding.weight @ mean + to_embedding.bias)
    slope = gradient(lambda given: readout(most_probable(given, LABELS, 4)), log_probs)
    assert slope[LABELS != IGNORE_INDEX].any(-1).all()
    assert not slope[LABELS == IGNORE_INDEX].any()
