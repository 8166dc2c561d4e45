"""The workbench: models, data and closed-form fits, all that is frozen or fixed before training begins."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from elmlib.adapter import (
    EmbeddingAdapter,
    LinearMap,
    NormalEquations,
    fit_ridge,
    mean_and_std,
    mean_token_embedding,
    token_idf,
)
from elmlib.bertscore import BERTScoreEvaluator, create_evaluator
from elmlib.config import SummaryTrainingConfig
from elmlib.data import Batch, Split, load_split
from elmlib.losses import DriftReadout
from elmlib.model import Elm, make_adapter
from elmlib.pretrained import encode, load_embedder, load_llm, native_bf16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workbench:
    """All that is frozen or fixed: what several runs on the same data and models can share."""

    elm: Elm
    train: Split
    val: Split
    idf: Tensor
    """(vocab,) inverse document frequency over the training answers."""
    readout: DriftReadout
    evaluator: BERTScoreEvaluator
    embed: Callable[[list[str]], np.ndarray]
    """Texts -> vectors, in the space of the source embeddings."""

    def with_adapter(self, adapter: EmbeddingAdapter) -> "Workbench":
        """The same workbench around another adapter, say one that is not wrapped for several processes."""
        return replace(self, elm=self.elm.with_adapter(adapter))


def prepare(config: SummaryTrainingConfig, device: torch.device) -> Workbench:
    """Load models and data, fit what has a closed form, and start the adapter warm."""
    dtype = torch.bfloat16 if config.use_bf16 and native_bf16(device) else torch.float32
    llm, tokenizer = load_llm(config.llm_model_name, dtype, device)
    train, val = (load_split(config, split, tokenizer) for split in ("train", "val"))
    for name, split in (("train", train), ("val", val)):
        logger.info("%s: %d rows, %d left out as too long", name, len(split), split.too_long)
    table = llm.get_input_embeddings().weight
    adapter = make_adapter(config, table).to(device)
    idf = token_idf(train.answers, len(table)).to(device)
    adapter.standardise(*mean_and_std(batch.embeddings for batch in _rows(train, device)))

    def moments(split: Split, forward: bool) -> NormalEquations:
        pairs = (
            (adapter.standardised(batch.embeddings), mean_token_embedding(batch.labels, table, idf), batch.embeddings)
            for batch in _rows(split, device)
        )
        return NormalEquations((x, y) if forward else (y, e) for x, y, e in pairs)

    if config.warm_start:
        fit, strength = fit_ridge(moments(train, forward=True), moments(val, forward=True))
        adapter.warm_start(fit)
        logger.info("warm start: ridge strength %.3g", strength)
    to_embedding, strength = fit_ridge(moments(train, forward=False), moments(val, forward=False))
    logger.info("drift read-out: ridge strength %.3g", strength)
    embedder = load_embedder(config.embedding_model_name, device)
    return Workbench(
        elm=Elm(llm, tokenizer, adapter, config.use_gradient_checkpointing),
        train=train,
        val=val,
        idf=idf,
        readout=DriftReadout(table, idf, LinearMap(*(x.to(device) for x in to_embedding)), config.drift_top_k),
        evaluator=create_evaluator(config, [train.records[row].target_text for row in train.subset(1000, config.seed)]),
        embed=lambda texts: encode(embedder, texts, config.batch_size),
    )


def _rows(split: Split, device: torch.device, chunk: int = 256) -> Iterator[Batch]:
    # Answers of like length share a chunk, or the longest answer would pad all of them.
    for rows in split.bucket(range(len(split)), chunk):
        yield split.collate(rows).to(device)
