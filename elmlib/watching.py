"""A training run watched from its notebook: curves that grow while it trains, and a button that stops and saves it."""

import threading
import time
from pathlib import Path
from typing import Self

import ipywidgets as ipw
from IPython.display import display

from elmlib.plots import draw_curves, to_png
from elmlib.tracking import Row

_PAUSES = 5.0, 20.0  # least and most seconds between two drawings of the training loss; an evaluation is drawn at once
_SHARE = 0.03  # of the time that drawing may take


class LiveView:
    """One of a run's trackers: shows the curves of `run`, each validation figure with its control as a second line.

    JupyterLab (4.4 and later, with ipykernel 7) delivers a click while the cell is busy, on a thread of its own.
    """

    def __init__(self, run: Path):
        self.run = run
        self.stopped = threading.Event()
        self.picture = ipw.Image(format="png", layout=ipw.Layout(width="100%"))
        self.button = ipw.Button(description="Stop and save", icon="stop", button_style="warning")
        self.told = ipw.HTML()
        self.button.on_click(self._stop)
        self._next = 0.0

    def show(self) -> Self:
        """Display picture and button where the cell's output goes."""
        display(ipw.VBox([self.picture, ipw.HBox([self.button, self.told])]))
        # ipykernel 7.4 hands a click to the shell that last spoke for the button, which is busy training. Without this
        # mark it goes where JupyterLab sends it, to a thread of its own.
        vars(self.button.comm).pop("_reply_subshell_id", None)
        return self

    def log(self, row: Row) -> None:
        """Draw what has been logged so far, now and then."""
        if row.kind == "eval" or time.monotonic() > self._next:
            self._draw()

    def stop_reason(self) -> str:
        """Asked by the run after each step."""
        return "by hand" if self.stopped.is_set() else ""

    def close(self) -> None:
        """The run is over."""
        self._draw()
        self.button.disabled = True

    def _stop(self, _: ipw.Button) -> None:
        self.stopped.set()
        self.button.disabled = True
        self.told.value = 'stops after this step; <code>resume_from = "latest"</code> goes on from there'

    def _draw(self) -> None:
        started = time.monotonic()
        self.picture.value = to_png(draw_curves(self.run), dpi=80)
        least, most = _PAUSES
        now = time.monotonic()
        self._next = now + min(max(least, (now - started) / _SHARE), most)
