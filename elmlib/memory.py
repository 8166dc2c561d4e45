"""The memory that a training step really takes, measured in a process of its own that holds nothing else."""

import ctypes
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple, cast

import torch
from transformers import PreTrainedModel

from elmlib import resident
from elmlib.adapter import EmbeddingAdapter
from elmlib.benchmark_commands import PlanConfig
from elmlib.contests import take_step
from elmlib.data import Batch
from elmlib.drift import DriftHead, DriftReadout
from elmlib.model import Elm
from elmlib.pretrained import default_device, load_llm
from elmlib.prompts import PromptIds
from elmlib.ridge import LinearMap

_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 1 << 16  # mallopt(3)


class Learner(NamedTuple):
    """All that the losses look at, with random maps in the place of fitted ones."""

    elm: Elm
    idf: torch.Tensor
    drift: DriftHead
    teacher: None = None


class Point(NamedTuple):
    """A training step to measure."""

    batch_size: int
    answer_tokens: int
    checkpointing: bool


def measure_steps(config: PlanConfig, points: Sequence[Point]) -> list[int]:
    """Peak bytes of one training step at each point, with the LLM, the adapter and AdamW's moments among them.

    On a GPU the allocator's own count; on Linux the resident memory of a fresh process less what it had before it
    loaded the LLM. Raises NotImplementedError for any other CPU.
    """
    if not torch.cuda.is_available() and sys.platform != "linux":
        raise NotImplementedError(f"the peak memory of a process cannot be read on {sys.platform}; use Linux or a GPU")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, config, list(points)).result()


def _measure(config: PlanConfig, points: list[Point]) -> list[int]:
    device = default_device()
    if device.type == "cpu":
        # Freed tensors then go back to the system at once, and resident memory is the memory in use.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
    torch.ones(512, 512) @ torch.ones(512, 512)  # starts the threads, whose stacks are not the step's
    before = resident.resident_bytes() if device.type == "cpu" else 0
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    found = []
    for point in points:
        llm, tokenizer = load_llm(config.llm_model_name, dtype, device)
        learner = _learner(Elm(llm, tokenizer, _adapter(config, llm).to(device), point.checkpointing), config)
        step = _step(learner, config, device)
        step(1, 1)  # makes AdamW's moments and reads the prompt
        _forget_peak(device)
        step(point.batch_size, point.answer_tokens)
        found.append(_peak(device) - before)
        del llm, learner, step
    return found


def _adapter(config: PlanConfig, llm: PreTrainedModel) -> EmbeddingAdapter:
    dim = cast(torch.Tensor, llm.get_input_embeddings().weight).shape[1]
    return EmbeddingAdapter(config.embedding_dim, dim, config.num_soft_tokens, config.hidden_dim, 0.1, 1.0)


def _learner(elm: Elm, config: PlanConfig) -> Learner:
    table = elm.table
    to_embedding = LinearMap(
        torch.randn(config.embedding_dim, table.shape[1], device=table.device),
        torch.zeros(config.embedding_dim, device=table.device),
    )
    idf = torch.ones(len(table), device=table.device)
    return Learner(elm, idf, DriftReadout(table, idf, to_embedding))


def _step(learner: Learner, config: PlanConfig, device: torch.device) -> Callable[[int, int], None]:
    """What takes a training step on so many rows of so many answer tokens."""
    settings = config.training()
    optimizer = torch.optim.AdamW(learner.elm.adapter.parameters(), lr=settings.learning_rate, fused=True)
    generator = torch.Generator().manual_seed(0)

    def step(rows: int, answer_tokens: int) -> None:
        batch = Batch(
            embeddings=torch.randn(rows, config.embedding_dim, generator=generator),
            labels=torch.randint(len(learner.elm.table), (rows, answer_tokens), generator=generator),
            sources=torch.arange(rows),
            prompt=PromptIds(list(range(config.prompt_tokens)), [], 0),
            rows=[],
        ).to(device)
        take_step(learner, batch, settings, optimizer)

    return step


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        resident.forget_peak()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident.peak_bytes()
