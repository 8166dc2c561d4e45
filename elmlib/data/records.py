"""Files of a corpus: JSONL records and safetensors rows, where they are, and writing that is whole or not at all."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec
import numpy as np
import orjson
import platformdirs
from filelock import FileLock
from safetensors import SafetensorError, safe_open

from elmlib.config import InputError
from elmlib.data.prompts import check_template

SPLITS = ("train", "val", "test")
TENSOR = "embeddings"
_ITEM_BYTES = {"F32": 4, "BF16": 2}


class Record(msgspec.Struct, frozen=True, gc=False):
    """One target text for one embedding; the guide's data format plus `source_id` and `source_text`."""

    task_type: str
    input_prompt_template: str
    embedding_index: int
    target_text: str
    variation: int
    temperature: int | float
    top_p: int | float
    token_count: int
    source_id: str = ""
    source_text: str = ""

    @property
    def source(self) -> str:
        """Name of the source: `source_id`, or the embedding row where the file has no such field."""
        return self.source_id or f"row {self.embedding_index}"

    def to_line(self) -> bytes:
        """The record as one JSONL line."""
        return orjson.dumps(msgspec.structs.asdict(self), option=orjson.OPT_APPEND_NEWLINE)


def parse_record(line: bytes, num_rows: int) -> Record:
    """A JSONL line as a checked record; unknown fields are ignored, null counts as absent. Raises InputError."""
    values = parse_line(line)
    if isinstance(values, dict) and None in values.values():
        values = {name: value for name, value in values.items() if value is not None}
    try:
        record = msgspec.convert(values, Record)
    except msgspec.ValidationError as error:  # names the field
        raise InputError(str(error)) from error
    if not 0 <= record.embedding_index < num_rows:
        raise InputError(f"embedding_index {record.embedding_index} is outside the {num_rows} rows of the embeddings")
    if not record.target_text.strip():
        raise InputError("target_text is empty")
    check_template(record.input_prompt_template)
    return record


def read_records(path: Path, num_rows: int) -> Iterator[Record]:
    """Yield the records of a split file of `num_rows` embeddings; errors name file and line."""
    for number, line in read_lines(path):
        try:
            yield parse_record(line, num_rows)
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line without its end) of a text file, without BOM, CR and blank lines."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    empty = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line := line.strip():
                empty = False
                yield number, line
    if empty:
        raise InputError(f"{path} is empty; expected one JSON object a line")


def parse_line(line: bytes, where: str = "") -> Any:
    """One line of JSON; InputError begins with `where` and says whether the bytes or the JSON are broken."""
    prefix = f"{where}: " if where else ""
    try:
        return orjson.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{prefix}not UTF-8: {error}") from error
    except orjson.JSONDecodeError as error:
        raise InputError(f"{prefix}not valid JSON: {error}") from error


