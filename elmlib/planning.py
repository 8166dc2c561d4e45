"""Which card a training step fits, and at which batch size."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import AutoModel, AutoModelForCausalLM

from elmlib.benchmark_commands import PlanConfig
from elmlib.shapes import load_config
from elmlib.tracing import StepPlan, count_flops, trace_step

GIB = 2**30
_PARTS = (
    ("llm", "LLM, frozen"),
    ("adapter", "adapter and AdamW's moments"),
    ("prefix", "prompt's keys and values"),
    ("activations", "activations"),
    ("logits", "logits"),
    ("backward", "gradients on their way"),
    ("peak", "training step, at most"),
)


class Plan(NamedTuple):
    """A step without and with gradient checkpointing, and what else lies on the device."""

    config: PlanConfig
    llm_parameters: int
    adapter_parameters: int
    evaluation: int
    """Bytes of the embedder and of BERTScore's encoder, which stay on the device between evaluations."""
    plain: StepPlan
    checkpointed: StepPlan
    flops: tuple[int, int]
    """Of a step without and with checkpointing."""
    fits: dict[str, tuple[int, int]]
    """For each card, the largest power of 2 that fits as batch size, without and with checkpointing; 0 for none."""


def plan(config: PlanConfig) -> Plan:
    """Trace a step as it is asked for, then larger and smaller batches until each card's largest is found.

    Raises FileNotFoundError for a model whose config is nowhere.
    """
    llm = load_config(config.llm_model_name)
    evaluation = 0
    if config.evaluation_device != "cpu":
        embedder, encoder = config.embedding_model_name, config.bertscore_model
        evaluation = model_bytes(embedder, 2 if config.bf16 else 4) + model_bytes(encoder, 4)

    def step(batch_size: int, checkpointing: bool) -> StepPlan:
        return trace_step(llm, replace(config, batch_size=batch_size), checkpointing)

    found = {(config.batch_size, way): step(config.batch_size, way) for way in (False, True)}

    def largest(budget: float, way: bool) -> int:
        size = 1
        while size <= 1024:
            if (size, way) not in found:
                found[size, way] = step(size, way)
            if found[size, way].peak + evaluation > budget:
                break
            size *= 2
        return size // 2

    fits = {card: (largest(parse_memory(card), False), largest(parse_memory(card), True)) for card in config.gpu_memory}
    plain, checkpointed = (found[config.batch_size, way] for way in (False, True))
    return Plan(
        config=config,
        llm_parameters=_count_parameters(lambda: AutoModelForCausalLM.from_config(llm)),
        adapter_parameters=plain.adapter // 12,
        evaluation=evaluation,
        plain=plain,
        checkpointed=checkpointed,
        flops=(count_flops(llm, config, False), count_flops(llm, config, True)),
        fits=fits,
    )


def parse_memory(text: str) -> float:
    """Bytes of `16GiB`, `40GB` or a plain number of bytes; raises ValueError for anything else."""
    for unit, size in (("GiB", GIB), ("GB", 10**9), ("MiB", 2**20), ("MB", 10**6), ("", 1)):
        if text.endswith(unit):
            try:
                return float(text.removesuffix(unit)) * size
            except ValueError:
                break
    raise ValueError(f"memory {text!r}; expected a size such as 16GiB or 40GB")


def model_bytes(name: str, width: int) -> int:
    """Bytes of the weights of an encoder or embedder at `width` bytes each."""
    config = load_config(name)
    return width * _count_parameters(lambda: AutoModel.from_config(config))


def _count_parameters(make: Callable[[], torch.nn.Module]) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in make().parameters())


def to_text(plan: Plan) -> str:
    """The plan as a plain table."""
    config = plan.config
    lines = [
        f"{config.llm_model_name}: {plan.llm_parameters:,} parameters, frozen; adapter: {plan.adapter_parameters:,}",
        f"one step of {config.batch_size} rows of {config.answer_tokens} answer tokens: "
        f"{plan.flops[0] / 1e12:.3g} TFLOP, {plan.flops[1] / 1e12:.3g} with gradient checkpointing",
        "",
        f"{'GiB':<34}{'plain':>10}{'checkpointing':>16}",
    ]
    for name, label in _PARTS:
        needs = (getattr(step, name) / GIB for step in (plan.plain, plan.checkpointed))
        lines.append("{:<34}{:>10.2f}{:>16.2f}".format(label, *needs))
    lines.append(f"{'embedder and BERTScore encoder':<34}{plan.evaluation / GIB:>10.2f}{plan.evaluation / GIB:>16.2f}")
    lines.append("")
    for card, sizes in plan.fits.items():
        told = (f"up to batch size {size}" if size else "does not fit" for size in sizes)
        lines.append("{:<8} plain: {}; with gradient checkpointing: {}".format(card, *told))
    if plan.evaluation and any(0 in sizes for sizes in plan.fits.values()):
        lines.append("(--evaluation-device cpu leaves the card to the LLM)")
    return "\n".join(lines)
