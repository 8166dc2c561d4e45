"""The losses, pure functions of tensors. Each returns sums with their counts, so that a mean over accumulated batches
and over processes is sum / count and never a mean of means."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from elmlib.adapter import LinearMap
from elmlib.prompts import IGNORE_INDEX


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


def predict(hidden: Tensor, weight: Tensor, labels: Tensor, top_k: int) -> Predictions:
    """NLL and the `top_k` most probable tokens, without holding the logits of all positions.

    hidden (batch, length, dim): the LLM's last hidden states; weight (vocab, dim): its output layer; labels (batch,
    length) with IGNORE_INDEX at padding, which is not computed. Equals, in float32,
    `log_softmax(hidden @ weight.T)` gathered at the labels and cut to its top k, with the same gradient to `hidden`;
    `weight` is frozen and gets none.
    """
    answers = labels != IGNORE_INDEX
    nll, top, ids = _Predict.apply(hidden[answers], weight, labels[answers], min(top_k, len(weight)))
    shape = (*labels.shape, top.shape[-1])
    top_log_probs = top.new_full(shape, float("-inf")).masked_scatter(answers[..., None], top)
    return Predictions(nll, top_log_probs, ids.new_zeros(shape).masked_scatter(answers[..., None], ids))


class _Predict(torch.autograd.Function):
    """With p = softmax(W h): d nll / dh = E_p[W] - W[label], d log p_k / dh = W[k] - E_p[W]. So one vector a position,
    E_p[W], made while its logits are at hand, is all that the backward pass needs of the whole vocabulary."""

    CHUNK = 128  # positions whose logits are held at a time

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        nll = torch.zeros((), device=hidden.device)
        tops, expected = [], []
        for part, label in zip(hidden.split(_Predict.CHUNK), labels.split(_Predict.CHUNK), strict=True):
            logits = (part @ weight.T).float()  # (chunk, vocab)
            total = logits.logsumexp(-1, keepdim=True)
            nll += (total - logits.gather(1, label[:, None])).sum()
            top, ids = logits.topk(top_k)
            tops.append((top - total, ids))
            if ctx.needs_input_grad[0]:
                expected.append(logits.sub_(total).exp_().to(weight.dtype) @ weight)  # (chunk, dim)
        top_log_probs, top_ids = (torch.cat(pieces) for pieces in zip(*tops, strict=True))
        if expected:
            ctx.save_for_backward(torch.cat(expected), weight, labels, top_ids)
        ctx.mark_non_differentiable(top_ids)
        return nll, top_log_probs, top_ids

    @staticmethod
    def backward(ctx: Any, nll: Tensor, top: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        expected, weight, labels, ids = ctx.saved_tensors
        grad = nll * (expected.float() - weight[labels].float())
        grad += (top[:, None] @ weight[ids].float())[:, 0] - top.sum(1, keepdim=True) * expected.float()
        return grad.to(weight.dtype), None, None, None


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


def expected_token_embedding(top_log_probs: Tensor, top_ids: Tensor, table: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean embedding of the tokens that the model is about to say, (batch, llm_dim) float32.

    Each answer position contributes its most probable tokens (batch, length, k), by probability times `weights`
    (vocab,); what falls outside the top k is missing mass, not invented mass. Padding has log-probability -inf.
    table (vocab, llm_dim).
    """
    mass = (top_log_probs.exp() * weights[top_ids]).flatten(1)  # (batch, length * k)
    total = mass[:, None] @ table[top_ids.flatten(1)].float()  # (batch, 1, length * k) @ (batch, length * k, llm_dim)
    return total[:, 0] / mass.sum(1).clamp_min(1e-6)[:, None]


def text_drift(meanings: Tensor, embeddings: Tensor, target_similarity: float) -> tuple[Tensor, Tensor]:
    """relu(target_similarity - cos(v, e)) and the cosine itself, each (batch,); v and e (batch, embedding_dim).

    `meanings` must lie in the embedder's own space: a cosine between vectors of unrelated spaces means nothing.
    """
    similarity = F.cosine_similarity(meanings, embeddings, dim=-1)
    return F.relu(target_similarity - similarity), similarity


class DriftReadout(NamedTuple):
    """What turns predicted tokens into a vector of the embedder's space; fitted in closed form, then frozen."""

    table: Tensor
    """(vocab, llm_dim) the LLM's token embeddings."""
    idf: Tensor
    """(vocab,) weight of each token."""
    to_embedding: LinearMap
    """Mean token embedding -> embedding."""
    top_k: int
    """Most probable tokens per position that are looked at."""

    def __call__(self, predictions: Predictions) -> Tensor:
        """(batch, embedding_dim): the meaning of what the model is about to say."""
        top, ids = predictions.top_log_probs, predictions.top_ids
        return self.to_embedding(expected_token_embedding(top, ids, self.table, self.idf))
