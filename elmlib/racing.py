"""Fair timing: contestants take turns in one process, so that a slow moment of the machine strikes them all."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm


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
    contestants: Mapping[str, Callable[[], object]],
    turns: int,
    settle: Callable[[], object] = lambda: None,
    warm_up: bool = True,
    progress: str = "",
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time each contestant `turns` times, in turn, after one turn that is not counted (with `warm_up`).

    `prepare` is called before each contestant, untimed; `settle` before each clock is read: on a GPU
    `torch.cuda.synchronize`. The order is reversed from turn to turn, so that none always runs behind the same other.
    """
    found: dict[str, list[float]] = {name: [] for name in contestants}
    with tqdm(total=(turns + warm_up) * len(contestants), desc=progress, disable=not progress, leave=False) as bar:
        for turn in range(-1 if warm_up else 0, turns):
            order = list(contestants) if turn % 2 == 0 else list(contestants)[::-1]
            for name in order:
                prepare()
                settle()
                started = time.perf_counter()
                contestants[name]()
                settle()
                if turn >= 0:
                    found[name].append(time.perf_counter() - started)
                bar.update()
    return {name: Timing(tuple(seconds)) for name, seconds in found.items()}


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times longer `slow` took: the median of the ratios turn by turn."""
    return float(np.median(np.divide(slow.seconds, fast.seconds)))
