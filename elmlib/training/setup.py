"""What a run is set up from: models, data and evaluator; its steps and learning rates; several processes."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from elmlib.config import InputError, SummaryTrainingConfig
from elmlib.data.dataset import SummaryDataset, epoch_batches, load_split, locate_split
from elmlib.evaluation.bertscore import BASELINE_TEXTS, BERTScoreEvaluator, create_evaluator
from elmlib.models.adapter import EmbeddingAdapter
from elmlib.models.elm import SoftTokenModel, build_model
from elmlib.models.pretrained import encode, load_embedder
from elmlib.models.warm_start import WarmStart, load_warm_start, warm_started_adapter
from elmlib.training.drift import DriftHead, DriftReadout, ReEmbed

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingComponents:
    """Models, data and fits of one config: all that training reads and does not change, and the adapter it trains."""

    model: SoftTokenModel
    train: SummaryDataset
    val: SummaryDataset
    warm_start: WarmStart
    drift_head: DriftHead
    evaluator: BERTScoreEvaluator
    embedder: "SentenceTransformer"
    embed: Callable[[list[str]], np.ndarray]  # Texts -> vectors, in the space of the source embeddings
    known_references: dict[int, np.ndarray] = field(default_factory=dict)
    """Embedded targets of validation rows: every evaluation needs the same ones."""

    def reference_vectors(self, rows: Sequence[int]) -> np.ndarray:
        """(rows, embedding_dim): the embedded targets of validation rows, each computed once."""
        if missing := [row for row in rows if row not in self.known_references]:
            texts = [self.val.records[row].target_text for row in missing]
            self.known_references.update(zip(missing, self.embed(texts), strict=True))
        return np.stack([self.known_references[row] for row in rows])

    def with_adapter(self, adapter: EmbeddingAdapter) -> "TrainingComponents":
        """The same components with another adapter, for example one wrapped for several processes."""
        return replace(self, model=self.model.with_adapter(adapter))


def build_components(
    config: SummaryTrainingConfig, device: torch.device, shard: Callable[[PreTrainedModel], object] | None = None
) -> TrainingComponents:
    """Load models and data, compute the closed-form fits, and start the adapter; `shard` as in `load_llm`.
    Raises InputError as loading them does."""
    for name in ("train", "val"):  # before a model is loaded or downloaded: a wrong folder fails at once
        locate_split(config, name)
    model = build_model(config, device, shard=shard)
    train, val = (load_split(config, split, model.tokenizer) for split in ("train", "val"))
    for name, dataset in (("train", train), ("val", val)):
        logger.info("%s: %d rows, %d left out as too long", name, len(dataset), dataset.too_long)
    warm_start = load_warm_start(train, val, model.table, config)
    model = model.with_adapter(warm_started_adapter(config, warm_start, model.table))
    evaluation_device = torch.device(config.evaluation_device or device)
    embedder = load_embedder(config.embedding_model_name, evaluation_device)
    drift_head: DriftHead = DriftReadout(model.table, warm_start.idf, warm_start.to_embedding.map)
    if config.text_drift_head == "re_embed":
        if evaluation_device.type != model.table.device.type:
            raise InputError("text_drift_head re_embed trains through the embedder: leave evaluation_device empty")
        drift_head = ReEmbed(embedder, model.tokenizer)
    references = [train.records[row].target_text for row in train.subset(BASELINE_TEXTS, config.eval_seed)]
    evaluator = create_evaluator(config, references, evaluation_device)

    def embed(texts: list[str]) -> np.ndarray:
        return encode(embedder, texts, config.batch_size)

    return TrainingComponents(model, train, val, warm_start, drift_head, evaluator, embedder, embed)


def accumulation_groups(
    dataset: SummaryDataset, config: SummaryTrainingConfig, epoch: int, process: int = 0, processes: int = 1
) -> list[list[list[int]]]:
    """The optimizer steps of one epoch: for each, the batches of this process, each a list of rows. The last batches
    are left out where they are too few for all processes."""
    batches = epoch_batches(dataset, config.batch_size, config.seed, epoch)
    batches = batches[: len(batches) // processes * processes]
    size = config.gradient_accumulation_steps * processes
    groups = [batches[start : start + size] for start in range(0, len(batches), size)]
    return [group[process::processes] for group in groups]


def learning_rate(step: int, total_steps: int, config: SummaryTrainingConfig) -> float:
    """The rate of optimizer step `step`, from 0: linear warm-up, then a half cosine to 0."""
    warmup = math.ceil(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether accelerate's config, or `accelerate launch --use_fsdp`, asks for FSDP, and several processes run."""
    return accelerator.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def share_adapter(adapter: EmbeddingAdapter, accelerator: Accelerator) -> torch.nn.Module:
    """The adapter, its gradients averaged over all processes in the backward pass. Only these are communicated."""
    if accelerator.num_processes == 1:
        return adapter
    device = accelerator.device
    return DistributedDataParallel(adapter, device_ids=[device.index] if device.type == "cuda" else None)


def without_communication(adapter: torch.nn.Module) -> AbstractContextManager:
    """Gradients are summed in this process and not sent: for all batches of an optimizer step but its last."""
    return adapter.no_sync() if isinstance(adapter, DistributedDataParallel) else nullcontext()


def shard_llm(llm: PreTrainedModel, accelerator: Accelerator) -> None:
    """Shard the LLM's layers over all processes with FSDP; each is gathered when it runs and freed after it.

    accelerate's own FSDP shards what is trained, which is small; here the frozen LLM is large. Token embeddings, the
    last norm and the output layer stay whole: the losses multiply with them. Every later forward pass needs all
    processes. FSDP: Zhao et al., VLDB 2023, https://arxiv.org/abs/2304.11277.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in llm.get_decoder().layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)  # by default a root, as each is here, stays whole
