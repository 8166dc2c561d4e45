"""A study: a hyperparameter search, or a grid of variants, whose trials are executed notebooks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elmlib.study.results import (
        best_trial,
        cells_frame,
        default_trial,
        open_study,
        results_frame,
        serve_dashboard,
        trials_frame,
        variants_frame,
    )
    from elmlib.study.search_space import load_grid, load_space
    from elmlib.study.study import StudyFailedError, run_study, submit_launchers
    from elmlib.study.trial import OptunaCallback

_HOMES = {
    "results": [
        *("best_trial", "cells_frame", "default_trial", "open_study", "results_frame", "serve_dashboard"),
        *("trials_frame", "variants_frame"),
    ],
    "search_space": ["load_grid", "load_space"],
    "study": ["StudyFailedError", "run_study", "submit_launchers"],
    "trial": ["OptunaCallback"],
}
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:  # imported when first used, so that the front is light
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
