"""The losses: pure functions of tensors, and the table of those that training sums, weighs and logs.

Every function returns sums; sums are divided by counts over the whole accumulation group and all processes, so that a
mean is sum / count and never a mean of means. To add a loss, write its function and add one entry to LOSSES.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from elmlib.config import SummaryTrainingConfig
from elmlib.data.dataset import Batch
from elmlib.data.prompts import IGNORE_INDEX
from elmlib.models.warm_start import mean_token_embedding

if TYPE_CHECKING:
    from elmlib.training.setup import TrainingComponents

CHUNK = 512  # answer positions whose logits over the vocabulary are in memory at a time, at most


class Predictions(NamedTuple):
    """The model's predictions at each answer position."""

    nll: Tensor  # Sum of -log p(label) over answer tokens, nats, float32
    top_log_probs: Tensor  # (batch, length, k) float32 log-probabilities of the most probable tokens; -inf at padding
    top_ids: Tensor  # (batch, length, k)


def predict(hidden: Tensor, weight: Tensor, labels: Tensor, top_k: int) -> Predictions:
    """NLL and the `top_k` most probable tokens, without the logits of all positions in memory at once.

    hidden (batch, length, dim): the LLM's last hidden states; weight (vocab, dim): its output layer; labels (batch,
    length) with IGNORE_INDEX at padding, which is not computed. Equals, in float32, `log_softmax(hidden @ weight.T)`
    gathered at the labels and cut to its top k, with the same gradient to `hidden`; `weight` is frozen and gets none.
    """
    answers = labels != IGNORE_INDEX
    top_k = min(top_k, len(weight))
    nll, log_probs, ids = _Predict.apply(hidden[answers], weight, labels[answers], top_k)
    shape = (*labels.shape, top_k)
    top = log_probs.new_full(shape, float("-inf")).masked_scatter(answers[..., None], log_probs)
    return Predictions(nll, top, ids.new_zeros(shape).masked_scatter(answers[..., None], ids))


class _Predict(torch.autograd.Function):
    """`predict` without padding: hidden (tokens, dim), labels (tokens,).

    With p = softmax(W h): d nll / dh = E_p[W] - W[label], d log p_k / dh = W[k] - E_p[W]. So E_p[W], one vector a
    position, computed while its logits exist, is all that the backward pass needs of the whole vocabulary.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        nll = torch.zeros((), device=hidden.device)
        pieces, expected = [], []
        count = -(-len(hidden) // CHUNK)
        # Pieces of equal sizes: a last piece of few positions would read all of the output layer for them.
        for part, label in zip(*(x.tensor_split(count) for x in (hidden, labels)), strict=True):
            log_probs = torch.log_softmax(part @ weight.T, -1, dtype=torch.float32)  # (chunk, vocab)
            nll -= log_probs.gather(1, label[:, None]).sum()
            pieces.append(log_probs.topk(top_k))
            if ctx.needs_input_grad[0]:
                expected.append(log_probs.exp_().to(weight.dtype) @ weight)  # (chunk, dim)
        top, ids = (torch.cat(piece) for piece in zip(*pieces, strict=True))
        if expected:
            ctx.save_for_backward(torch.cat(expected), weight, labels, ids)
        ctx.mark_non_differentiable(ids)
        return nll, top, ids

    @staticmethod
    def backward(ctx: Any, nll: Tensor, slopes: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        expected, weight, labels, ids = ctx.saved_tensors
        grad = nll * (expected.float() - weight[labels].float())
        grad += (slopes[:, None] @ weight[ids].float())[:, 0] - slopes.sum(1, keepdim=True) * expected.float()
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


def text_drift(vectors: Tensor, embeddings: Tensor, target_similarity: float) -> tuple[Tensor, Tensor]:
    """relu(target_similarity - cos(v, e)) and the cosine itself, each (batch,); v and e (batch, embedding_dim), both in
    the embedder's own space: a cosine between vectors of unrelated spaces means nothing."""
    similarity = F.cosine_similarity(vectors, embeddings, dim=-1)
    return F.relu(target_similarity - similarity), similarity


