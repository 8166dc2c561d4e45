"""The corpus is a function of its source and seed; nothing stands in two splits; a stopped build loses nothing."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from elmlib import cli
from elmlib.config import CorpusConfig, FilterConfig, InputError
from elmlib.data import sources
from elmlib.data.corpus import build_corpus, drop_duplicates, pair_records, split_pairs
from elmlib.data.filtering import filter_corpus
from elmlib.data.records import SPLITS, EmbeddingFile, Record, parse_record, read_records, write_embeddings
from elmlib.data.sources import Pair, dataset_pairs, jsonl_pairs, read_docstrings, read_source

DIM = 8
LONG = " ".join(f"word{i}" for i in range(30))


def embed(texts: list[str]) -> np.ndarray:
    """A vector that depends on the text alone."""
    rows = [np.frombuffer(hashlib.sha256(text.encode()).digest()[:DIM], np.uint8) for text in texts]
    return np.stack(rows).astype(np.float32) + 1


class Watched:
    """`embed`, with the texts it was given, and an error instead of batch `fail_at`."""

    def __init__(self, fail_at: int = -1):
        self.batches: list[list[str]] = []
        self.fail_at = fail_at

    def __call__(self, texts: list[str]) -> np.ndarray:
        if len(self.batches) == self.fail_at:
            raise KeyboardInterrupt
        self.batches.append(texts)
        return embed(texts)


def example_rows() -> list[dict[str, Any]]:
    """60 texts of all lengths in 20 groups of unequal size."""
    groups = random.Random(0).choices(range(20), k=60)
    return [
        {
            "text": f"Text {i} " + "and so on " * (i * 7 % 60),
            "summary": [f"Summary {i}.", f"In other words {i}."] if i % 3 == 0 else f"Summary {i}.",
            "module": f"module{group}",
            "keywords": ["first", "second"] if i % 2 else [],
            "category": "numbers",
        }
        for i, group in enumerate(groups)
    ]


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_config(folder: Path, source: Path | str = "", **changes: Any) -> CorpusConfig:
    """A config over `example_rows`, or over `source`, that writes below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "source": str(source or write_jsonl(folder / "texts.jsonl", example_rows())),
        "output_dir": folder / "synthesis",
        "output_embeddings_dir": folder / "embeddings",
        "group_field": "module",
        "val_fraction": 0.2,
        "test_fraction": 0.2,
        "embedding_batch_size": 4,
    }
    return CorpusConfig(**(settings | changes))


def contents(config: CorpusConfig) -> dict[str, bytes]:
    """Name -> bytes of all that a build left behind."""
    paths = [*config.output_dir.iterdir(), *config.output_embeddings_dir.iterdir()]
    return {path.name: path.read_bytes() for path in paths}


def read_split(config: CorpusConfig, split: str) -> tuple[list[Record], np.ndarray]:
    with EmbeddingFile(config.output_embeddings_dir / f"{split}_embeddings.safetensors") as file:
        vectors = file.rows(0, file.num_rows)
    return list(read_records(config.output_dir / f"{split}_synthesis.jsonl", len(vectors))), vectors


# Docstrings


PACKAGE = {
    "pack/__init__.py": f'"""Holds many useful things.\n\n{LONG}\n"""\n',
    "pack/shapes.py": f'''
class Circle:
    """Something round and small.

        Indented first line.
    {LONG}
    """

    def __init__(self, radius, *args, colour=None, **kwargs):
        """Too short.

        {LONG}
        """

    @property
    def area(self):
        """Space that it   takes
        up in squares.

        {LONG}
        """

    @area.setter
    def area(self, value):
        """Second of that name.

        {LONG}
        """

if True:
    async def roll(cls, place, /, speed, *, until="\\d"):
        r"""Roll it over there.

        {LONG}
        """

        def inner(step):
            """Do one step now.

            {LONG}
            """

def one_paragraph():
    """Four words are here."""

def short_text():
    """Four words are here.

    But little follows.
    """

def wordy():
    """{LONG} {LONG}

    {LONG}
    """

def surrogate():
    """Four words \\ud800 here.

    {LONG}
    """
''',
    "pack/plain.py": "x = 1\n",
    "pack/broken.py": '"""x"""\ndef (\n',
    "pack/latin.py": b'"""caf\xe9"""\n',
    "pack/null.py": b'"""x"""\0\n',
}


