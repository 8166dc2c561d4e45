from .adapter import (
    AdapterFile as AdapterFile,
    BEST as BEST,
    EmbeddingAdapter as EmbeddingAdapter,
    LinearMap as LinearMap,
    load_adapter as load_adapter,
    save_adapter as save_adapter,
)
from .elm import Sampling as Sampling, SoftTokenModel as SoftTokenModel, build_model as build_model
from .plan import plan_training as plan_training
from .pretrained import (
    default_device as default_device,
    encode as encode,
    load_embedder as load_embedder,
    load_llm as load_llm,
    locate as locate,
    native_bf16 as native_bf16,
    public_name as public_name,
    revision_of as revision_of,
)
from .warm_start import (
    WarmStart as WarmStart,
    load_warm_start as load_warm_start,
    warm_started_adapter as warm_started_adapter,
    whitened_maps as whitened_maps,
)
