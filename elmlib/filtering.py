"""A multi-task corpus -> one task: its records, each embedding row they use once, and no source in two splits.

Both files of a split are streamed; what grows with the corpus (row map, hashes for the leak check) stays on disk.
"""

import mmap
import warnings
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from tqdm.auto import tqdm

from elmlib import layout, records
from elmlib.commands import FilterConfig
from elmlib.leaks import Notes, find_leaks
from elmlib.lines import Line, line_blocks, parse_lines, with_indices
from elmlib.prompts import SLOT
from elmlib.records import EmbeddingFile, atomic_path
from elmlib.reports import FilterReport, SplitReport, Tally

_BLOCK_BYTES = 1 << 20  # read at a time: float32 rows, or the row map
_UNSEEN, _BAD = -1, -2  # rows in a map under construction; in the end both are -1, dropped


class _Split(NamedTuple):
    """A split's input, and what is noted of it on disk, each with the first line that it comes from."""

    name: str
    lines: Path
    vectors: EmbeddingFile
    sources: Notes
    """Hash of the source_id, of each kept record that has one."""
    rows: Notes
    """Old number, of each kept row in the new order."""
    hashes: Notes
    """Hash of the vector, of each kept row."""


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
        splits = list(_open_splits(config, stack))
        rejected = stack.enter_context(open(temporary(rejected_path), "wb")) if config.skip_bad else None
        reports = {split.name: _filter_split(split, config, temporary, rejected, progress) for split in splits}
        leaks = (
            *find_leaks("source_id", "source_id", {split.name: split.sources for split in splits}),
            *find_leaks("vector", "embedding_index", {split.name: split.hashes for split in splits}),
        )
        message = "\n".join(["the splits are not apart", *map(str, leaks)])
        if leaks and not config.allow_leaks:
            raise ValueError(f"{message}\n(allow_leaks makes this a warning)")
        report = FilterReport(config.task_type, reports, leaks)
        records.write_json(temporary(config.output_dir / "filter_report.json"), asdict(report))
    if not config.skip_bad:  # an earlier run's would contradict this report
        rejected_path.unlink(missing_ok=True)
    if leaks:
        warnings.warn(message, UserWarning, stacklevel=2)
    return report


def _open_splits(config: FilterConfig, stack: ExitStack) -> Iterator[_Split]:
    dims = {}
    for name in layout.SPLITS:
        lines = config.input_dir / f"{name}_synthesis.jsonl"
        if not lines.is_file():
            raise FileNotFoundError(f"{lines} does not exist")
        path = config.input_embeddings_dir / f"{name}_embeddings.safetensors"
        vectors = stack.enter_context(EmbeddingFile(path))
        dims[name] = vectors.dim
        if len(set(dims.values())) > 1:
            raise ValueError(f"{path}: {vectors.dim} numbers a vector; all splits must agree, but they have {dims}")
        notes = [stack.enter_context(Notes(lines, config.output_dir)) for _ in range(3)]
        yield _Split(name, lines, vectors, *notes)


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Make `folder`; when the block fails, remove again what had to be made."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty: somebody else uses it by now
            for path in made:
                path.rmdir()
        raise


def _filter_split(
    split: _Split,
    config: FilterConfig,
    temporary: Callable[[Path], Path],
    rejected: BinaryIO | None,
    progress: bool,
) -> SplitReport:
    """Write the three files of a split under the names that `temporary` gives for theirs."""
    lines, vectors = split.lines, split.vectors
    map_path = temporary(config.output_embeddings_dir / f"{split.name}_index_map.npy")
    index_map = np.lib.format.open_memmap(map_path, "w+", np.int64, (vectors.num_rows,))
    tally = Tally(split.name, lines, vectors, config.task_type, rejected)
    size = lines.stat().st_size + vectors.path.stat().st_size
    with tqdm(total=size, desc=f"filter {split.name}", unit="B", unit_scale=True, disable=not progress) as bar:
        _mark_rows(vectors, index_map, bar)
        with open(temporary(config.output_dir / lines.name), "wb") as out:
            report = _keep_records(split, tally, index_map, out, bar)
        _drop_marks(index_map)
        shape = (report.embedding_rows_kept, vectors.dim)
        vectors_path = temporary(config.output_embeddings_dir / vectors.path.name)
        records.write_embeddings(vectors_path, shape, _kept_rows(split), vectors.dtype, vectors.metadata)
    return report


