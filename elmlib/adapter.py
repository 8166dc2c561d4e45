"""The adapter: one embedding in, soft tokens out; and the targets of its warm start."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elmlib.ridge import LinearMap

PRE_ACTIVATION_RMS = 1.7
"""Size of the MLP's random features. At torch's default, 0.6, a GELU is nearly linear, and the MLP has little to say
that the linear path does not."""

START_RMS = 10.0
"""Size of the warm start before the norm, which hides it from the output: large beside what AdamW adds to the MLP's
output in its first steps (learning rate times hidden_dim, about 4), which else overwrite the warm start at once."""


class EmbeddingAdapter(nn.Module):
    """Embedding -> `num_soft_tokens` vectors at the scale of the LLM's own token embeddings; float32 throughout.

    z = residual_scale * S(x) + W2 . dropout(gelu(W1 . x)) for the standardised embedding x; out = gain * z / rms(z).
    W2 starts at zero, so the linear path S speaks first; `gain` (one number per hidden dimension) starts at the RMS
    of the LLM's token embeddings. RMSNorm: Zhang and Sennrich, NeurIPS 2019.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        embedding_dim: int,
        llm_dim: int,
        num_soft_tokens: int,
        hidden_dim: int,
        dropout_rate: float,
        residual_scale: float,
        token_rms: float = 1.0,
    ):
        super().__init__()
        self.num_soft_tokens, self.llm_dim, self.residual_scale = num_soft_tokens, llm_dim, residual_scale
        self.register_buffer("mean", torch.zeros(embedding_dim))
        self.register_buffer("std", torch.ones(embedding_dim))
        self.linear = nn.Linear(embedding_dim, num_soft_tokens * llm_dim)
        self.up = nn.Linear(embedding_dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, num_soft_tokens * llm_dim)
        self.dropout = nn.Dropout(dropout_rate)
        self.norm = nn.RMSNorm(llm_dim, eps=1e-8)
        # Standardised embeddings then give pre-activations of RMS PRE_ACTIVATION_RMS.
        nn.init.normal_(self.up.weight, std=PRE_ACTIVATION_RMS / math.sqrt(embedding_dim))
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        nn.init.constant_(self.norm.weight, token_rms)
        if embedding_dim == llm_dim and num_soft_tokens == 1:
            # The embedding already has the right size: pass it through until training knows better.
            nn.init.eye_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(batch, embedding_dim) -> (batch, num_soft_tokens, llm_dim)."""
        x = self.standardised(embeddings)
        z = self.residual_scale * self.linear(x) + self.down(self.dropout(F.gelu(self.up(x))))
        return self.norm(z.unflatten(-1, (self.num_soft_tokens, self.llm_dim)))  # (batch, k * H) -> (batch, k, H)

    def standardised(self, embeddings: Tensor) -> Tensor:
        """Embeddings with the train split's mean taken off, over its standard deviation."""
        return (embeddings - self.mean) / self.std

    @torch.no_grad()
    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Set the train split's mean and standard deviation, each (embedding_dim,)."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6, std, 1.0))  # a dimension that never varies must not be blown up

    @torch.no_grad()
    def warm_start(self, maps: Sequence[LinearMap]) -> None:
        """Start soft token j in the direction of maps[j], from standardised embeddings to llm_dim.

        The maps' outputs have a root mean square of 1 over the training rows, and START_RMS here, before the norm.
        """
        assert len(maps) == self.num_soft_tokens, (len(maps), self.num_soft_tokens)
        assert maps[0].weight.shape == (self.llm_dim, self.mean.numel()), maps[0].weight.shape
        scale = START_RMS / self.residual_scale
        self.linear.weight.copy_(scale * torch.cat([it.weight for it in maps]))
        self.linear.bias.copy_(scale * torch.cat([it.bias for it in maps]))


def token_idf(answers: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """Inverse document frequency log((N + 1) / (df + 1)) of each token over N answers, (vocab_size,) float32."""
    frequency = torch.zeros(vocab_size)
    for answer in answers:
        frequency[list(set(answer))] += 1
    return torch.log((len(answers) + 1) / (frequency + 1))


def mean_token_embedding(labels: Tensor, table: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of each row's token embeddings, (batch, llm_dim) float32.

    labels (batch, length) with negative padding; table (vocab, llm_dim); weights (vocab,), at least 0. A row whose
    tokens all weigh 0 gets their plain mean.
    """
    ids = labels.clamp_min(0)
    present = (labels >= 0).float()
    weighted = weights[ids] * present
    weighted = torch.where(weighted.sum(1, keepdim=True) > 0, weighted, present)
    weighted = weighted / weighted.sum(1, keepdim=True)
    return torch.einsum("bt,bth->bh", weighted, table[ids].float())


def token_embedding_rms(table: Tensor) -> float:
    """Root mean square over all entries of the token embedding table (vocab, llm_dim)."""
    return math.sqrt(table.float().square().mean().item())
