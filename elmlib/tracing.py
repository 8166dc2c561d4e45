"""What a training step needs on a device, from the model's config alone: no weights are loaded, no number computed.

The step is traced on fake tensors, which have shapes and no values. Each is counted when it is made and when it is
freed, so the memory is that of the very code that trains. A few layers are traced; the others are like them.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from elmlib.adapter import EmbeddingAdapter, mean_token_embedding
from elmlib.benchmark_commands import PlanConfig
from elmlib.data import Batch
from elmlib.drift import DriftReadout, text_drift
from elmlib.losses import Predictions, info_nce, predict_tokens
from elmlib.model import Elm
from elmlib.prompts import PromptIds
from elmlib.ridge import LinearMap


class StepPlan(NamedTuple):
    """Memory of one training step, bytes."""

    llm: int
    """The frozen LLM's weights."""
    adapter: int
    """Its weights and AdamW's two moments, float32."""
    prefix: int
    """Keys and values of the prompt, one copy a row."""
    activations: int
    """What the forward pass leaves for the backward pass."""
    logits: int
    """What the losses hold beyond that, at most."""
    backward: int
    """What the backward pass holds beyond all of these, at most, the adapter's gradients among it."""

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self)


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside: those alive, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.alive -= size


class _Tokenizer(NamedTuple):
    """All that an `Elm` asks of its tokenizer before it generates."""

    eos_token_id: int = 0


class _Fake(NamedTuple):
    """A step's inputs, without values."""

    elm: Elm
    batch: Batch
    drift: DriftReadout


def trace_step(llm_config: PretrainedConfig, config: PlanConfig, checkpointing: bool) -> StepPlan:
    """One optimizer step behind others: the optimizer's moments exist, gradients do not."""
    whole = StepPlan(*_of_all_layers(llm_config, lambda llm: trace_layers(llm, config, checkpointing)))
    # Activations are freed layer by layer: the more of them, the less the backward pass can need beyond them.
    return whole._replace(backward=max(whole.backward, 0))


def count_flops(llm_config: PretrainedConfig, config: PlanConfig, checkpointing: bool) -> int:
    """Floating-point operations of one step's matrix products, forward and backward."""
    return _of_all_layers(llm_config, lambda llm: [_count_layers(llm, config, checkpointing)])[0]


def _of_all_layers(llm_config: PretrainedConfig, measure: Callable[[PretrainedConfig], Sequence[int]]) -> Sequence[int]:
    """`measure` with one and with two periods of the LLM's layers; all its layers follow in proportion."""
    layers, period = llm_config.num_hidden_layers, _period(llm_config)
    few = layers % period + period
    if layers <= few + period:
        return measure(llm_config)
    one, two = (measure(_cut(llm_config, count)) for count in (few, few + period))
    more = (layers - few) // period
    return [start + more * (end - start) for start, end in zip(one, two, strict=True)]


def _period(llm_config: PretrainedConfig) -> int:
    """After how many layers their kinds come again; 1 where all are alike."""
    kinds = getattr(llm_config, "layer_types", None) or [""]
    return next(p for p in range(1, len(kinds) + 1) if kinds[p:] == kinds[:-p])