class EmbeddingFile:
    """One safetensors file that holds the single 2-D tensor `embeddings`, float32 or bfloat16, read row by row. Plain
    reads, not mmap: a mapped file counts as this process's memory until the kernel takes it back. The file is checked
    before any row is read; InputError names it."""

    def __init__(self, path: Path):
        self.path = path = Path(path).expanduser()
        if not self.path.is_file():
            raise InputError(f"{path} does not exist")
        try:
            with safe_open(path, "np") as file:  # reads the header and compares it with the size of the file
                if list(file.keys()) != [TENSOR]:
                    raise InputError(f"{path} holds the tensors {sorted(file.keys())}; expected only {TENSOR!r}")
                self.dtype: str = file.get_slice(TENSOR).get_dtype()
                shape: list[int] = file.get_slice(TENSOR).get_shape()
                self.metadata: dict[str, str] = dict(sorted((file.metadata() or {}).items()))
        except SafetensorError as error:
            raise InputError(f"{path} is truncated or no safetensors file: {error}") from error
        if self.dtype not in _ITEM_BYTES or len(shape) != 2 or 0 in shape:
            raise InputError(f"{path}: {self.dtype} of shape {shape}; expected 2-D F32 or BF16, not empty")
        self.num_rows, self.dim = shape
        self._row_bytes = self.dim * _ITEM_BYTES[self.dtype]
        self._file = open(path, "rb")  # noqa: SIM115 (closed in __exit__)
        self._start = self._file.seek(-self.num_rows * self._row_bytes, os.SEEK_END)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def raw(self, start: int, stop: int) -> bytes:
        """Rows start to stop as on disk."""
        assert 0 <= start <= stop <= self.num_rows, (start, stop, self.num_rows)
        self._file.seek(self._start + start * self._row_bytes)
        return self._file.read((stop - start) * self._row_bytes)  # more than 2 GiB too, unlike os.pread

    def check_embedder(self, model: str) -> None:
        """Raise InputError where the header names another embedder than `model`; only the last parts of the names are
        compared, for a model may lie in a folder."""
        made_by = self.metadata.get("embedding_model", model)
        if Path(made_by).name.lower() != Path(model).name.lower():
            raise InputError(f"{self.path} holds vectors of {made_by}, not of {model}; use one embedder")

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop as float32, (stop - start, dim)."""
        raw = self.raw(start, stop)
        if self.dtype == "F32":
            return np.frombuffer(raw, np.float32).reshape(-1, self.dim)
        # bfloat16 is the upper half of a float32.
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(-1, self.dim)


def check_rows(rows: np.ndarray, numbers: Sequence[int], what: str = "row") -> None:
    """Raise InputError for a vector that is not finite or all zero: `what`, its number out of `numbers`, the reason."""
    for bad, reason in ((~np.isfinite(rows).all(axis=1), "NaN or infinite"), (~rows.any(axis=1), "all zero")):
        if bad.any():
            number = numbers[int(bad.argmax())]
            raise InputError(f"{what} {number} is {reason}; expected a finite vector that is not zero")


def write_embeddings(
    path: Path, shape: tuple[int, int], chunks: Iterable[bytes], dtype: str = "F32", metadata: dict | None = None
) -> None:
    """Stream raw rows into a safetensors file: 8 bytes of length, a JSON header, the rows."""
    nbytes = shape[0] * shape[1] * _ITEM_BYTES[dtype]
    header = {TENSOR: {"dtype": dtype, "shape": list(shape), "data_offsets": [0, nbytes]}}
    encoded = json.dumps({"__metadata__": metadata or {}} | header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        written = sum(file.write(chunk) for chunk in chunks)
        assert written == nbytes, (written, nbytes)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block ends well and removed when it does not."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _writing(path.parent):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A full disk is an OSError with the folder: Python names no file, and safetensors has an error of its own."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{folder}: {error}") from error
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(folder)
        raise


def write_json(path: Path, values: Any) -> None:
    """Write `values` as indented JSON; the file appears whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, 64 digits; the file is read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_once(target: Path, build: Callable[[Path], None]) -> None:
    """Make the folder `target`, whole or not at all, by `build(temporary folder)`, in one process at a time."""
    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return
        temporary = target.with_name(f"{target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed build: the lock is ours
        temporary.mkdir()
        try:
            with _writing(target.parent):
                build(temporary)
                temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def cache_folder() -> Path:
    """The folder of cached models and results: `ELMLIB_CACHE`, else the user's cache folder of this platform."""
    return Path(os.environ.get("ELMLIB_CACHE") or platformdirs.user_cache_dir("elmlib")).expanduser()


class SplitPaths(NamedTuple):
    """The two files of one split."""

    records: Path
    embeddings: Path


def split_paths(records: Path, embeddings: Path, split: str) -> SplitPaths:
    """The files of `split` in a folder of records and a folder of embeddings, whether they exist or not."""
    return SplitPaths(records / f"{split}_synthesis.jsonl", embeddings / f"{split}_embeddings.safetensors")


def find_split(data_dir: Path, split: str) -> SplitPaths:
    """The files of `split` under `synthesis/` and `embeddings/` of `data_dir`, or directly in it."""
    records = find_records(Path(data_dir) / f"{split}_synthesis.jsonl")
    return SplitPaths(records, find_embeddings(records))


def find_records(path: Path) -> Path:
    """`path`, or the file of that name in `synthesis/` beside it: the guide names both."""
    return _first_existing([path.parent, path.parent / "synthesis"], path.name)


def find_embeddings(records: Path) -> Path:
    """The embeddings of a records file: in the same folder, or in `embeddings/` in or beside it."""
    name = records.name.replace("_synthesis.jsonl", "_embeddings.safetensors")
    if name == records.name:
        raise InputError(f"{records} is not named SPLIT_synthesis.jsonl; name its embeddings with --embeddings")
    folders = [records.parent, records.parent / "embeddings", records.parent.parent / "embeddings"]
    return _first_existing(folders, name, ", or use --embeddings")


def _first_existing(folders: list[Path], name: str, hint: str = "") -> Path:
    paths = [folder.expanduser() / name for folder in folders]
    for path in paths:
        if path.is_file():
            return path
    raise InputError(f"no {name}: looked at {', '.join(map(str, paths))}; `elm filter` writes it{hint}")
