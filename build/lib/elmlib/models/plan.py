"""`elm plan`: the memory and the work of a training step, by a closed formula of the LLM's config.json alone.

It counts what autograd keeps in the decoder layers of transformers (Llama, Qwen3 and others of their shape): the LLM is
frozen, so a linear layer keeps nothing, a norm its float32 input, attention its queries, keys, values and output, the
gated MLP three tensors. A test compares it with a measured step.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from elmlib.config import OFFLINE_EMBEDDER, OFFLINE_LLM, PlanConfig
from elmlib.models.pretrained import ALIASES, find

if TYPE_CHECKING:
    import pandas

GIB = 2**30
MARGIN = 1.1
"""On everything: fragmentation of the allocator, and the formula's own error."""
CONTEXT_BYTES = GIB // 2
"""CUDA's context and kernels; an assumption, not measured."""

_CHUNK = 512  # positions whose logits are in memory at a time: CHUNK of training/losses.py, which would load torch
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_ENCODERS = ("bert", "roberta", "xlm-roberta", "mpnet", "deberta", "deberta-v2")
_QWEN3_4B = {
    "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True, "model_type": "qwen3",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    OFFLINE_LLM: {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "tie_word_embeddings": True, "model_type": "llama", "vocab_size": 49152,
    },
    OFFLINE_EMBEDDER: {
        "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12,
        "model_type": "bert", "vocab_size": 30522,
    },
    "Qwen/Qwen3-4B-Instruct-2507": {"vocab_size": 151936, **_QWEN3_4B},
    "Qwen/Qwen3-Embedding-4B": {"vocab_size": 151665, **_QWEN3_4B},
    "microsoft/deberta-xlarge-mnli": {  # bert_score reads its layer 40 and drops the eight after it
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 16,
        "model_type": "deberta", "vocab_size": 50265,
    },
}  # fmt: skip
"""The config.json of the default models and the guide's, for plans before any download."""


class StepPlan(NamedTuple):
    """Memory of one training step, bytes, without MARGIN."""

    llm: int
    adapter: int
    """Its weights and AdamW's two moments, float32."""
    prefix: int
    """Keys and values of the prompt, one copy a row."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    losses: int
    """The most that the losses or the adapter's gradients hold beyond that."""
    flops: float
    """Floating-point operations of the matrix products, forward and backward."""

    @property
    def step(self) -> int:
        """Bytes of the whole step."""
        return self.llm + self.adapter + self.prefix + self.activations + self.losses


class Plan(NamedTuple):
    """The estimates of `elm plan`."""

    config: PlanConfig
    shape: dict[str, Any]
    evaluation: int
    """Bytes of the embedder and of BERTScore's encoder, which stay on the card between evaluations."""

    def estimate(self, batch_size: int, checkpointing: bool) -> StepPlan:
        """One step of `batch_size` rows."""
        return plan_step(self.config, self.shape, batch_size, checkpointing)

    def card_bytes(self, batch_size: int, checkpointing: bool) -> float:
        """What a card must have: step, evaluation models, margin and CUDA's context."""
        return MARGIN * (self.estimate(batch_size, checkpointing).step + self.evaluation) + CONTEXT_BYTES

    def summary(self) -> str:
        """The models and the work of a step."""
        config = self.config
        plain, checkpointed = (self.estimate(config.batch_size, way).flops / 1e12 for way in (False, True))
        return (
            f"{config.llm_model_name}: {_decoder_parameters(self.shape):,} parameters, frozen; adapter: "
            f"{_adapter_parameters(config, self.shape):,}\none step of {config.batch_size} rows of "
            f"{config.answer_tokens} answer tokens: {plain:.3g} TFLOP, {checkpointed:.3g} with gradient checkpointing\n"
            f"All totals include {MARGIN - 1:.0%} margin and {CONTEXT_BYTES / GIB:.1f} GiB for CUDA's context. A card "
            "without bfloat16 (T4, V100) needs the float32 LLM: --no-bf16."
        )

    def to_frame(self) -> "pandas.DataFrame":
        """GiB by part for `batch_size`, then the total for other batch sizes; plain and with checkpointing."""
        import pandas

        steps = {way: self.estimate(self.config.batch_size, way) for way in (False, True)}
        rows: dict[str, list[float]] = {
            label: [getattr(steps[way], name) / GIB for way in (False, True)]
            for name, label in (
                ("llm", "LLM, frozen"), ("adapter", "adapter and AdamW's moments"),
                ("prefix", "keys and values of the prompt"), ("activations", "activations"),
                ("losses", "logits, losses, gradients"),
            )
        }  # fmt: skip
        rows["embedder and BERTScore encoder"] = [self.evaluation / GIB] * 2
        for size in sorted({*_BATCH_SIZES[:6], self.config.batch_size}):
            rows[f"total, batch size {size}"] = [self.card_bytes(size, way) / GIB for way in (False, True)]
        return pandas.DataFrame(rows, index=["plain, GiB", "checkpointing, GiB"]).T.round(2)

    def fits_frame(self) -> "pandas.DataFrame":
        """The largest batch size that fits each card; 0 where none does."""
        import pandas

        rows = {
            card: [
                max((size for size in _BATCH_SIZES if self.card_bytes(size, way) <= parse_memory(card)), default=0)
                for way in (False, True)
            ]
            for card in self.config.gpu_memory
        }
        return pandas.DataFrame(rows, index=["largest batch, plain", "largest batch, checkpointing"]).T