def _cut(llm_config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The config of the same LLM with its first `layers` layers alone."""
    cut = copy.deepcopy(llm_config)
    cut.num_hidden_layers = layers
    if getattr(cut, "layer_types", None):
        cut.layer_types = cut.layer_types[:layers]
    return cut


def trace_layers(llm_config: PretrainedConfig, config: PlanConfig, checkpointing: bool) -> StepPlan:
    """`trace_step` through every layer."""
    with FakeTensorMode(), PeakBytes() as memory:
        fake = _inputs(llm_config, config, checkpointing)
        weights = sum(p.untyped_storage().nbytes() for p in set(fake.elm.llm.parameters()))
        trained = sum(p.numel() for p in fake.elm.adapter.parameters())
        fake.elm(fake.batch)  # reads the prompt, which later steps share
        before, memory.peak = memory.alive, memory.alive
        soft, hidden = fake.elm(fake.batch)
        activations, memory.peak = memory.alive - before, memory.alive
        loss = _losses(fake, soft, hidden, config)
        logits = memory.peak - before - activations
        memory.peak = memory.alive
        del soft, hidden
        loss.backward()
        backward = memory.peak - before - activations - logits
    prefix = 0 if checkpointing else config.batch_size * _prompt_bytes(llm_config, config)
    return StepPlan(
        llm=weights,
        adapter=12 * trained,
        prefix=prefix,
        activations=activations - prefix,
        logits=logits,
        backward=max(0, backward),
    )


def _count_layers(llm_config: PretrainedConfig, config: PlanConfig, checkpointing: bool) -> int:
    """`count_flops` through every layer."""
    with FakeTensorMode():
        fake = _inputs(llm_config, config, checkpointing)
        fake.elm(fake.batch)  # reads the prompt, which later steps share
        with FlopCounterMode(display=False) as counter:
            _losses(fake, *fake.elm(fake.batch), config).backward()
    return counter.get_total_flops()


def _prompt_bytes(llm_config: PretrainedConfig, config: PlanConfig) -> int:
    """Keys and values of the prompt in one row."""
    heads = getattr(llm_config, "num_key_value_heads", None) or llm_config.num_attention_heads
    dim = getattr(llm_config, "head_dim", None) or llm_config.hidden_size // llm_config.num_attention_heads
    width = 2 if config.bf16 else 4
    return 2 * llm_config.num_hidden_layers * heads * dim * config.prompt_tokens * width


def _inputs(llm_config: PretrainedConfig, config: PlanConfig, checkpointing: bool) -> _Fake:
    """Models and a batch of full rows, on the CPU and without values."""
    attention = "sdpa" if config.fused_attention else "eager"  # as `load_llm` has it
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    llm = AutoModelForCausalLM.from_config(llm_config, attn_implementation=attention, dtype=dtype)
    llm.requires_grad_(False).eval()
    table = llm.get_input_embeddings().weight
    dim = table.shape[1]
    adapter = EmbeddingAdapter(config.embedding_dim, dim, config.num_soft_tokens, config.hidden_dim, 0.1, 1.0)
    elm = Elm(llm, cast(PreTrainedTokenizerBase, _Tokenizer()), adapter, checkpointing)
    size, length = config.batch_size, config.answer_tokens
    batch = Batch(
        embeddings=torch.zeros(size, config.embedding_dim),
        labels=torch.zeros(size, length, dtype=torch.long),
        sources=torch.zeros(size, dtype=torch.long),
        prompt=PromptIds([0] * config.prompt_tokens, [], 0),
        rows=[],
    )
    readout = LinearMap(torch.zeros(config.embedding_dim, dim), torch.zeros(config.embedding_dim))
    return _Fake(elm, batch, DriftReadout(table, torch.zeros(len(table)), readout))


def _losses(fake: _Fake, soft: Tensor, hidden: Tensor, config: PlanConfig) -> Tensor:
    """`objective.loss_parts` of a batch without padding: which positions count would depend on values."""
    size, length = config.batch_size, config.answer_tokens
    labels = fake.batch.labels.flatten()
    none = labels.new_zeros(len(labels), 0)
    nll, log_probs, ids = predict_tokens(hidden.flatten(0, 1), fake.elm.head, labels, config.drift_top_k, none)
    shape = (size, length, config.drift_top_k)
    meanings = fake.drift(Predictions(nll, log_probs.view(shape), ids.view(shape), log_probs[:, :0]))
    drift = text_drift(meanings, fake.batch.embeddings, 1.0)[0].sum()
    positives = mean_token_embedding(fake.batch.labels, fake.elm.table, fake.drift.idf)
    return nll + drift + info_nce(soft.mean(1), positives, fake.batch.sources, 0.1).sum()
