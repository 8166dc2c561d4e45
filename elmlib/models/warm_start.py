"""Closed forms on the training rows: statistics, the ridge regressions, and the adapter that starts from them.

They are computed once per data and LLM, cached on disk and shared by all runs. Memory does not grow with the rows.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from elmlib.config import InputError, SummaryTrainingConfig
from elmlib.data.dataset import Batch, SummaryDataset
from elmlib.data.records import build_once, cache_folder
from elmlib.models.adapter import EmbeddingAdapter, LinearMap, load_cached, make_adapter, save_tensors

logger = logging.getLogger(__name__)

MEAN_SHARE = 1.0
"""Size of the targets' common mean relative to a row's own part, which has size 1. In the regression itself the mean
was 5 times the own part (7,200 docstrings); without any of it, training ended at a higher NLL."""

_FLOOR = 0.1  # of the mean eigenvalue, added to each: the least common directions are mostly noise
_VERSION = 3  # of the code that computes the fits: raise it where their values change
_FILE = "fits.safetensors"
_RIDGES = ("to_tokens", "to_embedding")


class Moments(NamedTuple):
    """Mean (dim,) and covariance (dim, dim), float64."""

    mean: Tensor
    covariance: Tensor


class NormalEquations:
    """What least squares needs of any number of (x, y) rows: their second moments, in float64."""

    def __init__(self, chunks: Iterable[tuple[Tensor, Tensor]]):
        """chunks of x (rows, inputs) and y (rows, outputs). Raises InputError for no rows."""
        self.gram, self.cross, self.power = torch.zeros(()), torch.zeros(()), torch.zeros(())
        self.rows = 0
        for x, y in chunks:
            x, y = _double(torch.cat([x, torch.ones_like(x[:, :1])], dim=1)), _double(y)  # the last input is the bias
            self.gram = self.gram + x.T @ x
            self.cross = self.cross + x.T @ y
            self.power = self.power + y.T @ y
            self.rows += len(x)
        if not self.rows:
            raise InputError("least squares got no rows")

    def solve(self, strength: float) -> Tensor:
        """Ridge regression (Hoerl and Kennard, 1970), (inputs + 1, outputs): argmin |xW - y|^2 + strength |W|^2. The
        bias, the last row, is not penalised."""
        penalty = torch.full_like(self.gram[0], strength)
        penalty[-1] = 0.0
        return torch.linalg.solve(self.gram + torch.diag(penalty), self.cross)

    def mean_error(self, solution: Tensor) -> float:
        """Mean of |xW - y|^2 over these rows, from their moments alone."""
        error = self.power.trace() - 2 * (solution * self.cross).sum() + (solution * (self.gram @ solution)).sum()
        return error.item() / self.rows

    def input_moments(self) -> Moments:
        """Of x."""
        mean = self.gram[-1, :-1] / self.rows
        return Moments(mean, self.gram[:-1, :-1] / self.rows - torch.outer(mean, mean))

    def output_moments(self) -> Moments:
        """Of y."""
        mean = self.cross[-1] / self.rows
        return Moments(mean, self.power / self.rows - torch.outer(mean, mean))


class Ridge(NamedTuple):
    """A ridge regression with the moments of its training rows."""

    map: LinearMap
    strength: float  # Of the penalty
    inputs: Moments
    outputs: Moments


def fit_ridge(train: NormalEquations, val: NormalEquations) -> Ridge:
    """The ridge regression on `train` whose strength has the least error on `val`. Strengths are tried from 1e-4 to 30
    times the mean second moment of an input, in half decades."""
    scale = train.gram.diagonal()[:-1].mean().item()
    strengths = [scale * 10 ** (exponent / 2) for exponent in range(-8, 4)]
    solutions = [train.solve(strength) for strength in strengths]
    errors = [val.mean_error(solution) for solution in solutions]
    best = errors.index(min(errors))
    weight, bias = solutions[best][:-1].T, solutions[best][-1]
    fitted = LinearMap(weight.float().contiguous(), bias.float())
    return Ridge(fitted, strengths[best], train.input_moments(), train.output_moments())


def whitened_maps(ridge: Ridge, count: int) -> list[LinearMap]:
    """`count` maps of what `ridge` predicts, each whitened more; outputs have root mean square 1 over the rows. Map j
    is C^-p (y(x) - m) for p = j / count, with m and C the targets' mean and covariance, plus MEAN_SHARE of m's
    direction. p = 0 is the regression, dominated by what all targets share; p = 1/2 whitens the targets; p = 1 would be
    Fisher's linear discriminant (Fisher, 1936), which separates this target from the others."""
    (center, spread), (mean, covariance) = ridge.inputs, ridge.outputs
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0) + _FLOOR * values.mean().clamp_min(1e-12)
    slope = ridge.map.weight.to(covariance)  # (outputs, inputs)
    common = MEAN_SHARE * mean / mean.square().mean().sqrt()
    maps = []
    for number in range(count):
        sharper = (vectors * values ** (-number / count)) @ vectors.T @ slope
        size = ((sharper @ spread) * sharper).sum(1).mean().sqrt()
        own = sharper / size.clamp_min(1e-12)  # embeddings or targets that are all equal have no own part
        weight, bias = (x / (1 + MEAN_SHARE**2) ** 0.5 for x in (own, common - own @ center))
        maps.append(LinearMap(weight.float(), bias.float()))
    return maps


