"""The memory that a training step really takes, measured in a process of its own that holds nothing else."""

import ctypes
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, cast

import torch
from transformers import PreTrainedModel

from elmlib.adapter import EmbeddingAdapter
from elmlib.benchmark_commands import PlanConfig
from elmlib.contests import Job, take_step
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
    before = _resident("VmRSS")
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    found = []
    for point in points:
        llm, tokenizer = load_llm(config.llm_model_name, dtype, device)
        learner = _learner(Elm(llm, tokenizer, _adapter(config, llm).to(device), point.checkpointing), config)
        step = _step(learner, config, point, device)
        for _ in range(2):  # the first one makes AdamW's moments and reads the prompt
            _forget_peak(device)
            step()
        found.append(_peak(device) - (before if device.type == "cpu" else 0))
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


def _step(learner: Learner, config: PlanConfig, point: Point, device: torch.device) -> Job:
    settings = config.training()
    generator = torch.Generator().manual_seed(0)
    shape = (point.batch_size, point.answer_tokens)
    batch = Batch(
        embeddings=torch.randn(point.batch_size, config.embedding_dim, generator=generator),
        labels=torch.randint(len(learner.elm.table), shape, generator=generator),
        sources=torch.arange(point.batch_size),
        prompt=PromptIds(list(range(config.prompt_tokens)), [], 0),
        rows=[],
    ).to(device)
    optimizer = torch.optim.AdamW(learner.elm.adapter.parameters(), lr=settings.learning_rate, fused=True)
    return lambda: take_step(learner, batch, settings, optimizer)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to what is resident now


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)
