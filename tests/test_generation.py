"""Predictions stream to disk, go on where they stopped, and belong to one checkpoint and one input."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from elmlib import generation
from elmlib.config import SummaryTrainingConfig
from elmlib.decoding import Sampling
from elmlib.generation import generate_file, load_elm, read_pairs
from elmlib.layout import find_split
from elmlib.records import EmbeddingFile, write_embeddings
from elmlib.trainer import train


@pytest.fixture
def adapter(tiny_config: SummaryTrainingConfig) -> Path:
    return train(replace(tiny_config, max_epochs=1)).best


@pytest.fixture
def records(small_data: Path) -> Path:
    return find_split(small_data, "test").records


def predictions(path: Path) -> list[str]:
    return [json.loads(line)["prediction"] for line in path.read_text().splitlines()]


def test_a_stopped_run_goes_on_to_the_same_file(adapter: Path, records: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    assert generate_file(adapter, records, whole, batch_size=4) == 24
    generate_file(adapter, records, stopped, batch_size=4)
    lines = whole.read_bytes().splitlines(keepends=True)
    stopped.write_bytes(b"".join(lines[:8]) + lines[8][:11])  # killed within a line
    assert generate_file(adapter, records, stopped, batch_size=4) == 16
    assert stopped.read_bytes() == whole.read_bytes()
    assert generate_file(adapter, records, stopped, batch_size=4) == 0


def test_an_output_of_another_making_is_not_touched(adapter: Path, records: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    generate_file(adapter, records, output)
    before = output.read_bytes()
    with pytest.raises(ValueError, match="remove it or name another"):
        generate_file(adapter, records, output, max_new_tokens=3)
    assert output.read_bytes() == before


def test_bare_embeddings_give_the_same_summaries(
    adapter: Path, records: Path, small_data: Path, tmp_path: Path
) -> None:
    generate_file(adapter, records, tmp_path / "records.jsonl", batch_size=4)
    generate_file(adapter, find_split(small_data, "test").embeddings, tmp_path / "bare.jsonl", batch_size=4)
    assert predictions(tmp_path / "bare.jsonl") == predictions(tmp_path / "records.jsonl")


def test_records_that_share_an_embedding_are_generated_once(
    adapter: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = tmp_path / "test_synthesis.jsonl"
    twice.write_bytes(b"".join(line + line for line in records.read_bytes().splitlines(keepends=True)))
    sizes = []
    real = generation.Elm.generate

    def counting(elm: generation.Elm, batch: generation.PromptBatch, length: int) -> list[str]:
        sizes.append(len(batch.embeddings))
        return real(elm, batch, length)

    monkeypatch.setattr(generation.Elm, "generate", counting)
    output = tmp_path / "out.jsonl"
    generate_file(adapter, twice, output, find_split(records.parent.parent, "test").embeddings)
    assert sum(sizes) == 24 and len(predictions(output)) == 48
    assert predictions(output)[::2] == predictions(output)[1::2]


def test_candidates_stand_beside_the_greedy_prediction_and_are_nearer(
    adapter: Path, records: Path, tmp_path: Path
) -> None:
    greedy, drawn = tmp_path / "greedy.jsonl", tmp_path / "drawn.jsonl"
    generate_file(adapter, records, greedy, batch_size=8)
    generate_file(adapter, records, drawn, batch_size=8, sampling=Sampling(count=4, temperature=1.0))
    assert predictions(greedy) == predictions(drawn)
    best = [json.loads(line)["best_candidate"] for line in drawn.read_text().splitlines()]
    assert best != predictions(greedy)
    with pytest.raises(ValueError, match="remove it or name another"):
        generate_file(adapter, records, drawn, batch_size=8)


def test_embeddings_of_another_size_are_refused_before_the_llm_is_loaded(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "load_llm", lambda *_: pytest.fail("the LLM was loaded"))
    path = tmp_path / "wide_embeddings.safetensors"
    write_embeddings(path, (2, 8), [np.ones((2, 8), np.float32).tobytes()])
    with pytest.raises(ValueError, match=r"vectors of size 8; .* reads 384"):
        generate_file(adapter, path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_loaded_adapter_speaks_as_the_trained_one(
    adapter: Path, records: Path, small_data: Path, tiny_config: SummaryTrainingConfig, tmp_path: Path
) -> None:
    """The summaries of the best evaluation come out again from the file on disk."""
    evaluated = [json.loads(line) for line in (adapter.parent / "predictions.jsonl").read_text().splitlines()]
    output = tmp_path / "val.jsonl"
    generate_file(adapter, find_split(small_data, "val").records, output)
    made = {
        json.loads(line)["embedding_index"]: json.loads(line)["prediction"] for line in output.read_text().splitlines()
    }
    assert [made[line["embedding_index"]] for line in evaluated] == [line["prediction"] for line in evaluated]


def test_load_elm_names_a_file_that_is_no_adapter(tmp_path: Path, small_data: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_elm(tmp_path / "none.safetensors", torch.device("cpu"))
    with pytest.raises(ValueError, match="not written by elmlib"):
        load_elm(find_split(small_data, "test").embeddings, torch.device("cpu"))


def test_pairs_are_checked_line_by_line(records: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [{"embedding_index": i, "prediction": "x"} for i in range(24)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(read_pairs(path, records).predictions) == 24
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    with pytest.raises(ValueError, match="has 23 lines"):
        read_pairs(path, records)
    path.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    with pytest.raises(ValueError, match="line 1: made from embedding 23"):
        read_pairs(path, records)
    path.write_text("".join(json.dumps({"embedding_index": i}) + "\n" for i in range(24)))
    with pytest.raises(ValueError, match="line 1: expected a JSON object with the text field 'prediction'"):
        read_pairs(path, records)


def test_embedding_file_rows_are_what_was_embedded(small_data: Path) -> None:
    with EmbeddingFile(find_split(small_data, "test").embeddings) as file:
        assert file.rows(0, 2).shape == (2, 384)
