"""How candidate summaries are drawn: temperature and nucleus, without sorting the whole vocabulary at each step."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

NUCLEUS_TOKENS = 512
"""Most tokens that a nucleus holds; at the default temperature the 95% nucleus of an LLM has far fewer."""


class Sampling(NamedTuple):
    """How candidates are drawn."""

    count: int = 8
    """Candidates per embedding."""
    temperature: float = 0.7
    """0 decodes greedily."""
    top_p: float = 0.95
    seed: int = 0


class Nucleus(LogitsProcessor):
    """Nucleus sampling (Holtzman et al., ICLR 2020): the most probable tokens whose probabilities reach `top_p`.

    transformers sorts the whole vocabulary for it, which takes longer than the LLM's own step; here only the
    NUCLEUS_TOKENS most probable tokens are looked at.
    """

    def __init__(self, sampling: Sampling):
        self.temperature, self.top_p = sampling.temperature, sampling.top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (rows, vocab) -> the same over the temperature, -inf outside each row's nucleus."""
        scores = scores / self.temperature
        top, ids = scores.topk(min(NUCLEUS_TOKENS, scores.shape[-1]))
        probabilities = (top - scores.logsumexp(-1, keepdim=True)).exp()
        outside = probabilities.cumsum(-1) - probabilities >= self.top_p  # the token that reaches top_p is inside
        return torch.full_like(scores, float("-inf")).scatter(-1, ids, top.masked_fill(outside, float("-inf")))
