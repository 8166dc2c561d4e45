"""How sure a mean and a difference are, and how far two figures go together."""

from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
_CHUNK = 500  # resamples held at a time


class Interval(NamedTuple):
    """A mean and its 95% bootstrap confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> Interval:
    """Percentile bootstrap (Efron, 1979) of the mean of `values` (n,): 10,000 resamples, 95%.

    Raises ValueError for no values.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("no values; a bootstrap needs at least one")
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, len(values), (_CHUNK, len(values))) for _ in range(RESAMPLES // _CHUNK))
    means = np.concatenate([values[rows].mean(axis=1) for rows in draws])
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def permutation_p(first: np.ndarray, second: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of the paired permutation test (Fisher, 1935) that `first` and `second` have equal means.

    Both (n,), in pairs. Each of 10,000 resamples swaps every pair with probability 1/2; the least p is 1 / 10,001.
    Raises ValueError for no pairs or unequal lengths.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"{len(first)} and {len(second)} values; a paired test needs as many of each, at least one")
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    rng = np.random.default_rng(seed)
    flips = (rng.integers(0, 2, (_CHUNK, len(difference))) * 2.0 - 1.0 for _ in range(RESAMPLES // _CHUNK))
    means = np.concatenate([flip @ difference for flip in flips]) / len(difference)
    at_least = int(
        (np.abs(means) >= abs(difference.mean()) - 1e-12).sum()
    )  # rounding must not lose the tie with itself
    return (1 + at_least) / (1 + RESAMPLES)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of a and b, each (n,), -1 to 1; 0 where either is constant and none is defined."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