class LossInputs(NamedTuple):
    """What the losses of one batch are computed from."""

    components: "TrainingComponents"
    config: SummaryTrainingConfig
    batch: Batch
    soft_tokens: Tensor  # (batch, num_soft_tokens, llm_dim) float32
    predictions: Predictions
    predicted_vectors: Tensor | None  # (batch, embedding_dim): the expected text, embedded; None without the drift loss


class Loss(NamedTuple):
    """One entry of the table."""

    name: str  # In metrics.jsonl
    sum: Callable[[LossInputs], Tensor]  # The sum over the batch, a scalar
    per: Literal["token", "row"]  # What the sum is divided by: answer tokens or rows
    weight: str = ""  # Setting with its weight; empty for a weight of 1
    switch: str = ""  # Setting that turns it on; empty where it is always on
    is_trained: bool = True  # False for a figure that is logged and adds nothing to the loss

    def is_on(self, config: SummaryTrainingConfig) -> bool:
        """Whether `config` asks for it."""
        return not self.switch or getattr(config, self.switch)


def _contrastive(inputs: LossInputs) -> Tensor:
    labels, sources, parts = inputs.batch.labels, inputs.batch.sources, inputs.components
    positives = mean_token_embedding(labels, parts.model.table, parts.warm_start.idf)  # (batch, llm_dim)
    return info_nce(inputs.soft_tokens.mean(1), positives, sources, inputs.config.contrastive_temperature).sum()


def _drift(inputs: LossInputs) -> Tensor:
    assert inputs.predicted_vectors is not None
    target = inputs.config.text_drift_target_similarity
    return text_drift(inputs.predicted_vectors, inputs.batch.embeddings, target)[0].sum()


def _predicted_similarity(inputs: LossInputs) -> Tensor:
    assert inputs.predicted_vectors is not None
    return text_drift(inputs.predicted_vectors.detach(), inputs.batch.embeddings, 1.0)[1].sum()


LOSSES = (
    Loss("nll", lambda inputs: inputs.predictions.nll, "token"),
    Loss("contrastive", _contrastive, "row", "contrastive_weight", "use_contrastive_loss"),
    Loss("drift", _drift, "row", "text_drift_weight", "use_text_drift_loss"),
    Loss("predicted_similarity", _predicted_similarity, "row", switch="use_text_drift_loss", is_trained=False),
)


def compute_losses(components: "TrainingComponents", batch: Batch, config: SummaryTrainingConfig) -> dict[str, Tensor]:
    """One forward pass, and the sum over `batch` of every loss in LOSSES that `config` asks for, by name."""
    model, drift = components.model, config.use_text_drift_loss
    soft, hidden = model(batch)
    predictions = predict(hidden, model.head, batch.labels, config.drift_top_k if drift else 0)
    vectors = components.drift_head(predictions) if drift else None
    inputs = LossInputs(components, config, batch, soft, predictions, vectors)
    return {loss.name: loss.sum(inputs) for loss in LOSSES if loss.is_on(config)}


def total_loss(sums: Mapping[str, Tensor], counts: Mapping[str, int], config: SummaryTrainingConfig) -> Tensor:
    """The weighted sum of all losses; `counts`: the answer tokens and rows ("token", "row") of the optimizer step."""
    total = torch.zeros((), device=sums["nll"].device)
    for per, count in counts.items():
        losses = [loss for loss in LOSSES if loss.per == per and loss.is_trained and loss.name in sums]
        weights = [getattr(config, loss.weight) if loss.weight else 1.0 for loss in losses]
        if losses:
            total = total + sum(w * sums[loss.name] for w, loss in zip(weights, losses, strict=True)) / count
    return total
