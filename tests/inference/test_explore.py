"""Questions to an adapter: arithmetic of vectors, files of vectors, summaries with their controls, and explorer."""

import inspect
import itertools
import json
import os
from collections.abc import Iterator
from html import escape
from pathlib import Path

import ipywidgets as ipw
import numpy as np
import pytest
from conftest import sentences, write_split
from safetensors.numpy import save_file
from sentence_transformers.util import cos_sim

from elmlib.config import InputError
from elmlib.inference.explore import (
    BEST_OF,
    SAMPLED,
    Explorer,
    Question,
    add_direction,
    interpolate,
    mean_vector,
    newest_run,
    read_vector,
)
from elmlib.inference.summarizer import Elm
from elmlib.models import Sampling

SHORT = {"tokens": 6}


@pytest.fixture(scope="module")
def explorer(trained_run: Path, small_data: Path) -> Explorer:
    explorer = Explorer(Elm.from_pretrained(trained_run), small_data)
    explorer.decoding.children[1].value = 6
    assert explorer.decoding.kwargs["tokens"] == 6
    return explorer


A, B = np.array([3.0, 0.0, 0.0], np.float32), np.array([0.0, 3.0, 0.0], np.float32)


def test_interpolate_goes_from_one_to_the_other_at_their_length() -> None:
    np.testing.assert_allclose(interpolate(A, B, 0.0), A)
    np.testing.assert_allclose(interpolate(A, B, 1.0), B, atol=1e-6)
    half = interpolate(A, B, 0.5)
    assert np.linalg.norm(half) == pytest.approx(3.0) and half[0] == pytest.approx(half[1])


def test_add_direction_follows_it_and_keeps_the_length() -> None:
    start = np.array([0.0, 0.0, 2.0], np.float32)
    np.testing.assert_allclose(add_direction(start, A, B, 0.0), start)
    there, back = add_direction(start, A, B, 1.0), add_direction(start, A, B, -1.0)
    assert there[0] > 0 > there[1] and back[0] < 0 < back[1]
    assert np.linalg.norm(there) == pytest.approx(2.0)


def test_mean_vector_is_between_all_at_their_mean_length() -> None:
    found = mean_vector(np.stack([A, B]))
    np.testing.assert_allclose(found, interpolate(A, B, 0.5), rtol=1e-6)
    with pytest.raises(InputError, match="no vectors to average"):
        mean_vector(np.zeros((0, 3), np.float32))


def test_read_vector_reads_files_and_numbers(tmp_path: Path) -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_file({"embeddings": rows}, tmp_path / "v.safetensors")
    np.save(tmp_path / "v.npy", rows)
    (tmp_path / "v.json").write_text(json.dumps(rows[1].tolist()))
    (tmp_path / "v.txt").write_text("3 4\n5\n")
    for name, row in (("v.safetensors", 1), ("v.npy", 1), ("v.json", 0), ("v.txt", 0)):
        np.testing.assert_array_equal(read_vector(tmp_path / name, row), rows[1])
    np.testing.assert_array_equal(read_vector(" [3.0, 4, 5e0] "), rows[1])
    np.testing.assert_array_equal(read_vector(f" {tmp_path / 'v.npy'} ", 1), rows[1])
    np.testing.assert_array_equal(read_vector("[-3.0, 4, 5e0]"), [-3, 4, 5])
    with pytest.raises(InputError, match="has 2 vectors; there is no row 2"):
        read_vector(tmp_path / "v.npy", 2)
    with pytest.raises(InputError, match="is no vector: could not convert"):
        read_vector("1, two")
    (tmp_path / "words.txt").write_text("one, two")
    with pytest.raises(InputError, match=r"words\.txt is no vector: could not convert"):
        read_vector(tmp_path / "words.txt")
    with pytest.raises(InputError, match=r"no file .*nowhere\.npy"):
        read_vector(tmp_path / "nowhere.npy")