def write_package(folder: Path) -> list[tuple[str, Path]]:
    """The files of PACKAGE and one that is missing."""
    files = [("pack.missing", folder / "missing.py")]
    for name, code in PACKAGE.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(code if isinstance(code, bytes) else code.encode())
        files.append((name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"), path))
    return files


def test_docstrings_become_pairs(tmp_path: Path):
    found = {pair.source_id: pair for pair in read_docstrings(write_package(tmp_path), progress=False)[0]}
    assert list(found) == [
        "pack",
        "pack.shapes.Circle",
        "pack.shapes.Circle.area",
        "pack.shapes.roll",
        "pack.shapes.roll.inner",
    ]
    summaries = ("Something round and small.",)
    text = f"    Indented first line.\n{LONG}"
    keywords = ("radius", "colour")
    assert found["pack.shapes.Circle"] == Pair(
        "pack.shapes.Circle", "pack.shapes", text, summaries, keywords, category="pack"
    )
    assert found["pack"].keywords == found["pack.shapes.Circle.area"].keywords == ()
    assert found["pack.shapes.Circle.area"].summaries == ("Space that it takes up in squares.",)
    assert found["pack.shapes.roll"].keywords == ("place", "speed", "until")


def test_unreadable_files_are_counted(tmp_path: Path):
    skipped = dict(reason.split(": ", 1) for reason in read_docstrings(write_package(tmp_path), progress=False)[1])
    assert sorted(skipped) == ["pack.broken", "pack.latin", "pack.missing", "pack.null"]
    assert skipped["pack.broken"].startswith("SyntaxError")
    assert skipped["pack.latin"].startswith("UnicodeDecodeError")


def test_processes_find_what_one_process_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = write_package(tmp_path)
    one_process = read_docstrings(files, progress=False)
    monkeypatch.setattr(sources, "_FILES_A_PROCESS", 3)
    assert read_docstrings(files, progress=False) == one_process


def test_source_files_are_modules_of_the_listed_packages():
    files = sources.source_files()
    modules = {module for module, _ in files}
    assert files == sorted(files)
    assert {"json.decoder", "asyncio.queues", "numpy", "torch.nn.functional", "optuna.study.study"} <= modules
    assert not [it for it in modules if it.partition(".")[0] == "elmlib" or ".tests." in it or ".." in it]


def test_the_sampled_packages_do_not_follow_the_requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = sources.PACKAGES.read_text().split()
    assert sorted(set(names)) == names and len(names) > 150
    (tmp_path / "packages.txt").write_text("not-installed\nnumpy\n")
    monkeypatch.setattr(sources, "PACKAGES", tmp_path / "packages.txt")
    assert [it.name for it in sources.documented_packages()] == ["numpy"]
    assert "torch.nn.functional" not in {module for module, _ in sources.source_files()}


@pytest.mark.heavy
def test_installation_holds_enough_pairs():
    found, skipped = read_source(CorpusConfig(), progress=False)
    pairs, _ = drop_duplicates(found)
    assert len(pairs) >= 15_000
    assert len({it.source_id for it in pairs}) == len(pairs)
    assert all(4 <= len(it.summaries[0].split()) <= 30 and len(it.text.split()) >= 25 for it in pairs)
    assert len(skipped) < 100
    splits = split_pairs(pairs, CorpusConfig())
    assert all(0.09 * len(pairs) <= len(splits[split]) <= 0.1 * len(pairs) + 1 for split in ("val", "test"))


# Duplicates and splits


def test_repeated_texts_and_summaries_are_dropped():
    pairs = [
        Pair("d", "d", "new", ("One", "Three", "THREE ")),
        Pair("c", "c", "other", ("ONE",)),
        Pair("b", "b", "Some  TEXT", ("Two",)),
        Pair("a", "a", "some\ntext", ("one", "two too")),
    ]
    assert drop_duplicates(pairs) == ([pairs[3], pairs[0]._replace(summaries=("Three",))], 4)


def test_texts_can_be_told_apart_by_their_opening_alone():
    pairs = [Pair("a", "a", "the same, then x", ("One",)), Pair("b", "b", "the same, then y", ("Two",))]
    assert drop_duplicates(pairs) == (pairs, 0)
    assert drop_duplicates(pairs, opening=10) == (pairs[:1], 1)


def test_no_group_text_or_summary_stands_in_two_splits(tmp_path: Path):
    config = make_config(tmp_path)
    pairs = jsonl_pairs(config)
    splits = split_pairs(pairs, config)
    assert sorted(pair for split in SPLITS for pair in splits[split]) == pairs
    for field in ("group", "text", "summaries"):
        values = [{getattr(pair, field) for pair in splits[split]} for split in SPLITS]
        assert len(set.union(*values)) == sum(map(len, values))
    assert len(splits["val"]) == len(splits["test"]) == 12


def test_a_large_group_goes_to_train():
    pairs = [Pair(f"{i}", "large" if i < 50 else f"{i}", f"text {i}", (f"summary {i}",)) for i in range(100)]
    for seed in range(10):
        splits = split_pairs(pairs, CorpusConfig(seed=seed))
        assert {split: len(splits[split]) for split in SPLITS} == {"train": 80, "val": 10, "test": 10}
        assert not {"large"} & {pair.group for split in ("val", "test") for pair in splits[split]}


@pytest.mark.parametrize(("count", "fraction"), [(0, 0.1), (3, 0.1), (30, 0.0)])
def test_an_empty_split_is_refused(count: int, fraction: float):
    pairs = [Pair(f"{i}", f"{i}", f"text {i}", (f"summary {i}",)) for i in range(count)]
    with pytest.raises(InputError, match=r"no pairs for .*val"):
        split_pairs(pairs, CorpusConfig(val_fraction=fraction))


# Building


def test_equal_settings_give_equal_bytes(tmp_path: Path):
    first, second = make_config(tmp_path / "a"), make_config(tmp_path / "b")
    assert build_corpus(first, embed, progress=False) == build_corpus(second, embed, progress=False)
    left, right = contents(first), contents(second)
    assert left.pop("corpus.json") != right.pop("corpus.json")  # it names the folders
    assert left == right
    assert len(left) == 6


@pytest.mark.parametrize("changes", [{"seed": 1}, {"limit": 40}, {"val_fraction": 0.3}])
def test_other_splits_have_another_fingerprint(tmp_path: Path, changes: dict[str, Any]):
    report = build_corpus(make_config(tmp_path), embed, progress=False)
    other = build_corpus(make_config(tmp_path, **changes), embed, progress=False)
    assert other.fingerprint != report.fingerprint
    assert other.reused == []


def test_limit_takes_a_sample_before_the_split(tmp_path: Path):
    report = build_corpus(make_config(tmp_path, limit=40), embed, progress=False)
    assert report.found == 60
    assert [counts["pairs"] for counts in report.splits.values()] == [24, 8, 8]


def test_records_point_at_the_vector_of_their_text(tmp_path: Path):
    config = make_config(tmp_path)
    report = build_corpus(config, embed, progress=False)
    rows = {row["text"]: row for row in example_rows()}
    for split, counts in report.splits.items():
        found, vectors = read_split(config, split)
        assert len(vectors) == counts["pairs"] == len({it.source_id for it in found})
        assert counts["summary"] + counts["keywords"] + counts["category"] == len(found)
        for record in found:
            assert np.array_equal(vectors[record.embedding_index], embed([record.source_text])[0])
        for text in {it.source_text for it in found}:
            targets = [it.target_text for it in found if it.source_text == text]
            row = rows.pop(text)
            summaries = row["summary"] if isinstance(row["summary"], list) else [row["summary"]]
            assert targets == summaries + ["first, second"] * bool(row["keywords"]) + ["numbers"]
    assert not rows


def test_records_of_a_pair():
    pair = Pair("a", "g", "text", ("It's one.", "Also one"), ("x", "y_z"), "top")
    found = list(pair_records(pair, 0))
    for record in found:
        assert parse_record(record.to_line(), 1) == record
    assert [(it.task_type, it.variation, it.target_text, it.token_count) for it in found] == [
        ("summary", 0, "It's one.", 5),
        ("summary", 1, "Also one", 2),
        ("keywords", 0, "x, y_z", 3),
        ("category", 0, "top", 1),
    ]
    assert {(it.embedding_index, it.temperature, it.top_p, it.source_id) for it in found} == {(0, 0.0, 1.0, "a")}


def test_description_and_table(tmp_path: Path):
    config = make_config(tmp_path)
    report = build_corpus(config, embed, progress=False)
    about = json.loads((config.output_dir / "corpus.json").read_text())
    assert about["fingerprint"] == report.fingerprint
    assert about["config"]["output_dir"] == str(config.output_dir)
    assert about["splits"] == report.splits
    assert about["versions"]["numpy"] == np.__version__
    assert report.fingerprint in report.summary()
    frame = report.to_frame()
    assert list(frame.columns) == ["groups", "pairs", "summary", "keywords", "category"]
    for split in SPLITS:
        assert dict(frame.loc[split]) == report.splits[split]


def test_longest_texts_come_first(tmp_path: Path):
    watched = Watched()
    build_corpus(make_config(tmp_path), watched, progress=False)
    train = [len(text) for batch in watched.batches[:9] for text in batch]
    assert len(train) == 36
    assert train == sorted(train, reverse=True)


# Stopped, started again, reused


@pytest.mark.parametrize("tail", [0, 5, DIM * 4, DIM * 4 + 5])
def test_a_stopped_build_goes_on_where_it_was(tmp_path: Path, tail: int):
    whole, stopped = make_config(tmp_path / "a"), make_config(tmp_path / "b")
    everything = Watched()
    report = build_corpus(whole, everything, progress=False)
    first = Watched(fail_at=3)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(stopped, first, progress=False)
    (partial,) = stopped.output_embeddings_dir.glob(".train_*.partial")
    with open(partial, "ab") as file:  # what a kill in the middle of a write leaves
        file.write(b"\1" * tail)
    (stopped.output_embeddings_dir / ".train_embeddings.other.8.partial").write_bytes(b"stale")

    second = Watched()
    assert build_corpus(stopped, second, progress=False) == report
    assert first.batches + second.batches == everything.batches
    left, right = contents(whole), contents(stopped)
    assert left.pop("corpus.json") != right.pop("corpus.json")
    assert left == right


def test_a_finished_split_is_kept_when_a_later_one_stops(tmp_path: Path):
    config = make_config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(config, Watched(fail_at=10), progress=False)
    second = Watched()
    assert build_corpus(config, second, progress=False).reused == ["train"]
    assert len(second.batches) == 5


def test_a_finished_corpus_is_reused(tmp_path: Path):
    config = make_config(tmp_path)
    first = build_corpus(config, embed, progress=False)
    before = contents(config)
    watched = Watched()
    second = build_corpus(config, watched, progress=False)
    assert (second.fingerprint, second.reused, watched.batches) == (first.fingerprint, list(SPLITS), [])
    assert contents(config) == before


def remove_records(config: CorpusConfig) -> None:
    (config.output_dir / "val_synthesis.jsonl").unlink()


def cut_embeddings(config: CorpusConfig) -> None:
    path = config.output_embeddings_dir / "val_embeddings.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def change_records(config: CorpusConfig) -> None:
    path = config.output_dir / "val_synthesis.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"variation":0', b'"variation":1', 1))


def turn_embeddings(config: CorpusConfig) -> None:
    path = config.output_embeddings_dir / "val_embeddings.safetensors"
    with EmbeddingFile(path) as file:
        write_embeddings(path, (file.dim, file.num_rows), [file.raw(0, file.num_rows)], metadata=file.metadata)


@pytest.mark.parametrize("harm", [remove_records, cut_embeddings, change_records, turn_embeddings])
def test_a_damaged_split_is_made_again(tmp_path: Path, harm: Callable[[CorpusConfig], None]):
    config = make_config(tmp_path)
    build_corpus(config, embed, progress=False)
    before = contents(config)
    harm(config)
    assert build_corpus(config, embed, progress=False).reused == ["train", "test"]
    assert contents(config) == before


@pytest.mark.parametrize("changes", [{"embedding_model_name": "other"}, {"seed": 3}])
def test_stale_embeddings_never_lie_beside_new_records(tmp_path: Path, changes: dict[str, Any]):
    build_corpus(make_config(tmp_path), embed, progress=False)
    config = make_config(tmp_path, **changes)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(config, Watched(fail_at=1), progress=False)
    assert not list(config.output_embeddings_dir.glob("*.safetensors"))
    assert build_corpus(config, embed, progress=False).reused == []


# Sources


GOOD = {"text": "A text", "summary": "A summary", "module": "m"}


def test_a_dataset_on_disk_gives_what_its_jsonl_gives(tmp_path: Path):
    expected = jsonl_pairs(make_config(tmp_path))
    rows = [
        row | {"summary": [row["summary"]] if isinstance(row["summary"], str) else row["summary"]}
        for row in example_rows()
    ]
    plain = datasets.Dataset.from_list(rows)
    plain.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"other": plain}).save_to_disk(tmp_path / "named")
    for name, split in (("plain", "train"), ("named", "other")):
        found = dataset_pairs(make_config(tmp_path, tmp_path / name, dataset_split=split))
        assert [it[1:] for it in found] == [it[1:] for it in expected]
    config = make_config(tmp_path / "out", tmp_path / "plain", limit=30)
    assert build_corpus(config, embed, progress=False).found == 60
    with pytest.raises(InputError, match=r"named.*split 'train'.*other"):
        dataset_pairs(make_config(tmp_path, tmp_path / "named"))


