"""Files are read back as they were written, or refused with the file, the line and what was expected."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from elmlib.config import InputError
from elmlib.data.records import (
    EmbeddingFile,
    Record,
    atomic_path,
    build_once,
    check_rows,
    file_digest,
    find_split,
    parse_line,
    parse_record,
    read_lines,
    read_records,
    write_embeddings,
    write_json,
)

RECORD = Record(
    "summary", "Summarize:\n\n{text}\n\nSummary:", 0, "A summary.", 0, 0.3, 0.85, 3, "module.name", "A text."
)
VALUES = json.loads(RECORD.to_line())


def header(values: Any, data: bytes = b"") -> bytes:
    encoded = json.dumps(values).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_agree_with_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    safetensors.torch.save_file({"embeddings": expected}, tmp_path / "theirs.safetensors", metadata={"model": "m"})
    with EmbeddingFile(tmp_path / "theirs.safetensors") as theirs:
        assert (theirs.num_rows, theirs.dim, theirs.metadata) == (7, 5, {"model": "m"})
        assert np.array_equal(theirs.rows(0, 7), expected.float().numpy())
        assert np.array_equal(theirs.rows(2, 4), expected[2:4].float().numpy())
        chunks = [theirs.raw(0, 3), theirs.raw(3, 3), theirs.raw(3, 7)]
        write_embeddings(tmp_path / "ours.safetensors", (7, 5), chunks, theirs.dtype, theirs.metadata)
    ours = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert list(ours) == ["embeddings"]
    assert ours["embeddings"].dtype == dtype
    assert torch.equal(ours["embeddings"], expected)
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"model": "m"}


BAD_EMBEDDINGS = {
    "no bytes": (b"", "truncated"),
    "not safetensors": (b"hello, this is a text file\n", "truncated or no safetensors"),
    "header is not JSON": (struct.pack("<Q", 4) + b"{{{{", "no safetensors file"),
    "header is a list": (header([]), "no safetensors file"),
    "no tensor": (header({}), r"holds the tensors \[\]"),
    "another name": (
        header({"vectors": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}, b"1234"),
        r"\['vectors'\]; expected only 'embeddings'",
    ),
    "tensor without a shape": (header({"embeddings": {"dtype": "F32"}}), "no safetensors file"),
    "half precision": (header({"embeddings": {"dtype": "F16", "shape": [1, 1], "data_offsets": [0, 2]}}, b"12"), "F16"),
    "one dimension": (header({"embeddings": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"), "2-D"),
    "no rows": (header({"embeddings": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}}), "not empty"),
    "cut": (header({"embeddings": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}}, b"1234567"), "truncated"),
    "padded": (
        header({"embeddings": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}, b"12345"),
        "no safetensors file",
    ),
}


@pytest.mark.parametrize("case", BAD_EMBEDDINGS)
def test_bad_embedding_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    content, reason = BAD_EMBEDDINGS[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        EmbeddingFile(path)
    assert str(path) in str(caught.value)


def test_embedding_files_that_are_missing_or_hold_two_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.safetensors does not exist"):
        EmbeddingFile(tmp_path / "none.safetensors")
    tensor = np.ones((2, 3), np.float32)
    safetensors.numpy.save_file({"embeddings": tensor, "more": tensor}, tmp_path / "two.safetensors")
    with pytest.raises(InputError, match=r"two.safetensors holds the tensors \['embeddings', 'more'\]"):
        EmbeddingFile(tmp_path / "two.safetensors")


@pytest.mark.heavy
def test_rows_of_more_than_two_gib_are_read_whole(tmp_path: Path) -> None:
    num_rows, dim = 600_000, 1024
    shape = {"dtype": "F32", "shape": [num_rows, dim], "data_offsets": [0, num_rows * dim * 4]}
    start = header({"embeddings": shape})
    with open(tmp_path / "big.safetensors", "wb") as file:  # sparse: nearly nothing on the disk
        file.write(start)
        file.seek(len(start) + (num_rows * dim - 1) * 4)
        file.write(np.float32(7).tobytes())
    with EmbeddingFile(tmp_path / "big.safetensors") as embeddings:
        rows = embeddings.rows(0, num_rows)
    assert rows.shape == (num_rows, dim)
    assert rows[-1, -1] == 7


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (0.0, "zero"), (-0.0, "zero")]
)
def test_bad_rows_are_refused_by_number(value: float, reason: str) -> None:
    rows = np.ones((4, 3), np.float32)
    check_rows(rows, range(len(rows)))
    rows[2] = value
    with pytest.raises(InputError, match=f"row 12 is .*{reason}"):
        check_rows(rows, range(10, 10 + len(rows)))


def parse(values: Any, num_rows: int = 1) -> Record:
    return parse_record(json.dumps(values).encode(), num_rows)


def test_to_line_is_read_back_by_parse_record() -> None:
    assert parse_record(RECORD.to_line(), 1) == Record(**VALUES) == RECORD
    assert RECORD.source == "module.name"
    assert parse(VALUES | {"source_id": ""}).source == "row 0"
    assert parse(VALUES | {"temperature": 1, "top_p": 1, "more": None}).temperature == 1
    assert parse({name: value for name, value in VALUES.items() if not name.startswith("source")}).source_text == ""


def test_parse_record_takes_null_as_absent() -> None:
    record = parse(VALUES | {"source_id": None, "source_text": None})
    assert (record.source_id, record.source_text) == ("", "")
    with pytest.raises(InputError, match="missing required field `top_p`"):
        parse(VALUES | {"top_p": None})


@pytest.mark.parametrize("name", [name for name in VALUES if not name.startswith("source")])
def test_parse_record_names_a_missing_field(name: str) -> None:
    with pytest.raises(InputError, match=f"missing required field `{name}`"):
        parse({key: value for key, value in VALUES.items() if key != name})


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("value", [True, [], {}])
def test_parse_record_names_field_and_expected_type(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"Expected .*, got .* - at `\$\.{name}`"):
        parse(VALUES | {name: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"embedding_index": 1.0}, r"Expected `int`, got `float` - at `\$.embedding_index`"),
        ({"embedding_index": "1"}, r"Expected `int`, got `str` - at `\$.embedding_index`"),
        ({"embedding_index": -1}, "-1 is outside the 3 rows"),
        ({"embedding_index": 3}, "3 is outside the 3 rows"),
        ({"token_count": 3.0}, "Expected `int`"),
        ({"target_text": " \n"}, "target_text is empty"),
        ({"input_prompt_template": "Summarize."}, "0 times; expected once"),
        ({"input_prompt_template": "{text} {text}"}, "2 times; expected once"),
    ],
)
def test_parse_record_refuses_a_bad_value(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        parse(VALUES | change, num_rows=3)


@pytest.mark.parametrize("values", [[], "text", 1, None])
def test_parse_record_refuses_what_is_no_object(values: Any) -> None:
    with pytest.raises(InputError, match="Expected `object`"):
        parse(values)


@pytest.mark.parametrize("value", [None, 7, "", [], [1, None], {"a": 1}])
def test_parse_record_ignores_optional_fields_that_nobody_asked_for(value: Any) -> None:
    line = json.dumps(VALUES | {"category": value, "keywords": value}).encode()
    assert parse_record(line, 1) == RECORD


def test_parse_record_refuses_bytes_of_an_unknown_field_that_are_not_utf8() -> None:
    line = json.dumps(VALUES | {"more": "x"}).encode().replace(b'"x"', b'"\xff"')
    with pytest.raises(InputError, match="not UTF-8"):
        parse_record(line, 1)


def test_bom_crlf_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"\xef\xbb\xbf{}\r\n\r\n  \n[]\r\n1")
    assert list(read_lines(path)) == [(1, b"{}"), (4, b"[]"), (5, b"1")]


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n \r\n"])
def test_files_without_a_line_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"empty.jsonl is empty"):
        list(read_lines(tmp_path / "empty.jsonl"))
    with pytest.raises(InputError, match=r"none.jsonl does not exist"):
        list(read_lines(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": 1e999}', "not valid JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
    ],
)
def test_broken_lines_say_what_is_broken(line: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=f"here: {reason}"):
        parse_line(line, "here")


def test_read_records_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(RECORD.to_line() + json.dumps(VALUES | {"more": 1, "embedding_index": 1}).encode())
    assert [record.embedding_index for record in read_records(path, num_rows=2)] == [0, 1]
    with pytest.raises(InputError, match=r"records.jsonl, line 2: embedding_index 1 is outside"):
        list(read_records(path, num_rows=1))


@pytest.mark.parametrize("folders", [("synthesis", "embeddings"), (".", "."), (".", "embeddings")])
def test_find_split_knows_both_layouts(tmp_path: Path, folders: tuple[str, str]) -> None:
    with pytest.raises(InputError, match=r"no val_synthesis.jsonl: looked at"):
        find_split(tmp_path, "val")
    expected = (
        tmp_path / folders[0] / "val_synthesis.jsonl",
        tmp_path / folders[1] / "val_embeddings.safetensors",
    )
    for path in expected:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert tuple(find_split(tmp_path, "val")) == expected


def test_atomic_path_leaves_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("second")
        raise KeyboardInterrupt
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_writers_that_fail_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"\(4, 8\)"):
        write_embeddings(tmp_path / "short.safetensors", (2, 1), [b"1234"])
    with pytest.raises(TypeError, match="serializable"):
        write_json(tmp_path / "values.json", {"values": {1, 2}})
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "values.json", {"values": [1, 2]})
    assert json.loads((tmp_path / "values.json").read_text()) == {"values": [1, 2]}


def test_file_digest_is_sha256_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"some bytes")
    assert file_digest(tmp_path / "file") == hashlib.sha256(b"some bytes").hexdigest()


def test_build_once_builds_once_and_leaves_nothing_of_a_failure(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    target = tmp_path / "new" / "target"
    with pytest.raises(KeyboardInterrupt):
        build_once(target, fail)
    assert not target.exists()
    build_once(target, lambda folder: (folder / "whole").touch())
    build_once(target, fail)
    assert [path.name for path in target.iterdir()] == ["whole"]
