"""What the corpus builder and the filter read and wrote, as JSON values and as tables."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elmlib.data.prompts import TASK_TEMPLATES
from elmlib.data.records import Record

if TYPE_CHECKING:
    import pandas as pd

_MAX_VALUES = 32  # different values in one count; all further ones are counted as "others"


@dataclass(frozen=True)
class CorpusSplit:
    """The size of one split; `records` counts by task."""

    split: str
    groups: int
    pairs: int
    records: dict[str, int]


@dataclass(frozen=True)
class CorpusReport:
    """What a corpus was made of; equal fingerprints mean equal pairs in equal splits."""

    fingerprint: str
    found: int
    """Pairs before duplicates were dropped and `limit` was applied."""
    dropped: int
    """Texts and summaries that repeated an earlier one."""
    skipped: tuple[str, ...]
    """`module: reason` of each source file that could not be read."""
    splits: tuple[CorpusSplit, ...]
    reused: tuple[str, ...]
    """Splits that were complete on disk and were left as they were."""

    def to_frame(self) -> "pd.DataFrame":
        """One row a split: its groups, pairs and records of each task."""
        import pandas as pd

        rows = [[it.groups, it.pairs, *it.records.values()] for it in self.splits]
        return pd.DataFrame(
            rows, pd.Index([it.split for it in self.splits], name="split"), ["groups", "pairs", *TASK_TEMPLATES]
        )

    def summary(self) -> str:
        """One line: what was found, dropped, skipped and reused."""
        return (
            f"{self.found} pairs found, {self.dropped} duplicates dropped, {len(self.skipped)} files skipped, "
            f"fingerprint {self.fingerprint}, reused: {', '.join(self.reused) or 'nothing'}"
        )


@dataclass(frozen=True)
class Leak:
    """`count` different values of `kind`, source_id or vector, are in both splits."""

    kind: str
    first: str
    second: str
    count: int
    example: str

    def __str__(self) -> str:
        return f"{self.kind} in both {self.first} and {self.second}: {self.count}, for example {self.example}"


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


@dataclass(frozen=True)
class FilterReport:
    """What `filter_corpus` read and wrote."""

    task_type: str
    splits: dict[str, SplitReport]
    leaks: tuple[Leak, ...]

    def to_frame(self) -> "pd.DataFrame":
        """One column a split, one row a count; the last rows count what the split shares with other splits."""
        import pandas as pd

        columns: dict[str, dict[str, float]] = {}
        for split, report in self.splits.items():
            counts: dict[str, float] = {}
            for name, value in asdict(report).items():
                values = value.items() if isinstance(value, dict) else [("", value)]
                counts |= {f"{name} {key}".strip().replace("_", " "): number for key, number in values}
            for kind in ("source_id", "vector"):
                shared = (leak.count for leak in self.leaks if leak.kind == kind and split in (leak.first, leak.second))
                counts[f"leaks: {kind}"] = sum(shared)
            columns[split] = counts
        labels = list(dict.fromkeys(label for counts in columns.values() for label in counts))
        rows = [[counts.get(label, 0) for counts in columns.values()] for label in labels]
        # dtype object: counts stay whole numbers beside the mean
        return pd.DataFrame(rows, pd.Index(labels, name=self.task_type), list(columns), dtype=object)


class Tally:
    """The counts of one split while it is filtered."""

    def __init__(self, task: str):
        self.task, self.rejected = task, 0
        self._tasks = Counter({task: 0})
        self._variations: Counter[Any] = Counter()
        self._temperatures: Counter[Any] = Counter()
        self._tokens: tuple[float, int, int] = (float("inf"), 0, 0)  # fewest, most, total

    def add(self, tasks: list[str], kept: list[Record]) -> None:
        """Count a block of good records: the task of each, and the kept ones."""
        _count(self._tasks, tasks)
        if kept:
            tokens = [record.token_count for record in kept]
            _count(self._variations, [record.variation for record in kept])
            _count(self._temperatures, [float(record.temperature) for record in kept])  # 1 and 1.0 are one label
            fewest, most, total = self._tokens
            self._tokens = min(fewest, *tokens), max(most, *tokens), total + sum(tokens)

    def report(self, path: Path, rows_read: int, rows_kept: int) -> SplitReport:
        """All counts of the records in `path`; raises ValueError, naming it, where no record was kept."""
        good, kept = self._tasks.total(), self._tasks[self.task]
        if not good + self.rejected:
            raise ValueError(f"{path} is empty; expected one JSON object a line")
        if not kept:
            tasks = ", ".join(f"{task}: {n}" for task, n in (+self._tasks).most_common()) or "no good record"
            raise ValueError(f"{path}: no record of task {self.task!r}, but {tasks} (rejected: {self.rejected})")
        fewest, most, total = self._tokens
        return SplitReport(
            read=good + self.rejected,
            kept=kept,
            dropped=good - kept,
            rejected=self.rejected,
            embedding_rows_read=rows_read,
            embedding_rows_kept=rows_kept,
            token_counts=TokenCounts(int(fewest), total / kept, most, total),
            variations={str(value): n for value, n in self._variations.most_common()},
            temperatures={str(value): n for value, n in self._temperatures.most_common()},
        )


def _count(counter: Counter, values: Iterable[Any]) -> None:
    for value, n in Counter(values).items():
        counter[value if value in counter or len(counter) < _MAX_VALUES else "others"] += n