def test_newest_run_is_the_last_saved(tmp_path: Path) -> None:
    runs = {str(tmp_path / name): f"data of {name}" for name in ("old", "new", "empty")}
    with pytest.raises(InputError, match=r"no best_summary_model.* or .*empty; train one: `make demo`"):
        newest_run(runs)
    for run in runs:
        Path(run).mkdir()
    for age, name in enumerate(("new", "old")):
        file = tmp_path / name / "best_summary_model.safetensors"
        file.touch()
        os.utime(file, (1000 - age, 1000 - age))
    assert newest_run(runs) == (str(tmp_path / "new"), "data of new")


def test_stream_grows_token_by_token_to_the_summary(explorer: Explorer) -> None:
    vector = explorer.vectors[0]
    grown = list(explorer.stream(vector, **SHORT))
    assert grown[-1] == explorer.summarize(vector, **SHORT) == explorer.elm.summarize(vector[None], 6)[0]
    assert len(grown) > 1 and all(len(a) <= len(b) + 1 for a, b in itertools.pairwise(grown))


def test_summarize_decodes_as_the_decoding_says(explorer: Explorer) -> None:
    vector, model = explorer.vectors[1], explorer.elm.model
    batch = explorer.elm.batch(vector[None])
    drawn = explorer.summarize(vector, decoding=BEST_OF, temperature=1.5, candidates=4, tokens=6)
    assert drawn == explorer.elm.summarize(vector[None], 6, Sampling(4, 1.5))[0]
    sampled = explorer.summarize(vector, decoding=SAMPLED, temperature=1.5, candidates=4, tokens=6)
    assert sampled == model.candidates(batch, 6, Sampling(1, 1.5))[0][0]


def test_the_controls_of_decoding_start_at_the_defaults_of_stream(explorer: Explorer) -> None:
    settings = inspect.signature(explorer.stream).parameters
    defaults = {name: setting.default for name, setting in settings.items() if name != "vector"}
    assert explorer.decoding.kwargs == defaults | SHORT


def test_neighbours_are_those_of_the_naive_loop(explorer: Explorer) -> None:
    vector, train = explorer.vectors[2], explorer.train
    cosines = [float(cos_sim(train.vectors([row])[0], vector)) for row in range(len(train))]
    naive = sorted(range(len(train)), key=lambda row: -cosines[row])[:3]
    frame = explorer.neighbours(vector)
    assert frame["source_id"].tolist() == [train.records[row].source for row in naive]
    assert frame["summary"].tolist() == [train.records[row].target_text for row in naive]
    assert frame["similarity"].tolist() == pytest.approx([cosines[row] for row in naive], abs=1e-5)


def test_similarity_is_one_for_the_own_text_and_zero_for_none(explorer: Explorer) -> None:
    text = explorer.val.records[0].source_text
    assert explorer.similarity(text, explorer.vectors[0]) == pytest.approx(1.0, abs=1e-3)
    assert explorer.similarity(" ", explorer.vectors[0]) == 0.0
    assert len(explorer.texts().options) == len(explorer.vectors)


