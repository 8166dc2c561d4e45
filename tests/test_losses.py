"""Each loss equals the formula that its docstring names, in value and in gradient."""

import math

import pytest
import torch

from elmlib import losses
from elmlib.losses import info_nce, predict, teacher_kl
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


def cosine(a, b):
    return (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()


def naive_info_nce(anchors, positives, sources, temperature):
    losses = []
    for i in range(len(anchors)):
        rivals = [j for j in range(len(anchors)) if j == i or sources[j] != sources[i]]
        total = sum(torch.exp(cosine(anchors[i], positives[j]) / temperature) for j in rivals)
        losses.append(total.log() - cosine(anchors[i], positives[i]) / temperature)
    return torch.stack(losses)


ASKED = torch.tensor([[token % VOCAB, (3 * token + 1) % VOCAB] for token in range(13)])  # for each answer token


def naive_predict(hidden, weight, labels, top_k, asked):
    """NLL, top-k log-probabilities, their tokens, and log-probabilities of the asked ones, position by position."""
    answers = [(row, t) for row in range(ROWS) for t in range(LENGTH) if labels[row, t] != IGNORE_INDEX]
    nll, tops, ids, found = torch.zeros(()), [], [], []
    for (row, t), wanted in zip(answers, asked, strict=True):
        scores = torch.stack([hidden[row, t] @ token for token in weight])
        log_probs = scores - scores.exp().sum().log()
        nll = nll - log_probs[labels[row, t]]
        best = log_probs.argsort(descending=True)[:top_k]
        tops.append(log_probs[best])
        ids.append(best)
        found.append(torch.stack([log_probs[token] for token in wanted]))
    return nll, torch.stack(tops), torch.stack(ids), torch.stack(found)


def slope(*outputs):
    """A weighted sum, so that no two outputs can stand in for each other."""
    return sum((x * torch.arange(1.0, x.numel() + 1).view_as(x)).sum() for x in outputs)


@pytest.mark.parametrize("chunk", [1, 3, 128])
@pytest.mark.parametrize("top_k", [1, 4, VOCAB + 10])
def test_predict_and_its_gradient_equal_their_naive_twin(top_k, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    weight, answers = normal(VOCAB, DIM, seed=3), LABELS != IGNORE_INDEX
    hidden, other = (normal(ROWS, LENGTH, DIM, seed=4).requires_grad_() for _ in range(2))
    found = predict(hidden, weight, LABELS, top_k, ASKED)
    assert found.top_log_probs[~answers].isneginf().all()
    values = (found.nll, found.top_log_probs[answers], found.top_ids[answers], found.asked_log_probs)
    expected = naive_predict(other, weight, LABELS, top_k, ASKED)
    for (nll, top, _, asked), given in ((values, hidden), (expected, other)):
        slope(2 * nll, top, asked).backward()
        assert not given.grad[~answers].any()
    for value, wanted in zip((*values, hidden.grad), (*expected, other.grad), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)


def test_what_is_asked_for_changes_nothing_else():
    hidden, weight = normal(ROWS, LENGTH, DIM, seed=4), normal(VOCAB, DIM, seed=3)
    plain, asked = predict(hidden, weight, LABELS, 2), predict(hidden, weight, LABELS, 2, ASKED)
    assert plain.asked_log_probs.shape == (13, 0)
    for before, after in zip(plain[:3], asked[:3], strict=True):
        assert torch.equal(before, after)


def naive_teacher_kl(teacher, student, kept):
    """sum p_T log(p_T / p_S) over the kept tokens, and the same for all others as one event; full distributions."""
    values = []
    for row in range(len(teacher)):
        p, q = teacher[row].exp(), student[row].exp()
        value = sum(p[token] * (p[token] / q[token]).log() for token in kept[row])
        rest = [token for token in range(VOCAB) if token not in kept[row]]
        if rest:
            value = value + p[rest].sum() * (p[rest].sum() / q[rest].sum()).log()
        values.append(value)
    return torch.stack(values)


@pytest.mark.parametrize("top_k", [1, 3, VOCAB])
def test_teacher_kl_equals_its_naive_twin(top_k):
    teacher, student = (normal(ROWS, VOCAB, seed=seed).log_softmax(-1) for seed in (5, 6))
    top, ids = teacher.topk(top_k)
    found = teacher_kl(top, student.gather(1, ids))
    torch.testing.assert_close(found, naive_teacher_kl(teacher, student, ids.tolist()), rtol=1e-4, atol=1e-5)
    if top_k == VOCAB:
        full = torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="none").sum(1)
        torch.testing.assert_close(found, full, rtol=1e-4, atol=1e-5)


def test_teacher_kl_is_zero_for_the_teacher_itself_and_grows_with_what_is_kept():
    teacher, student = (normal(ROWS, VOCAB, seed=seed).log_softmax(-1) for seed in (5, 6))
    order = teacher.argsort(descending=True)
    before = torch.zeros(ROWS)
    for top_k in range(1, VOCAB):
        ids = order[:, :top_k]
        same = teacher_kl(teacher.gather(1, ids), teacher.gather(1, ids))
        torch.testing.assert_close(same, torch.zeros(ROWS), rtol=0, atol=1e-6)
        found = teacher_kl(teacher.gather(1, ids), student.gather(1, ids))
        assert (found >= before - 1e-5).all()  # merging tokens into one bucket can only hide a difference
        before = found
    assert before.min() > 0


def test_permuting_the_tokens_permutes_teacher_kl():
    teacher, student = (normal(ROWS, VOCAB, seed=seed).log_softmax(-1)[:, :4] for seed in (5, 6))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(teacher_kl(teacher[order], student[order]), teacher_kl(teacher, student)[order])


def test_teacher_kl_has_the_gradient_of_finite_differences():
    teacher = normal(ROWS, VOCAB, seed=5, dtype=torch.float64).log_softmax(-1)[:, :3]
    scores = normal(ROWS, VOCAB, seed=6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: teacher_kl(teacher, x.log_softmax(-1)[:, :3]), scores)


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
