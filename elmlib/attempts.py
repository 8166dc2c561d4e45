"""What else could make a training step faster: each tried on the same batches, beside the step as it is."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F

from elmlib import losses
from elmlib.config import SummaryTrainingConfig
from elmlib.contests import Steps, training
from elmlib.data import Batch
from elmlib.losses import LossParts
from elmlib.model import Elm
from elmlib.objective import loss_parts
from elmlib.pretrained import load_llm, native_bf16
from elmlib.prompts import IGNORE_INDEX
from elmlib.racing import Job
from elmlib.workbench import Workbench

AS_IT_IS = "as it is"


class Attempt(NamedTuple):
    """A step with one thing other than elmlib has it."""

    name: str
    about: str
    """What is other, and what became of it."""
    kept: bool
    """Whether elmlib works so."""
    make: Callable[[], list[Job]] | None
    """None where it cannot be tried on this machine; `about` then says why."""


def attempts(bench: Workbench, config: SummaryTrainingConfig, steps: Steps, compiled: bool) -> list[Attempt]:
    """The step as it is, then each attempt; all with the NLL alone, on the same rows."""
    device = bench.elm.table.device
    plain = replace(config, use_contrastive_loss=False, use_text_drift_loss=False)

    def step(bench: Workbench = bench, loss: Callable[..., LossParts] = loss_parts, mixed: bool = False) -> list[Job]:
        return training(bench, plain, loss, steps.mixed if mixed else steps.bucketed)

    def other_llm(dtype: torch.dtype, checkpointing: bool = False) -> Workbench:
        llm, tokenizer = load_llm(config.llm_model_name, dtype, device)
        elm = Elm(llm, tokenizer, bench.elm.adapter, checkpointing, config.soft_token_place)
        return replace(bench, elm=elm)

    def with_attention(name: str) -> list[Job]:
        other = other_llm(bench.elm.llm.dtype)
        other.elm.llm.set_attn_implementation(name)
        return step(other)

    def with_compile() -> list[Job]:
        other = other_llm(bench.elm.llm.dtype)
        other.elm.llm.base_model.compile(dynamic=True)
        return step(other)

    def chunked(size: int) -> list[Job]:
        def within(job: Job) -> None:
            with _chunk(size):
                job()

        return [partial(within, job) for job in step()]

    wide = torch.float32 if bench.elm.llm.dtype == torch.bfloat16 else torch.bfloat16
    used = bench.elm.llm.config._attn_implementation
    other = "eager" if used == "sdpa" else "sdpa"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return [
        Attempt(AS_IT_IS, "the step that elmlib trains with", True, step),
        Attempt("random batches", "rows of like length not put together", False, lambda: step(mixed=True)),
        Attempt(
            "loss by autograd", "logits of all answer positions, padding too, and PyTorch's own cross-entropy", False,
            lambda: step(loss=_autograd_loss),
        ),
        Attempt(
            "vocabulary whole", f"logits of all answer tokens at once, not of {losses.CHUNK} at a time", False,
            lambda: chunked(2**40),
        ),
        Attempt(f"{other} attention", f"in the place of {used}", False, lambda: with_attention(other)),
        Attempt(
            "gradient checkpointing", "activations made twice, and the prompt read in every row; for memory, not speed",
            False, lambda: step(other_llm(bench.elm.llm.dtype, checkpointing=True)),
        ),
        _other_width(wide, device, lambda: step(other_llm(wide))),
        Attempt(
            "torch.compile", "of the frozen LLM, with dynamic shapes" if compiler else "needs a C++ compiler", False,
            with_compile if compiled and compiler else None,
        ),
    ]  # fmt: skip


def first_call(make: Callable[[], list[Job]]) -> tuple[list[Job], float]:
    """The jobs, and the seconds of their first run, in which a compiler compiles."""
    jobs = make()
    started = time.perf_counter()
    for job in jobs:
        job()
    return jobs, time.perf_counter() - started


def _other_width(dtype: torch.dtype, device: torch.device, make: Callable[[], list[Job]]) -> Attempt:
    if dtype == torch.bfloat16 and not native_bf16(device):
        # A hundredth of float32's speed where it is emulated: an hour for this table.
        return Attempt("LLM in bfloat16", "this processor does not multiply it", False, None)
    name = str(dtype).removeprefix("torch.")
    return Attempt(f"LLM in {name}", "the other width", False, make)


@contextmanager
def _chunk(size: int) -> Iterator[None]:
    usual, losses.CHUNK = losses.CHUNK, size
    try:
        yield
    finally:
        losses.CHUNK = usual


def _autograd_loss(bench: Workbench, batch: Batch, config: SummaryTrainingConfig) -> LossParts:
    hidden = bench.elm(batch).hidden
    logits = (hidden @ bench.elm.head.T).float()
    nll = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    nothing = torch.zeros((), device=nll.device)
    return LossParts(nll, nothing, nothing, nothing, nothing, batch.num_tokens, len(batch.labels))
