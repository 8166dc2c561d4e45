"""`elm plan`: memory and work of a training step, by a closed formula of the LLM's config.json alone.

The LLM is frozen, so autograd keeps for the backward pass of a decoder layer (transformers' Llama, Qwen3 and the like):
the norms' float32 inputs, queries, keys, values, the attention's output and three tensors of the gated MLP. A linear
layer keeps nothing. Tests compare the formula with traces of the training code and with a measured step.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from elmlib.config import OFFLINE_EMBEDDER, OFFLINE_LLM, InputError, PlanConfig, read_settings
from elmlib.models.pretrained import ALIASES, locate

if TYPE_CHECKING:
    from pandas import DataFrame

GIB = 2**30
MARGIN = 1.1  # factor on all totals: fragmentation of the allocator, and the formula's own error
CONTEXT_BYTES = GIB // 2  # CUDA's context and kernels; an assumption, not measured
NORMS = dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "phi3", "granite"), 2)
NORMS |= {"gemma3_text": 4, "glm4": 4}
"""Model types whose layers the formula describes -> norms over the hidden size in each layer."""
_CHUNK = 512  # positions whose logits are in memory at a time: CHUNK of training/losses.py, which would load torch
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Shape(NamedTuple):
    """The sizes of a model, named as in its config.json."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tie_word_embeddings: bool = False

    @property
    def attention(self) -> tuple[int, int]:
        """Sizes of all queries and of all keys of a token."""
        dim = self.head_dim or self.hidden_size // self.num_attention_heads
        return self.num_attention_heads * dim, (self.num_key_value_heads or self.num_attention_heads) * dim

    @property
    def parameters(self) -> int:
        """Weights of a decoder with a gated MLP or, for other model types, of an encoder such as BERT."""
        hidden, inner, layers, table = self.hidden_size, self.intermediate_size, self.num_hidden_layers, self.vocab_size
        if self.model_type in NORMS:
            layer = hidden * (2 * sum(self.attention) + 3 * inner + 2)
            return layers * layer + table * hidden * (1 if self.tie_word_embeddings else 2) + hidden
        products = 6 if self.model_type.startswith("deberta") else 4  # DeBERTa: keys and queries of positions too
        return layers * hidden * (products * hidden + 2 * inner) + (table + 512) * hidden


_QWEN3_4B = Shape("qwen3", 2560, 9728, 36, 32, 151936, 8, 128, True)
SHAPES = {
    OFFLINE_LLM: Shape("llama", 576, 1536, 30, 9, 49152, 3, 64, True),
    OFFLINE_EMBEDDER: Shape("bert", 384, 1536, 6, 12, 30522),
    "Qwen/Qwen3-4B-Instruct-2507": _QWEN3_4B,
    "Qwen/Qwen3-Embedding-4B": _QWEN3_4B._replace(vocab_size=151665),
    "microsoft/deberta-xlarge-mnli": Shape("deberta", 1024, 4096, 40, 16, 50265),  # of 48 layers bert_score keeps 40
}
"""The default models and the guide's: their estimates need no download."""


class StepPlan(NamedTuple):
    """One training step: bytes, without MARGIN, and operations."""

    frozen_llm: int
    adapter_and_moments: int  # weights and AdamW's two moments, float32
    cached_prompt: int  # keys and values, one copy a row
    activations: int  # kept from the forward pass for the backward pass
    losses_and_gradients: int  # the most beyond these at any moment: logits, drift loss or a recomputed layer too
    operations: float  # of all matrix products, forward and backward

    @property
    def memory(self) -> int:
        """Bytes of the whole step."""
        return sum(self[:5])


def plan_training(config: PlanConfig) -> "DataFrame":
    """Memory of a training step in GiB, plain and with gradient checkpointing (columns): its parts for the config's
    batch size, without margin; then, with margin and CUDA's context, the total for each batch size, and the largest
    batch size for each card. Raises as `read_shape`, and InputError for an LLM whose layers the formula does not
    describe, such as a mixture of experts."""
    import pandas

    shape, evaluation = read_shape(config.llm_model_name), 0
    if shape.model_type not in NORMS:
        raise InputError(f"{config.llm_model_name} is a {shape.model_type!r}; `elm plan` knows {', '.join(NORMS)}")
    if config.evaluation_device != "cpu":  # both stay on the card between evaluations
        evaluation = (2 if config.use_bf16 else 4) * read_shape(config.embedding_model_name).parameters
        evaluation += 4 * read_shape(config.bertscore_model).parameters
    columns: dict[str, dict[str, float]] = {}
    for column, checkpointing in (("plain", False), ("checkpointing", True)):
        steps = {size: plan_step(config, shape, size, checkpointing) for size in {*_BATCH_SIZES, config.batch_size}}
        totals = {n: MARGIN * (steps[n].memory + evaluation) + CONTEXT_BYTES for n in sorted(steps)}
        *parts, operations = steps[config.batch_size]._asdict().items()
        rows = {name.replace("_", " "): x / GIB for name, x in (*parts, ("embedder_and_BERTScore_encoder", evaluation))}
        rows["operations (TFLOP)"] = operations[1] / 1e12
        rows |= {f"total, batch size {size}": total / GIB for size, total in totals.items()}
        for card in config.gpu_memory:
            fitting = [size for size, total in totals.items() if total <= card * GIB]
            rows[f"largest batch size on a card of {card:g} GiB"] = max(fitting, default=0)
        columns[column] = rows
    return pandas.DataFrame(columns).round(2)