def test_a_folder_of_data_files_is_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "files"
    folder.mkdir()
    write_jsonl(folder / "validation.jsonl", [GOOD])
    config = make_config(tmp_path, folder, dataset_split="validation")
    assert dataset_pairs(config) == [Pair("files:00000000", "m", "A text", ("A summary",))]
    with pytest.raises(InputError, match=r"files', split 'train': .*validation"):
        dataset_pairs(make_config(tmp_path, folder))


def test_fields_can_be_named_and_left_out(tmp_path: Path):
    rows = [{"body": " A text ", "titles": ["One", "Two"], "number": 7}, {"body": "B", "titles": "Three", "number": 7}]
    config = make_config(
        tmp_path, write_jsonl(tmp_path / "x.jsonl", rows), text_field="body", summary_field="titles", group_field=""
    )
    first, second = jsonl_pairs(config)
    assert first == Pair("x.jsonl:00000001", "x.jsonl:00000001", " A text ", ("One", "Two"))
    assert second.group == second.source_id == "x.jsonl:00000002"
    by_number = make_config(tmp_path, config.source, text_field="body", summary_field="titles", group_field="number")
    assert {it.group for it in jsonl_pairs(by_number)} == {"7"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "A", "module": "m"}, "line 2: expected the field 'summary', found text, module"),
        ({"summary": "A", "module": "m"}, "line 2: expected the field 'text', found summary, module"),
        ({"text": "A", "summary": "A"}, "line 2: expected the field 'module', found text, summary"),
        ({}, "line 2: expected the field 'module', found no field"),
        (GOOD | {"text": " \n"}, "line 2: field 'text' is ' .*expected text that is not blank$"),
        (GOOD | {"text": ["A"]}, "line 2: field 'text' is"),
        (GOOD | {"text": None}, "line 2: field 'text' is None"),
        (GOOD | {"summary": []}, r"line 2: field 'summary' is \[\].*list"),
        (GOOD | {"summary": ["A", ""]}, "line 2: field 'summary'"),
        (GOOD | {"summary": 1}, "line 2: field 'summary' is 1"),
        (GOOD | {"module": None}, "line 2: field 'module' is None"),
        ([1], "line 2: expected a JSON object, found list"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, line: Any, message: str):
    path = write_jsonl(tmp_path / "bad.jsonl", [GOOD, line])
    with pytest.raises(InputError, match=f"bad.jsonl, {message}"):
        build_corpus(make_config(tmp_path, path), embed, progress=False)
    assert not (tmp_path / "synthesis").exists()


