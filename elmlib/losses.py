"""The losses, pure functions of tensors. Each returns sums with their counts, so that a mean over accumulated batches
and over processes is sum / count and never a mean of means."""

from typing import NamedTuple

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


def token_nll(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) over labels other than IGNORE_INDEX; log_probs (batch, length, vocab) float32."""
    return F.nll_loss(log_probs.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


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


def expected_token_embedding(log_probs: Tensor, labels: Tensor, table: Tensor, weights: Tensor, top_k: int) -> Tensor:
    """Weighted mean embedding of the tokens that the model is about to say, (batch, llm_dim) float32.

    Each answer position contributes its `top_k` most probable tokens by probability times `weights` (vocab,).
    log_probs (batch, length, vocab) float32; labels (batch, length) say only which positions are answers; table
    (vocab, llm_dim).
    """
    top, ids = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1)  # (batch, length, k)
    mass = (top.exp() * weights[ids] * (labels != IGNORE_INDEX)[..., None]).flatten(1)  # (batch, length * k)
    total = mass[:, None] @ table[ids.flatten(1)].float()  # (batch, 1, length * k) @ (batch, length * k, llm_dim)
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

    def __call__(self, log_probs: Tensor, labels: Tensor) -> Tensor:
        """(batch, embedding_dim): the meaning of what the model is about to say."""
        return self.to_embedding(expected_token_embedding(log_probs, labels, self.table, self.idf, self.top_k))
