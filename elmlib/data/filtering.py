"""A multi-task corpus -> one task: its records, each embedding row they use once, and no source in two splits.

The JSONL is read once, in a stream. In memory are 16 bytes for each embedding row (new row, hash of the vector) and 12
for each kept vector and source (hash, line number). Python's hashes are 64 bits with a random key of this process.
"""

import json
import re
import warnings
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import orjson
from tqdm.auto import tqdm, trange

from elmlib.config import FilterConfig, InputError
from elmlib.data import records
from elmlib.data.records import SPLITS, EmbeddingFile, Record

if TYPE_CHECKING:
    import pandas as pd

_BLOCK_BYTES = 1 << 20  # of vectors read at a time
_MAX_VALUES = 32  # different values in one count; all further ones are counted as "others"
_KEY = b'"embedding_index"'
_INTEGER = re.compile(rb"-?\d+")
_ESCAPE = re.compile(rb"\\u00[567]")  # with which the key could be spelled too


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
class SplitReport:
    """One split: read = kept + dropped (other tasks) + rejected; the counts by value are of kept records."""

    read: int
    kept: int
    dropped: int
    rejected: int
    embedding_rows_read: int
    embedding_rows_kept: int
    token_counts: dict[str, float]
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

        frame = pd.json_normalize([asdict(report) for report in self.splits.values()], sep=" ").fillna(0)
        frame.columns = frame.columns.str.replace("_", " ")
        for kind in ("source_id", "vector"):
            leaks = [leak for leak in self.leaks if leak.kind == kind]
            frame[f"leaks: {kind}"] = [
                sum(leak.count for leak in leaks if split in (leak.first, leak.second)) for split in self.splits
            ]
        frame.index = pd.Index(self.splits)
        return frame.convert_dtypes().astype(object).T.rename_axis(self.task_type)


def filter_corpus(config: FilterConfig, progress: bool = True) -> FilterReport:
    """Keep the records of `config.task_type` and the embedding rows that they use; the output appears whole or not.

    Writes each split's JSONL (unknown fields and the order of fields stay), safetensors (rows in the order of their
    first use) and `{split}_index_map.npy` (int64, old row -> new row, -1 for dropped), `filter_report.json` and, with
    `skip_bad`, `rejected.jsonl`. Records of all tasks are checked, with the vectors that they point to.

    Raises InputError for a missing or bad file or record, a split without the task and a
    source_id or a vector in two splits; `skip_bad` and `allow_leaks` go on instead.
    """
    rejected_path = config.output_dir / "rejected.jsonl"
    with ExitStack() as stack:
        for folder in (config.output_dir, config.output_embeddings_dir):
            if folder.resolve() in (config.input_dir.resolve(), config.input_embeddings_dir.resolve()):
                raise InputError(f"{folder} holds the input; choose another folder for the output")
            stack.callback(_remove_empty, [path for path in (folder, *folder.parents) if not path.exists()])
        rejected = None
        if config.skip_bad:
            rejected = stack.enter_context(open(stack.enter_context(records.atomic_path(rejected_path)), "wb"))
        splits = [_Split(config, name, rejected, stack) for name in SPLITS]
        dims = {str(split.vectors.path): split.vectors.dim for split in splits}
        if len(set(dims.values())) > 1:
            raise InputError(f"all splits need vectors of one size, but they have {dims}; embed all with one model")
        reports = {split.name: split.filter(progress) for split in splits}
        leaks = tuple(_find_leaks(splits))
        message = "\n".join(["the splits overlap", *map(str, leaks)])
        if leaks and not config.allow_leaks:
            raise InputError(f"{message}\n(allow_leaks makes this a warning)")
        report = FilterReport(config.task_type, reports, leaks)
        report_path = stack.enter_context(records.atomic_path(config.output_dir / "filter_report.json"))
        records.write_json(report_path, asdict(report))
    if not config.skip_bad:  # an earlier run's would contradict this report
        rejected_path.unlink(missing_ok=True)
    if leaks:
        warnings.warn(message, UserWarning, stacklevel=2)
    return report


