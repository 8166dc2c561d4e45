"""`SoftTokenModel`: a frozen LLM that reads soft tokens. One function places them, for the loss and for generation."""

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from elmlib.config import InputError, SoftTokenPosition, SummaryTrainingConfig
from elmlib.data.dataset import Batch, PromptBatch
from elmlib.data.prompts import PromptIds
from elmlib.models.adapter import EmbeddingAdapter, make_adapter
from elmlib.models.pretrained import check_llm, load_llm, native_bf16

NUCLEUS_TOKENS = 512  # most tokens of a nucleus; at the default temperature the 95% nucleus has far fewer


class Sampling(NamedTuple):
    """How candidates are sampled."""

    count: int = 8  # type: ignore[assignment]  # candidates per embedding; hides tuple.count, which nobody calls
    temperature: float = 0.7  # 0 decodes greedily
    top_p: float = 0.95
    seed: int = 0


class SoftTokenModel:
    """A frozen LLM and the adapter that writes its soft tokens."""

    def __init__(
        self,
        llm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapter: EmbeddingAdapter,
        use_gradient_checkpointing: bool = False,
        position: SoftTokenPosition = "before_answer",
        is_sharded: bool = False,
    ):
        assert not any(p.requires_grad for p in llm.parameters()), "the LLM must be frozen"
        self.llm, self.tokenizer, self.adapter, self.position = llm, tokenizer, adapter, position
        self.is_sharded = is_sharded  # over several processes
        self.table = token_table(llm)
        # generate() takes missing settings from the model's own defaults, and chat models sample and penalise.
        llm.generation_config = GenerationConfig()
        self.head, self.scale = cast(Tensor, llm.get_output_embeddings().weight), check_llm(llm)
        self._prefixes: dict[tuple[int, ...], tuple[Tensor, DynamicCache]] = {}

        # transformers drops the cache of keys and values when it recomputes activations, and linear attention changes
        # its states in place, which autograd forbids: there the prompt is read whole.
        layers = DynamicCache(config=llm.config).layers
        linear = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
        self._share_prefix, self._recompute = not (use_gradient_checkpointing or linear), use_gradient_checkpointing
        if use_gradient_checkpointing:
            llm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    def with_adapter(self, adapter: EmbeddingAdapter) -> "SoftTokenModel":
        """The same LLM and cached prompts with another adapter."""
        other = copy.copy(self)
        other.adapter = adapter
        return other

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Teacher forcing: soft tokens (batch, num_soft_tokens, llm_dim) float32, and the last hidden states at the
        answer positions (batch, answer length, llm_dim) in the LLM's dtype; position t predicts label t."""
        soft = self.adapter(batch.embeddings)
        # Behind the soft tokens all labels but the last; padding stands right of them, where causality hides it.
        embeds, cache = self.place_tokens(batch.prompt, soft, self._embed(batch.labels[:, :-1].clamp_min(0)))
        # transformers recomputes activations in train mode only; a frozen LLM has no other use for that mode.
        self.llm.train(self._recompute and torch.is_grad_enabled())
        output = self.llm.base_model(inputs_embeds=embeds, cache=cache, use_cache=cache is not None)
        return soft, self.scale * output.last_hidden_state[:, -batch.labels.shape[1] :]

    def generate(self, batch: PromptBatch, max_new_tokens: int) -> list[str]:
        """Greedy answers, one a row, stripped of surrounding white space."""
        return [texts[0] for texts in self.candidates(batch, max_new_tokens, Sampling(count=1, temperature=0.0))]

    @torch.no_grad()
    def candidates(self, batch: PromptBatch, max_new_tokens: int, sampling: Sampling) -> list[list[str]]:
        """`sampling.count` answers for each row, all decoded in one batch over the shared prompt."""
        ids = deque(self._answer(batch, max_new_tokens, sampling), maxlen=1).pop()
        texts = self._texts(batch.prompt, ids)
        return [texts[start : start + sampling.count] for start in range(0, len(texts), sampling.count)]

    @torch.no_grad()
    def stream(self, batch: PromptBatch, max_new_tokens: int, sampling: Sampling) -> Iterator[list[str]]:
        """The answers of all rows so far, `sampling.count` for each row in turn, after each token."""
        for ids in self._answer(batch, max_new_tokens, sampling):
            yield self._texts(batch.prompt, ids)

    def _answer(self, batch: PromptBatch, max_new_tokens: int, sampling: Sampling) -> Iterator[list[list[int]]]:
        """Token ids of each row's answers, after each token. Most summaries are far shorter than the longest: a row
        that has ended leaves the batch, while transformers' generate() goes on with all rows."""
        self.llm.eval()
        soft = self.adapter(batch.embeddings).repeat_interleave(sampling.count, dim=0)
        embeds, cache = self.place_tokens(batch.prompt, soft)
        generator = torch.Generator(embeds.device).manual_seed(sampling.seed)
        cache = DynamicCache(config=self.llm.config) if cache is None else cache
        end_ids = torch.tensor(self._ends(batch.prompt), device=embeds.device)
        rows = torch.arange(len(embeds), device=embeds.device)
        answers: list[list[int]] = [[] for _ in range(len(embeds))]
        for _ in range(max_new_tokens):
            output = self.llm.base_model(inputs_embeds=embeds, cache=cache, use_cache=True)
            tokens = draw((self.scale * output.last_hidden_state[:, -1] @ self.head.T).float(), sampling, generator)
            if self.is_sharded:  # all processes go on with the same rows, or they would wait for each other
                torch.distributed.broadcast(tokens, 0)
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                answers[row].append(token)
            yield answers
            going = (~torch.isin(tokens, end_ids)).nonzero().squeeze(-1)
            if not len(going):
                break
            if len(going) < len(rows):
                cache.reorder_cache(cast(torch.LongTensor, going))  # selects rows, of every kind of layer
                rows, tokens = rows[going], tokens[going]
            embeds = self._embed(tokens[:, None])

    @torch.no_grad()
    def read(self, texts: Sequence[str], prompt: PromptIds, max_new_tokens: int, max_text_tokens: int) -> list[str]:
        """Greedy answers of the LLM to the real texts, cut to `max_text_tokens`: the upper bound for an adapter. All
        texts are one batch, so keep it small."""
        cut = [ids[:max_text_tokens] for ids in self.tokenizer(list(texts), add_special_tokens=False).input_ids]
        rows = [torch.tensor([*prompt.before, *ids, *prompt.behind], device=self.table.device) for ids in cut]
        # Left padding, so that every row's answer begins at the same place.
        pad: dict[str, Any] = {"batch_first": True, "padding_side": "left", "padding_value": prompt.end_of_turn}
        padded = pad_sequence(rows, **pad)
        mask = pad_sequence([torch.ones_like(row) for row in rows], **pad | {"padding_value": 0})
        settings = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=prompt.end_of_turn, do_sample=False)
        settings.eos_token_id = self._ends(prompt)
        generate: Any = self.llm.eval().generate  # PreTrainedModel is typed without it
        ids = generate(input_ids=padded, attention_mask=mask, generation_config=settings)
        return self._texts(prompt, ids[:, padded.shape[1] :].tolist())

    def _ends(self, prompt: PromptIds) -> list[int]:
        return sorted({prompt.end_of_turn, self.tokenizer.eos_token_id} - {None})

    def _texts(self, prompt: PromptIds, ids: list[list[int]]) -> list[str]:
        ends = self._ends(prompt)
        answers = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in ids]
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def place_tokens(
        self, prompt: PromptIds, soft: Tensor, answer: Tensor | None = None
    ) -> tuple[Tensor, DynamicCache | None]:
        """Put soft tokens where `position` says: [prefix] [soft tokens] [rest of the prompt] [answer]. A shared prefix
        is returned as a cache of keys and values, and the embeddings hold the rest only. soft (batch, k, llm_dim);
        answer (batch, length, llm_dim) or None; returns (batch, length, llm_dim) and cache."""
        batch = len(soft)
        before, between = prompt.around(self.position)
        ids = torch.tensor([between], dtype=torch.long, device=soft.device)
        parts = [soft.to(self.table.dtype), self._embed(ids).expand(batch, -1, -1)]
        parts += [] if answer is None else [answer]
        start, cache = self._prefix(before)
        if not self._share_prefix:
            return torch.cat([start.expand(batch, -1, -1), *parts], dim=1), None
        return torch.cat(parts, dim=1), _copies(cache, batch)

    @torch.no_grad()
    def _prefix(self, before: list[int]) -> tuple[Tensor, DynamicCache]:
        """Embeddings (1, length, llm_dim) of the constant beginning, and its keys and values, read once."""
        key = tuple(before)
        if key not in self._prefixes:
            ids = torch.tensor([before], device=self.table.device)
            cache = DynamicCache(config=self.llm.config)
            if self._share_prefix:
                self.llm.base_model(input_ids=ids, cache=cache, use_cache=True)
                if cache.get_seq_length() != len(before):  # earlier versions ignore `cache=`
                    raise InputError(f"transformers {transformers.__version__} fills no cache; install 5.24 or later")
            self._prefixes[key] = self._embed(ids), cache
        return self._prefixes[key]

    def _embed(self, ids: Tensor) -> Tensor:
        return self.llm.get_input_embeddings()(ids).detach()  # recomputation of activations would ask for a gradient


