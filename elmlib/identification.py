"""Whether a summary tells its own source from all others: ranks, beside what chance alone gives."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import hypergeom

if TYPE_CHECKING:
    import pandas

POOL = 100
"""Sources that a summary has to tell its own from, so that figures of splits of any size compare."""

_COMPARED = 512  # summaries compared with the pool at once


@dataclass(frozen=True, eq=False)
class Identification:
    """How n summaries rank their own source among `num_sources`, or among `pool` drawn from them at random.

    In a pool the own source stands among pool - 1 others, and how many of those that beat it are drawn is
    hypergeometric; the figures are expectations over all such pools, so no draw of one makes them noisy.
    """

    ranks: np.ndarray
    """(n,) int among all `num_sources`, 1 is best; a tie counts as lost."""
    num_sources: int
    pool: int
    """Sources that a summary has to tell its own from, itself among them: 2 to `num_sources`."""

    def among(self, pool: int) -> "Identification":
        """The same ranks in pools of `pool` sources, or of all where there are fewer."""
        return replace(self, pool=min(pool, self.num_sources))

    @property
    def top_1(self) -> float:
        """Share of summaries nearest to their own source, 0 to 1."""
        return self.top(1)

    @property
    def top_5(self) -> float:
        """Share of summaries whose own source is among the nearest five, 0 to 1."""
        return self.top(5)

    def top(self, count: int) -> float:
        """Share of summaries whose own source is among the nearest `count`, 0 to 1."""
        if self.pool == self.num_sources:  # the only pool there is; exact, where the distribution is so to 15 digits
            return float((self.ranks <= count).mean())
        return float(hypergeom.cdf(count - 1, self.num_sources - 1, self.ranks - 1, self.pool - 1).mean())

    @property
    def mrr(self) -> float:
        """Mean reciprocal rank, above 0 to 1: of rank r among M, in pools of N, (1 - C(M-r, N) / C(M, N)) M / (N r)."""
        none_as_good = hypergeom.pmf(0, self.num_sources, self.ranks, self.pool)
        return float(((1 - none_as_good) * self.num_sources / (self.pool * self.ranks)).mean())

    @property
    def chance(self) -> float:
        """Top-1 of a summary that tells nothing: 1 / pool."""
        return 1 / self.pool

    @property
    def chance_mrr(self) -> float:
        """MRR of a summary that tells nothing: the mean of 1 / rank over all ranks."""
        return float((1 / np.arange(1, self.pool + 1)).mean())

    def to_frame(self) -> "pandas.DataFrame":
        """One row a summary: rank and reciprocal_rank among all sources."""
        import pandas

        return pandas.DataFrame({"rank": self.ranks, "reciprocal_rank": 1 / self.ranks})


def identify_sources(
    summaries: np.ndarray, targets: np.ndarray, sources: Sequence[str], rows: Sequence[int] | None = None
) -> Identification:
    """Rank each summary's own target among the targets of all sources, by cosine.

    summaries (n, dim); targets (m, dim), a pool that may hold more than the summaries' own; `sources` (m,) tells which
    targets are of one source, and such targets do not compete. `rows` (n,) are the places of the summaries' own
    targets in the pool; without them n = m, row by row. An all-zero summary (an empty text) is last.
    Raises ValueError for fewer than two sources.
    """
    own = np.arange(len(targets)) if rows is None else np.asarray(rows)
    assert len(own) == len(summaries) and len(sources) == len(targets), (len(own), summaries.shape, targets.shape)
    names, numbers = np.unique(np.array(sources), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{len(names)} source; identification needs at least 2")
    by_source = np.argsort(numbers, kind="stable")
    starts = np.searchsorted(numbers[by_source], np.arange(len(names)))
    given, pool = unit_rows(summaries), unit_rows(targets)
    ranks = []
    for first in range(0, len(own), _COMPARED):
        mine = own[first : first + _COMPARED]
        similarity = given[first : first + _COMPARED] @ pool.T  # (chunk, m)
        # The nearest target of each source stands for it: (chunk, sources).
        nearest = np.maximum.reduceat(similarity[:, by_source], starts, axis=1)
        at = np.arange(len(mine))
        rivals = nearest >= similarity[at, mine][:, None] - 1e-12
        rivals[at, numbers[mine]] = False
        ranks.append(1 + rivals.sum(axis=1))
    return Identification(np.concatenate(ranks), len(names), len(names))


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float64; all-zero rows stay zero."""
    rows = np.asarray(rows, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
