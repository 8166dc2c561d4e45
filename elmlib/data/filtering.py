"""A multi-task corpus -> one task: its records, each embedding row they use once, and no source in two splits.

The JSONL is read once, in a stream. In memory are 8 bytes for each embedding row, twice (new row, hash of the vector),
and 8 for each source (hash of the source_id).
"""

import json
import warnings
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from itertools import combinations, islice
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import orjson
from tqdm.auto import tqdm

from elmlib.config import FilterConfig
from elmlib.data.prompts import SLOT
from elmlib.data.records import (
    SPLITS,
    EmbeddingFile,
    Record,
    atomic_path,
    check_rows,
    parse_record,
    write_embeddings,
    write_json,
)
from elmlib.data.reports import FilterReport, Leak, SplitReport, Tally

_BLOCK_BYTES = 1 << 20  # read at a time
_BLOCK_LINES = 256  # handled at a time; they stay in the processor's cache
_UNUSED, _BAD = -1, -2  # in the row map while it is made; in the end both are -1
_BOM = b"\xef\xbb\xbf"
_KEY = b'"embedding_index"'
_KEYS = (_KEY + b": ", _KEY + b":")  # as json.dumps and as other libraries write it
_ESCAPES = (b"\\u005", b"\\u006", b"\\u007")  # with which the key could be spelled too


def filter_corpus(config: FilterConfig, progress: bool = True) -> FilterReport:
    """Keep the records of `config.task_type` and the embedding rows that they use; the output appears whole or not.

    Writes each split's JSONL (unknown fields and the order of fields stay), safetensors (rows in the order of their
    first use) and `{split}_index_map.npy` (int64, old row -> new row, -1 for dropped), `filter_report.json` and, with
    `skip_bad`, `rejected.jsonl`. Records of all tasks are checked, with the vectors that they point to; a vector that
    no record points to is not.

    Raises FileNotFoundError for a missing file and ValueError for a bad one, a bad record (without `skip_bad`), a
    split without the task, an output folder that is an input folder, and a source_id or a vector in two splits
    (with `allow_leaks` a UserWarning).
    """
    folders = (config.output_dir, config.output_embeddings_dir)
    for folder in folders:
        if folder.resolve() in (config.input_dir.resolve(), config.input_embeddings_dir.resolve()):
            raise ValueError(f"{folder} holds the input; choose another folder for the output")
    rejected_path = config.output_dir / "rejected.jsonl"
    with ExitStack() as stack:

        def temporary(path: Path) -> Path:
            return stack.enter_context(atomic_path(path))

        for folder in folders:
            stack.enter_context(_new_folder(folder))
        rejected = stack.enter_context(open(temporary(rejected_path), "wb")) if config.skip_bad else None
        splits = [
            _Split(name, lines, vectors, config.task_type, rejected)
            for name, lines, vectors in _open_splits(config, stack)
        ]
        reports = {split.name: _filter_split(split, config, temporary, progress) for split in splits}
        leaks = tuple(_find_leaks(splits))
        message = "\n".join(["the splits overlap", *map(str, leaks)])
        if leaks and not config.allow_leaks:
            raise ValueError(f"{message}\n(allow_leaks makes this a warning)")
        report = FilterReport(config.task_type, reports, leaks)
        write_json(temporary(config.output_dir / "filter_report.json"), asdict(report))
    if not config.skip_bad:  # an earlier run's would contradict this report
        rejected_path.unlink(missing_ok=True)
    if leaks:
        warnings.warn(message, UserWarning, stacklevel=2)
    return report


def _open_splits(config: FilterConfig, stack: ExitStack) -> Iterator[tuple[str, Path, EmbeddingFile]]:
    dims = {}
    for name in SPLITS:
        lines = config.input_dir / f"{name}_synthesis.jsonl"
        if not lines.is_file():
            raise FileNotFoundError(f"{lines} does not exist")
        path = config.input_embeddings_dir / f"{name}_embeddings.safetensors"
        vectors = stack.enter_context(EmbeddingFile(path))
        dims[name] = vectors.dim
        if len(set(dims.values())) > 1:
            raise ValueError(f"{path}: {vectors.dim} numbers a vector; all splits must agree, but they have {dims}")
        yield name, lines, vectors


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Make `folder`; when the block fails, remove again what had to be made."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty: another process uses it by now
            for path in made:
                path.rmdir()
        raise


