"""Training: losses, the loop, evaluations, checkpoints and loggers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elmlib.training.checkpoint import find_checkpoint
    from elmlib.training.loggers import MetricsRow, RunLogger, read_metrics
    from elmlib.training.losses import info_nce, text_drift
    from elmlib.training.setup import TrainingComponents, build_components
    from elmlib.training.trainer import TrainResult, UnstableTrainingError, train
    from elmlib.training.validation import validate

_HOMES = {
    "checkpoint": ["find_checkpoint"],
    "loggers": ["MetricsRow", "RunLogger", "read_metrics"],
    "losses": ["info_nce", "text_drift"],
    "setup": ["TrainingComponents", "build_components"],
    "trainer": ["TrainResult", "UnstableTrainingError", "train"],
    "validation": ["validate"],
}
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:  # imported when first used: torch takes seconds to load
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