def plan_training(config: PlanConfig) -> Plan:
    """Estimate a training step. Raises FileNotFoundError for a model without a config, ValueError for one whose layers
    the formula does not describe (a mixture of experts)."""
    shape = read_shape(config.llm_model_name)
    if kind := next((name for name in ("num_experts", "num_local_experts", "n_routed_experts") if shape.get(name)), ""):
        raise ValueError(f"{config.llm_model_name} is a mixture of experts ({kind}), which `elm plan` cannot estimate")
    evaluation = 0
    if config.evaluation_device != "cpu":
        evaluation = (2 if config.bf16 else 4) * _parameters(read_shape(config.embedding_model_name))
        evaluation += 4 * _parameters(read_shape(config.bertscore_model))
    return Plan(config, shape, evaluation)


def plan_step(config: PlanConfig, shape: dict[str, Any], batch_size: int, checkpointing: bool) -> StepPlan:
    """The closed formula: bytes and operations of one optimizer step of `batch_size` full rows."""
    hidden, inner, layers, vocab = (
        shape[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    heads, queries, keys = _attention(shape)
    width, bf16 = (2 if config.bf16 else 4), config.bf16
    own = config.num_soft_tokens + config.answer_tokens - 1  # of a row; the prompt's are shared unless recomputed
    seen = own + config.prompt_tokens  # tokens that attention reads
    rows, positions = batch_size, batch_size * config.answer_tokens
    trained = _adapter_parameters(config, shape)

    per_token = 2 * 4 * hidden + width * (2 * queries + 3 * inner)  # two norms; q and attention's output; the MLP
    if shape.get("model_type") in ("qwen3", "gemma3_text"):
        per_token += 4 * (queries + keys)  # norms of queries and keys
    layer = rows * (own * per_token + 2 * width * queries * seen)  # keys and values, repeated for all heads
    if config.fused_attention:
        layer += rows * own * (width * seen + 4 * heads)  # the mask, and the log of each sum
    else:
        layer += rows * own * ((4 + (2 if bf16 else 0)) * heads * seen - width * queries)  # the weights, no output
    prefix = 2 * width * keys * layers * rows * config.prompt_tokens
    activations = layers * layer - prefix
    linear = hidden * (2 * queries + 2 * keys + 3 * inner)
    work = 4.0 * rows * own * layers * linear + 12 * rows * own * seen * queries * layers
    if (
        checkpointing
    ):  # every layer keeps its input alone, for the prompt's tokens too; all but its last product is redone
        prefix, activations = 0, rows * seen * hidden * (layers * width + 8)
        work = 2.0 * rows * seen * layers * (3 * linear - hidden * inner) + 16 * rows * seen**2 * queries * layers
    chunks = -(-positions // _CHUNK)
    chunk = 4 * vocab * -(-positions // chunks)
    logits = chunk * ((2.5 if bf16 else 2) + (chunks > 1))  # from the second chunk on, the one before is alive
    gathered = positions * config.drift_top_k * hidden * (6 if bf16 else 4)  # token embeddings in the drift loss
    losses = max(int(logits), gathered, 4 * trained - activations)
    work += 4.0 * positions * vocab * hidden
    llm = width * _decoder_parameters(shape)
    return StepPlan(llm, 12 * trained, prefix, activations, losses, work)


def parse_memory(text: str) -> float:
    """Bytes of `16GiB`, `40GB` or a plain number of bytes; raises ValueError for anything else."""
    for unit, size in (("GiB", GIB), ("GB", 10**9), ("MiB", 2**20), ("MB", 10**6), ("", 1)):
        if text.endswith(unit):
            try:
                return float(text.removesuffix(unit)) * size
            except ValueError:
                break
    raise ValueError(f"memory {text!r}; expected a size such as 16GiB or 40GB")


def read_shape(name: str) -> dict[str, Any]:
    """The config.json of a model: of its folder, one of SHAPES, of the hub's cache, or of the hub.

    Raises FileNotFoundError for a model that is in none of these places.
    """
    name = ALIASES.get(name, name)
    if name in SHAPES:
        return SHAPES[name]
    folder = find(name)
    if Path(folder).is_dir():
        return json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return json.loads(Path(hf_hub_download(folder, "config.json")).read_text(encoding="utf-8"))
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"no config.json of {name!r}: no such folder, and the hub gave none ({error})"
        ) from error


def _attention(shape: dict[str, Any]) -> tuple[int, int, int]:
    """Heads, and the sizes of all queries and of all keys of a token."""
    heads = shape["num_attention_heads"]
    dim = shape.get("head_dim") or shape["hidden_size"] // heads
    return heads, heads * dim, (shape.get("num_key_value_heads") or heads) * dim


def _parameters(shape: dict[str, Any]) -> int:
    if shape.get("model_type") not in _ENCODERS:
        return _decoder_parameters(shape)
    hidden, relative = shape["hidden_size"], str(shape["model_type"]).startswith("deberta")
    layer = (6 if relative else 4) * hidden**2 + 2 * hidden * shape["intermediate_size"]  # with relative positions
    return shape["num_hidden_layers"] * layer + (shape["vocab_size"] + 512) * hidden


def _decoder_parameters(shape: dict[str, Any]) -> int:
    _, queries, keys = _attention(shape)
    hidden, table = shape["hidden_size"], shape["vocab_size"] * shape["hidden_size"]
    layer = hidden * (2 * queries + 2 * keys + 3 * shape["intermediate_size"]) + 2 * hidden
    return shape["num_hidden_layers"] * layer + table * (1 if shape.get("tie_word_embeddings") else 2) + hidden


def _adapter_parameters(config: PlanConfig, shape: dict[str, Any]) -> int:
    out, llm_dim = config.num_soft_tokens * shape["hidden_size"], shape["hidden_size"]
    linear = (config.embedding_dim + 1) * out
    return linear + (config.embedding_dim + 1) * config.hidden_dim + (config.hidden_dim + 1) * out + llm_dim
