"""Prints the memory that one training step takes in this process, which holds nothing else; test_plan starts it.

Arguments: rows, answer tokens, prompt tokens, and 1 for gradient checkpointing.
"""

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from elmlib.config import SummaryTrainingConfig
from elmlib.data import Batch, PromptIds
from elmlib.models import build_model
from elmlib.models.adapter import LinearMap
from elmlib.training.drift import DriftReadout
from elmlib.training.losses import compute_losses, total_loss

_MALLOPT_MMAP_THRESHOLD = -3  # mallopt(3)


def measure_step(config: SummaryTrainingConfig, data: Batch) -> int:
    """Peak resident bytes of the second step beyond those before the LLM was loaded."""
    # Freed tensors then go back to the system at once, and resident memory is memory in use.
    ctypes.CDLL(None).mallopt(_MALLOPT_MMAP_THRESHOLD, 1 << 16)
    torch.ones(512, 512) @ torch.ones(512, 512)  # starts the threads, whose stacks are no part of the step
    before = _status("VmRSS")
    model = build_model(config, torch.device("cpu"))
    to_embedding = LinearMap(torch.randn(config.embedding_dim, model.table.shape[1]), torch.zeros(config.embedding_dim))
    idf = torch.ones(len(model.table))
    parts: Any = SimpleNamespace(  # all that the losses read, with random maps in the place of fitted ones
        model=model, warm_start=SimpleNamespace(idf=idf), drift_head=DriftReadout(model.table, idf, to_embedding)
    )
    optimizer = torch.optim.AdamW(model.adapter.parameters(), lr=1e-5, fused=True)
    first = data._replace(embeddings=data.embeddings[:1], labels=data.labels[:1, :1], sources=data.sources[:1])
    for batch in (first, data):  # the first makes AdamW's moments and reads the prompt
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to VmRSS
        counts = {"token": batch.num_tokens, "row": len(batch.labels)}
        total_loss(compute_losses(parts, batch, config), counts, config).backward()
        optimizer.step()
        optimizer.zero_grad()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    # Not getrusage's figure: a process inherits the peak of the one that started it, even through exec.
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    rows, answer_tokens, prompt_tokens, checkpointing = map(int, sys.argv[1:])
    settings = SummaryTrainingConfig(use_bf16=False, use_gradient_checkpointing=bool(checkpointing))
    step = Batch(
        embeddings=torch.randn(rows, settings.embedding_dim),
        labels=torch.randint(49152, (rows, answer_tokens)),
        sources=torch.arange(rows),
        prompt=PromptIds(list(range(prompt_tokens)), [], 0),
        rows=[],
    )
    print(measure_step(settings, step))