@dataclass(frozen=True)
class WarmStart:
    """Statistics and ridge regressions on the training rows."""

    mean: Tensor  # (embedding_dim,) of the embeddings, as is `std`
    std: Tensor
    idf: Tensor  # (vocab,) inverse document frequency over the training answers
    to_tokens: Ridge  # standardised embedding -> idf-weighted mean token embedding, where the adapter starts
    to_embedding: Ridge  # Mean token embedding -> embedding: the drift read-out


def warm_started_adapter(config: SummaryTrainingConfig, warm_start: WarmStart, table: Tensor) -> EmbeddingAdapter:
    """An untrained adapter of `config`, standardised, started warm or at random; table (vocab, llm_dim)."""
    adapter = make_adapter(config, table).to(table.device)
    adapter.standardise(warm_start.mean, warm_start.std)
    if config.warm_start:
        count = config.num_soft_tokens
        whitened = config.warm_start_whitening
        adapter.warm_start(whitened_maps(warm_start.to_tokens, count if whitened else 1) * (1 if whitened else count))
    return adapter


def load_warm_start(
    train: SummaryDataset, val: SummaryDataset, table: Tensor, config: SummaryTrainingConfig
) -> WarmStart:
    """`fit_warm_start`, cached on disk. Raises InputError where a fit is not finite."""
    folder = cache_folder() / "fits" / _key(train, val, table)
    build_once(folder, lambda target: _write(target / _FILE, fit_warm_start(train, val, table, config)))
    return _read(folder / _FILE, table.device)


def fit_warm_start(
    train: SummaryDataset, val: SummaryDataset, table: Tensor, config: SummaryTrainingConfig
) -> WarmStart:
    """Statistics on `train` and both ridge regressions, their strength chosen on `val`; table (vocab, llm_dim)."""
    device = table.device
    idf = token_idf(train.answers, len(table)).to(device)
    adapter = make_adapter(config, table).to(device)  # standardises the embeddings
    vectors = (batch.embeddings for batch in _batches(train, device))
    mean, covariance = NormalEquations((x, x[:, :0]) for x in vectors).input_moments()
    adapter.standardise(mean.float(), covariance.diagonal().clamp_min(0).sqrt().float())

    def moments(dataset: SummaryDataset, forward: bool) -> NormalEquations:
        pairs = (
            (adapter.standardised(batch.embeddings), mean_token_embedding(batch.labels, table, idf), batch.embeddings)
            for batch in _batches(dataset, device)
        )
        return NormalEquations((x, y) if forward else (y, e) for x, y, e in pairs)

    ridges = []
    for name, forward in (("warm start", True), ("drift read-out", False)):
        ridge = fit_ridge(moments(train, forward), moments(val, forward))
        logger.info("%s: ridge strength %.3g", name, ridge.strength)
        ridges.append(ridge._replace(map=LinearMap(*(x.to(device) for x in ridge.map))))
    return WarmStart(adapter.mean, adapter.std, idf, *ridges)


def token_idf(answers: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """Inverse document frequency log((N + 1) / (df + 1)) of each token over N answers, (vocab_size,) float32."""
    frequency = torch.zeros(vocab_size)
    for answer in answers:
        frequency[list(set(answer))] += 1
    return torch.log((len(answers) + 1) / (frequency + 1))


def mean_token_embedding(labels: Tensor, table: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of each row's token embeddings, (batch, llm_dim) float32. labels (batch, length) with negative
    padding; table (vocab, llm_dim); weights (vocab,), at least 0. Tokens that all weigh 0 get their plain mean."""
    ids = labels.clamp_min(0)
    present = (labels >= 0).float()
    weighted = weights[ids] * present
    weighted = torch.where(weighted.sum(1, keepdim=True) > 0, weighted, present)
    weighted = weighted / weighted.sum(1, keepdim=True)
    return torch.einsum("bt,bth->bh", weighted, table[ids].float())


def _double(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()  # Apple's GPUs have no float64


def _batches(dataset: SummaryDataset, device: torch.device, chunk: int = 256) -> Iterator[Batch]:
    # Answers of similar length share a batch, or the longest answer would pad all of them.
    for rows in dataset.bucket(range(len(dataset)), chunk):
        yield dataset.collate(rows).to(device)


def _write(path: Path, warm_start: WarmStart) -> None:
    tensors = {name: getattr(warm_start, name) for name in ("mean", "std", "idf")}
    for name in _RIDGES:
        ridge: Ridge = getattr(warm_start, name)
        parts = (*ridge.map, torch.tensor(ridge.strength, dtype=torch.float64), *ridge.inputs, *ridge.outputs)
        tensors |= {f"{name}.{number}": part for number, part in enumerate(parts)}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"the fit {name} is not finite; look for bad vectors with `elm filter`")
    save_tensors(path, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {})


def _read(path: Path, device: torch.device) -> WarmStart:
    loaded = load_cached(path)
    # Apple's GPUs have no float64.
    tensors = {
        name: x if device.type == "mps" and x.dtype == torch.float64 else x.to(device) for name, x in loaded.items()
    }

    def ridge(name: str) -> Ridge:
        weight, bias, strength, *moments = (tensors[f"{name}.{number}"] for number in range(7))
        return Ridge(LinearMap(weight, bias), strength.item(), Moments(*moments[:2]), Moments(*moments[2:]))

    return WarmStart(tensors["mean"], tensors["std"], tensors["idf"], *map(ridge, _RIDGES))


def _key(train: SummaryDataset, val: SummaryDataset, table: Tensor) -> str:
    """Hash of all that the fits depend on: vectors, answers, and the LLM's token embeddings."""
    about = [_VERSION, train.digest(), val.digest(), str(table.dtype), table.shape]
    digest = hashlib.sha256(json.dumps(about).encode())
    digest.update(table.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:24]
