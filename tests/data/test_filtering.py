"""The filter keeps one task and loses nothing of it; it stops at bad input and then leaves no output."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from elmlib.config import FilterConfig, InputError
from elmlib.data import filtering
from elmlib.data.filtering import FilterReport, filter_corpus
from elmlib.data.prompts import TASK_TEMPLATES
from elmlib.data.records import SPLITS, EmbeddingFile, write_embeddings

NUM_ROWS, DIM = 12, 4


def make_values(split: str, row: int, task: str = "summary", variation: int = 0) -> dict[str, Any]:
    return {
        "task_type": task,
        "extra": {"text": "Füße \u2028 {text}", "embedding_index": 99, "big": 2**80, "small": 1e-7},
        "input_prompt_template": TASK_TEMPLATES[task],
        "embedding_index": row,
        "target_text": f"What row {row} says.",
        "variation": variation,
        "temperature": 0.3 + 0.4 * variation,
        "top_p": 0.85,
        "token_count": 10 + row,
        "source_id": f"{split} {row}",
    }


def make_records(split: str) -> list[dict[str, Any]]:
    """Rows from the last to the first; of the even ones two summaries, of the odd ones keywords alone."""
    records = []
    for row in reversed(range(NUM_ROWS)):
        if row % 2 == 0:
            records += [make_values(split, row, "summary", variation) for variation in (0, 1)]
        records.append(make_values(split, row, "keywords"))
    return records


def make_vectors(split: str) -> np.ndarray:
    return np.random.default_rng(SPLITS.index(split)).standard_normal((NUM_ROWS, DIM), dtype=np.float32)


def lines_path(config: FilterConfig, split: str) -> Path:
    return config.input_dir / f"{split}_synthesis.jsonl"


def vectors_path(config: FilterConfig, split: str) -> Path:
    return config.input_embeddings_dir / f"{split}_embeddings.safetensors"


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(values) + "\n" for values in records), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def config(tmp_path: Path) -> FilterConfig:
    """A good corpus, not yet filtered."""
    folders = [tmp_path / "in" / "synthesis", tmp_path / "in" / "embeddings"]
    for folder in folders:
        folder.mkdir(parents=True)
    made = FilterConfig(*folders, tmp_path / "out" / "synthesis", tmp_path / "out" / "embeddings")
    for split in SPLITS:
        write_lines(lines_path(made, split), make_records(split))
        save_file({"embeddings": make_vectors(split)}, vectors_path(made, split), metadata={"model": "m"})
    return made


def replaced(config: FilterConfig, **changes: Any) -> FilterConfig:
    return FilterConfig(**vars(config) | changes)


def run(config: FilterConfig) -> FilterReport:
    return filter_corpus(config, progress=False)


def output(config: FilterConfig) -> dict[str, bytes]:
    folder = config.output_dir.parent
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def naive_filter(config: FilterConfig, split: str) -> tuple[list[dict[str, Any]], np.ndarray, dict[int, int]]:
    """The twin: all in memory, one line at a time."""
    mapping: dict[int, int] = {}
    kept = []
    for values in read_lines(lines_path(config, split)):
        if values["task_type"] == config.task_type:
            values["embedding_index"] = mapping.setdefault(values["embedding_index"], len(mapping))
            kept.append(values)
    return kept, load_file(vectors_path(config, split))["embeddings"][list(mapping)], mapping


@pytest.mark.parametrize("task", ["summary", "keywords"])
def test_the_output_is_that_of_the_naive_twin(config: FilterConfig, task: str) -> None:
    config = replaced(config, task_type=task)
    report = run(config)
    for split in SPLITS:
        records, vectors, mapping = naive_filter(config, split)
        kept = read_lines(config.output_dir / f"{split}_synthesis.jsonl")
        assert [list(values.items()) for values in kept] == [list(values.items()) for values in records]
        with EmbeddingFile(config.output_embeddings_dir / f"{split}_embeddings.safetensors") as file:
            assert np.array_equal(file.rows(0, file.num_rows), vectors)
            assert file.metadata == {"model": "m"}
        index_map = np.load(config.output_embeddings_dir / f"{split}_index_map.npy", allow_pickle=False)
        assert index_map.dtype == np.int64
        assert index_map.tolist() == [mapping.get(row, -1) for row in range(NUM_ROWS)]
        counts = report.splits[split]
        assert (counts.read, counts.kept, counts.embedding_rows_kept) == (24, len(records), len(mapping))
    assert not report.leaks
    assert not (config.output_dir / "rejected.jsonl").exists()


def test_the_report_counts_what_is_kept(config: FilterConfig) -> None:
    report = run(config)
    counts = report.splits["val"]
    assert (counts.read, counts.kept, counts.dropped, counts.rejected) == (24, 12, 12, 0)
    assert (counts.embedding_rows_read, counts.embedding_rows_kept) == (12, 6)
    assert counts.token_counts == {"minimum": 10, "mean": 15.0, "maximum": 20, "total": 180}
    assert counts.variations == {"0": 6, "1": 6}
    assert counts.temperatures == {"0.3": 6, "0.7": 6}
    stored = json.loads((config.output_dir / "filter_report.json").read_text())
    assert stored["splits"]["val"]["token_counts"] == counts.token_counts
    assert stored["leaks"] == []
    frame = report.to_frame()
    assert (frame.index.name, list(frame.columns)) == ("summary", list(SPLITS))
    assert list(frame.loc["embedding rows kept"]) == list(frame.loc["temperatures 0.3"]) == [6, 6, 6]
    assert not frame.loc[["leaks: source_id", "leaks: vector"]].to_numpy().any()


def test_no_count_grows_with_the_corpus(config: FilterConfig) -> None:
    records = [make_values("test", 0, variation=variation) for variation in range(1000)]
    write_lines(lines_path(config, "test"), records)
    counts = run(config).splits["test"]
    assert sum(counts.variations.values()) == sum(counts.temperatures.values()) == 1000
    assert len(counts.variations) <= 33
    assert counts.variations["others"] >= 900


def test_bfloat16_stays_and_rows_are_read_in_any_order(config: FilterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filtering, "_BLOCK_BYTES", 5 * 4 * DIM)  # five rows at a time
    rows = make_vectors("train").view(np.uint16)[:, 1::2].copy()
    write_embeddings(vectors_path(config, "train"), rows.shape, [rows.tobytes()], "BF16", {"model": "m"})
    order = np.random.default_rng(0).permutation(NUM_ROWS)
    write_lines(lines_path(config, "train"), [make_values("train", int(row)) for row in order])
    run(config)
    with EmbeddingFile(config.output_embeddings_dir / "train_embeddings.safetensors") as file:
        assert file.dtype == "BF16"
        assert file.raw(0, NUM_ROWS) == rows[order].tobytes()


def test_filter_corpus_keeps_null_in_an_optional_field(config: FilterConfig) -> None:
    records = [make_values("val", row) | {"source_id": None, "source_text": None} for row in (2, 4)]
    write_lines(lines_path(config, "val"), records)
    run(config)
    kept = read_lines(config.output_dir / "val_synthesis.jsonl")
    assert kept == [values | {"embedding_index": index} for index, values in enumerate(records)]


def test_bom_crlf_blank_lines_and_a_missing_last_newline_are_fine(config: FilterConfig) -> None:
    plain = run(config)
    expected = output(config)
    for split in SPLITS:
        path = lines_path(config, split)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n").removesuffix(b"\r\n\r\n"))
    assert run(config) == plain
    assert output(config) == expected


@pytest.mark.parametrize(
    "spelling",
    [
        b'"embedding_index" :\t7',
        b'"embedding_index": -0',
        b'"embedding_index": 3, "embedding_index": 7',
        b'"embedding\\u005findex": 7',
        b'"embedding\\u005findex": 7, "more": {"embedding_index": 7}',
        b'"embedding\\u005findex": 11, "more": {"embedding_index": 3}',
        b'"more": {"embedding_index": 7}, "embedding_index": 7',
        b'"more": "\\"embedding_index\\": 7", "embedding_index": 7',
        b'"more": [7, 1e-7, 18446744073709551617, "\\u00e9"], "embedding_index": 7',
    ],
)
def test_the_index_is_found_however_it_is_spelt(config: FilterConfig, spelling: bytes) -> None:
    lines = [json.dumps(make_values("val", row) | {"extra": 0}).encode() for row in (2, 4, 6)]
    known = [line.replace(b'"extra": 0, ', b"") for line in lines]
    for rest in (lines, known):
        odd = rest[1].replace(b'"embedding_index": 4', spelling)
        assert odd != rest[1]
        lines_path(config, "val").write_bytes(b"\n".join([rest[0], odd, rest[2]]))
        run(config)
        kept = (config.output_dir / "val_synthesis.jsonl").read_bytes().splitlines()
        assert [list(json.loads(line).items()) for line in kept] == [
            list((json.loads(line) | {"embedding_index": index}).items())
            for index, line in enumerate([rest[0], odd, rest[2]])
        ]


def change_line(number: int, change: Callable[[bytes], bytes]) -> Callable[[FilterConfig], None]:
    """In the val split, line `number` becomes change(line)."""

    def make_bad(config: FilterConfig) -> None:
        path = lines_path(config, "val")
        lines = path.read_bytes().splitlines()
        lines[number - 1] = change(lines[number - 1])
        path.write_bytes(b"\n".join(lines))

    return make_bad


def change_field(number: int, **changes: Any) -> Callable[[FilterConfig], None]:
    return change_line(number, lambda line: json.dumps(json.loads(line) | changes).encode())


def without_field(number: int, name: str) -> Callable[[FilterConfig], None]:
    return change_line(
        number, lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != name}).encode()
    )


def change_row(row: int, value: float) -> Callable[[FilterConfig], None]:
    def make_bad(config: FilterConfig) -> None:
        rows = make_vectors("val")
        rows[row] = value
        save_file({"embeddings": rows}, vectors_path(config, "val"))

    return make_bad


def write_vectors(**tensors: np.ndarray) -> Callable[[FilterConfig], None]:
    return lambda config: save_file(tensors, vectors_path(config, "val"))


# Line 3 is a summary, line 4 keywords; row 8 has summaries on lines 6 and 7, keywords on line 8.
BAD_RECORDS = {
    "broken JSON": (change_line(3, lambda line: line[:-1]), 3, "not valid JSON"),
    "NaN in JSON": (change_line(3, lambda line: line.replace(b"0.85", b"NaN")), 3, "not valid JSON"),
    "not UTF-8": (change_line(3, lambda line: line.replace(b"says", b"s\xe4ys")), 3, "not UTF-8"),
    "not UTF-8 in an unknown field": (change_line(3, lambda line: line.replace(b"{text}", b"\xe4", 1)), 3, "not UTF-8"),
    "no object": (change_line(3, lambda line: b"[]"), 3, "Expected `object`, got `array`"),
    "missing field": (without_field(3, "top_p"), 3, "missing required field `top_p`"),
    "missing field of another task": (without_field(4, "top_p"), 4, "missing required field `top_p`"),
    "mistyped text": (change_field(3, target_text=7), 3, r"Expected `str`, got `int` - at `\$.target_text`"),
    "mistyped number": (change_field(3, temperature="hot"), 3, r"Expected `int \| float`, got `str`"),
    "mistyped source": (change_field(3, source_id=7), 3, r"Expected `str`, got `int` - at `\$.source_id`"),
    "mistyped source text": (change_field(3, source_text=[]), 3, r"Expected `str`, got `array` - at `\$.source_text`"),
    "unhashable task": (change_field(3, task_type=[]), 3, r"Expected `str`, got `array` - at `\$.task_type`"),
    "empty target": (change_field(3, target_text=" "), 3, "target_text is empty"),
    "no slot": (change_field(3, input_prompt_template="Hello"), 3, "0 times; expected once"),
    "negative index": (change_field(3, embedding_index=-1), 3, "embedding_index -1 is outside the 12 rows"),
    "index out of range": (change_field(3, embedding_index=12), 3, "embedding_index 12 is outside the 12 rows"),
    "index far out of range": (change_field(3, embedding_index=2**70), 3, "Expected `int`, got `float`"),
    "float index": (change_field(3, embedding_index=1.0), 3, r"Expected `int`, got `float` - at `\$.embedding_index`"),
    "bool index": (change_field(3, embedding_index=True), 3, r"Expected `int`, got `bool` - at `\$.embedding_index`"),
    "NaN vector": (change_row(8, np.nan), 6, "val_embeddings.safetensors: row 8 is NaN or infinite"),
    "infinite vector": (change_row(8, -np.inf), 6, "val_embeddings.safetensors: row 8 is NaN or infinite"),
    "zero vector": (change_row(8, 0), 6, "val_embeddings.safetensors: row 8 is all zero"),
}
BAD_FILES = {
    "no lines": (lambda c: lines_path(c, "val").write_bytes(b""), "val_synthesis.jsonl is empty"),
    "blank lines": (lambda c: lines_path(c, "val").write_bytes(b"\xef\xbb\xbf\r\n\n"), "val_synthesis.jsonl is empty"),
    "no split": (lambda c: lines_path(c, "val").unlink(), "val_synthesis.jsonl does not exist"),
    "no vectors": (lambda c: vectors_path(c, "val").unlink(), "val_embeddings.safetensors does not exist"),
    "empty vectors": (lambda c: vectors_path(c, "val").write_bytes(b""), "val_embeddings.safetensors is truncated"),
    "truncated vectors": (
        lambda c: vectors_path(c, "val").write_bytes(vectors_path(c, "val").read_bytes()[:-1]),
        "val_embeddings.safetensors is truncated",
    ),
    "two tensors": (
        write_vectors(embeddings=make_vectors("val"), more=make_vectors("val")),
        r"val_embeddings.safetensors holds the tensors \['embeddings', 'more'\]",
    ),
    "another dimension": (
        write_vectors(embeddings=np.ones((NUM_ROWS, DIM + 1), np.float32)),
        "vectors of one size, but .*train_embeddings.safetensors': 4, .*val_embeddings.safetensors': 5",
    ),
    "none of the task": (
        lambda c: write_lines(lines_path(c, "val"), [make_values("val", row, "keywords") for row in range(3)]),
        "val_synthesis.jsonl: no record of task 'summary', but keywords: 3",
    ),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_stops_with_file_and_line_or_is_set_aside(config: FilterConfig, case: str) -> None:
    make_bad, number, reason = BAD_RECORDS[case]
    make_bad(config)
    with pytest.raises(InputError, match=rf"val_synthesis.jsonl, line {number}: .*{reason}"):
        run(config)
    assert not config.output_dir.parent.exists()

    lines = lines_path(config, "val").read_bytes().splitlines()
    report = run(replaced(config, skip_bad=True))
    rejected = read_lines(config.output_dir / "rejected.jsonl")
    assert rejected[0]["split"] == "val"
    assert rejected[0]["line"] == number
    assert rejected[0]["raw"] == lines[number - 1].decode("utf-8", errors="replace")
    assert len(rejected) == (3 if "vector" in case else 1)
    counts = report.splits["val"]
    assert counts.rejected == len(rejected)
    assert counts.read == 24 == counts.kept + counts.dropped + counts.rejected
    assert len(read_lines(config.output_dir / "val_synthesis.jsonl")) == counts.kept
    index_map = np.load(config.output_embeddings_dir / "val_index_map.npy")
    assert sorted(index_map) == [-1] * (NUM_ROWS - counts.embedding_rows_kept) + list(range(counts.embedding_rows_kept))
    run_again = run(
        replaced(
            config,
            input_dir=config.output_dir,
            input_embeddings_dir=config.output_embeddings_dir,
            output_dir=config.output_dir / "again",
            output_embeddings_dir=config.output_dir / "again",
        )
    )
    assert run_again.splits["val"].kept == counts.kept


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_stops_and_leaves_no_output(config: FilterConfig, case: str, skip_bad: bool) -> None:
    make_bad, reason = BAD_FILES[case]
    make_bad(config)
    with pytest.raises(InputError, match=reason):
        run(replaced(config, skip_bad=skip_bad))
    assert not config.output_dir.parent.exists()


@pytest.mark.parametrize("make_bad", [BAD_RECORDS["zero vector"][0], BAD_FILES["two tensors"][0]])
def test_a_failure_leaves_an_earlier_output_as_it_was(
    config: FilterConfig, make_bad: Callable[[FilterConfig], None]
) -> None:
    run(config)
    earlier = output(config)
    make_bad(config)
    with pytest.raises(InputError, match="val_"):
        run(config)
    assert output(config) == earlier


@pytest.mark.parametrize("step", ["hash_rows", "_with_index", "_find_leaks", "asdict"])
def test_an_interruption_leaves_an_earlier_output_as_it_was(
    config: FilterConfig, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(filtering, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(config)
        assert not config.output_dir.parent.exists()
    run(config)
    earlier = output(config)
    monkeypatch.setattr(filtering, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(replaced(config, task_type="keywords", skip_bad=True))
    assert output(config) == earlier


def test_rejected_records_of_an_earlier_run_go(config: FilterConfig) -> None:
    run(replaced(config, skip_bad=True))
    assert (config.output_dir / "rejected.jsonl").read_bytes() == b""
    run(config)
    assert not (config.output_dir / "rejected.jsonl").exists()


def test_a_split_of_bad_records_stops_even_when_they_are_skipped(config: FilterConfig) -> None:
    lines_path(config, "test").write_bytes(b"{}\n{}\n")
    with pytest.raises(InputError, match=r"no record of task 'summary', but no good record \(rejected: 2\)"):
        run(replaced(config, skip_bad=True))


def test_a_bad_vector_that_no_record_uses_is_dropped(config: FilterConfig) -> None:
    rows = np.vstack([make_vectors("val"), np.zeros((1, DIM), np.float32)])
    write_vectors(embeddings=rows)(config)
    run(config)
    index_map = np.load(config.output_embeddings_dir / "val_index_map.npy")
    assert index_map[-1] == -1


def test_the_input_is_never_overwritten(config: FilterConfig) -> None:
    for changes in (
        {"output_dir": config.input_dir},
        {"output_embeddings_dir": config.input_dir / ".." / "embeddings"},
    ):
        with pytest.raises(InputError, match="holds the input"):
            run(replaced(config, **changes))


def leak_sources(config: FilterConfig) -> None:
    """Two sources of train are in val too: one as a summary, one as keywords alone, which the filter drops."""
    records = make_records("val")
    for values in records:
        if values["embedding_index"] in (3, 4):
            values["source_id"] = f"train {values['embedding_index'] + 2}"
    write_lines(lines_path(config, "val"), records)


def leak_vectors(config: FilterConfig) -> None:
    """Vectors of train are in test too, as row 0 (with another zero sign) and as row 1, which no summary uses."""
    train, test = make_vectors("train"), make_vectors("test")
    train[6, 0], train[8, 0] = 0.0, 0.0
    test[0], test[1] = train[6], train[8]
    test[0, 0] = -0.0
    save_file({"embeddings": train}, vectors_path(config, "train"))
    save_file({"embeddings": test}, vectors_path(config, "test"))


@pytest.mark.parametrize(
    ("leak", "message"),
    [
        (
            leak_sources,
            r"source_id in both train and val: 1, for example source_id 'train 6' \(.*train_synthesis.jsonl, line 10\) "
            r"and source_id 'train 6' \(.*val_synthesis.jsonl, line 14\)",
        ),
        (
            leak_vectors,
            r"vector in both train and test: 1, for example embedding_index 6 \(.*train_synthesis.jsonl, line 10\) "
            r"and embedding_index 0 \(.*test_synthesis.jsonl, line 22\)",
        ),
    ],
)
def test_leaks_between_splits_stop_or_warn(
    config: FilterConfig,
    leak: Callable[[FilterConfig], None],
    message: str,
) -> None:
    leak(config)
    with pytest.raises(InputError, match=message):
        run(config)
    assert not config.output_dir.parent.exists()
    with pytest.warns(UserWarning, match=message):
        report = run(replaced(config, allow_leaks=True))
    assert [leak.count for leak in report.leaks] == [1]
    kind, _, _, first, _, second = message.split(":")[0].split()
    assert dict(report.to_frame().loc[f"leaks: {kind}"]) == {it: int(it in (first, second)) for it in SPLITS}
    assert len(read_lines(config.output_dir / "test_synthesis.jsonl")) == 12


def test_every_leak_is_counted_per_pair_and_kind(config: FilterConfig) -> None:
    for split in SPLITS:
        write_lines(lines_path(config, split), make_records("train"))
        write_embeddings(vectors_path(config, split), (NUM_ROWS, DIM), [make_vectors("train").tobytes()])
    with pytest.warns(UserWarning, match="the splits overlap"):
        report = run(replaced(config, allow_leaks=True))
    pairs = [("train", "val"), ("train", "test"), ("val", "test")]
    found = [(leak.kind, leak.first, leak.second, leak.count) for leak in report.leaks]
    assert found == [(kind, *pair, 6) for kind in ("source_id", "vector") for pair in pairs]


def test_records_without_a_source_leak_by_vector_alone(config: FilterConfig) -> None:
    for split in SPLITS:
        records = [values | {"source_id": ""} for values in make_records(split)]
        del records[0]["source_id"]
        write_lines(lines_path(config, split), records)
    assert not run(config).leaks
    leak_vectors(config)
    with pytest.raises(InputError, match="vector in both train and test: 1"):
        run(config)


def test_filter_corpus_needs_little_memory() -> None:
    """46 MB of vectors and 60 MB of lines pass through in less."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        for split, num_rows in zip(SPLITS, (30_000, 1_000, 1_000), strict=True):
            chunks = (rng.standard_normal((1_000, 384), dtype=np.float32).tobytes() for _ in range(num_rows // 1_000))
            write_embeddings(folder / f"{split}_embeddings.safetensors", (num_rows, 384), chunks)
            with open(folder / f"{split}_synthesis.jsonl", "w") as file:
                for row in range(num_rows):
                    line = json.dumps(make_values(split, row) | {"source_text": "word " * 60})
                    file.write(f"{line}\n" * 3)
        script = """if True:
            import resource, sys
            from pathlib import Path
            from elmlib.config import FilterConfig
            from elmlib.data.filtering import filter_corpus
            peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            before = peak()
            folder = Path(sys.argv[1])
            report = filter_corpus(FilterConfig(folder, folder, folder / "out", folder / "out"), progress=False)
            print(report.splits["train"].kept, (peak() - before) // 1024)
        """
        done = subprocess.run([sys.executable, "-c", script, name], capture_output=True, text=True, check=True)
        kept, megabytes = map(int, done.stdout.split())
    assert kept == 90_000
    assert megabytes < 40, megabytes
