"""`elm generate`: resumed output, its digests, refused input, and predictions beside references."""

import json
from pathlib import Path

import numpy as np
import pytest

from elmlib.config import InputError
from elmlib.data import EmbeddingFile, PromptBatch, find_split, write_embeddings
from elmlib.inference.batch import generate_file, read_pairs
from elmlib.models import Sampling, SoftTokenModel, elm


@pytest.fixture
def adapter(trained_run: Path) -> Path:
    return trained_run / "best_summary_model.safetensors"


@pytest.fixture
def records(small_data: Path) -> Path:
    return find_split(small_data, "test").records


def predictions(path: Path) -> list[str]:
    return [json.loads(line)["prediction"] for line in path.read_text().splitlines()]


def test_generate_file_resumes_to_the_same_bytes(adapter: Path, records: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    assert generate_file(adapter, records, whole, batch_size=4) == 24
    generate_file(adapter, records, stopped, batch_size=4)
    lines = whole.read_bytes().splitlines(keepends=True)
    stopped.write_bytes(b"".join(lines[:8]) + lines[8][:11])  # killed within a line
    assert generate_file(adapter, records, stopped, batch_size=4) == 16
    assert stopped.read_bytes() == whole.read_bytes()
    assert generate_file(adapter, records, stopped, batch_size=4) == 0


def test_generate_file_does_not_touch_an_output_of_another_decoding(
    adapter: Path, records: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    generate_file(adapter, records, output)
    before = output.read_bytes()
    with pytest.raises(InputError, match="remove it or name another"):
        generate_file(adapter, records, output, max_new_tokens=3)
    assert output.read_bytes() == before


def test_generate_file_reads_embeddings_without_records(
    adapter: Path, records: Path, small_data: Path, tmp_path: Path
) -> None:
    generate_file(adapter, records, tmp_path / "records.jsonl", batch_size=4)
    generate_file(adapter, find_split(small_data, "test").embeddings, tmp_path / "bare.jsonl", batch_size=4)
    assert predictions(tmp_path / "bare.jsonl") == predictions(tmp_path / "records.jsonl")


def test_generate_file_generates_a_shared_embedding_once(
    adapter: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = tmp_path / "test_synthesis.jsonl"
    twice.write_bytes(b"".join(line + line for line in records.read_bytes().splitlines(keepends=True)))
    sizes = []
    real = SoftTokenModel.generate

    def counting(model: SoftTokenModel, batch: PromptBatch, length: int) -> list[str]:
        sizes.append(len(batch.embeddings))
        return real(model, batch, length)

    monkeypatch.setattr(SoftTokenModel, "generate", counting)
    output = tmp_path / "out.jsonl"
    generate_file(adapter, twice, output, find_split(records.parent.parent, "test").embeddings)
    assert sum(sizes) == 24 and len(predictions(output)) == 48
    assert predictions(output)[::2] == predictions(output)[1::2]


def test_generate_file_adds_the_best_candidate_to_the_greedy_prediction(
    adapter: Path, records: Path, tmp_path: Path
) -> None:
    greedy, drawn = tmp_path / "greedy.jsonl", tmp_path / "drawn.jsonl"
    generate_file(adapter, records, greedy, batch_size=8)
    generate_file(adapter, records, drawn, batch_size=8, sampling=Sampling(count=4, temperature=1.0))
    assert predictions(greedy) == predictions(drawn)
    best = [json.loads(line)["best_candidate"] for line in drawn.read_text().splitlines()]
    assert best != predictions(greedy)
    with pytest.raises(InputError, match="remove it or name another"):
        generate_file(adapter, records, drawn, batch_size=8)


def test_generate_file_refuses_another_size_before_the_llm_is_loaded(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elm, "load_llm", lambda *_: pytest.fail("the LLM was loaded"))
    path = tmp_path / "wide_embeddings.safetensors"
    write_embeddings(path, (2, 8), [np.ones((2, 8), np.float32).tobytes()])
    with pytest.raises(InputError, match=r"vectors of size 8; .* reads 384"):
        generate_file(adapter, path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_generate_file_repeats_the_summaries_of_the_best_evaluation(
    adapter: Path, small_data: Path, tmp_path: Path
) -> None:
    evaluated = [json.loads(line) for line in (adapter.parent / "predictions.jsonl").read_text().splitlines()]
    output = tmp_path / "val.jsonl"
    generate_file(adapter, find_split(small_data, "val").records, output)
    made = {
        json.loads(line)["embedding_index"]: json.loads(line)["prediction"] for line in output.read_text().splitlines()
    }
    assert [made[line["embedding_index"]] for line in evaluated] == [line["prediction"] for line in evaluated]


def test_read_pairs_checks_each_line(records: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [{"embedding_index": i, "prediction": "x"} for i in range(24)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(read_pairs(path, records).predictions) == 24
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    with pytest.raises(InputError, match="has 23 lines"):
        read_pairs(path, records)
    path.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    with pytest.raises(InputError, match="line 1: made from embedding 23"):
        read_pairs(path, records)
    path.write_text("".join(json.dumps({"embedding_index": i}) + "\n" for i in range(24)))
    with pytest.raises(InputError, match="line 1 has no 'prediction'"):
        read_pairs(path, records)
    path.write_text("".join(json.dumps(line | {"prediction": None}) + "\n" for line in lines))
    with pytest.raises(InputError, match="line 1 has no 'prediction'"):
        read_pairs(path, records)


@pytest.mark.parametrize("changed", ["records", "embeddings"])
def test_generate_file_refuses_an_output_of_other_files_of_the_same_name(
    changed: str, adapter: Path, small_data: Path, tmp_path: Path
) -> None:
    split, other = find_split(small_data, "test"), find_split(small_data, "val")
    output = tmp_path / "out.jsonl"
    generate_file(adapter, split.records, output, max_new_tokens=2)
    before = output.read_bytes()
    (tmp_path / "b").mkdir()
    records, vectors = tmp_path / "b" / split.records.name, tmp_path / "b" / split.embeddings.name
    records.write_bytes((other if changed == "records" else split).records.read_bytes())
    vectors.write_bytes((other if changed == "embeddings" else split).embeddings.read_bytes())
    with pytest.raises(InputError, match=f"was made from .*'{changed}': .*, not from .*remove it or name another"):
        generate_file(adapter, records, output, max_new_tokens=2)
    assert output.read_bytes() == before


def test_generate_file_resumes_where_the_same_files_were_moved(adapter: Path, small_data: Path, tmp_path: Path) -> None:
    split, output = find_split(small_data, "test"), tmp_path / "out.jsonl"
    generate_file(adapter, split.records, output, max_new_tokens=2)
    for path in split:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert generate_file(adapter, tmp_path / split.records.name, output, max_new_tokens=2) == 0


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (0, "all zero")]
)
def test_generate_file_refuses_bad_rows_before_anything_is_written(
    value: float, reason: str, adapter: Path, records: Path, small_data: Path, tmp_path: Path
) -> None:
    with EmbeddingFile(find_split(small_data, "test").embeddings) as file:
        rows = file.rows(0, file.num_rows).copy()
    rows[17] = value
    path, output = tmp_path / "test_embeddings.safetensors", tmp_path / "out.jsonl"
    write_embeddings(path, rows.shape, [rows.tobytes()])
    for source, embeddings in ((path, None), (records, path)):
        with pytest.raises(InputError, match=rf"test_embeddings\.safetensors: row 17 is {reason}"):
            generate_file(adapter, source, output, embeddings)
    assert list(tmp_path.iterdir()) == [path]


def test_generate_file_ignores_a_bad_row_that_no_record_uses(
    adapter: Path, records: Path, small_data: Path, tmp_path: Path
) -> None:
    with EmbeddingFile(find_split(small_data, "test").embeddings) as file:
        rows = np.concatenate([file.rows(0, file.num_rows), np.full((1, file.dim), np.nan, np.float32)])
    path = tmp_path / "test_embeddings.safetensors"
    write_embeddings(path, rows.shape, [rows.tobytes()])
    assert generate_file(adapter, records, tmp_path / "out.jsonl", path, max_new_tokens=2) == 24


def test_generate_file_refuses_vectors_of_another_embedder(adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    rows = np.ones((2, 384), np.float32)
    write_embeddings(path, rows.shape, [rows.tobytes()], metadata={"embedding_model": "other/model"})
    with pytest.raises(InputError, match=r"vectors of other/model, not of all-minilm"):
        generate_file(adapter, path, tmp_path / "out.jsonl")


def test_generate_file_takes_the_best_adapter_of_a_folder(adapter: Path, records: Path, tmp_path: Path) -> None:
    generate_file(adapter.parent, records, tmp_path / "folder.jsonl", max_new_tokens=2)
    generate_file(adapter, records, tmp_path / "file.jsonl", max_new_tokens=2)
    assert (tmp_path / "folder.jsonl").read_bytes() == (tmp_path / "file.jsonl").read_bytes()
