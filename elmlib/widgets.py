"""The explorer in a notebook: change something on the left of a card, and the summary on it follows."""

import threading
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import ipywidgets as ipw
import numpy as np

from elmlib.exploring import Controls, Explorer, Manner, blend, centre, move, parse_vector, project, read_vector
from elmlib.plots import plot_map, to_png

_WIDE = ipw.Layout(width="95%")
_GREEDY, _BEAMS, _DRAWN, _NEAREST = "greedy", "beam search", "drawn", "nearest of several drawn"


class Known(NamedTuple):
    """What can stand beside a summary."""

    text: str = ""
    reference: str = ""
    controls: Controls | None = None


class Page:
    """Widgets around one explorer; all of them decode as `settings` says."""

    def __init__(self, explorer: Explorer):
        self.explorer = explorer
        self._texts = [(label, row) for row, label in enumerate(explorer.labels())]
        self._one_at_a_time = threading.Lock()  # JupyterLab calls from a thread of its own
        self.how = ipw.Dropdown(options=(_GREEDY, _BEAMS, _DRAWN, _NEAREST), description="decoding")
        self.num_beams = _whole("beams", 4, 2, 8)
        self.temperature = ipw.FloatSlider(
            value=0.7, min=0.1, max=1.5, step=0.1, description="temperature", continuous_update=False
        )
        self.top_p = ipw.FloatSlider(
            value=0.95, min=0.05, max=1.0, step=0.05, description="top-p", continuous_update=False
        )
        self.candidates = _whole("candidates", 8, 2, 32)
        self.length = _whole("tokens", 32, 4, 128)

    def manner(self) -> Manner:
        """How the next answer is decoded."""
        drawn = self.how.value in (_DRAWN, _NEAREST)
        return Manner(
            num_beams=self.num_beams.value if self.how.value == _BEAMS else 1,
            temperature=self.temperature.value if drawn else 0.0,
            top_p=self.top_p.value,
            candidates=self.candidates.value if self.how.value == _NEAREST else 1,
            max_new_tokens=self.length.value,
        )

    def settings(self) -> ipw.Widget:
        """How answers are decoded: greedily, by beams, drawn, or the one of several that means most nearly the same."""
        return ipw.VBox([
            ipw.HBox([self.how, self.length]),
            ipw.HBox([self.num_beams, self.temperature, self.top_p]),
            self.candidates,
        ])  # fmt: skip

    def ask(self) -> ipw.Widget:
        """Pick a validation text or type one: its summary from the vector alone, beside all that it can be held to."""
        choice, card = self._choice("text"), ipw.HTML()
        typed = ipw.Textarea(placeholder="... or type a text of your own", layout=ipw.Layout(width="95%", height="6em"))
        button = ipw.Button(description="Summarise", button_style="primary")

        def show(vector: Callable[[], np.ndarray], text: str, reference: str) -> None:
            row = choice.value
            self._follow(card, vector, lambda: Known(text, reference, self.explorer.controls(row, self.manner())))

        def show_row(*_: object) -> None:
            record = self.explorer.val.records[choice.value]
            show(lambda: self.explorer.vectors[choice.value], record.source_text or "", record.target_text)

        def show_typed(*_: object) -> None:
            show(lambda: self.explorer.elm.embed([typed.value])[0], typed.value, "")

        choice.observe(show_row, "value")
        button.on_click(show_typed)
        show_row()
        return ipw.VBox([choice, typed, button, card])

    def blend(self) -> ipw.Widget:
        """Two texts and a slider between them."""
        first, second, card = self._choice("text A"), self._choice("text B", 1), ipw.HTML()
        share = ipw.FloatSlider(
            value=0.5, min=0.0, max=1.0, step=0.1, description="A to B", continuous_update=False, layout=_WIDE
        )

        def vector() -> np.ndarray:
            return blend(self._vector(first), self._vector(second), share.value)

        return self._live(card, [first, second, share], vector)

    def move(self) -> ipw.Widget:
        """A text moved along the direction from B to A."""
        start, a, b = self._choice("start"), self._choice("text A", 1), self._choice("text B", 2)
        steps = ipw.FloatSlider(
            value=1.0, min=-2.0, max=2.0, step=0.25, description="A minus B", continuous_update=False, layout=_WIDE
        )

        def vector() -> np.ndarray:
            return move(self._vector(start), self._vector(a), self._vector(b), steps.value)

        return self._live(ipw.HTML(), [start, a, b, steps], vector)

    def cluster(self, rows: Sequence[int]) -> ipw.Widget:
        """Several texts, `rows` of them chosen: what are they about together?"""
        chosen = ipw.SelectMultiple(options=self._texts, value=tuple(rows), rows=8, layout=_WIDE)
        return self._live(ipw.HTML(), [chosen], lambda: centre(self.explorer.vectors[list(chosen.value)]))

    def paste(self) -> ipw.Widget:
        """A vector out of a file, or its numbers."""
        given = ipw.Textarea(placeholder="a path (.safetensors, .npy, text), or the numbers themselves", layout=_WIDE)
        row = ipw.IntText(value=0, description="row")
        button, card = ipw.Button(description="Summarise", button_style="primary"), ipw.HTML()

        def vector() -> np.ndarray:
            text = given.value.strip()
            return read_vector(Path(text).expanduser(), row.value) if _is_path(text) else parse_vector(text)

        button.on_click(lambda _: self._follow(card, vector, Known))
        return ipw.VBox([given, row, button, card])

    def map(self) -> ipw.Widget:
        """All validation texts on their first two principal components; the one that is chosen says what it is."""
        points, choice, card = project(self.explorer.vectors), self._choice("point"), ipw.HTML()
        groups = [record.source.split(".")[0].split(":")[0] for record in self.explorer.val.records]
        picture = ipw.Image(format="png", layout=ipw.Layout(width="48%"))

        def show(*_: object) -> None:
            picture.value = _png(points, groups, choice.value)
            record = self.explorer.val.records[choice.value]
            known = Known(record.source_text or "", record.target_text)
            self._follow(card, lambda: self.explorer.vectors[choice.value], lambda: known)

        choice.observe(show, "value")
        show()
        card.layout = ipw.Layout(width="48%")
        return ipw.VBox([choice, ipw.HBox([picture, card])])

    def _choice(self, label: str, row: int = 0) -> ipw.Dropdown:
        return ipw.Dropdown(options=self._texts, value=row, description=label, layout=_WIDE)

    def _vector(self, choice: ipw.Dropdown) -> np.ndarray:
        return self.explorer.vectors[choice.value]

    def _live(self, card: ipw.HTML, inputs: list[ipw.Widget], vector: Callable[[], np.ndarray]) -> ipw.Widget:
        def show(*_: object) -> None:
            self._follow(card, vector, Known)

        for widget in inputs:
            widget.observe(show, "value")
        show()
        return ipw.VBox([*inputs, card])

    def _follow(self, card: ipw.HTML, vector: Callable[[], np.ndarray], known: Callable[[], Known]) -> None:
        """Write the answer to a vector onto `card` as it grows, then all that stands beside it."""
        with self._one_at_a_time:
            try:
                given, text = vector(), ""
                for text in self.explorer.stream(given, self.manner()):
                    card.value = _lines([("summary", text)])
                beside, similarity = known(), self.explorer.similarity(text, given)
                rows = [("summary", text), ("similarity", f"{similarity:.3f} (cosine of the summary to the vector)")]
                rows += [("reference", beside.reference)] if beside.reference else []
                if beside.controls:
                    rows += [
                        ("another text's vector says", beside.controls.shuffled),
                        ("the mean vector says", beside.controls.mean),
                    ]
                for it in self.explorer.neighbours(given):
                    rows.append((f"near: {it.similarity:.3f}", f"{it.source_id}: {it.summary}"))
                card.value = _lines([*rows, *([("text", beside.text)] if beside.text else [])])
            except (ValueError, OSError) as error:  # of what was typed; a callback's exception is seen by nobody
                card.value = _lines([("error", str(error))])


def _lines(rows: Sequence[tuple[str, str]]) -> str:
    """An HTML table of names and values; the summary stands out."""
    cells = (
        f"<tr><td style='vertical-align:top;padding-right:1em;color:#666'>{escape(name)}</td>"
        f"<td style='white-space:pre-wrap{';font-weight:bold' if name == 'summary' else ''}'>{escape(value[:1500])}"
        "</td></tr>"
        for name, value in rows
    )
    return f"<table class='elm-card'>{''.join(cells)}</table>"


def _png(points: np.ndarray, groups: Sequence[str], chosen: int) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    plot_map(points, groups, chosen, figure.subplots())
    return to_png(figure, dpi=110)


def _whole(label: str, value: int, least: int, most: int) -> ipw.IntSlider:
    return ipw.IntSlider(value=value, min=least, max=most, description=label, continuous_update=False)


def _is_path(text: str) -> bool:
    return not text.lstrip("[-+.")[:1].isdigit()
