"""The adapter, from one embedding to soft tokens; and adapter files: safetensors with one JSON header, never pickle."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from elmlib.config import InputError, SummaryTrainingConfig
from elmlib.data.records import atomic_path

BEST = "best_summary_model.safetensors"  # file name of a run's best adapter

PRE_ACTIVATION_RMS = 1.7
"""Size of the MLP's random features. At torch's default, 0.6, a GELU is nearly linear, and the MLP adds little."""

START_RMS = 10.0
"""Size of the warm start before the norm, which hides it from the output. It is large beside what AdamW adds to the
MLP's output in its first steps (learning rate times hidden_dim, about 4), which would otherwise overwrite it."""

# One metadata key only: safetensors writes several in random order, and equal runs must give equal bytes.
_HEADER, _DIGEST = "elmlib", "digest"


class LinearMap(NamedTuple):
    """y = weight x + bias; weight (outputs, inputs), bias (outputs,), float32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class EmbeddingAdapter(nn.Module):
    """Embedding -> `num_soft_tokens` vectors at the scale of the LLM's own token embeddings; float32 throughout. z =
    residual_scale * S(x) + W2 . dropout(gelu(W1 . x)) for the standardised embedding x; out = gain * z / rms(z). W2
    starts at zero, so only the linear path S acts at first; `gain` (one number per hidden dimension) starts at the RMS
    of the LLM's token embeddings. RMSNorm: Zhang and Sennrich, NeurIPS 2019."""

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
            # The embedding already has the right size: start at the identity.
            nn.init.eye_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(batch, embedding_dim) -> (batch, num_soft_tokens, llm_dim)."""
        x = self.standardised(embeddings)
        z = self.residual_scale * self.linear(x) + self.down(self.dropout(F.gelu(self.up(x))))
        return self.norm(z.unflatten(-1, (self.num_soft_tokens, self.llm_dim)))  # (batch, k * H) -> (batch, k, H)

    def standardised(self, embeddings: Tensor) -> Tensor:
        """Embeddings minus the train split's mean, divided by its standard deviation."""
        return (embeddings - self.mean) / self.std

    @torch.no_grad()
    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Set the train split's mean and standard deviation, each (embedding_dim,)."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6, std, 1.0))  # a constant dimension must not be scaled up

    @torch.no_grad()
    def warm_start(self, maps: Sequence[LinearMap]) -> None:
        """Start soft token j in the direction of maps[j], from standardised embeddings to llm_dim. The maps' outputs
        have a root mean square of 1 over the training rows, and START_RMS here, before the norm."""
        assert len(maps) == self.num_soft_tokens, (len(maps), self.num_soft_tokens)
        assert maps[0].weight.shape == (self.llm_dim, self.mean.numel()), maps[0].weight.shape
        scale = START_RMS / self.residual_scale
        self.linear.weight.copy_(scale * torch.cat([part.weight for part in maps]))
        self.linear.bias.copy_(scale * torch.cat([part.bias for part in maps]))


def make_adapter(config: SummaryTrainingConfig, table: Tensor) -> EmbeddingAdapter:
    """A new adapter of the config's shape, seeded, its output at the scale of `table` (vocab, llm_dim)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        sizes = config.embedding_dim, table.shape[1], config.num_soft_tokens, config.hidden_dim
        token_rms = math.sqrt(table.float().square().mean().item())
        return EmbeddingAdapter(*sizes, config.dropout_rate, config.residual_scale, token_rms)


class AdapterFile(NamedTuple):
    """An adapter as read from disk."""

    weights: dict[str, Tensor]
    config: SummaryTrainingConfig  # The settings that it was trained with; paths and hardware at their defaults
    step: int
    data_fingerprint: str


def save_adapter(
    path: Path, adapter: EmbeddingAdapter, config: SummaryTrainingConfig, step: int, data_fingerprint: str
) -> None:
    """Write the adapter's weights and buffers with the settings, the step and the data that they come from."""
    header = {"config": config.identity(), "step": step, "data_fingerprint": data_fingerprint}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.state_dict().items()}
    save_tensors(path, weights, header)


def find_adapter(path: Path | str) -> Path:
    """An adapter file, or the best adapter in the folder of a run."""
    path = Path(path).expanduser()
    return path / BEST if path.is_dir() else path


def load_adapter(path: Path) -> AdapterFile:
    """Read what `find_adapter` finds, of earlier versions of elmlib too. Raises InputError for no such file and for one
    that is truncated or not elmlib's."""
    path = find_adapter(path)
    weights, header = load_tensors(path)
    if missing := {"config", "step", "data_fingerprint"} - header.keys():
        raise InputError(f"{path} holds no adapter: its header has no {', '.join(sorted(missing))}")
    config = SummaryTrainingConfig.from_dict(header["config"], origin=str(path))
    return AdapterFile(weights, config, header["step"], header["data_fingerprint"])


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write a safetensors file with a JSON `header`; it appears complete or not at all."""
    header = header | {_DIGEST: _digest(tensors, header)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={_HEADER: json.dumps(header)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file by `save_tensors`; raises as `load_adapter` does."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise InputError(f"{path} is truncated or no safetensors file: {error}") from error
    if header is None:
        raise InputError(f"{path} was not written by elmlib: its header has no {_HEADER!r} entry")
    try:
        values = json.loads(header)
        whole = values.pop(_DIGEST, None) in (None, _digest(tensors, values))  # earlier versions wrote none
    except (ValueError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise InputError(f"{path} is damaged: it does not hold what elmlib wrote; take another file")
    return tensors, values


def load_cached(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by `save_tensors` in a folder of the cache; raises as `load_adapter` does."""
    try:
        return load_tensors(path)[0]
    except InputError as error:
        raise InputError(f"{error}; remove {path.parent}, a cache that is then made again") from error


def _digest(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    """SHA-256 of everything that a file holds."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