def plan_step(config: PlanConfig, shape: Shape, batch_size: int, checkpointing: bool) -> StepPlan:
    """The closed formula: bytes and operations of one optimizer step of `batch_size` full rows."""
    kind, hidden, inner, layers, heads, vocab, *_ = shape
    queries, keys = shape.attention
    width, rows, positions = (2 if config.use_bf16 else 4), batch_size, batch_size * config.answer_tokens
    own = config.num_soft_tokens + config.answer_tokens - 1  # tokens of a row after the prompt
    seen = own + config.prompt_tokens  # tokens that attention reads
    run = seen if checkpointing else own  # tokens of a row in each layer: the prompt's are cached, or computed again
    trained = (config.embedding_dim + 1) * config.hidden_dim + hidden
    trained += (config.embedding_dim + config.hidden_dim + 2) * config.num_soft_tokens * hidden

    norm = 4 if kind == "gemma3_text" else width  # bytes of a number that it keeps; load_llm fuses the others
    per_token = norm * hidden * NORMS[kind] + width * (2 * queries + 3 * inner)
    per_token += norm * (queries + keys) if kind in ("qwen3", "gemma3_text") else 0  # norms of queries and keys
    layer = rows * (run * per_token + 2 * width * queries * seen)  # with keys and values repeated for all heads
    if config.fused_attention:
        layer += rows * run * (width * seen + 4 * heads)  # the mask, and the log of each sum
    else:
        layer += rows * run * ((6 if config.use_bf16 else 4) * heads * seen - width * queries)  # weights, no output
    if checkpointing:  # every layer keeps its input alone; in the backward pass it is run again, gradients beside it
        prefix, activations = 0, rows * seen * hidden * (layers * width + 8)
        again = layer + rows * run * width * 5 * inner // 2
    else:
        prefix, again = 2 * width * keys * layers * rows * config.prompt_tokens, 0
        activations = layers * layer - prefix
    chunks = -(-positions // _CHUNK)  # from the second chunk on, the one before it is still in memory
    logits = 4 * vocab * -(-positions // chunks) * ((2.5 if config.use_bf16 else 2) + (chunks > 1))
    gathered = positions * config.drift_top_k * hidden * (6 if config.use_bf16 else 4)  # token embeddings, drift loss
    losses = max(int(logits), gathered, again, 4 * trained - activations)

    linear = hidden * (2 * queries + 2 * keys + 3 * inner)
    work = 4 * linear + 12 * seen * queries  # per token and layer: forward, and backward to the inputs alone
    work += 2 * (linear - hidden * inner) + 4 * seen * queries if checkpointing else 0  # all but the last product again
    flops = float(rows * run * layers * work + 4 * positions * vocab * hidden)
    return StepPlan(width * shape.parameters, 12 * trained, prefix, activations, losses, flops)


def read_shape(name: str) -> Shape:
    """The sizes of a model: from SHAPES, or the config.json of a local folder, of the hub's cache or of the hub. Raises
    InputError as `locate` does, and for a config without the sizes that the formula needs."""
    if shape := SHAPES.get(ALIASES.get(name, name)) or SHAPES.get(name.lower()):
        return shape
    path = Path(locate(name), "config.json")
    if not path.is_file():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(locate(name), "config.json"))
    config = read_settings(path)
    kinds = {key: str if key == "model_type" else int for key in Shape._fields[:6]}
    if missing := [key for key, kind in kinds.items() if not isinstance(config.get(key), kind) or not config[key]]:
        raise InputError(f"{path}: no {', '.join(missing)}, which `elm plan` needs; it cannot estimate this model")
    return Shape(**{key: config[key] for key in Shape._fields if key in config})
