"""JSONL lines of records by the million: parsed and checked in C, and given another embedding index as they lie."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import msgspec

_BUFFER_BYTES = 1 << 20
_BLOCK_LINES = 256  # handled at a time; they stay in the processor's cache
_BOM = b"\xef\xbb\xbf"
_INDEX_KEY = b'"embedding_index"'
_INDEX_KEYS = _INDEX_KEY + b":", _INDEX_KEY + b": "  # as JSON libraries write it; the second is json.dumps'


class Line(msgspec.Struct, gc=False):
    """What `records.check_fields` asks for, checked in C while it is parsed; unknown fields are passed over."""

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


class _KnownLine(Line, gc=False, forbid_unknown_fields=True):
    """A line without any unknown field, as all lines of most files are."""


_decode = msgspec.json.Decoder(Line).decode
_decode_known = msgspec.json.Decoder(_KnownLine).decode


def parse_lines(lines: list[bytes]) -> Sequence[Line | None]:
    """The records of a block; None for a line that is none."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        return list(map(_decode_known, lines))
    return list(map(_parse_line, lines))


def _parse_line(line: bytes) -> Line | None:
    try:
        line.decode()  # the decoder passes over the bytes of unknown fields
        return _decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def line_blocks(path: Path) -> Iterator[tuple[int, list[bytes]]]:
    """Lines, with the number of the first."""
    with open(path, "rb", buffering=_BUFFER_BYTES) as file:
        file.seek(len(_BOM) if file.read(len(_BOM)) == _BOM else 0)
        number = 1
        while lines := list(islice(file, _BLOCK_LINES)):
            yield number, lines
            number += len(lines)


def with_indices(lines: list[bytes], records: list[Line], indices: list[int]) -> bytes:
    """Lines of one block, joined, each with its number of `indices` in the place of its own.

    All else stays, to the byte but for a line's end.
    """
    if not lines:
        return b""
    key = next((key for key in _INDEX_KEYS if key in lines[0]), _INDEX_KEYS[0])
    pieces = []
    for line, record, index in zip(lines, records, indices, strict=True):
        old = record.embedding_index
        if not line.endswith(b"}\n"):
            line = line.rstrip() + b"\n"
        piece = line.replace(b"%b%d" % (key, old), b"%b%d" % (key, index), 1)
        if piece == line and old != index:
            piece = _with_index(line, record, index)
        pieces.append(piece)
    joined = b"".join(pieces)
    # Without unknown fields, of which the key might be one, and with the key once in each line, it was the right one.
    if type(records[0]) is _KnownLine and joined.count(_INDEX_KEY) == len(lines):
        return joined
    return b"".join(map(_with_index, lines, records, indices))


def _with_index(line: bytes, record: Line, index: int) -> bytes:
    """One line, however its index is spelt; its fields keep their order."""
    line = line.rstrip() + b"\n"
    head, key, tail = line.partition(_INDEX_KEY)
    if _INDEX_KEY not in tail:
        changed = head + key + tail.replace(b"%d" % record.embedding_index, b"%d" % index, 1)
        # The key may have been one of an unknown field, and the record's own spelt with escapes.
        again = _parse_line(changed)
        if again is not None and again.embedding_index == index:
            return changed
    return json.dumps(json.loads(line) | {"embedding_index": index}, ensure_ascii=False).encode() + b"\n"
