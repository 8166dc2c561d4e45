"""The workbench: models, data and closed-form fits, all that is frozen or fixed before training begins."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from elmlib.adapter import EmbeddingAdapter
from elmlib.bertscore import BERTScoreEvaluator, create_evaluator
from elmlib.config import SummaryTrainingConfig
from elmlib.data import Split, load_split, locate_split, opening_split
from elmlib.drift import DriftHead, DriftReadout, ReEmbed
from elmlib.fits import Fits, load_fits
from elmlib.model import Elm, make_adapter, token_table
from elmlib.pretrained import check_head, encode, load_embedder, load_llm, native_bf16
from elmlib.ridge import views
from elmlib.teacher import Teacher, load_teacher

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)


_LOADED = (
    *("summary_data_path", "summary_only", "max_seq_length", "train_rows", "llm_model_name", "embedding_model_name"),
    *("embedding_dim", "use_bf16", "bertscore_model", "bertscore_batch_size", "evaluation_device", "eval_seed"),
)
"""Settings that decide which models and data are loaded; a workbench serves runs that have them equal."""


@dataclass(frozen=True)
class Workbench:
    """All that is frozen or fixed: what several runs on the same data and models can share."""

    elm: Elm
    train: Split
    val: Split
    fits: Fits
    drift: DriftHead
    teacher: Teacher | None
    """Of `train`; None without the teacher's loss."""
    evaluator: BERTScoreEvaluator
    embedder: "SentenceTransformer"
    embed: Callable[[list[str]], np.ndarray]
    """Texts -> vectors, in the space of the source embeddings."""

    config: SummaryTrainingConfig
    """The settings that models, data and fits were loaded by."""

    known_references: dict[int, np.ndarray] = field(default_factory=dict)
    """Re-embedded targets of validation rows, each embedded once; every evaluation asks for the same ones."""

    @property
    def idf(self) -> torch.Tensor:
        """(vocab,) weight of each token in a text's meaning."""
        return self.fits.idf

    def reference_vectors(self, rows: Sequence[int]) -> np.ndarray:
        """(rows, embedding_dim): the targets of validation rows, re-embedded."""
        if missing := [row for row in rows if row not in self.known_references]:
            texts = [self.val.records[row].target_text for row in missing]
            self.known_references.update(zip(missing, self.embed(texts), strict=True))
        return np.stack([self.known_references[row] for row in rows])

    def with_adapter(self, adapter: EmbeddingAdapter) -> "Workbench":
        """The same workbench around another adapter, say one that is not wrapped for several processes."""
        return replace(self, elm=self.elm.with_adapter(adapter))

    def fresh(self, config: SummaryTrainingConfig) -> "Workbench":
        """The same models and data with an adapter, warm or at random, and losses as `config` has them.

        Raises ValueError where `config` asks for other models or data than these.
        """
        for name in _LOADED:
            if getattr(config, name) != getattr(self.config, name):
                raise ValueError(
                    f"{name} is {getattr(config, name)!r}, but the models and data were loaded with "
                    f"{getattr(self.config, name)!r}; load them for these settings"
                )
        table = self.elm.table
        adapter = make_adapter(config, table).to(table.device)
        adapter.standardise(self.fits.mean, self.fits.std)
        if config.warm_start:
            count = config.num_soft_tokens
            found = views(self.fits.to_tokens, count if config.warm_start_views else 1)
            adapter.warm_start(found if config.warm_start_views else found * count)
        if config.text_drift_head == "re_embed":
            if config.evaluation_device and config.evaluation_device != table.device.type:
                raise ValueError("text_drift_head re_embed trains through the embedder: leave evaluation_device empty")
            drift: DriftHead = ReEmbed(self.embedder, self.elm.tokenizer)
        else:
            drift = DriftReadout(table, self.fits.idf, self.fits.to_embedding.map)
        teacher = load_teacher(self.elm, self.train, config) if config.use_teacher_kl else None
        elm = self.elm.configured(adapter, config.use_gradient_checkpointing, config.soft_token_place)
        return replace(self, elm=elm, drift=drift, teacher=teacher, config=config)

    def opening(self, config: SummaryTrainingConfig) -> "Workbench":
        """The same workbench for the paraphrase stage: each text's own beginning is its training target."""
        train = opening_split(self.train, self.elm.tokenizer, config.pretrain_tokens)
        return replace(
            self, train=train, teacher=load_teacher(self.elm, train, config) if config.use_teacher_kl else None
        )


def prepare(config: SummaryTrainingConfig, device: torch.device) -> Workbench:
    """Load models and data, fit what has a closed form, and start the adapter warm."""
    for name in ("train", "val"):  # before a model is loaded or even downloaded: a wrong folder fails at once
        locate_split(config, name)
    dtype = torch.bfloat16 if config.use_bf16 and native_bf16(device) else torch.float32
    llm, tokenizer = load_llm(config.llm_model_name, dtype, device)
    check_head(llm)
    train, val = (load_split(config, split, tokenizer) for split in ("train", "val"))
    for name, split in (("train", train), ("val", val)):
        logger.info("%s: %d rows, %d left out as too long", name, len(split), split.too_long)
    table = token_table(llm)
    adapter = make_adapter(config, table).to(device)
    fits = load_fits(train, val, table, adapter)
    evaluation_device = torch.device(config.evaluation_device or device)
    embedder = load_embedder(config.embedding_model_name, evaluation_device)
    references = [train.records[row].target_text for row in train.subset(1000, config.eval_seed)]
    bench = Workbench(
        elm=Elm(llm, tokenizer, adapter, config.use_gradient_checkpointing, config.soft_token_place),
        train=train,
        val=val,
        fits=fits,
        drift=DriftReadout(table, fits.idf, fits.to_embedding.map),
        teacher=None,
        evaluator=create_evaluator(config, references, evaluation_device),
        embedder=embedder,
        embed=lambda texts: encode(embedder, texts, config.batch_size),
        config=config,
    )
    return bench.fresh(config)
