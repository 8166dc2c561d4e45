"""What has a closed form on the training rows: computed once per data and LLM, kept on disk, shared by all runs."""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from elmlib.adapter import EmbeddingAdapter, mean_token_embedding, token_idf
from elmlib.caching import build_once, cache_folder
from elmlib.data import Batch, Split
from elmlib.ridge import LinearMap, Moments, NormalEquations, Ridge, fit_ridge, mean_and_std

logger = logging.getLogger(__name__)

_VERSION = 2  # of the code that computes the fits: raise it where their values change
_FILE = "fits.safetensors"
_RIDGES = ("to_tokens", "to_embedding")


@dataclass(frozen=True)
class Fits:
    """What has a closed form: statistics and ridge regressions on the training rows."""

    mean: Tensor
    """(embedding_dim,) of the embeddings, as is `std`."""
    std: Tensor
    idf: Tensor
    """(vocab,) inverse document frequency over the training answers."""
    to_tokens: Ridge
    """Standardised embedding -> idf-weighted mean token embedding of the target, whose views start the adapter warm."""
    to_embedding: Ridge
    """Mean token embedding -> embedding: the drift read-out."""


def load_fits(train: Split, val: Split, table: Tensor, adapter: EmbeddingAdapter) -> Fits:
    """`fit`, from the cache where it was computed before; `adapter` standardises for it."""
    folder = cache_folder() / "fits" / _key(train, val, table)
    build_once(folder, lambda place: _write(place / _FILE, fit(train, val, table, adapter)))
    return _read(folder / _FILE, table.device)


def fit(train: Split, val: Split, table: Tensor, adapter: EmbeddingAdapter) -> Fits:
    """Statistics on `train` and both ridge regressions, their strength chosen on `val`; table (vocab, llm_dim).

    `adapter` standardises for the warm start, and keeps the statistics of `train`.
    """
    device = table.device
    idf = token_idf(train.answers, len(table)).to(device)
    adapter.standardise(*mean_and_std(batch.embeddings for batch in _rows(train, device)))

    def moments(split: Split, forward: bool) -> NormalEquations:
        pairs = (
            (adapter.standardised(batch.embeddings), mean_token_embedding(batch.labels, table, idf), batch.embeddings)
            for batch in _rows(split, device)
        )
        return NormalEquations((x, y) if forward else (y, e) for x, y, e in pairs)

    fits = []
    for name, forward in (("warm start", True), ("drift read-out", False)):
        found = fit_ridge(moments(train, forward), moments(val, forward))
        logger.info("%s: ridge strength %.3g", name, found.strength)
        fits.append(found._replace(map=LinearMap(*(x.to(device) for x in found.map))))
    return Fits(adapter.mean, adapter.std, idf, *fits)


def _rows(split: Split, device: torch.device, chunk: int = 256) -> Iterator[Batch]:
    # Answers of like length share a chunk, or the longest answer would pad all of them.
    for rows in split.bucket(range(len(split)), chunk):
        yield split.collate(rows).to(device)


def _write(path: Path, fits: Fits) -> None:
    tensors = {name: getattr(fits, name) for name in ("mean", "std", "idf")}
    for name in _RIDGES:
        ridge: Ridge = getattr(fits, name)
        parts = (
            ridge.map.weight,
            ridge.map.bias,
            torch.tensor(ridge.strength, dtype=torch.float64),
            *ridge.inputs,
            *ridge.outputs,
        )
        tensors |= {f"{name}.{number}": part for number, part in enumerate(parts)}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"the fit {name} is not finite; look for bad vectors with `elm filter`")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


def _read(path: Path, device: torch.device) -> Fits:
    loaded = load_file(path)
    # Apple's GPUs have no float64.
    tensors = {
        name: x if device.type == "mps" and x.dtype == torch.float64 else x.to(device) for name, x in loaded.items()
    }

    def ridge(name: str) -> Ridge:
        weight, bias, strength, *moments = (tensors[f"{name}.{number}"] for number in range(7))
        return Ridge(LinearMap(weight, bias), strength.item(), Moments(*moments[:2]), Moments(*moments[2:]))

    return Fits(tensors["mean"], tensors["std"], tensors["idf"], *map(ridge, _RIDGES))


def _key(train: Split, val: Split, table: Tensor) -> str:
    """Hash of all that the fits depend on: vectors, answers, and the LLM's token embeddings."""
    about = [_VERSION, train.digest(), val.digest(), str(table.dtype), table.shape]
    digest = hashlib.sha256(json.dumps(about).encode())
    digest.update(table.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:24]
