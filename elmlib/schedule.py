"""The course of a run: which rows at which optimizer step, and at which learning rate."""

import math

from elmlib.config import SummaryTrainingConfig
from elmlib.data import Split, epoch_batches


def epoch_windows(
    split: Split, config: SummaryTrainingConfig, epoch: int, process: int = 0, processes: int = 1
) -> list[list[list[int]]]:
    """The optimizer steps of one epoch: for each, the batches of this process, each a list of rows.

    Batches too few for all processes are left out.
    """
    batches = epoch_batches(split, config.batch_size, config.seed, epoch)
    batches = batches[: len(batches) // processes * processes]
    size = config.gradient_accumulation_steps * processes
    windows = [batches[start : start + size] for start in range(0, len(batches), size)]
    return [window[process::processes] for window in windows]


def learning_rate(step: float, total_steps: int, config: SummaryTrainingConfig) -> float:
    """The rate of optimizer step `step`, from 0: linear warm-up, then a half cosine to 0."""
    warmup = math.ceil(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))