def _copies(cache: DynamicCache, rows: int) -> DynamicCache:
    """`cache`, once for each row: a forward pass appends to the cache that it is given."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    other.batch_repeat_interleave(rows)  # gives the copied layers tensors of their own
    return other


def token_table(llm: PreTrainedModel) -> Tensor:
    """The output of the LLM's embedding layer for each token, (vocab, llm_dim); Gemma's layer scales its weights."""
    layer = llm.get_input_embeddings()
    if type(layer) is nn.Embedding:
        return layer.weight
    weight = cast(Tensor, layer.weight)
    with torch.no_grad():
        return layer(torch.arange(len(weight), device=weight.device))


def build_model(
    config: SummaryTrainingConfig,
    device: torch.device,
    weights: dict[str, Tensor] | None = None,
    revision: str = "",
    origin: str = "the adapter",
    shard: Callable[[PreTrainedModel], object] | None = None,
) -> SoftTokenModel:
    """The frozen LLM of `config` with an adapter: a new one, or one of `weights`, read from `origin`. `revision` is a
    commit of the hub, empty for the newest; `shard` as in `load_llm`. Raises InputError for an LLM that
    cannot be found, that the losses cannot use, or of another size than `weights`."""
    dtype = torch.bfloat16 if config.use_bf16 and native_bf16(device) else torch.float32
    llm, tokenizer = load_llm(config.llm_model_name, dtype, device, revision, shard)
    table = token_table(llm)
    adapter = make_adapter(config, table)
    if weights is not None:
        if (size := len(weights["norm.weight"])) != table.shape[1]:
            raise InputError(
                f"{config.llm_model_name} has token embeddings of size {table.shape[1]}; {origin} writes {size}: it "
                "was trained with another LLM"
            )
        adapter.load_state_dict(weights)
        adapter.eval()
    position, is_sharded = config.soft_token_position, shard is not None
    return SoftTokenModel(llm, tokenizer, adapter.to(device), config.use_gradient_checkpointing, position, is_sharded)


def nucleus(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Nucleus sampling (Holtzman et al., ICLR 2020): the most probable tokens whose probabilities reach `top_p`. logits
    (rows, vocab) float32 -> probabilities at the temperature, 0 outside the nucleus, and token ids, both (rows, k).
    Instead of sorting the whole vocabulary, only its NUCLEUS_TOKENS most probable tokens are looked at."""
    logits = logits / sampling.temperature
    top, ids = logits.topk(min(NUCLEUS_TOKENS, logits.shape[-1]))
    probabilities = (top - logits.logsumexp(-1, keepdim=True)).exp()
    outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p  # the token that reaches top_p is inside
    return probabilities.masked_fill(outside, 0.0), ids


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token for each row of logits (rows, vocab) float32: (rows,); the best one at temperature 0."""
    if not sampling.temperature:
        return logits.argmax(-1)
    probabilities, ids = nucleus(logits, sampling)
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)