def _mark_rows(vectors: EmbeddingFile, index_map: np.memmap, bar: tqdm) -> None:
    step = max(1, _BLOCK_BYTES // (4 * vectors.dim))
    for start in range(0, vectors.num_rows, step):
        rows = vectors.rows(start, min(start + step, vectors.num_rows))
        good = np.isfinite(rows).all(axis=1) & rows.any(axis=1)
        index_map[start : start + step] = np.where(good, _UNSEEN, _BAD)
        _release(index_map)
        bar.update(vectors.path.stat().st_size * len(rows) // vectors.num_rows)


def _drop_marks(index_map: np.memmap) -> None:
    step = _BLOCK_BYTES // index_map.itemsize
    for start in range(0, len(index_map), step):
        block = index_map[start : start + step]
        np.maximum(block, _UNSEEN, out=block)
        _release(index_map)


def _release(index_map: np.memmap) -> None:
    """Unmap the pages touched so far (the data is in the file): mapped, they count as this process's memory."""
    cast(mmap.mmap, index_map.base).madvise(mmap.MADV_DONTNEED)


def _keep_records(split: _Split, tally: Tally, index_map: np.memmap, out: BinaryIO, bar: tqdm) -> SplitReport:
    """Write the wanted records with their new index, and note what the later steps need."""
    new_rows = index_map.data  # gives ints, several times faster than the array
    num_rows, num_new, last_source = len(index_map), 0, ""
    for start, lines in line_blocks(split.lines):
        tasks: list[str] = []
        kept: list[Line] = []
        kept_lines: list[bytes] = []
        indices: list[int] = []
        sources: list[int] = []
        rows: list[int] = []
        for number, line, record in zip(count(start), lines, parse_lines(lines), strict=False):
            if (
                record is None
                or not 0 <= (row := record.embedding_index) < num_rows
                or (new_row := new_rows[row]) == _BAD
                or record.input_prompt_template.count(SLOT) != 1
                or not record.target_text.strip()
            ):
                if line.strip():
                    tally.reject(number, line)
                continue
            task, source = record.task_type, record.source_id
            tasks.append(task)
            if task != tally.wanted:
                continue
            if source and source != last_source:
                last_source = source
                # A str's own hash is a 64-bit SipHash, salted anew in each process; the notes live no longer than it.
                sources += (hash(source), number)
            if new_row == _UNSEEN:
                new_row = new_rows[row] = num_new
                num_new += 1
                rows += (row, number)
            kept.append(record)
            kept_lines.append(line)
            indices.append(new_row)
        tally.add(tasks, kept)
        out.write(with_indices(kept_lines, kept, indices))
        split.sources.add(array("q", sources))
        split.rows.add(array("q", rows))
        _release(index_map)
        bar.update(sum(map(len, lines)))
    return tally.report(num_new)


def _kept_rows(split: _Split) -> Iterator[bytes]:
    """The kept rows in the new order, as they lie on disk; neighbours are read in one go, and the hashes noted."""
    vectors = split.vectors
    for pairs in split.rows.blocks(max(1, _BLOCK_BYTES // (4 * vectors.dim))):
        rows = pairs[:, 0]
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        raw = b"".join(vectors.raw(run[0], run[-1] + 1) for run in runs)
        decoded = records.decode_rows(raw, vectors.dtype, vectors.dim) + 0.0  # -0.0 becomes 0.0, its equal
        hashes = [hash(row.tobytes()) for row in decoded]
        split.hashes.add(np.stack([hashes, pairs[:, 1]], axis=1).data)
        yield raw
