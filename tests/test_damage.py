"""Damaged files: a command refuses each with one line and leaves all files as they were, or gives the right result.

The inputs are drawn by hypothesis, the same ones each time: some hundred in `make test`, some thousand in
`make test-heavy`. What takes long and is not under test (models from disk, training steps) is cached or left out.
"""

import io
import json
import math
import re
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st

from elmlib import cli
from elmlib.config import InputError, StudyConfig, SummaryTrainingConfig
from elmlib.data.records import EmbeddingFile
from elmlib.evaluation import examples_frame, sample_frame
from elmlib.evaluation.bertscore import BERTScoreEvaluator
from elmlib.inference import read_vector
from elmlib.models import pretrained
from elmlib.plots import draw_curves, draw_report, ranks_info, similarity_info
from elmlib.study.search_space import plan_study
from elmlib.training.trainer import _Run

# hypothesis prints the files of a failure whole.
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")

ROOT = Path(__file__).parent.parent
RECORDS, VECTORS = "data/synthesis/test_synthesis.jsonl", "data/embeddings/test_embeddings.safetensors"
BEST, STEP, STATE = (
    "run/best_summary_model.safetensors",
    "run/adapter_step_8.safetensors",
    "run/run_state_step_8.safetensors",
)
GENERATE = ("generate", "--checkpoint", BEST, "--input", RECORDS, "--output", "out.jsonl")
EVALUATE = ("evaluate", "--predictions", "predictions.jsonl", "--references", RECORDS, "--output", "scores.json")
FILTER = ("filter", "--input-dir", "data/synthesis", "--input-embeddings-dir", "data/embeddings")
FILTER += ("--output-dir", "new/synthesis", "--output-embeddings-dir", "new/embeddings")
RESUME = ("train", "--data-dir", "data", "--resume-from", STEP)

# Damage ---------------------------------------------------------------------------------------------------------------

JUNK = st.one_of(
    st.sampled_from([None, True, False, -1, 0, 1, 2**63, 10**30, 0.5, -0.0, 1e308, math.nan, math.inf, "", " "]),
    st.text(max_size=4), st.lists(st.integers(0, 2), max_size=2), st.dictionaries(st.text(max_size=2), st.integers()),
)  # fmt: skip