@pytest.mark.parametrize("extra", [{"keywords": [1]}, {"keywords": 7}, {"category": ["a"]}, {"category": " "}])
def test_jsonl_pairs_ignores_keywords_and_category_of_another_type(tmp_path: Path, extra: dict[str, Any]):
    path = write_jsonl(tmp_path / "texts.jsonl", [GOOD | extra])
    (pair,) = jsonl_pairs(make_config(tmp_path, path))
    assert (pair.keywords, pair.category) == ((), "")


def test_a_malformed_row_of_a_dataset_is_named(tmp_path: Path):
    datasets.Dataset.from_list([GOOD, GOOD | {"text": ""}]).save_to_disk(tmp_path / "rows")
    with pytest.raises(InputError, match="rows, row 1: field 'text' is ''"):
        dataset_pairs(make_config(tmp_path, tmp_path / "rows"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"text": \n', "line 1: not valid JSON"), (b'{"text": "\xff"}\n', "line 1: not UTF-8"), (b"\n", "is empty")],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"bad.jsonl.*{message}"):
        build_corpus(make_config(tmp_path, path), embed, progress=False)


def test_an_absent_file_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.jsonl does not exist"):
        build_corpus(make_config(tmp_path, tmp_path / "none.jsonl"), embed, progress=False)


def test_a_hub_out_of_reach_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"dataset 'some/news' cannot be read: .*reach.*save_to_disk\('folder'\)"):
        dataset_pairs(make_config(tmp_path, "some/news"))


def test_a_folder_without_data_is_named(tmp_path: Path):
    (tmp_path / "hollow").mkdir()
    with pytest.raises(InputError, match="hollow"):
        dataset_pairs(make_config(tmp_path, tmp_path / "hollow"))


def test_a_split_without_a_vector_of_its_own_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"no pairs for val_synthesis\.jsonl: all \d+ texts"):
        build_corpus(make_config(tmp_path), lambda texts: np.ones((len(texts), DIM)), progress=False)