class _Split:
    """The input of one split, the hashes for the overlap check, and the counts of its report."""

    def __init__(self, name: str, lines: Path, vectors: EmbeddingFile, task: str, rejected: BinaryIO | None):
        """`rejected` takes bad records; without it the first one raises."""
        self.name, self.lines, self.vectors, self.task = name, lines, vectors, task
        self.index_map = np.full(vectors.num_rows, _UNUSED)
        """Old row -> new row."""
        self.row_hashes = array("q")
        """Hash of each vector, by old row."""
        self.row_lines = array("I")
        """Line that uses a kept row first, by new row."""
        self.source_hashes = array("q")
        """Hash of the source_id of kept records, not repeated for neighbours of one source."""
        self.source_lines = array("I")
        """Line of each of them."""
        self._rejected_file = rejected
        self.tally = Tally(task)

    @property
    def order(self) -> np.ndarray:
        """Old rows in the order of their new numbers."""
        kept = np.flatnonzero(self.index_map >= 0)
        return kept[np.argsort(self.index_map[kept])]

    def hashes(self, kind: str) -> tuple[np.ndarray, array]:
        """Hashes of source_id or vector of the kept records, and the line that each comes from."""
        if kind == "source_id":
            return np.array(self.source_hashes, np.int64), self.source_lines
        return np.array(self.row_hashes)[self.order], self.row_lines

    def place(self, number: int, field: str) -> str:
        """What line `number` holds in `field`, with the file's name."""
        with open(self.lines, "rb") as file:
            line = next(islice(file, number - 1, None)).removeprefix(_BOM)
        return f"{field} {orjson.loads(line)[field]!r} ({self.lines}, line {number})"

    def reject(self, number: int, line: bytes) -> None:
        """Write a bad record to the rejected ones with the reason, or raise ValueError with it."""
        try:
            row = parse_record(line, self.vectors.num_rows).embedding_index
            check_rows(self.vectors.rows(row, row + 1), [row])
            raise AssertionError(f"a good record was refused: {line!r}")
        except ValueError as error:
            reason = f"{self.vectors.path}: {error}" if str(error).startswith("row ") else str(error)
        if self._rejected_file is None:
            raise ValueError(f"{self.lines}, line {number}: {reason}")
        raw = line.decode("utf-8", errors="replace").rstrip()
        entry = {"split": self.name, "line": number, "reason": reason, "raw": raw}
        self._rejected_file.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
        self.tally.rejected += 1


def _filter_split(
    split: _Split, config: FilterConfig, temporary: Callable[[Path], Path], progress: bool
) -> SplitReport:
    """Write the three files of a split under the names that `temporary` gives for theirs."""
    lines, vectors = split.lines, split.vectors
    size = lines.stat().st_size + vectors.path.stat().st_size
    with tqdm(total=size, desc=f"filter {split.name}", unit="B", unit_scale=True, disable=not progress) as bar:
        _read_vectors(split, bar)
        with open(temporary(config.output_dir / lines.name), "wb") as out:
            _keep_records(split, out, bar)
    np.maximum(split.index_map, _UNUSED, out=split.index_map)
    report = split.tally.report(lines, len(split.index_map), int((split.index_map >= 0).sum()))
    with open(temporary(config.output_embeddings_dir / f"{split.name}_index_map.npy"), "wb") as out:
        np.save(out, split.index_map)
    shape = (report.embedding_rows_kept, vectors.dim)
    vectors_path = temporary(config.output_embeddings_dir / vectors.path.name)
    write_embeddings(vectors_path, shape, _kept_rows(split), vectors.dtype, vectors.metadata)
    return report


