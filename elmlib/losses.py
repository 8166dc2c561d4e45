"""The losses, pure functions of tensors. Each returns sums with their counts, so that a mean over accumulated batches
and over processes is sum / count and never a mean of means."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from elmlib.prompts import IGNORE_INDEX

CHUNK = 512
"""Answer positions whose logits over the vocabulary are held at a time, at most."""


class LossParts(NamedTuple):
    """Sums over one batch, and what to divide them by."""

    nll: Tensor
    """Sum of negative log-likelihoods over answer tokens, nats."""
    contrastive: Tensor
    """Sum of InfoNCE over rows, nats."""
    drift: Tensor
    """Sum of the text drift loss over rows, cosine units."""
    drift_similarity: Tensor
    """Sum over rows of the cosine that the drift loss looks at."""
    teacher: Tensor
    """Sum of the KL divergence from the teacher over answer tokens, nats."""
    tokens: int
    rows: int


class Predictions(NamedTuple):
    """What the model says at each answer position."""

    nll: Tensor
    """Sum of -log p(label) over answer tokens, nats, float32."""
    top_log_probs: Tensor
    """(batch, length, k) float32 log-probabilities of the most probable tokens; -inf at padding."""
    top_ids: Tensor
    """(batch, length, k)."""
    asked_log_probs: Tensor
    """(answer tokens, m) float32 log-probabilities of the tokens that were asked for; m is 0 where none were."""


def predict(hidden: Tensor, weight: Tensor, labels: Tensor, top_k: int, asked_ids: Tensor | None = None) -> Predictions:
    """NLL, the `top_k` most probable tokens and any others asked for, without holding the logits of all positions.

    hidden (batch, length, dim): the LLM's last hidden states; weight (vocab, dim): its output layer; labels (batch,
    length) with IGNORE_INDEX at padding, which is not computed; asked_ids (answer tokens, m), row by row. Equals, in
    float32, `log_softmax(hidden @ weight.T)` gathered at the labels, cut to its top k and gathered at `asked_ids`,
    with the same gradient to `hidden`; `weight` is frozen and gets none.
    """
    answers = labels != IGNORE_INDEX
    given, chosen = hidden[answers], labels[answers]
    asked = chosen.new_zeros(len(chosen), 0) if asked_ids is None else asked_ids
    top_k = min(top_k, len(weight))
    nll, log_probs, ids = predict_tokens(given, weight, chosen, top_k, asked)
    shape = (*labels.shape, top_k)
    top = log_probs.new_full(shape, float("-inf")).masked_scatter(answers[..., None], log_probs[:, :top_k])
    top_ids = ids.new_zeros(shape).masked_scatter(answers[..., None], ids)
    return Predictions(nll, top, top_ids, log_probs[:, top_k:])


def predict_tokens(
    hidden: Tensor, weight: Tensor, labels: Tensor, top_k: int, asked: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`predict` for positions that all count: hidden (tokens, dim), labels (tokens,), asked (tokens, m).

    Returns the NLL's sum, log-probabilities (tokens, top_k + m) and the ids of the top k (tokens, top_k).
    """
    return _Predict.apply(hidden, weight, labels, top_k, asked)


class _Predict(torch.autograd.Function):
    """With p = softmax(W h): d nll / dh = E_p[W] - W[label], d log p_k / dh = W[k] - E_p[W]. So one vector a position,
    E_p[W], made while its logits are at hand, is all that the backward pass needs of the whole vocabulary."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, top_k: int, asked: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        nll = torch.zeros((), device=hidden.device)
        pieces, expected = [], []
        count = -(-len(hidden) // CHUNK)
        # Of equal sizes: a last piece of few positions would read all of the output layer for them.
        for part, label, also in zip(*(x.tensor_split(count) for x in (hidden, labels, asked)), strict=True):
            log_probs = torch.log_softmax(part @ weight.T, -1, dtype=torch.float32)  # (chunk, vocab)
            nll -= log_probs.gather(1, label[:, None]).sum()
            top, top_ids = log_probs.topk(top_k)
            pieces.append((torch.cat([top, log_probs.gather(1, also)], dim=1), top_ids))
            if ctx.needs_input_grad[0]:
                expected.append(log_probs.exp_().to(weight.dtype) @ weight)  # (chunk, dim)
        told, ids = (torch.cat(piece) for piece in zip(*pieces, strict=True))
        if expected:
            ctx.save_for_backward(torch.cat(expected), weight, labels, torch.cat([ids, asked], dim=1))
        ctx.mark_non_differentiable(ids)
        return nll, told, ids

    @staticmethod
    def backward(ctx: Any, nll: Tensor, slopes: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        expected, weight, labels, ids = ctx.saved_tensors
        grad = nll * (expected.float() - weight[labels].float())
        grad += (slopes[:, None] @ weight[ids].float())[:, 0] - slopes.sum(1, keepdim=True) * expected.float()
        return grad.to(weight.dtype), None, None, None, None


def info_nce(anchors: Tensor, positives: Tensor, sources: Tensor, temperature: float) -> Tensor:
    """InfoNCE (van den Oord et al., 2018) of each row, (batch,) nats; 0 for a batch of one.

    anchors, positives (batch, dim), compared by cosine; row i's positive is positives[i], its negatives are the other
    rows' positives but those of the same source (sources (batch,)), which would be false negatives.
    """
    similarity = F.normalize(anchors, dim=-1) @ F.normalize(positives, dim=-1).T / temperature  # (batch, batch)
    same_source = sources[:, None] == sources[None, :]
    same_source.fill_diagonal_(False)
    similarity = similarity.masked_fill(same_source, float("-inf"))
    return F.cross_entropy(similarity, torch.arange(len(anchors), device=anchors.device), reduction="none")


def teacher_kl(teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
    """KL(teacher || student) of each answer token over the teacher's k most probable tokens and one bucket for all
    others, (tokens,) nats, at least 0; forward KL as in knowledge distillation (Hinton et al., 2015).

    Both (tokens, k) float32 log-probabilities of the same tokens. With k the whole vocabulary it is the full KL; with
    fewer it is a lower bound of it (the bucket hides how its mass is spread).
    """
    teacher, student = (torch.cat([kept, _log_rest(kept)], dim=1) for kept in (teacher_log_probs, student_log_probs))
    return (teacher.exp() * (teacher - student)).sum(1)


def _log_rest(log_probs: Tensor) -> Tensor:
    """log(1 - sum p), (tokens, 1), with at least 1e-6 left over: rounding must not make it infinite."""
    return torch.log((1 - log_probs.exp().sum(1, keepdim=True)).clamp_min(1e-6))