def test_question_has_the_vector_of_another_group_as_control(
    trained_run: Path, small_data: Path, tmp_path: Path
) -> None:
    """Validation texts of three modules, eight of each: the next row would be of the same module."""
    pairs = sentences(24, 5)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        write_split(tmp_path, split, pairs, rng.normal(size=(24, 384)).astype(np.float32))
    path = tmp_path / "synthesis" / "val_synthesis.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [json.dumps(it | {"source_id": f"package.m{i // 8}:f{i}"}) + "\n" for i, it in enumerate(records)]
    path.write_text("".join(lines))
    explorer = Explorer(Elm.from_pretrained(trained_run), tmp_path)
    modules = [record.source.partition(":")[0] for record in explorer.val.records]
    for row in range(24):
        assert modules[explorer.swap[row]] != modules[row]
        np.testing.assert_array_equal(explorer.question(row).other, explorer.vectors[explorer.swap[row]])


def test_question_has_another_source_as_control_where_all_are_of_one_group(explorer: Explorer) -> None:
    sources = [record.source for record in explorer.val.records]
    assert all(sources[other] != sources[row] for row, other in enumerate(explorer.swap))


def test_answer_compares_the_summary_with_its_controls(explorer: Explorer) -> None:
    question = explorer.question(0)
    *_, rows = explorer.answer(question, **SHORT)
    values = dict(rows)
    assert values["summary"] == explorer.summarize(question.vector, **SHORT)
    assert values["from another text's vector"] == explorer.summarize(explorer.vectors[explorer.swap[0]], **SHORT)
    assert values["from the mean vector"] == explorer.summarize(explorer.elm.mean_vector(), **SHORT)
    assert (values["reference"], values["text"]) == (question.reference, question.text)
    assert values["similarity"].startswith(f"{explorer.similarity(values['summary'], question.vector):.3f}")
    assert sum(name.startswith("near: ") for name, _ in rows) == 3


def parts(widget: ipw.Widget) -> Iterator[ipw.Widget]:
    yield widget
    for child in getattr(widget, "children", ()):
        yield from parts(child)


def one(widget: ipw.Widget, kind: type[ipw.Widget], number: int = 0) -> ipw.Widget:
    return [part for part in parts(widget) if type(part) is kind][number]


def test_card_follows_a_chosen_text(explorer: Explorer) -> None:
    card = explorer.card(explorer.question, row=explorer.texts())
    one(card, ipw.Dropdown).value = 3
    *_, rows = explorer.answer(explorer.question(3), **SHORT)
    html = one(card, ipw.HTML).value
    assert "elm-card" in html and all(escape(value) in html for _, value in rows)


def test_card_follows_a_slider(explorer: Explorer) -> None:
    vectors = explorer.vectors
    card = explorer.card(lambda share: interpolate(*vectors[:2], share), share=(0.0, 1.0, 0.1))
    slider, html = one(card, ipw.FloatSlider), one(card, ipw.HTML)
    assert not slider.continuous_update
    for share in (0.0, 1.0):
        slider.value = share
        vector = interpolate(vectors[0], vectors[1], share)
        assert escape(explorer.summarize(vector, **SHORT)) in html.value
        assert f"near: {explorer.neighbours(vector)['similarity'][0]:.3f}" in html.value


def test_card_with_a_button_summarises_a_typed_text(explorer: Explorer) -> None:
    card = explorer.card(explorer.text_question, button="Summarise", text=ipw.Textarea())
    assert not one(card, ipw.HTML).value
    one(card, ipw.Textarea).value = text = "A <new> text of my own."
    one(card, ipw.Button).click()
    vector = explorer.elm.embed([text])[0]
    html = one(card, ipw.HTML).value
    assert escape(explorer.summarize(vector, **SHORT)) in html and "A &lt;new&gt; text" in html
    assert "from another text&#x27;s vector" in html


def test_card_shows_a_typed_vector_or_one_line_of_error(explorer: Explorer, tmp_path: Path) -> None:
    card = explorer.card(read_vector, button="Summarise", text=ipw.Textarea(), row=ipw.IntText(0))
    vector = explorer.vectors[4]
    path = tmp_path / "vector.json"
    path.write_text(json.dumps(vector.tolist()))
    summary = escape(explorer.summarize(vector, **SHORT))
    for text, shown in (
        (str(path), summary), (json.dumps(vector.tolist()), summary), ("1, 2, 3", "this adapter reads (n, 384)"),
        (str(tmp_path / "no.npy"), "no file"), (" ".join(["0"] * 384), "row 0 is all zero"), ("", "no file"),
    ):  # fmt: skip
        one(card, ipw.Textarea).value = text
        one(card, ipw.Button).click()
        html = one(card, ipw.HTML).value
        assert escape(shown) in html and ("error" in html) is (shown != summary)


def test_card_decodes_by_the_shared_settings(explorer: Explorer) -> None:
    card = explorer.card(lambda: Question(explorer.vectors[1]), button="Summarise")
    method = one(explorer.decoding, ipw.Dropdown)
    try:
        method.value = BEST_OF
        one(card, ipw.Button).click()
        summary = explorer.summarize(explorer.vectors[1], decoding=BEST_OF, tokens=6)
        assert escape(summary) in one(card, ipw.HTML).value
    finally:
        method.value = "greedy"
