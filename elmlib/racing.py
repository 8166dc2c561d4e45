"""Fair timing: contestants take turns in one process, so that a slow moment of the machine strikes them all."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

Job = Callable[[], object]


class Timing(NamedTuple):
    """How long one contestant took, turn by turn."""

    seconds: tuple[float, ...]
    """One a turn, in the order of the turns; all contestants of a race have as many."""

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Largest less smallest, over the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def race(
    contestants: Mapping[str, Sequence[Job]],
    turns: int,
    settle: Job = lambda: None,
    warm_up: bool = True,
    progress: str = "",
    prepare: Job = lambda: None,
) -> dict[str, Timing]:
    """Time each contestant `turns` times, in turn, after one turn that is not counted (with `warm_up`).

    A contestant comes in parts, as many as every other has: all do their first part before any does its second, and a
    turn's seconds are the sum over them. `prepare` is called before each part, untimed; `settle` before each clock is
    read: on a GPU `torch.cuda.synchronize`. The order is reversed each time, so that none always runs behind the same
    other.
    """
    counts = {name: len(jobs) for name, jobs in contestants.items()}
    parts = next(iter(counts.values()))
    assert set(counts.values()) == {parts}, f"contestants in unequal numbers of parts: {counts}"
    first = -1 if warm_up else 0
    seconds = {name: np.zeros(turns) for name in contestants}
    total = (turns - first) * parts * len(contestants)
    with tqdm(total=total, desc=progress, disable=not progress, leave=False) as bar:
        for turn, part in itertools.product(range(first, turns), range(parts)):
            for name in list(contestants)[:: 1 if (turn + part) % 2 == 0 else -1]:
                prepare()
                settle()
                started = time.perf_counter()
                contestants[name][part]()
                settle()
                if turn >= 0:
                    seconds[name][turn] += time.perf_counter() - started
                bar.update()
    return {name: Timing(tuple(spent.tolist())) for name, spent in seconds.items()}


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times longer `slow` took: the median of the ratios turn by turn."""
    return float(np.median(np.divide(slow.seconds, fast.seconds)))
