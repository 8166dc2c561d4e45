"""The adapter: one embedding in, soft tokens out; and its closed-form warm start."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PRE_ACTIVATION_RMS = 1.7
"""Size of the MLP's random features. At torch's default, 0.6, a GELU is nearly linear, and the MLP has little to say
that the linear path does not."""

START_RMS = 10.0
"""Size of the warm start before the norm, which hides it from the output: large beside what AdamW adds to the MLP's
output in its first steps (learning rate times hidden_dim, about 1), which else overwrite the warm start at once."""


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
    def warm_start(self, ridge: "Ridge") -> None:
        """Start every soft token in the direction of `ridge`, which maps standardised embeddings to one vector of size
        llm_dim; over its training rows they have a root mean square of START_RMS before the norm."""
        weight, bias = ridge.map
        assert weight.shape == (self.llm_dim, self.mean.numel()), weight.shape
        scale = START_RMS / (self.residual_scale * ridge.rms)
        self.linear.weight.copy_(scale * weight.repeat(self.num_soft_tokens, 1))
        self.linear.bias.copy_(scale * bias.repeat(self.num_soft_tokens))


class LinearMap(NamedTuple):
    """y = weight x + bias; weight (outputs, inputs), bias (outputs,), float32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class NormalEquations:
    """What least squares needs of any number of (x, y) rows: their second moments, in float64."""

    def __init__(self, chunks: Iterable[tuple[Tensor, Tensor]]):
        """chunks of x (rows, inputs) and y (rows, outputs); memory does not grow with the number of rows."""
        self.gram, self.cross, self.squares = torch.zeros(()), torch.zeros(()), torch.zeros(())
        self.rows = 0
        for x, y in chunks:
            x, y = _double(torch.cat([x, torch.ones_like(x[:, :1])], dim=1)), _double(y)  # the last input is the bias
            self.gram = self.gram + x.T @ x
            self.cross = self.cross + x.T @ y
            self.squares = self.squares + y.square().sum()
            self.rows += len(x)
        if not self.rows:
            raise ValueError("least squares got no rows")

    def solve(self, strength: float) -> Tensor:
        """Ridge regression (Hoerl and Kennard, 1970), (inputs + 1, outputs): argmin |xW - y|^2 + strength |W|^2.

        The bias, the last row, is not shrunk.
        """
        penalty = torch.full_like(self.gram[0], strength)
        penalty[-1] = 0.0
        return torch.linalg.solve(self.gram + torch.diag(penalty), self.cross)

    def root_mean_square(self, solution: Tensor) -> float:
        """Of the entries of xW over these rows, from their moments alone."""
        total = (solution * (self.gram @ solution)).sum() / (self.rows * solution.shape[1])
        return total.sqrt().item()

    def mean_error(self, solution: Tensor) -> float:
        """Mean of |xW - y|^2 over these rows, from their moments alone."""
        error = self.squares - 2 * (solution * self.cross).sum() + (solution * (self.gram @ solution)).sum()
        return error.item() / self.rows


class Ridge(NamedTuple):
    """A ridge regression."""

    map: LinearMap
    strength: float
    """Of the penalty."""
    rms: float
    """Root mean square of the map's outputs over the training rows."""


def fit_ridge(train: NormalEquations, val: NormalEquations) -> Ridge:
    """The ridge regression on `train` whose strength has the least error on `val`.

    Strengths are tried from 1e-4 to 30 times the mean second moment of an input, in half decades.
    """
    scale = train.gram.diagonal()[:-1].mean().item()
    strengths = [scale * 10 ** (exponent / 2) for exponent in range(-8, 4)]
    solutions = [train.solve(strength) for strength in strengths]
    errors = [val.mean_error(solution) for solution in solutions]
    best = errors.index(min(errors))
    weight, bias = solutions[best][:-1].T, solutions[best][-1]
    found = LinearMap(weight.float().contiguous(), bias.float())
    return Ridge(found, strengths[best], train.root_mean_square(solutions[best]))


def mean_and_std(chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation over the rows of all chunks, each (dim,), summed in float64."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for x in chunks:
        x = _double(x)
        count, total, squares = count + len(x), total + x.sum(0), squares + x.square().sum(0)
    if count == 0:
        raise ValueError("mean_and_std got no rows")
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp_min(0).sqrt().float()


def _double(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()  # Apple's GPUs have no float64


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
