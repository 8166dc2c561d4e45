"""Records on disk: JSONL lines and safetensors rows, read in a stream, checked, and written whole or not at all.

Formats: https://jsonlines.org and https://huggingface.co/docs/safetensors (8-byte length, JSON header, raw rows).
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import orjson

from elmlib.prompts import check_template

TENSOR = "embeddings"
_ITEM_BYTES = {"F32": 4, "BF16": 2}


@dataclass(frozen=True)
class Record:
    """One target text for one embedding; the guide's data format plus `source_id` and `source_text`."""

    task_type: str
    input_prompt_template: str
    embedding_index: int
    target_text: str
    variation: int
    temperature: float
    top_p: float
    token_count: int
    source_id: str = ""
    source_text: str = ""

    @property
    def source(self) -> str:
        """What tells sources apart: `source_id`, or the embedding row where the file has no such field."""
        return self.source_id or f"row {self.embedding_index}"

    def to_line(self) -> bytes:
        """The record as one JSONL line."""
        return orjson.dumps(asdict(self)) + b"\n"


# Name -> (accepted types, required). bool is a subclass of int, so it is refused by name in `check_fields`.
_FIELDS: dict[str, tuple[tuple[type, ...], bool]] = {
    "task_type": ((str,), True),
    "input_prompt_template": ((str,), True),
    "embedding_index": ((int,), True),
    "target_text": ((str,), True),
    "variation": ((int,), True),
    "temperature": ((int, float), True),
    "top_p": ((int, float), True),
    "token_count": ((int,), True),
    "source_id": ((str,), False),
    "source_text": ((str,), False),
}


def check_fields(values: Any, num_rows: int) -> None:
    """Raise ValueError, with the reason, unless `values` is a record that points into `num_rows` embeddings."""
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, found {type(values).__name__}")
    for name, (types, required) in _FIELDS.items():
        if name not in values:
            if required:
                raise ValueError(f"field {name!r} is missing")
        elif not isinstance(values[name], types) or isinstance(values[name], bool):
            raise ValueError(f"field {name!r} is {values[name]!r}; expected {' or '.join(t.__name__ for t in types)}")
    if not 0 <= values["embedding_index"] < num_rows:
        raise ValueError(
            f"embedding_index {values['embedding_index']} is outside the {num_rows} rows of the embeddings"
        )
    if not values["target_text"].strip():
        raise ValueError("target_text is empty")
    check_template(values["input_prompt_template"])


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line without its end) of a text file; a BOM, CRLF and blank lines are passed over.

    Raises FileNotFoundError for no such file and ValueError for an empty one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    found = False
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line := line.strip():
                found = True
                yield number, line
    if not found:
        raise ValueError(f"{path} is empty; expected one JSON object a line")


def parse_line(line: bytes, where: str = "line") -> Any:
    """One line of JSON; ValueError names `where` and says whether the bytes or the JSON are broken."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as bad_bytes:
            raise ValueError(f"{where}: not UTF-8: {bad_bytes}") from error
        raise ValueError(f"{where}: not valid JSON: {error}") from error


def read_records(path: Path, num_rows: int) -> Iterator[Record]:
    """Yield the records of a split file, each checked against `num_rows` embeddings; errors name file and line."""
    names = _FIELDS.keys()
    for number, line in read_lines(path):
        values = parse_line(line, f"{path}, line {number}")
        try:
            check_fields(values, num_rows)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        yield Record(**{name: values[name] for name in names if name in values})


class EmbeddingFile:
    """One safetensors file that holds the single 2-D tensor `embeddings`, float32 or bfloat16, read row by row.

    Plain reads, not mmap: a mapped file counts as this process's memory until the kernel takes it back.
    Raises FileNotFoundError or ValueError, naming the file and what was expected, before any row is read.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        size = self.path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length > size - 8:
                raise ValueError(f"{path} is truncated or no safetensors file ({size} bytes)")
            try:
                header = json.loads(file.read(length))
            except ValueError as error:
                raise ValueError(f"{path} is no safetensors file: its header is not JSON") from error
        if not isinstance(header, dict):
            raise ValueError(f"{path} is no safetensors file: its header is no JSON object")
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        if list(header) != [TENSOR]:
            raise ValueError(f"{path} holds the tensors {sorted(header)}; expected the single tensor {TENSOR!r}")
        tensor = header[TENSOR]
        if not (isinstance(tensor, dict) and tensor.keys() >= {"dtype", "shape", "data_offsets"}):
            raise ValueError(f"{path} is no safetensors file: its header describes the tensor as {tensor}")
        self.dtype: str = tensor["dtype"]
        if self.dtype not in _ITEM_BYTES or len(tensor["shape"]) != 2 or 0 in tensor["shape"]:
            raise ValueError(f"{path}: {self.dtype} of shape {tensor['shape']}; expected 2-D F32 or BF16, not empty")
        self.num_rows, self.dim = tensor["shape"]
        self._row_bytes = self.dim * _ITEM_BYTES[self.dtype]
        self._start = 8 + length + tensor["data_offsets"][0]
        expected = self._start + self.num_rows * self._row_bytes
        if size != expected:
            raise ValueError(f"{path} is truncated or padded: {size} bytes; {expected} expected from its header")
        self._file = open(path, "rb")  # noqa: SIM115 (closed in __exit__)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def raw(self, start: int, stop: int) -> bytes:
        """Rows start to stop as they lie on disk."""
        assert 0 <= start <= stop <= self.num_rows, (start, stop, self.num_rows)
        return os.pread(self._file.fileno(), (stop - start) * self._row_bytes, self._start + start * self._row_bytes)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop as float32, (stop - start, dim)."""
        return decode_rows(self.raw(start, stop), self.dtype, self.dim)


def decode_rows(raw: bytes, dtype: str, dim: int) -> np.ndarray:
    """Raw F32 or BF16 rows as float32, (rows, dim). bfloat16 is the upper half of a float32."""
    if dtype == "F32":
        return np.frombuffer(raw, np.float32).reshape(-1, dim)
    return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(-1, dim)


def check_rows(rows: np.ndarray, numbers: Sequence[int]) -> None:
    """Raise ValueError, with the row's number out of `numbers`, for a vector that is not finite or all zero."""
    for bad, reason in ((~np.isfinite(rows).all(axis=1), "NaN or infinite"), (~rows.any(axis=1), "all zero")):
        if bad.any():
            raise ValueError(f"row {numbers[int(bad.argmax())]} is {reason}; expected a finite vector that is not zero")


def write_embeddings(
    path: Path,
    shape: tuple[int, int],
    chunks: Iterable[bytes],
    dtype: str = "F32",
    metadata: dict[str, str] | None = None,
) -> None:
    """Stream raw rows into a safetensors file that appears whole or not at all."""
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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write `values` as indented JSON; the file appears whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