def _read_vectors(split: _Split, bar: tqdm) -> None:
    """Hash all vectors and mark those that are not finite or all zero."""
    vectors, step = split.vectors, max(1, _BLOCK_BYTES // (4 * split.vectors.dim))
    for start in range(0, vectors.num_rows, step):
        rows = vectors.rows(start, min(start + step, vectors.num_rows))
        split.index_map[start : start + step][~(np.isfinite(rows).all(axis=1) & rows.any(axis=1))] = _BAD
        split.row_hashes.extend(hash(row.tobytes()) for row in rows + 0.0)  # -0.0 becomes 0.0, its equal
        bar.update(vectors.path.stat().st_size * len(rows) // vectors.num_rows)


def _keep_records(split: _Split, out: BinaryIO, bar: tqdm) -> None:
    """Write the wanted records with their new index."""
    new_rows, task = split.index_map.data, split.task  # the memoryview gives ints, several times faster than the array
    num_rows, num_new, last_source = len(split.index_map), 0, ""
    for start, lines in _line_blocks(split.lines):
        tasks: list[str] = []
        kept: list[tuple[bytes, int, int]] = []
        records: list[Record] = []
        for number, (line, record) in enumerate(zip(lines, _parse_block(lines, num_rows), strict=True), start):
            if (
                record is None
                or not 0 <= (row := record.embedding_index) < num_rows
                or (new_row := new_rows[row]) == _BAD
                or record.input_prompt_template.count(SLOT) != 1
                or not record.target_text.strip()
            ):
                if line.strip():
                    split.reject(number, line)
                continue
            tasks.append(record.task_type)
            if record.task_type != task:
                continue
            source = record.source_id
            if source and source != last_source:
                last_source = source
                split.source_hashes.append(hash(source))
                split.source_lines.append(number)
            if new_row == _UNUSED:
                new_row = new_rows[row] = num_new
                num_new += 1
                split.row_lines.append(number)
            records.append(record)
            kept.append((line, row, new_row))
        split.tally.add(tasks, records)
        out.write(_with_indices(kept))
        bar.update(sum(map(len, lines)))


def _line_blocks(path: Path) -> Iterator[tuple[int, list[bytes]]]:
    """Lines, with the number of the first."""
    with open(path, "rb", buffering=_BLOCK_BYTES) as file:
        file.seek(len(_BOM) if file.read(len(_BOM)) == _BOM else 0)
        number = 1
        while lines := list(islice(file, _BLOCK_LINES)):
            yield number, lines
            number += len(lines)


class _PlainRecord(Record, frozen=True, gc=False, forbid_unknown_fields=True):
    """A record without unknown fields."""


_decode = msgspec.json.Decoder(Record).decode
_decode_plain = msgspec.json.Decoder(_PlainRecord).decode


def _parse_block(lines: list[bytes], num_rows: int) -> list[Record | None]:
    """The records of a block; None for a line that is none."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        return list(map(_decode_plain, lines))
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        b"".join(lines).decode()  # the decoder does not look at the bytes of unknown fields
        return list(map(_decode, lines))
    records: list[Record | None] = []
    for line in lines:
        try:
            records.append(parse_record(line, num_rows))
        except ValueError:
            records.append(None)
    return records


def _with_indices(kept: list[tuple[bytes, int, int]]) -> bytes:
    """Lines, joined, with the new index in the place of the old one; all else but a line's end stays to the byte."""
    if not kept:
        return b""
    key = next((key for key in _KEYS if key in kept[0][0]), _KEYS[0])
    pieces, plain = [], True
    for line, old, new in kept:
        if not line.endswith(b"}\n"):
            line = line.rstrip() + b"\n"
        piece = line.replace(b"%b%d" % (key, old), b"%b%d" % (key, new), 1)
        plain &= old == new or piece != line
        pieces.append(piece)
    joined = b"".join(pieces)
    # With the key once in each line, and never spelled with escapes, it was the right one.
    escaped = b"\\u00" in joined and any(escape in joined for escape in _ESCAPES)
    if plain and not escaped and joined.count(_KEY) == len(kept):
        return joined
    return b"".join(_with_index(line.rstrip() + b"\n", old, new) for line, old, new in kept)


def _with_index(line: bytes, old: int, new: int) -> bytes:
    """One line, however its index is spelled; its fields keep their order."""
    head, key, tail = line.partition(_KEY)
    if _KEY not in tail:
        changed = head + key + tail.replace(b"%d" % old, b"%d" % new, 1)
        # The key may have been one of an unknown field, and the record's own spelled with escapes.
        with suppress(msgspec.DecodeError):
            if _decode(changed).embedding_index == new:
                return changed
    return json.dumps(json.loads(line) | {"embedding_index": new}, ensure_ascii=False).encode() + b"\n"


def _kept_rows(split: _Split) -> Iterator[bytes]:
    """The kept rows in the new order, as on disk; neighbours are read in one go."""
    order, step = split.order, max(1, _BLOCK_BYTES // (4 * split.vectors.dim))
    for start in range(0, len(order), step):
        rows = order[start : start + step]
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        yield b"".join(split.vectors.raw(run[0], run[-1] + 1) for run in runs)


def _find_leaks(splits: list[_Split]) -> Iterator[Leak]:
    """What each two splits share of sources and of vectors; the example is the first one of the first split.

    The hashes are 64-bit SipHash with a random key of this process, so nothing outside this process uses them.
    """
    for kind, field in (("source_id", "source_id"), ("vector", "embedding_index")):
        for pair in combinations(splits, 2):
            (first, first_lines), (second, second_lines) = (split.hashes(kind) for split in pair)
            ordered = np.append(np.sort(second), 0)  # the last item is out of order; no search ends up behind it
            nearest = np.searchsorted(ordered[:-1], first)
            shared = np.flatnonzero((ordered[nearest] == first) & (nearest < len(second)))
            if len(shared):
                lines = first_lines[shared[0]], second_lines[int((second == first[shared[0]]).argmax())]
                example = " and ".join(split.place(number, field) for split, number in zip(pair, lines, strict=True))
                yield Leak(kind, pair[0].name, pair[1].name, len(set(first[shared].tolist())), example)
