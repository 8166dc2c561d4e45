"""Questions to an adapter: the arithmetic of vectors, their sources, and answers that are the adapter's own."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from elmlib.decoding import Sampling
from elmlib.exploring import (
    Explorer,
    Manner,
    blend,
    centre,
    cosine,
    move,
    newest_run,
    parse_vector,
    project,
    read_vector,
)
from elmlib.hub import Elm


@pytest.fixture(scope="module")
def explorer(trained_run: Path, small_data: Path) -> Explorer:
    return Explorer(Elm.from_pretrained(trained_run), small_data)


A, B = np.array([3.0, 0.0, 0.0], np.float32), np.array([0.0, 3.0, 0.0], np.float32)


def test_a_blend_goes_from_one_to_the_other_at_their_length() -> None:
    np.testing.assert_allclose(blend(A, B, 0.0), A)
    np.testing.assert_allclose(blend(A, B, 1.0), B, atol=1e-6)
    half = blend(A, B, 0.5)
    assert np.linalg.norm(half) == pytest.approx(3.0) and half[0] == pytest.approx(half[1])


def test_a_move_follows_the_direction_and_keeps_the_length() -> None:
    start = np.array([0.0, 0.0, 2.0], np.float32)
    np.testing.assert_allclose(move(start, A, B, 0.0), start)
    there, back = move(start, A, B, 1.0), move(start, A, B, -1.0)
    assert there[0] > 0 > there[1] and back[0] < 0 < back[1]
    assert np.linalg.norm(there) == pytest.approx(2.0)


def test_the_centre_is_between_all_at_their_mean_length() -> None:
    found = centre(np.stack([A, B]))
    np.testing.assert_allclose(found, blend(A, B, 0.5), rtol=1e-6)
    with pytest.raises(ValueError, match="no vectors to average"):
        centre(np.zeros((0, 3), np.float32))


def test_vectors_come_out_of_files_and_numbers(tmp_path: Path) -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_file({"embeddings": rows}, tmp_path / "v.safetensors")
    np.save(tmp_path / "v.npy", rows)
    (tmp_path / "v.json").write_text(json.dumps(rows[1].tolist()))
    (tmp_path / "v.txt").write_text("3 4\n5\n")
    for name, row in (("v.safetensors", 1), ("v.npy", 1), ("v.json", 0), ("v.txt", 0)):
        np.testing.assert_array_equal(read_vector(tmp_path / name, row), rows[1])
    np.testing.assert_array_equal(parse_vector(" [3.0, 4, 5e0] "), rows[1])
    with pytest.raises(ValueError, match="has 2 vectors; there is no row 2"):
        read_vector(tmp_path / "v.npy", 2)
    with pytest.raises(ValueError, match="is no vector: could not convert"):
        parse_vector("one, two")
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.npy"):
        read_vector(tmp_path / "nowhere.npy")


def test_the_newest_adapter_is_asked(tmp_path: Path) -> None:
    runs = {str(tmp_path / name): f"data of {name}" for name in ("old", "new", "empty")}
    with pytest.raises(FileNotFoundError, match=r"no best_summary_model.* or .*empty; train one: `make demo`"):
        newest_run(runs)
    for run in runs:
        Path(run).mkdir()
    for age, name in enumerate(("new", "old")):
        file = tmp_path / name / "best_summary_model.safetensors"
        file.touch()
        os.utime(file, (1000 - age, 1000 - age))
    assert newest_run(runs) == (str(tmp_path / "new"), "data of new")


def test_an_answer_grows_token_by_token_to_the_adapters_summary(explorer: Explorer) -> None:
    vector = explorer.vectors[0]
    grown = list(explorer.stream(vector, Manner(max_new_tokens=8)))
    assert grown[-1] == explorer.answer(vector, Manner(max_new_tokens=8)) == explorer.elm.summarize(vector[None], 8)[0]
    assert len(grown) > 1 and all(len(a) <= len(b) + 1 for a, b in itertools.pairwise(grown))


def test_each_manner_decodes_in_its_own_way(explorer: Explorer) -> None:
    vector = explorer.vectors[1]
    beams = explorer.answer(vector, Manner(num_beams=3, max_new_tokens=6))
    batch = explorer.elm.batch(vector[None])
    assert beams == explorer.elm.reader.search_beams(batch, 6, 3)[0]
    assert explorer.elm.reader.search_beams(batch, 6, 1) == explorer.elm.reader.generate(batch, 6)
    drawn = Manner(temperature=1.5, candidates=4, max_new_tokens=6)
    sampling = Sampling(4, 1.5, drawn.top_p, drawn.seed)
    assert explorer.answer(vector, drawn) == explorer.elm.summarize(vector[None], 6, sampling)[0]
    with pytest.raises(ValueError, match="candidates are drawn"):
        Manner(candidates=4)
    with pytest.raises(ValueError, match="beam search takes the best"):
        Manner(num_beams=2, temperature=1.0)


def test_the_nearest_neighbours_are_those_of_the_naive_loop(explorer: Explorer) -> None:
    vector = explorer.vectors[2]
    train = explorer.train
    naive = sorted(range(len(train)), key=lambda row: -cosine(train.vectors([row]).numpy()[0], vector))[:3]
    found = explorer.neighbours(vector)
    assert [it.source_id for it in found] == [train.records[row].source for row in naive]
    assert found[0].similarity == pytest.approx(cosine(train.vectors([naive[0]]).numpy()[0], vector), abs=1e-5)


def test_controls_and_similarity_are_of_the_text_asked_about(explorer: Explorer) -> None:
    manner = Manner(max_new_tokens=6)
    controls = explorer.controls(0, manner)
    assert controls.shuffled == explorer.answer(explorer.vectors[1], manner)
    assert controls.mean == explorer.answer(explorer.elm.mean_vector(), manner)
    text = explorer.val.records[0].source_text
    assert text and explorer.similarity(text, explorer.vectors[0]) == pytest.approx(1.0, abs=1e-3)
    assert explorer.similarity(" ", explorer.vectors[0]) == 0.0
    assert len(explorer.labels()) == len(explorer.vectors)


def test_the_map_keeps_most_of_what_two_dimensions_can() -> None:
    rng = np.random.default_rng(0)
    flat = np.zeros((50, 6))
    flat[:, :2] = rng.normal(size=(50, 2)) * [5, 2]
    points = project(flat)
    assert points.shape == (50, 2)
    np.testing.assert_allclose(np.ptp(points, axis=0).prod() > 0, True)
    np.testing.assert_allclose(np.linalg.norm(points[0] - points[1]), np.linalg.norm(flat[0] - flat[1]), rtol=1e-6)
