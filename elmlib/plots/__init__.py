"""Plots of runs, reports and studies, drawn from files. They need no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elmlib.plots.curves import LiveCurves, curves_info, draw_curves, draw_map, plot_curves, plot_map, to_png
    from elmlib.plots.report import draw_report, plot_ranks, plot_similarity, ranks_info, similarity_info
    from elmlib.plots.study import draw_study, draw_variants

_HOMES = {
    "curves": ["LiveCurves", "curves_info", "draw_curves", "draw_map", "plot_curves", "plot_map", "to_png"],
    "report": ["draw_report", "plot_ranks", "plot_similarity", "ranks_info", "similarity_info"],
    "study": ["draw_study", "draw_variants"],
}
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:  # imported when first used: each plot loads only what it needs
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