@pytest.mark.parametrize(("value", "message"), [(np.nan, "NaN"), (0.0, "all zero")])
def test_bad_vectors_are_refused(tmp_path: Path, value: float, message: str):
    config = make_config(tmp_path)
    with pytest.raises(InputError, match=message):
        build_corpus(config, lambda texts: np.full((len(texts), DIM), value, np.float32), progress=False)
    assert not list(config.output_embeddings_dir.glob("*.safetensors"))


def test_vectors_of_another_size_are_not_mixed(tmp_path: Path):
    config = make_config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(config, Watched(fail_at=1), progress=False)
    with pytest.raises(InputError, match="rows of another size than 3"):
        build_corpus(config, lambda texts: np.ones((len(texts), 3), np.float32), progress=False)


def test_texts_of_one_vector_stand_in_one_split(tmp_path: Path):
    def embed_opening(texts: list[str]) -> np.ndarray:
        return embed([text[:200] for text in texts])

    rows = [{"text": f"{LONG} {i}", "summary": f"Summary {i}."} for i in range(20)]
    rows += [{"text": f"Text {i}", "summary": f"Of text {i}."} for i in range(20)]
    config = make_config(tmp_path, write_jsonl(tmp_path / "own.jsonl", rows), group_field="")
    report = build_corpus(config, embed_opening, progress=False)
    assert report.repeated > 0 and sum(split["pairs"] for split in report.splits.values()) == 40 - report.repeated
    assert f"{report.repeated} texts left out" in report.summary()
    about = (config.output_dir / "corpus.json").read_bytes()
    again = build_corpus(config, embed_opening, progress=False)
    assert again == replace(report, reused=list(SPLITS)) and (config.output_dir / "corpus.json").read_bytes() == about
    folders = config.output_dir, config.output_embeddings_dir
    out = tmp_path / "filtered"
    filter_corpus(FilterConfig(*folders, output_dir=out, output_embeddings_dir=out), progress=False)


