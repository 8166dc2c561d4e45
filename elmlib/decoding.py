"""How candidate summaries are drawn: temperature and nucleus, without sorting the whole vocabulary at each step."""

from typing import NamedTuple

import torch
from torch import Tensor

NUCLEUS_TOKENS = 512
"""Most tokens that a nucleus holds; at the default temperature the 95% nucleus of an LLM has far fewer."""


class Sampling(NamedTuple):
    """How candidates are drawn."""

    count: int = 8  # type: ignore[assignment]  # hides tuple.count, which nobody calls here
    """Candidates per embedding."""
    temperature: float = 0.7
    """0 decodes greedily."""
    top_p: float = 0.95
    seed: int = 0


def nucleus(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Nucleus sampling (Holtzman et al., ICLR 2020): the most probable tokens whose probabilities reach `top_p`.

    logits (rows, vocab) float32 -> probabilities at the temperature, 0 outside the nucleus, and token ids, both
    (rows, k). Instead of sorting the whole vocabulary, only its NUCLEUS_TOKENS most probable tokens are looked at.
    """
    logits = logits / sampling.temperature
    top, ids = logits.topk(min(NUCLEUS_TOKENS, logits.shape[-1]))
    probabilities = (top - logits.logsumexp(-1, keepdim=True)).exp()
    outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p  # the token that reaches top_p is inside
    return probabilities.masked_fill(outside, 0.0), ids


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token for each row of logits (rows, vocab) float32: (rows,); the best one at temperature 0."""
    if not sampling.temperature:
        return logits.argmax(-1)
    probabilities, ids = nucleus(logits, sampling)
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)
