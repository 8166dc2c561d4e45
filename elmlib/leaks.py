"""Whether splits are apart: what stands in two of them is found by hashes that lie on disk, so memory is bounded."""

import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Self

import numpy as np
import orjson

_PAIR_BYTES = 16
_PAIRS = 1 << 20  # read at a time; also about the most of a split in one partition of the leak check


class Notes:
    """Pairs of int64 in an unnamed file: a value, and the number of the line of `lines` that it comes from."""

    def __init__(self, lines: Path, folder: Path):
        self._lines = lines
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed in __exit__)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._file.seek(0, 2) // _PAIR_BYTES

    def add(self, pairs: array | memoryview) -> None:
        """Append int64 pairs: value, line, value, line."""
        self._file.write(pairs)

    def blocks(self, num_pairs: int = _PAIRS) -> Iterator[np.ndarray]:
        """All pairs in the order in which they were added, int64 (up to `num_pairs`, 2) at a time."""
        self._file.seek(0)
        while raw := self._file.read(_PAIR_BYTES * num_pairs):
            yield np.frombuffer(raw, np.int64).reshape(-1, 2)

    def partition(self, part: int, num_parts: int) -> np.ndarray:
        """The different values that are `part` modulo `num_parts`, in ascending order."""
        found = [np.empty(0, np.int64)]
        for pairs in self.blocks():
            values = pairs[:, 0]
            found.append(_unique(values[values % num_parts == part]))
        return _unique(np.concatenate(found))

    def place(self, value: np.int64, field: str) -> str:
        """Where `value` was noted first, and what that line holds in `field`."""
        number = next(int(pairs[pairs[:, 0] == value][0, 1]) for pairs in self.blocks() if value in pairs[:, 0])
        with open(self._lines, "rb") as file:
            line = next(islice(file, number - 1, None)).removeprefix(b"\xef\xbb\xbf")
        return f"{field} {orjson.loads(line)[field]!r} ({self._lines}, line {number})"


def _unique(values: np.ndarray) -> np.ndarray:
    """As np.unique, which builds a hash table and takes 50 times longer with hashes (NumPy 2.4)."""
    values = np.sort(values)
    return np.concatenate([values[:1], values[1:][values[1:] != values[:-1]]])


@dataclass(frozen=True)
class Leak:
    """`count` different values of `kind`, source_id or vector, stand in both splits."""

    kind: str
    first: str
    second: str
    count: int
    example: str

    def __str__(self) -> str:
        return f"{self.kind} in both {self.first} and {self.second}: {self.count}, for example {self.example}"


def find_leaks(kind: str, field: str, notes: dict[str, Notes]) -> Iterator[Leak]:
    """What two splits share of the hashes noted for each; `field` names an example in their lines.

    The hashes are intersected partition by partition.
    """
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], np.int64] = {}
    num_parts = 1 + max(map(len, notes.values())) // _PAIRS
    for part in range(num_parts):
        hashes = {split: noted.partition(part, num_parts) for split, noted in notes.items()}
        for pair in combinations(notes, 2):
            shared = np.intersect1d(hashes[pair[0]], hashes[pair[1]], assume_unique=True)
            if len(shared):
                counts[pair] += len(shared)
                examples.setdefault(pair, shared[0])
    for pair in combinations(notes, 2):
        if pair in examples:
            places = " and ".join(notes[split].place(examples[pair], field) for split in pair)
            yield Leak(kind, *pair, counts[pair], places)