@st.composite
def cut(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with a part gone, replaced or put in; often the end."""
    start = draw(st.integers(0, len(whole)))
    stop = draw(st.one_of(st.just(len(whole)), st.integers(start, min(len(whole), start + 9))))
    return whole[:start] + draw(st.one_of(st.just(b""), st.binary(max_size=6))) + whole[stop:]


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one part of it replaced, removed, renamed or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        name = draw(st.sampled_from(sorted(value)))
        rest = {key: it for key, it in value.items() if key != name}
        kind = draw(st.sampled_from(("inside", "inside", "gone", "renamed", "more")))
        if kind == "more":
            return value | {draw(st.text(max_size=3)): draw(JUNK)}
        new = {"inside": name, "renamed": draw(st.text(max_size=3))}.get(kind)
        return rest if new is None else rest | {new: draw(changed(value[name])) if kind == "inside" else value[name]}
    if isinstance(value, list) and value and draw(st.booleans()):
        place = draw(st.integers(0, len(value) - 1))
        return draw(st.sampled_from([value[:place] + value[place + 1 :], [*value, value[place]], value[::-1]]))
    return draw(JUNK)


@st.composite
def lines(draw: st.DrawFn, whole: bytes) -> bytes:
    """JSONL with a line changed, gone, twice or in another place, or with other bytes."""
    rows = whole.splitlines()
    place, other = draw(st.integers(0, len(rows) - 1)), draw(st.integers(0, len(rows)))
    kind = draw(st.sampled_from(("bytes", "changed", "changed", "gone", "twice", "elsewhere", "form")))
    if kind == "bytes":
        return draw(cut(whole))
    line = rows.pop(place)
    if kind == "form":  # what other programs write
        rows.insert(place, draw(st.sampled_from([line + b"\r", b"\n" + line, b"  " + line, line + b"\n\n \n"])))
        return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + b"\n".join(rows)
    if kind != "gone":
        new = json.dumps(draw(changed(json.loads(line)))).encode() if kind == "changed" else line
        rows.insert(place if kind == "changed" else min(other, len(rows)), new)
    if kind == "twice":
        rows.insert(place, line)
    return b"".join(row + b"\n" for row in rows)


@st.composite
def tensors(draw: st.DrawFn, whole: bytes) -> bytes:
    """A safetensors file with another header, other numbers, or other bytes."""
    size = struct.unpack("<Q", whole[:8])[0]
    header, body = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    kind = draw(st.sampled_from(("bytes", "header", "header", "shape", "type", "own", "number")))
    about = header.get("__metadata__", {})
    name = draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    if kind == "bytes":
        return draw(cut(whole))
    if kind == "own" and "elmlib" in about:
        header["__metadata__"] = {"elmlib": json.dumps(draw(changed(json.loads(about["elmlib"]))))}
    elif kind == "shape" and header[name]["shape"]:  # of as many numbers
        shape = header[name]["shape"]
        count = int(np.prod(shape))
        header[name]["shape"] = draw(st.sampled_from([shape[::-1], [count], [1, *shape], [*shape, 1], [count, 1]]))
    elif kind == "type":  # of as many bytes
        header[name]["dtype"] = draw(st.sampled_from(["I32", "U32", "F64", "BF16", "F8_E4M3", "X", "BOOL"]))
    elif kind == "number":
        start, stop = header[name]["data_offsets"]
        value = draw(st.sampled_from([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\0\0"]))  # NaN, infinity, 0
        count = draw(st.sampled_from([4, stop - start]))
        body = body[:start] + (value * (count // 4))[:count] + body[start + count :]
    else:
        header = draw(changed(header))
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


# The place of the damage ----------------------------------------------------------------------------------------------


# Messages, and tqdm's bars with and without a total.
NO_ERROR = re.compile(r"elm: (INFO|WARNING)|.*\d%\||.*\[\d\d:\d\d, ")


class Reached(Exception):  # noqa: N818 (no error)
    """The command took its input and would now do its work."""


class Place:
    """A folder of files as they should be. A command finds it with some of them damaged."""

    def __init__(self, folder: Path):
        self.folder, self.whole = folder, contents(folder)

    def place(self, files: dict[str, bytes]) -> dict[str, bytes]:
        """All files as they should be, but for `files`."""
        before, now = self.whole | files, contents(self.folder)
        for name in now.keys() - before.keys():
            (self.folder / name).unlink()
        for name in (name for name in before if now.get(name) != before[name]):
            (self.folder / name).unlink(missing_ok=True)  # an earlier run may have mapped it
            (self.folder / name).write_bytes(before[name])
        return before

    def run(self, files: dict[str, bytes], *arguments: str) -> Any:
        """What the command printed, or whom it reached; None if it refused these files as it should."""
        before = self.place(files)
        code, out, err = 0, io.StringIO(), io.StringIO()
        logger = cli.logger
        state = logger.handlers, logger.level, logger.propagate
        try:
            with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
                warnings.simplefilter("always")
                cli.main(arguments)
        except Reached as reached:
            return reached.args[0]
        except SystemExit as stopped:
            code = stopped.code
        finally:
            logger.handlers, logger.level, logger.propagate = state
        if code == 0:
            return out.getvalue()
        assert code == 1 and not out.getvalue(), (code, out.getvalue())
        said = [line for line in re.split("[\r\n]", err.getvalue()) if not NO_ERROR.match(line)]
        assert [line.startswith("elm: error: ") for line in said if line] == [True], err.getvalue()
        assert contents(self.folder) == before
        return None

    def read(self, name: str) -> list[Any]:
        """The lines of a JSONL file."""
        rows = (self.folder / name).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        return [json.loads(row) for row in rows if row.strip()]

    def vectors(self, name: str) -> np.ndarray:
        """The rows of a file of embeddings."""
        with EmbeddingFile(self.folder / name) as file:
            return file.rows(0, file.num_rows)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def reach(value: Any, *_: Any) -> None:
    raise Reached(value)


@pytest.fixture(scope="module")
def place(small_data: Path, trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(small_data, folder / "data")
        shutil.copytree(trained_run, folder / "run")
        shutil.copy(ROOT / "notebooks/02_train.ipynb", folder / "notebook.ipynb")
        texts = [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]
        pairs = [{"text": row["source_text"], "summary": row["target_text"]} for row in texts]
        (folder / "texts.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        patch.setattr("elmlib.models.elm.load_llm", cache(pretrained.load_llm))
        load_embedder = cache(pretrained.load_embedder)
        for module in ("elmlib.models", "elmlib.training.setup", "elmlib.inference.summarizer"):
            patch.setattr(f"{module}.load_embedder", load_embedder)
        patch.setattr(BERTScoreEvaluator, "_encoder", BERTScoreEvaluator()._encoder)
        patch.setattr(_Run, "_epoch", reach)
        patch.setattr("elmlib.study.run_study", lambda config: reach(plan_study(config)))
        whole = Place(folder)
        assert "24 summaries" in whole.run({}, *GENERATE)
        shutil.copy(folder / "out.jsonl", folder / "predictions.jsonl")
        shutil.copy(folder / "out.jsonl.about.json", folder / "about.json")
        (folder / "out.jsonl").unlink(), (folder / "out.jsonl.about.json").unlink()
        yield Place(folder)


@pytest.fixture(params=[1, pytest.param(10, marks=pytest.mark.heavy)])
def examples(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Runs a check on `count` damaged inputs, or on ten times as many."""

    def run(count: int, check: Callable[..., None], *drawn: st.SearchStrategy) -> None:
        profile = settings(
            max_examples=count * request.param, derandomize=True, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        profile(given(*drawn)(check))()

    return run


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip_bad", [False, True])
def test_filter_of_damaged_records_or_vectors(place: Place, examples: Callable[..., None], skip_bad: bool) -> None:
    def check(files: dict[str, bytes]) -> None:
        if place.run(files, *FILTER, *(["--skip-bad"] if skip_bad else [])) is None:
            return
        report = json.loads((place.folder / "new/synthesis/filter_report.json").read_text())["splits"]["test"]
        old, new = place.read(RECORDS) if not skip_bad else [], place.read(f"new/{RECORDS[5:]}")
        assert report["read"] == report["kept"] + report["dropped"] + report["rejected"] and report["kept"] == len(new)
        if not skip_bad:
            old = [row for row in old if row["task_type"] == "summary"]
            assert [row | {"embedding_index": 0} for row in new] == [row | {"embedding_index": 0} for row in old]
            rows = [[row["embedding_index"] for row in part] for part in (old, new)]
            old_vectors, new_vectors = place.vectors(VECTORS), place.vectors(f"new/{VECTORS[5:]}")
            assert np.array_equal(old_vectors[rows[0]], new_vectors[rows[1]]) and np.isfinite(new_vectors).all()

    records, vectors = place.whole[RECORDS], place.whole[VECTORS]
    files = st.one_of(
        st.builds(lambda x: {RECORDS: x}, lines(records)), st.builds(lambda x: {VECTORS: x}, tensors(vectors))
    )
    examples(40, check, files)


def test_generate_from_damaged_records_vectors_checkpoints_and_outputs(
    place: Place, examples: Callable[..., None]
) -> None:
    place.place({})
    written = place.whole["predictions.jsonl"]
    known = {
        (place.vectors(VECTORS)[row["embedding_index"]].tobytes(), row["input_prompt_template"]): line["prediction"]
        for row, line in zip(place.read(RECORDS), place.read("predictions.jsonl"), strict=True)
    }

    def check(files: dict[str, bytes]) -> None:
        if place.run(files, *GENERATE) is None:
            return
        new, records, vectors = place.read("out.jsonl"), place.read(RECORDS), place.vectors(VECTORS)
        assert [row["embedding_index"] for row in new] == [row["embedding_index"] for row in records]
        for row, line in zip(records, new, strict=True):
            key = vectors[row["embedding_index"]].tobytes(), row["input_prompt_template"]
            assert isinstance(line["prediction"], str)
            assert "out.jsonl" in files or line["prediction"] == known.get(key, line["prediction"])

    def file(name: str, kind: Callable[[bytes], st.SearchStrategy], **more: bytes) -> st.SearchStrategy:
        return st.builds(lambda content: {name: content} | more, kind(place.whole.get(name, written)))

    about = {"out.jsonl.about.json": place.whole["about.json"]}
    results = st.builds(lambda text: {"run/result.json": text}, as_json(json.loads(place.whole["run/result.json"])))
    examples(60, check, st.one_of(file(RECORDS, lines), file(VECTORS, tensors), results))
    examples(60, check, file(BEST, tensors))
    examples(20, check, file("out.jsonl", lines, **about))
    damaged = st.builds(
        lambda text: {"out.jsonl": written} | dict.fromkeys(about, text), as_json(json.loads(*about.values()))
    )
    examples(20, check, damaged)


def test_evaluate_of_damaged_predictions_and_references(place: Place, examples: Callable[..., None]) -> None:
    assert place.run({}, *EVALUATE)
    whole = json.loads((place.folder / "scores.json").read_text())
    texts = [row["prediction"] for row in place.read("predictions.jsonl")]

    def check(files: dict[str, bytes]) -> None:
        if place.run(files, *EVALUATE) is None:
            return
        scores = json.loads((place.folder / "scores.json").read_text())
        assert all(np.isfinite(value) for value in scores.values() if not isinstance(value, str))
        if RECORDS not in files and [row["prediction"] for row in place.read("predictions.jsonl")] == texts:
            assert scores == whole

    predictions = st.builds(lambda x: {"predictions.jsonl": x}, lines(place.whole["predictions.jsonl"]))
    examples(25, check, st.one_of(predictions, st.builds(lambda x: {RECORDS: x}, lines(place.whole[RECORDS]))))


def test_train_on_damaged_records_and_vectors(place: Place, examples: Callable[..., None]) -> None:
    names = [name.replace("test", split) for split in ("train", "val") for name in (RECORDS, VECTORS)]

    def check(files: dict[str, bytes]) -> None:
        flags = ("--checkpoint-dir", "new", "--llm-model", llm, "--hidden-dim", "8", "--no-use-bf16", "--no-eval-first")
        run = place.run(files, "train", "--data-dir", "data", *flags)
        if run is None:
            return
        for split in ("train", "val"):
            dataset, rows = getattr(run.components, split), place.read(RECORDS.replace("test", split))
            assert [r.target_text for r in dataset.records] == [r["target_text"] for r in rows] and not dataset.too_long
            used = [row["embedding_index"] for row in rows]
            vectors = place.vectors(VECTORS.replace("test", split))[used]
            assert np.array_equal(dataset.vectors(range(len(dataset))).numpy(), vectors) and np.isfinite(vectors).all()

    header = json.loads(place.whole[BEST][8 : 8 + struct.unpack("<Q", place.whole[BEST][:8])[0]])
    llm = json.loads(header["__metadata__"]["elmlib"])["config"]["llm_model_name"]
    files = [
        st.builds(lambda x, name=name: {name: x}, (lines if name.endswith("l") else tensors)(place.whole[name]))
        for name in names
    ]
    examples(40, check, st.one_of(files))


def test_train_resumes_from_a_damaged_run_as_it_was_or_not_at_all(place: Place, examples: Callable[..., None]) -> None:
    def state(run: _Run) -> list[Any]:
        moments = [*run.optimizer.state_dict()["state"].values()]
        return [run.adapter.state_dict(), moments, torch.get_rng_state()]

    first = place.run({}, *RESUME)
    whole = state(first)

    def check(files: dict[str, bytes]) -> None:
        run = place.run(files, *RESUME)
        if run is not None:
            assert run.state == first.state
            torch.testing.assert_close(state(run), whole, rtol=0, atol=0)
            rows = (place.whole | files)["run/metrics.jsonl"].split(b"\n")[:-1]  # an incomplete last line goes
            rows = [json.loads(row) for row in rows if row.strip()]
            assert place.read("run/metrics.jsonl") == [row for row in rows if row["step"] <= 8]

    def file(name: str, kind: Callable[[bytes], st.SearchStrategy]) -> st.SearchStrategy:
        return st.builds(lambda content: {name: content}, kind(place.whole[name]))

    examples(30, check, st.one_of(file(STEP, tensors), file("run/metrics.jsonl", lines)))
    examples(50, check, file(STATE, tensors))
    size = struct.unpack("<Q", place.whole[STATE][:8])[0]
    header = json.loads(place.whole[STATE][8 : 8 + size]) | {"__metadata__": {"elmlib": "{}"}}
    empty = json.dumps(header).encode()
    assert place.run({STATE: struct.pack("<Q", len(empty)) + empty + place.whole[STATE][8 + size :]}, *RESUME) is None


def test_corpus_of_damaged_texts_and_of_a_damaged_corpus(place: Place, examples: Callable[..., None]) -> None:
    flags = ("corpus", "--source", "texts.jsonl", "--output-dir", "new", "--output-embeddings-dir", "new")
    flags += ("--val-fraction", "0.3", "--test-fraction", "0.3")
    assert place.run({}, *flags)
    built = {name: content for name, content in contents(place.folder).items() if name.startswith("new/")}

    def check(files: dict[str, bytes]) -> None:
        if place.run(files if "texts.jsonl" in files else built | files, *flags) is None:
            return
        rows = [row for split in ("train", "val", "test") for row in place.read(f"new/{split}_synthesis.jsonl")]
        found = {(row["source_text"], row["target_text"]) for row in rows if row["task_type"] == "summary"}
        texts = [(row["text"], row["summary"]) for row in place.read("texts.jsonl") if isinstance(row["summary"], str)]
        assert found <= {*texts} or len(texts) < len(place.read("texts.jsonl"))
        if "texts.jsonl" not in files:
            now = {name: content for name, content in contents(place.folder).items() if name.startswith("new/")}
            assert now.keys() == built.keys() and all(now[n] == built[n] for n in now if not n.endswith("corpus.json"))

    examples(20, check, st.builds(lambda x: {"texts.jsonl": x}, lines(place.whole["texts.jsonl"])))
    about = as_json(json.loads(built["new/corpus.json"]))
    vectors = tensors(built["new/val_embeddings.safetensors"])
    examples(10, check, st.builds(lambda x: {"new/corpus.json": x}, about))
    examples(10, check, st.builds(lambda x: {"new/val_embeddings.safetensors": x}, vectors))


def test_drawings_of_damaged_runs_and_reports(place: Place, examples: Callable[..., None]) -> None:
    def check(files: dict[str, bytes]) -> None:
        place.place(files)
        for name in files:
            for read in readers[name]:
                with suppress(InputError), warnings.catch_warnings():
                    read()

    row = "system,bertscore_f1,bertscore_f1_low,bertscore_f1_high\ntrue,0.3,0.2,0.4\nshuffled,0.1,0.0,0.2\n"
    place.whole["report.csv"] = row.encode()
    run, predictions = Path("run"), Path("run/predictions.jsonl")
    readers: dict[str, list[Callable[[], Any]]] = {
        "run/predictions.jsonl": [
            *(lambda: ranks_info(run), lambda: similarity_info(run)),
            *(lambda: sample_frame(predictions), lambda: examples_frame(predictions)),
        ],
        "run/metrics.jsonl": [lambda: draw_curves(run)],
        "report.csv": [lambda: draw_report(Path("report.csv"))],
    }
    files = {name: cut if name == "report.csv" else lines for name in readers}
    for name, kind in files.items():
        damaged = st.builds(lambda x, name=name: {name: x}, kind(place.whole[name]))
        examples(20 if name.startswith("run/p") else 4, check, damaged)


def test_vectors_that_a_person_names(place: Place, examples: Callable[..., None]) -> None:
    vector = place.vectors(VECTORS)[0]
    place.whole["vector.npy"], place.whole["vector.txt"] = npy(vector), ", ".join(map(str, vector)).encode()

    def check(name: str, content: bytes) -> None:
        place.place({name: content})
        with suppress(InputError):
            found = read_vector(name)
            assert found.dtype == np.float32 and found.ndim == 1

    odd = [
        np.zeros(()),
        np.zeros((2, 2, 2)),
        np.zeros(3, complex),
        np.array(["a"]),
        np.zeros((0, 3)),
        np.zeros(3, "M8"),
    ]
    odd += [np.zeros(3, "<i8"), np.zeros(3, bool), np.zeros((2, 3), np.float16)]
    arrays = st.one_of(cut(place.whole["vector.npy"]), st.sampled_from([npy(array) for array in odd]))
    examples(30, check, st.just("vector.npy"), arrays)
    examples(10, check, st.just("vector.txt"), cut(place.whole["vector.txt"]))
    examples(10, check, st.just("v.safetensors"), tensors(place.whole[VECTORS]))


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


# Settings -------------------------------------------------------------------------------------------------------------

FIELDS = [name for name in SummaryTrainingConfig.__dataclass_fields__ if name not in ("resume_from", "use_wandb")]
NAMES = st.one_of(st.sampled_from([*FIELDS, "soft_token_place", "pretrain_epochs", "unknown"]), st.text(max_size=3))
VALUES = st.one_of(JUNK, st.sampled_from([1, 2, 8, 0.5, 1e-3, True, "answer", "text", "DEBUG"]))
ODD_YAML = st.sampled_from(
    [
        *(
            "",
            "[",
            "- a",
            "? {a: 1}\n: 2",
            "1: 2",
            "null: 1",
            "1: 2\na: 3",
            "a: !!python/object:os.system x",
            "&a [*a]",
        ),
        *(
            "a: 2024-13-45",
            "learning_rate: 2024-10-10",
            "<<: 1",
            "a: &x {b: *x}",
            "\0",
            "\t",
            "a: b: c",
            "a:\n  - b\n c",
        ),
        *("batch_size: {low: 4, high: .inf}", "batch_size: {low: .nan, high: 8}", "batch_size: {1: 2}", "variants: 3"),
        *("dropout_rate: {low: 0, high: 0.2, step: .nan}", "batch_size: {choices: [[4]]}", "batch_size: {choices: []}"),
        *("soft_token_place: text", "soft_token_place: {choices: [answer, text]}", "pretrain_epochs: 0", "variants:"),
        *("soft_token_place: [1]", "a: {soft_token_place: text}", "variants: {1: {batch_size: 4}}", "a: {1: 2, b: 3}"),
        *("batch_size: {low: 4, high: 8, log: 3}", "variants: [a]", "[" * 3000, "max_epochs: " + "1" * 5000),
        *("seed: {low: 1, high: 1000000000000000000000000000000000000000000}", "seed: {low: 8, high: 4}", "seed: {}"),
    ]
)


def as_json(value: Any) -> st.SearchStrategy[bytes]:
    """A JSON file with something changed."""
    text = json.dumps(value).encode()
    return st.one_of(cut(text), st.builds(lambda x: json.dumps(x).encode(), changed(value)))


def as_yaml(values: st.SearchStrategy) -> st.SearchStrategy[bytes]:
    """A YAML file of `values`, damaged or not, or an odd one."""
    whole = st.builds(lambda x: yaml.safe_dump(x, allow_unicode=True).encode(), values)
    return st.one_of(whole, whole.flatmap(cut), ODD_YAML.map(str.encode), st.binary(max_size=12))


def test_settings_files_of_wrong_types_ranges_and_forms(place: Place, examples: Callable[..., None]) -> None:
    flags = ("train", "--data-dir", "data", "--dry-run", "--config")

    def check(name: str, content: bytes) -> None:
        if (printed := place.run({name: content}, *flags, name)) is None:
            return
        values = (yaml.safe_load if name.endswith("yaml") else json.loads)(content.decode())
        now = json.loads(printed.rpartition("}")[0] + "}")
        for setting in values.keys() & now.keys() - {"summary_data_path"}:
            assert now[setting] == type(now[setting])(values[setting]) and type(values[setting]) in (
                type(now[setting]),
                int,
            )

    values = st.dictionaries(NAMES, VALUES, max_size=3)
    in_json = st.builds(lambda x: json.dumps(x).encode(), values)
    examples(80, check, st.just("s.json"), st.one_of(in_json, in_json.flatmap(cut), st.just(b"[" * 3000)))
    examples(80, check, st.just("s.yaml"), as_yaml(values))


@pytest.mark.parametrize("command", ["filter", "generate", "study", "plan", "corpus"])
def test_settings_files_of_other_commands(
    place: Place, examples: Callable[..., None], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = cli.COMMANDS[command][0]
    monkeypatch.setitem(cli.COMMANDS, command, (kind, reach))
    flags = ("--checkpoint", "a", "--input", "b", "--output", "c") if command == "generate" else ()

    def check(content: bytes) -> None:
        config = place.run({"s.yaml": content}, command, "--config", "s.yaml", *flags)
        if config is not None:
            for name, value in yaml.safe_load(content.decode()).items():
                ours = getattr(config, name) if f"--{name}" not in flags else value
                assert str(ours) == str(Path(value)) if isinstance(ours, Path) else ours in (value, tuple_of(value))

    names = st.one_of(st.sampled_from(sorted(kind.__dataclass_fields__)), st.text(max_size=2))
    examples(20, check, as_yaml(st.dictionaries(names, VALUES, max_size=2)))


def tuple_of(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


RANGES = st.one_of(
    VALUES,
    st.fixed_dictionaries({"choices": st.lists(VALUES, max_size=3)}),
    st.fixed_dictionaries({"low": VALUES, "high": VALUES}, optional={"log": VALUES, "step": VALUES}),
)


@pytest.mark.parametrize("flag", ["space", "grid"])
def test_spaces_and_grids_of_wrong_types_ranges_and_forms(
    place: Place, examples: Callable[..., None], flag: str
) -> None:
    arguments = ("study", "--data-dir", "data", "--notebook", "notebook.ipynb", f"--{flag}", "s.yaml")

    def check(content: bytes) -> None:
        if (plan := place.run({"s.yaml": content}, *arguments)) is None:
            return
        values = yaml.safe_load(content.decode())
        if flag == "space":
            ranges = {name: value for name, value in values.items() if isinstance(value, dict)}
            assert plan.space.keys() == ranges.keys()
            for name in values.keys() - ranges.keys():
                ours = getattr(plan.base, name)
                assert ours == type(ours)(values[name])  # 10**30 becomes the nearest float
        else:
            variants = {"defaults": {}} | values.get("variants", values)
            first = plan.first[: len(variants)]
            assert [trial.user_attrs["changes"] for trial in first] == [it | {"seed": 0} for it in variants.values()]
            for trial in plan.first:  # what the launcher does with it
                SummaryTrainingConfig(**vars(plan.base) | trial.user_attrs["changes"])

    settings_ = st.dictionaries(st.sampled_from(FIELDS), RANGES if flag == "space" else VALUES, max_size=3)
    values = settings_ if flag == "space" else st.dictionaries(st.text(max_size=3), settings_, max_size=3)
    examples(80, check, as_yaml(values))


def test_notebooks_of_a_study_that_are_none(place: Place, examples: Callable[..., None]) -> None:
    def check(content: bytes) -> None:
        arguments = ("study", "--data-dir", "data", "--notebook", "notebook.ipynb")
        plan = place.run({"notebook.ipynb": content}, *arguments)
        assert plan is None or plan.contract["notebook"]

    cells = [{"cell_type": "code", "source": ["a = 1"], "metadata": {}}, {"cell_type": "markdown", "source": "b"}]
    examples(20, check, as_json({"cells": cells, "nbformat": 4}))


def test_the_place_is_as_good_as_undamaged(place: Place) -> None:
    """So that a refusal above is of the damage."""
    assert isinstance(place.run({}, *RESUME), _Run) and "24" in place.run({}, *GENERATE) and place.run({}, *FILTER)
    assert plan_study(StudyConfig(data_dir="data", notebook=Path("notebook.ipynb"))).space
