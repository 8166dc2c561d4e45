"""Several processes: the adapter in each of them, the frozen LLM in each or, with FSDP, dealt out over all.

Only the adapter's gradients travel: the LLM has none. accelerate's own FSDP wraps what is trained, which is small; here
it is the frozen LLM that is large. FSDP: Zhao et al., VLDB 2023, https://arxiv.org/abs/2304.11277.
"""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from elmlib.adapter import EmbeddingAdapter


def asks_for_shards(accelerator: Accelerator) -> bool:
    """Whether accelerate's config, or `accelerate launch --use_fsdp`, asks for FSDP, and several processes run."""
    return accelerator.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def share_adapter(adapter: EmbeddingAdapter, accelerator: Accelerator) -> torch.nn.Module:
    """The adapter, its gradients averaged over all processes in the backward pass."""
    if accelerator.num_processes == 1:
        return adapter
    device = accelerator.device
    return DistributedDataParallel(adapter, device_ids=[device.index] if device.type == "cuda" else None)


def without_travel(adapter: torch.nn.Module) -> AbstractContextManager:
    """Gradients are summed up in this process and not sent, for all batches of an optimizer step but its last."""
    return adapter.no_sync() if isinstance(adapter, DistributedDataParallel) else nullcontext()


def shard_llm(llm: PreTrainedModel, accelerator: Accelerator) -> None:
    """Deal the LLM's layers out over all processes; each is gathered when it runs and let go behind it.

    Token embeddings, the last norm and the output layer stay whole: the losses multiply with them directly. From here
    on a forward pass needs all processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in llm.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
