"""elmlib: a frozen language model learns to read a text embedding.

The names below are imported when they are first used: `import elmlib` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elmlib.config import SummaryTrainingConfig
    from elmlib.data import SummaryDataset, build_corpus, filter_corpus
    from elmlib.evaluation import BERTScoreEvaluator, create_evaluator
    from elmlib.inference import Elm, generate_file
    from elmlib.models import EmbeddingAdapter
    from elmlib.training import info_nce, text_drift, train

_HOMES = {
    "config": ["SummaryTrainingConfig"],
    "data": ["SummaryDataset", "build_corpus", "filter_corpus"],
    "models": ["EmbeddingAdapter"],
    "evaluation": ["BERTScoreEvaluator", "create_evaluator"],
    "training": ["info_nce", "text_drift", "train"],
    "inference": ["Elm", "generate_file"],
}
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    for package, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{package}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def version_line() -> str:
    """Versions of Python, elmlib, torch and transformers, and the device: the second cell of every notebook."""
    import platform
    from importlib.metadata import version

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = ", ".join(f"{name} {version(name)}" for name in ("elmlib", "torch", "transformers"))
    return f"Python {platform.python_version()}, {versions}, {device}"
