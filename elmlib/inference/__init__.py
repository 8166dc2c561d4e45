"""Use of a trained adapter: summaries of texts, of vectors and of whole files, and questions to single vectors."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elmlib.inference.batch import TextPairs, generate_file, read_pairs
    from elmlib.inference.explore import (
        Cards,
        Decoding,
        Explorer,
        Question,
        add_direction,
        interpolate,
        mean_vector,
        newest_run,
        path_or_numbers,
        project,
        read_vector,
    )
    from elmlib.inference.summarizer import Elm

_HOMES = {
    "batch": ["TextPairs", "generate_file", "read_pairs"],
    "explore": [
        *("Cards", "Decoding", "Explorer", "Question", "add_direction", "interpolate", "mean_vector", "newest_run"),
        *("path_or_numbers", "project", "read_vector"),
    ],
    "summarizer": ["Elm"],
}
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:  # imported when first used: torch takes seconds to load
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