class _Split:
    """One split while it is filtered, with the hashes of what is kept and the lines they come from."""

    def __init__(self, config: FilterConfig, name: str, rejected: BinaryIO | None, stack: ExitStack):
        """`rejected` takes bad records; without it the first one raises. `stack` closes and renames the files."""
        self.config, self.name, self.rejected, self.stack, self.num_rejected = config, name, rejected, stack, 0
        self.path, vectors = records.split_paths(config.input_dir, config.input_embeddings_dir, name)
        if not self.path.is_file():
            raise InputError(f"{self.path} does not exist")
        self.vectors = stack.enter_context(EmbeddingFile(vectors))
        self.hashes = {"source_id": array("q"), "vector": array("q")}
        self.numbers = {"source_id": array("I"), "vector": array("I")}

    def filter(self, progress: bool) -> SplitReport:
        """Write the three files of the split."""
        task, vectors = self.config.task_type, self.vectors
        folders = self.config.output_dir, self.config.output_embeddings_dir
        new_records, new_vectors = map(self.output, records.split_paths(*folders, self.name))
        hashes, usable = hash_rows(vectors, progress)
        index_map = array("q", [-1]) * vectors.num_rows
        kept_rows = array("q")  # old rows in the order of the new ones
        tasks, variations, temperatures = Counter({task: 0}), Counter[str](), Counter[str]()
        fewest, most, tokens, last_source = float("inf"), 0, 0, ""
        with open(new_records, "wb") as out:
            for number, line, record in self.good_records(usable, progress):
                _count(tasks, record.task_type)
                if record.task_type != task:
                    continue
                row, source, count = record.embedding_index, record.source_id, record.token_count
                if index_map[row] < 0:
                    index_map[row] = len(kept_rows)
                    kept_rows.append(row)
                    self.remember("vector", hashes[row], number)
                if source not in ("", last_source):
                    last_source = source
                    self.remember("source_id", hash(source), number)
                _count(variations, str(record.variation))
                _count(temperatures, str(float(record.temperature)))  # 1 and 1.0 are one label
                fewest, most, tokens = min(fewest, count), max(most, count), tokens + count
                out.write(_with_index(line, index_map[row]) + b"\n")
        kept, good = tasks[task], tasks.total()
        if not kept:
            others = ", ".join(f"{name}: {n}" for name, n in (+tasks).most_common()) or "no good record"
            raise InputError(f"{self.path}: no record of task {task!r}, but {others} (rejected: {self.num_rejected})")
        with open(self.output(folders[1] / f"{self.name}_index_map.npy"), "wb") as out:
            np.save(out, np.array(index_map))
        rows = (vectors.raw(row, row + 1) for row in kept_rows)
        records.write_embeddings(new_vectors, (len(kept_rows), vectors.dim), rows, vectors.dtype, vectors.metadata)
        return SplitReport(
            read=good + self.num_rejected,
            kept=kept,
            dropped=good - kept,
            rejected=self.num_rejected,
            embedding_rows_read=vectors.num_rows,
            embedding_rows_kept=len(kept_rows),
            token_counts={"minimum": int(fewest), "mean": tokens / kept, "maximum": most, "total": tokens},
            variations=dict(variations.most_common()),
            temperatures=dict(temperatures.most_common()),
        )

    def good_records(self, usable: np.ndarray, progress: bool) -> Iterator[tuple[int, bytes, Record]]:
        """Yield line number, line and record of each good one."""
        size = self.path.stat().st_size
        with tqdm(total=size, desc=self.path.name, unit="B", unit_scale=True, disable=not progress) as bar:
            for number, line in records.read_lines(self.path):
                bar.update(len(line) + 1)
                try:
                    record = records.parse_record(line, self.vectors.num_rows)
                    row = record.embedding_index
                    if not usable[row]:
                        records.check_rows(self.vectors.rows(row, row + 1), [row], f"{self.vectors.path}: row")
                except InputError as error:
                    if self.rejected is None:
                        raise InputError(f"{self.path}, line {number}: {error}") from error
                    raw = line.decode(errors="replace")
                    entry = {"split": self.name, "line": number, "reason": str(error), "raw": raw}
                    self.rejected.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
                    self.num_rejected += 1
                else:
                    yield number, line, record

    def output(self, path: Path) -> Path:
        """A temporary name for `path`; the file appears when all splits are written."""
        return self.stack.enter_context(records.atomic_path(path))

    def remember(self, kind: str, value: int, number: int) -> None:
        """Store the hash of a source_id or of a vector that line `number` is the first to use."""
        self.hashes[kind].append(value)
        self.numbers[kind].append(number)

    def place(self, kind: str, at: int, field: str) -> str:
        """What the line of hash `at` holds in `field`, with the file's name."""
        number = self.numbers[kind][at]
        line = next(line for found, line in records.read_lines(self.path) if found == number)
        return f"{field} {orjson.loads(line)[field]!r} ({self.path}, line {number})"


def _count(counter: Counter[str], value: str) -> None:
    counter[value if value in counter or len(counter) < _MAX_VALUES else "others"] += 1


def hash_rows(vectors: EmbeddingFile, progress: bool) -> tuple[array, np.ndarray]:
    """The hash of each vector, and whether it is finite and not all zero."""
    hashes, usable = array("q"), np.empty(vectors.num_rows, bool)
    step = max(1, _BLOCK_BYTES // (4 * vectors.dim))
    for start in trange(0, vectors.num_rows, step, desc=vectors.path.name, unit=" blocks", disable=not progress):
        rows = vectors.rows(start, min(start + step, vectors.num_rows))
        usable[start : start + step] = np.isfinite(rows).all(axis=1) & rows.any(axis=1)
        hashes.extend(hash(row.tobytes()) for row in rows + 0.0)  # -0.0 becomes 0.0, its equal
    return hashes, usable


def _with_index(line: bytes, index: int) -> bytes:
    """The line with another embedding_index; all else stays to the byte, unless the key is hard to find."""
    head, key, tail = line.partition(_KEY)
    if _KEY not in tail and not _ESCAPE.search(line):
        return head + key + _INTEGER.sub(b"%d" % index, tail, count=1)
    return json.dumps(json.loads(line) | {"embedding_index": index}, ensure_ascii=False).encode()


def _find_leaks(splits: list[_Split]) -> Iterator[Leak]:
    """What each two splits share of sources and of vectors; the example is the first one of the first split."""
    for kind, field in (("source_id", "source_id"), ("vector", "embedding_index")):
        for first, second in combinations(splits, 2):
            hashes = np.array(first.hashes[kind]), np.array(second.hashes[kind])
            shared, *places = np.intersect1d(*hashes, return_indices=True)
            if len(shared):
                at = places[0].argmin()
                example = f"{first.place(kind, places[0][at], field)} and {second.place(kind, places[1][at], field)}"
                yield Leak(kind, first.name, second.name, len(shared), example)


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # not empty: the filter was successful
        for folder in folders:
            folder.rmdir()
