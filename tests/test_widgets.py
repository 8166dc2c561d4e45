"""The explorer's widgets: what is chosen, typed or moved is what the card then says."""

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path

import ipywidgets as ipw
import pytest

from elmlib.config import SummaryTrainingConfig
from elmlib.exploring import Explorer, Manner, blend, centre
from elmlib.hub import Elm
from elmlib.trainer import train
from elmlib.watching import LiveView
from elmlib.widgets import Page


@pytest.fixture(scope="module")
def page(trained_run: Path, small_data: Path) -> Page:
    page = Page(Explorer(Elm.from_pretrained(trained_run), small_data))
    page.length.value = 6
    return page


def parts(widget: ipw.Widget) -> Iterator[ipw.Widget]:
    yield widget
    for child in getattr(widget, "children", ()):
        yield from parts(child)


def one(widget: ipw.Widget, kind: type[ipw.Widget], number: int = 0) -> ipw.Widget:
    return [part for part in parts(widget) if type(part) is kind][number]


def test_a_picked_text_stands_beside_its_reference_and_controls(page: Page) -> None:
    asked = page.ask()
    one(asked, ipw.Dropdown).value = 3
    card, record = one(asked, ipw.HTML).value, page.explorer.val.records[3]
    summary = page.explorer.answer(page.explorer.vectors[3], Manner(max_new_tokens=6))
    for text in (summary, record.target_text, record.source_text, page.explorer.controls(3, page.manner()).mean):
        assert text and escape(text) in card
    for neighbour in page.explorer.neighbours(page.explorer.vectors[3]):
        assert escape(neighbour.summary) in card


def test_a_typed_text_is_embedded_and_summarised(page: Page) -> None:
    asked = page.ask()
    one(asked, ipw.Textarea).value = "A <new> text of my own."
    one(asked, ipw.Button).click()
    card = one(asked, ipw.HTML).value
    vector = page.explorer.elm.embed(["A <new> text of my own."])[0]
    assert escape(page.explorer.answer(vector, page.manner())) in card and "A &lt;new&gt; text" in card


def test_the_slider_moves_the_summary(page: Page) -> None:
    blended = page.blend()
    slider, card = one(blended, ipw.FloatSlider), one(blended, ipw.HTML)
    for share in (0.0, 1.0):
        slider.value = share
        vector = blend(page.explorer.vectors[0], page.explorer.vectors[1], share)
        assert escape(page.explorer.answer(vector, page.manner())) in card.value
        assert f"near: {page.explorer.neighbours(vector)[0].similarity:.3f}" in card.value


def test_a_cluster_and_a_direction_have_cards(page: Page) -> None:
    cluster = page.cluster([0, 1, 2])
    vector = centre(page.explorer.vectors[[0, 1, 2]])
    assert escape(page.explorer.answer(vector, page.manner())) in one(cluster, ipw.HTML).value
    moved = page.move()
    before = one(moved, ipw.HTML).value
    one(moved, ipw.FloatSlider).value = -2.0
    assert one(moved, ipw.HTML).value != before


def test_a_pasted_vector_is_read_or_refused_in_words(page: Page, tmp_path: Path) -> None:
    pasted = page.paste()
    text, button, card = one(pasted, ipw.Textarea), one(pasted, ipw.Button), one(pasted, ipw.HTML)
    vector = page.explorer.vectors[4]
    path = tmp_path / "vector.json"
    path.write_text(json.dumps(vector.tolist()))
    for given in (str(path), json.dumps(vector.tolist())):
        text.value = given
        button.click()
        assert escape(page.explorer.answer(vector, page.manner())) in card.value
    for given, told in (("1, 2, 3", "this adapter reads (n, 384)"), (str(tmp_path / "no.npy"), "no file")):
        text.value = given
        button.click()
        assert escape(told) in card.value and "error" in card.value


def test_the_map_shows_the_chosen_point(page: Page) -> None:
    mapped = page.map()
    picture = one(mapped, ipw.Image)
    before = bytes(picture.value)
    assert before.startswith(b"\x89PNG")
    one(mapped, ipw.Dropdown).value = 5
    assert bytes(picture.value) != before
    assert escape(page.explorer.val.records[5].target_text) in one(mapped, ipw.HTML).value


def test_settings_decide_how_it_is_decoded(page: Page) -> None:
    assert page.manner() == Manner(max_new_tokens=6)
    page.settings()
    try:
        page.how.value = "beam search"
        assert page.manner().num_beams == page.num_beams.value
        page.how.value = "nearest of several drawn"
        assert (page.manner().candidates, page.manner().temperature) == (page.candidates.value, page.temperature.value)
        page.how.value = "drawn"
        assert (page.manner().candidates, page.manner().num_beams) == (1, 1)
    finally:
        page.how.value = "greedy"


def test_a_watched_run_draws_its_curves_and_stops_at_a_click(tiny_config: SummaryTrainingConfig) -> None:
    view = LiveView(Path(tiny_config.checkpoint_dir))

    class Clicker:
        """Clicks after the fourth step."""

        def log(self, row) -> None:
            if row.kind == "step" and row.step == 4:
                view.button.click()

        def close(self) -> None:
            assert view.button.disabled

    result = train(tiny_config, [view, Clicker()], stop=view.stop_reason)
    assert bytes(view.picture.value).startswith(b"\x89PNG")
    assert result.metrics["steps"] == 4 and result.last.is_file()
    stopped = json.loads((result.best.parent / "result.json").read_text())
    assert stopped["stopped"] == "by hand"
    assert "resume_from" in view.told.value
