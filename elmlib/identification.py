"""Whether a summary tells its own source from all others: ranks, beside what chance alone gives."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Identification:
    """How n summaries rank their own source among all `num_sources`."""

    ranks: np.ndarray
    """(n,) int, 1 is best; a tie counts as lost."""
    num_sources: int

    @property
    def top_1(self) -> float:
        """Share of summaries nearest to their own source, 0 to 1."""
        return float((self.ranks <= 1).mean())

    @property
    def top_5(self) -> float:
        """Share of summaries whose own source is among the nearest five, 0 to 1."""
        return float((self.ranks <= 5).mean())

    @property
    def mrr(self) -> float:
        """Mean reciprocal rank, above 0 to 1."""
        return float((1 / self.ranks).mean())

    @property
    def chance(self) -> float:
        """Top-1 of a summary that tells nothing: 1 / num_sources."""
        return 1 / self.num_sources

    @property
    def chance_mrr(self) -> float:
        """MRR of a summary that tells nothing: the mean of 1 / rank over all ranks."""
        return float((1 / np.arange(1, self.num_sources + 1)).mean())


def identify_sources(summaries: np.ndarray, targets: np.ndarray, sources: Sequence[str]) -> Identification:
    """Rank each summary's own target among the targets of all sources, by cosine.

    summaries, targets (n, dim), row by row of one source; `sources` (n,) tells which rows are of one source, and such
    rows do not compete. An all-zero summary (an empty text) is last.
    Raises ValueError for fewer than two sources.
    """
    assert summaries.shape == targets.shape and len(sources) == len(summaries), (summaries.shape, targets.shape)
    names, numbers = np.unique(np.array(sources), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{len(names)} source; identification needs at least 2")
    similarity = unit_rows(summaries) @ unit_rows(targets).T  # (n, n)
    # The nearest row of each source stands for it: (n, sources).
    nearest = np.full((len(sources), len(names)), -np.inf)
    for row, number in enumerate(numbers):
        nearest[:, number] = np.maximum(nearest[:, number], similarity[:, row])
    own = np.diagonal(similarity)[:, None]
    rivals = nearest >= own - 1e-12
    rivals[np.arange(len(sources)), numbers] = False
    return Identification(1 + rivals.sum(axis=1), len(names))


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float64; all-zero rows stay zero."""
    rows = np.asarray(rows, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
