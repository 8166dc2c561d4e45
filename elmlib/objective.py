"""What training minimises: the losses that the config asks for, and their weights."""

from typing import Protocol

import torch
from torch import Tensor

from elmlib.adapter import mean_token_embedding
from elmlib.config import SummaryTrainingConfig
from elmlib.data import Batch
from elmlib.drift import DriftHead, text_drift
from elmlib.losses import LossParts, info_nce, predict, teacher_kl
from elmlib.model import Elm
from elmlib.teacher import Teacher


class Learner(Protocol):
    """What the losses look at; a workbench is one."""

    @property
    def elm(self) -> Elm:
        """The LLM and the adapter that learns."""

    @property
    def idf(self) -> Tensor:
        """(vocab,) weight of each token in a text's meaning."""

    @property
    def drift(self) -> DriftHead:
        """Reads the meaning of what the model is about to say."""

    @property
    def teacher(self) -> Teacher | None:
        """Of the training rows; None without its loss."""


def loss_parts(bench: Learner, batch: Batch, config: SummaryTrainingConfig) -> LossParts:
    """One forward pass and every loss that the config asks for; a loss that it does not ask for is 0."""
    soft, hidden = bench.elm(batch)
    lesson = bench.teacher(batch.rows, soft.device) if bench.teacher else None
    predictions = predict(
        hidden,
        bench.elm.head,
        batch.labels,
        config.drift_top_k if config.use_text_drift_loss else 0,
        lesson.ids if lesson else None,
    )
    contrastive = drift = similarity = teacher = torch.zeros((), device=soft.device)
    if config.use_contrastive_loss:
        positives = mean_token_embedding(batch.labels, bench.elm.table, bench.idf)
        contrastive = info_nce(soft.mean(1), positives, batch.sources, config.contrastive_temperature).sum()
    if config.use_text_drift_loss:
        meanings = bench.drift(predictions)
        losses, cosines = text_drift(meanings, batch.embeddings, config.text_drift_target_similarity)
        drift, similarity = losses.sum(), cosines.detach().sum()
    if lesson:
        teacher = teacher_kl(lesson.log_probs, predictions.asked_log_probs).sum()
    return LossParts(predictions.nll, contrastive, drift, similarity, teacher, batch.num_tokens, len(batch.labels))


def total_loss(parts: LossParts, tokens: int, rows: int, config: SummaryTrainingConfig) -> Tensor:
    """The weighted sum of all losses, each per answer token or per row of the whole optimizer step."""
    return (
        (parts.nll + config.teacher_kl_weight * parts.teacher) / tokens
        + (config.contrastive_weight * parts.contrastive + config.text_drift_weight * parts.drift) / rows
    )  # fmt: skip
