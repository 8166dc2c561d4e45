"""What the filter kept, dropped and rejected: counted block by block, and shown as a table."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from elmlib import records
from elmlib.leaks import Leak
from elmlib.lines import Line
from elmlib.records import EmbeddingFile

_MOST_VALUES = 32  # that a count tells apart; the rest is counted together, so that no count grows with the corpus


@dataclass(frozen=True)
class TokenCounts:
    """`token_count` of the kept records."""

    minimum: int
    mean: float
    maximum: int
    total: int


@dataclass(frozen=True)
class SplitReport:
    """One split: read = kept + dropped (other tasks) + rejected; the counts by value are of kept records."""

    read: int
    kept: int
    dropped: int
    rejected: int
    embedding_rows_read: int
    embedding_rows_kept: int
    token_counts: TokenCounts
    variations: dict[str, int]
    temperatures: dict[str, int]

    def cells(self) -> dict[str, str]:
        """Label -> number, for `FilterReport.to_table`."""
        cells: dict[str, str] = {}
        for name, value in asdict(self).items():
            label = name.replace("_", " ")
            numbers = {f"{label}: {key}": n for key, n in value.items()} if isinstance(value, dict) else {label: value}
            cells |= {key: f"{n:,.1f}" if isinstance(n, float) else f"{n:,}" for key, n in numbers.items()}
        return cells


@dataclass(frozen=True)
class FilterReport:
    """What `filter_corpus` read and wrote."""

    task_type: str
    splits: dict[str, SplitReport]
    leaks: tuple[Leak, ...]

    def to_table(self) -> str:
        """One aligned column a split, then the leaks."""
        columns = [report.cells() for report in self.splits.values()]
        labels = dict.fromkeys(label for cells in columns for label in cells)
        rows = [[label, *(cells.get(label, "0") for cells in columns)] for label in labels]
        rows = [[self.task_type, *self.splits], *rows]
        first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([label.ljust(first), *map(str.rjust, numbers, others)]) for label, *numbers in rows]
        return "\n".join([*lines, *(f"leak: {leak}" for leak in self.leaks or ("none",))])


class Tally:
    """The account of one split while it is read: good records are counted, bad ones set aside."""

    def __init__(self, split: str, lines: Path, vectors: EmbeddingFile, wanted: str, rejected: BinaryIO | None):
        """`wanted` is the task that is kept; `rejected` takes bad records, and without it the first one raises."""
        self.wanted = wanted
        self._split, self._lines, self._vectors, self._file = split, lines, vectors, rejected
        self._tasks = Counter({wanted: 0})
        self._variations: Counter[Any] = Counter()
        self._temperatures: Counter[Any] = Counter()
        self._fewest: float = float("inf")  # a whole number once a record is kept
        self._most, self._total, self._rejected = 0, 0, 0

    def add(self, tasks: list[str], kept: list[Line]) -> None:
        """A block of good records: the task of each, and the kept ones."""
        _count(self._tasks, tasks)
        if kept:
            tokens = [record.token_count for record in kept]
            _count(self._variations, [record.variation for record in kept])
            _count(self._temperatures, [float(record.temperature) for record in kept])  # 1 and 1.0 are one label
            self._fewest, self._most = min(self._fewest, *tokens), max(self._most, *tokens)
            self._total += sum(tokens)

    def reject(self, number: int, line: bytes) -> None:
        """Set a bad record aside with the reason, or raise ValueError with it."""
        reason = _reason(line, self._vectors)
        if self._file is None:
            raise ValueError(f"{self._lines}, line {number}: {reason}")
        raw = line.decode("utf-8", errors="replace").rstrip()
        entry = {"split": self._split, "line": number, "reason": reason, "raw": raw}
        self._file.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
        self._rejected += 1

    def report(self, rows_kept: int) -> SplitReport:
        """All counts; raises ValueError, naming the file, where no record was kept."""
        good, kept = self._tasks.total(), self._tasks[self.wanted]
        if not good + self._rejected:
            raise ValueError(f"{self._lines} is empty; expected one JSON object a line")
        if not kept:
            found = ", ".join(f"{task}: {n}" for task, n in (+self._tasks).most_common()) or "no good record"
            found += f" (rejected: {self._rejected})"
            raise ValueError(f"{self._lines}: no record of task {self.wanted!r}, but {found}")
        return SplitReport(
            read=good + self._rejected,
            kept=kept,
            dropped=good - kept,
            rejected=self._rejected,
            embedding_rows_read=self._vectors.num_rows,
            embedding_rows_kept=rows_kept,
            token_counts=TokenCounts(int(self._fewest), self._total / kept, self._most, self._total),
            variations={str(value): n for value, n in self._variations.most_common()},
            temperatures={str(value): n for value, n in self._temperatures.most_common()},
        )


def _count(counter: Counter, values: Iterable[Any]) -> None:
    for value, n in Counter(values).items():
        counter[value if value in counter or len(counter) < _MOST_VALUES else "others"] += n


def _reason(line: bytes, vectors: EmbeddingFile) -> str:
    try:
        values = records.parse_line(line, "")
        records.check_fields(values, vectors.num_rows)
    except ValueError as error:
        return str(error).removeprefix(": ")
    row = values["embedding_index"]
    try:
        records.check_rows(vectors.rows(row, row + 1), [row])
    except ValueError as error:
        return f"{vectors.path}: {error}"
    raise AssertionError(f"a good record was refused: {line!r}")
