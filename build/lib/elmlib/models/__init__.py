"""The frozen LLM, the adapter and its warm start, and the text embedder."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elmlib.models.adapter import BEST, AdapterFile, EmbeddingAdapter, LinearMap, load_adapter, save_adapter
    from elmlib.models.elm import Sampling, SoftTokenModel, build_model
    from elmlib.models.plan import plan_training
    from elmlib.models.pretrained import (
        default_device,
        encode,
        load_embedder,
        load_llm,
        locate,
        native_bf16,
        public_name,
        revision_of,
    )
    from elmlib.models.warm_start import WarmStart, load_warm_start, warm_started_adapter, whitened_maps

_HOMES = {
    "adapter": ["BEST", "AdapterFile", "EmbeddingAdapter", "LinearMap", "load_adapter", "save_adapter"],
    "elm": ["Sampling", "SoftTokenModel", "build_model"],
    "plan": ["plan_training"],
    "pretrained": [
        *("default_device", "encode", "load_embedder", "load_llm", "locate", "native_bf16", "public_name"),
        "revision_of",
    ],
    "warm_start": ["WarmStart", "load_warm_start", "warm_started_adapter", "whitened_maps"],
}
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:  # imported when first used: torch takes seconds to load
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
