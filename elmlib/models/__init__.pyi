from .adapter import BEST as BEST, EmbeddingAdapter as EmbeddingAdapter, LinearMap as LinearMap
from .adapter import find_adapter as find_adapter, load_adapter as load_adapter, save_adapter as save_adapter
from .elm import Sampling as Sampling, SoftTokenModel as SoftTokenModel, build_model as build_model
from .plan import plan_training as plan_training
from .pretrained import (
    count_cut as count_cut,
    default_device as default_device,
    encode as encode,
    load_embedder as load_embedder,
)
from .pretrained import load_llm as load_llm, locate as locate, public_name as public_name
from .warm_start import WarmStart as WarmStart, load_warm_start as load_warm_start, whitened_maps as whitened_maps