def test_texts_that_the_embedder_cuts_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"text": f"{i} " + "word " * (300 if i < 3 else 3), "summary": f"Summary {i}."} for i in range(12)]
    source = write_jsonl(tmp_path / "own.jsonl", rows)
    flags = ["--output-dir", str(tmp_path), "--output-embeddings-dir", str(tmp_path), "--val-fraction", "0.3"]
    cli.main(["corpus", "--source", str(source), "--test-fraction", "0.3", *flags])
    assert "3 texts" in capsys.readouterr().out


def test_a_dataset_of_several_configurations_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "files"
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        write_jsonl(folder / name / "train.jsonl", [GOOD | {"text": name}])
    configs = [{"config_name": name, "data_files": f"{name}/train.jsonl"} for name in ("one", "two")]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    (pair,) = dataset_pairs(make_config(tmp_path, folder, dataset_config="two"))
    assert pair.text == "two"
    for name in ("", "three"):
        with pytest.raises(InputError, match=r"\['one', 'two'\]; choose one with --dataset-config$"):
            dataset_pairs(make_config(tmp_path, folder, dataset_config=name))


def test_a_dataset_script_is_named(tmp_path: Path):
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text("")
    with pytest.raises(InputError, match=r"scripts are no longer supported, but found scripted\.py"):
        dataset_pairs(make_config(tmp_path, folder))
