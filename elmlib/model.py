"""`Elm`: a frozen LLM that reads an adapter's soft tokens. One function puts them in place, for loss and generation."""

import copy
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from elmlib.adapter import EmbeddingAdapter, token_embedding_rms
from elmlib.config import SoftTokenPlace, SummaryTrainingConfig
from elmlib.data import Batch, PromptBatch
from elmlib.decoding import Sampling, draw
from elmlib.prompts import PromptIds


class Reading(NamedTuple):
    """What one forward pass gives."""

    soft_tokens: Tensor
    """(batch, num_soft_tokens, llm_dim) float32."""
    hidden: Tensor
    """(batch, answer length, llm_dim) last hidden states, in the LLM's dtype; position t predicts label t."""


class Prefix(NamedTuple):
    """The constant beginning of a prompt, read once by the frozen LLM."""

    embeds: Tensor
    """(1, prefix length, llm_dim)."""
    cache: DynamicCache


class Elm:
    """A frozen LLM and the adapter that speaks to it."""

    def __init__(
        self,
        llm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapter: EmbeddingAdapter,
        use_gradient_checkpointing: bool = False,
        place: SoftTokenPlace = "answer",
    ):
        assert not any(p.requires_grad for p in llm.parameters()), "the LLM must be frozen"
        self.llm, self.tokenizer, self.adapter, self.place = llm, tokenizer, adapter, place
        self.table = token_table(llm)
        # generate() fills what it is not told from the model's own habits, and chat models sample and penalise.
        llm.generation_config = GenerationConfig()
        self.head: Tensor = llm.get_output_embeddings().weight
        self._prefixes: dict[tuple[int, ...], Prefix] = {}
        self._set_checkpointing(use_gradient_checkpointing)

    def _set_checkpointing(self, use_gradient_checkpointing: bool) -> None:
        # transformers drops the cache of keys and values when it recomputes activations, so the prompt is read whole.
        self._share_prefix = not use_gradient_checkpointing
        if use_gradient_checkpointing:
            self.llm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        elif self.llm.is_activation_checkpointing:
            self.llm.activation_checkpointing_disable()

    def with_adapter(self, adapter: EmbeddingAdapter) -> "Elm":
        """The same LLM and cached prompts with another adapter."""
        other = copy.copy(self)
        other.adapter = adapter
        return other

    def configured(self, adapter: EmbeddingAdapter, use_gradient_checkpointing: bool, place: SoftTokenPlace) -> "Elm":
        """The same LLM with an adapter and all settings of another run."""
        return Elm(self.llm, self.tokenizer, adapter, use_gradient_checkpointing, place)

    def __call__(self, batch: Batch) -> Reading:
        """Teacher forcing: the answer positions alone, given the embeddings and the answer so far."""
        soft = self.adapter(batch.embeddings)
        embeds, cache = self.place_tokens(batch.prompt, soft, self.answer_so_far(batch.labels))
        # transformers recomputes activations in train mode only; a frozen LLM has no other use for that mode.
        self.llm.train(not self._share_prefix and torch.is_grad_enabled())
        output = self.llm.base_model(inputs_embeds=embeds, cache=cache, use_cache=cache is not None)
        return Reading(soft, output.last_hidden_state[:, -batch.labels.shape[1] :])

    def generate(self, batch: PromptBatch, max_new_tokens: int) -> list[str]:
        """Greedy answers, one a row, stripped of surrounding white space."""
        return [texts[0] for texts in self.candidates(batch, max_new_tokens, Sampling(count=1, temperature=0.0))]

    @torch.no_grad()
    def candidates(self, batch: PromptBatch, max_new_tokens: int, sampling: Sampling) -> list[list[str]]:
        """`sampling.count` answers for each row, all decoded in one batch over the shared prompt."""
        said = deque(self._answer(batch, max_new_tokens, sampling), maxlen=1).pop()
        texts = self._texts(batch.prompt, said)
        return [texts[start : start + sampling.count] for start in range(0, len(texts), sampling.count)]

    @torch.no_grad()
    def stream(self, batch: PromptBatch, max_new_tokens: int, sampling: Sampling) -> Iterator[list[str]]:
        """What all rows have said so far, `sampling.count` answers for each row in turn, after each token."""
        for said in self._answer(batch, max_new_tokens, sampling):
            yield self._texts(batch.prompt, said)

    @torch.no_grad()
    def search_beams(self, batch: PromptBatch, max_new_tokens: int, num_beams: int) -> list[str]:
        """The best answer of each row by beam search, transformers' own, over the whole prompt."""
        self.llm.eval()
        before, between = batch.prompt.around(self.place)
        soft = self.adapter(batch.embeddings).to(self.table.dtype)
        ids = [
            torch.tensor([part], dtype=torch.long, device=soft.device).expand(len(soft), -1)
            for part in (before, between)
        ]
        given = torch.cat([self._embed(ids[0]), soft, self._embed(ids[1])], dim=1)
        generate: Any = self.llm.generate  # PreTrainedModel is typed without it
        said = generate(
            inputs_embeds=given,
            attention_mask=torch.ones(given.shape[:2], dtype=torch.long, device=given.device),
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                eos_token_id=self._ends(batch.prompt),
                pad_token_id=self.tokenizer.eos_token_id,
                do_sample=False,
            ),
        )
        return self._texts(batch.prompt, said.tolist())

    def _answer(self, batch: PromptBatch, max_new_tokens: int, sampling: Sampling) -> Iterator[list[list[int]]]:
        """Token ids of each row's answers, after each token.

        transformers' generate() goes on with all rows until the last one has ended, and most summaries are far shorter
        than the longest: here a row that has ended leaves the batch.
        """
        self.llm.eval()
        soft = self.adapter(batch.embeddings).repeat_interleave(sampling.count, dim=0)
        embeds, cache = self.place_tokens(batch.prompt, soft)
        generator = torch.Generator(embeds.device).manual_seed(sampling.seed)
        cache = DynamicCache(config=self.llm.config) if cache is None else cache
        end_ids = torch.tensor(self._ends(batch.prompt), device=embeds.device)
        rows = torch.arange(len(embeds), device=embeds.device)
        said: list[list[int]] = [[] for _ in range(len(embeds))]
        for _ in range(max_new_tokens):
            output = self.llm.base_model(inputs_embeds=embeds, cache=cache, use_cache=True)
            tokens = draw((output.last_hidden_state[:, -1] @ self.head.T).float(), sampling, generator)
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                said[row].append(token)
            yield said
            going = (~torch.isin(tokens, end_ids)).nonzero().squeeze(-1)
            if not len(going):
                break
            if len(going) < len(rows):
                cache.batch_select_indices(going)
                rows, tokens = rows[going], tokens[going]
            embeds = self._embed(tokens[:, None])

    @torch.no_grad()
    def read(self, texts: Sequence[str], prompt: PromptIds, max_new_tokens: int, max_text_tokens: int) -> list[str]:
        """Greedy answers of the bare LLM to the real texts, cut to `max_text_tokens`: what a perfect adapter could do.

        One batch; logits of the first step take (texts x vocab x llm_dim) memory, so keep it small.
        """
        self.llm.eval()
        cut = [ids[:max_text_tokens] for ids in self.tokenizer(list(texts), add_special_tokens=False).input_ids]
        rows = [torch.tensor([*prompt.before, *ids, *prompt.behind]) for ids in cut]
        pad = self.tokenizer.eos_token_id
        # Left padding, so that every row's answer begins at the same place.
        given = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left").to(self.table.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        generate: Any = self.llm.generate  # PreTrainedModel is typed without it
        ids = generate(
            input_ids=given,
            attention_mask=mask.to(given.device),
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                eos_token_id=self._ends(prompt),
                pad_token_id=pad,
                do_sample=False,
            ),
        )
        return self._texts(prompt, ids[:, given.shape[1] :].tolist())

    @torch.no_grad()
    def reread(self, prompt: PromptIds, texts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Tensor:
        """Teacher forcing of the bare LLM on the real texts: last hidden states at all answer positions, row by row.

        texts and answers: token ids of each row, answers with the end of turn. Returns (answer tokens, llm_dim).
        """
        self.llm.eval()
        given = [
            torch.tensor([*text, *prompt.behind, *answer[:-1]]) for text, answer in zip(texts, answers, strict=True)
        ]
        ids = pad_sequence(given, batch_first=True, padding_value=self.tokenizer.eos_token_id).to(self.table.device)
        if self._share_prefix:
            cache = _copies(self._prefix(prompt.before).cache, len(ids))
            output = self.llm.base_model(input_ids=ids, cache=cache, use_cache=True)
        else:
            prefix = torch.tensor(prompt.before, device=ids.device).expand(len(ids), -1)
            output = self.llm.base_model(input_ids=torch.cat([prefix, ids], dim=1), use_cache=False)
        hidden = output.last_hidden_state[:, -ids.shape[1] :]  # right padding hides behind causality
        rows = zip(hidden, given, answers, strict=True)
        return torch.cat([row[len(tokens) - len(answer) : len(tokens)] for row, tokens, answer in rows])

    def _ends(self, prompt: PromptIds) -> list[int]:
        return sorted({prompt.end_of_turn, self.tokenizer.eos_token_id})

    def _texts(self, prompt: PromptIds, ids: list[list[int]]) -> list[str]:
        ends = self._ends(prompt)
        said = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in ids]
        return [text.strip() for text in self.tokenizer.batch_decode(said, skip_special_tokens=True)]

    def answer_so_far(self, labels: Tensor) -> Tensor:
        """What stands behind the soft tokens under teacher forcing: embeddings of all but each row's last label.

        labels (batch, length); padding sits right of every label, where causality hides it.
        """
        return self._embed(labels[:, :-1].clamp_min(0))

    def place_tokens(
        self, prompt: PromptIds, soft: Tensor, answer: Tensor | None = None
    ) -> tuple[Tensor, DynamicCache | None]:
        """Put soft tokens where `place` says: [prefix] [soft tokens] [what stands between] [answer].

        With a shared prefix, that part comes as a cache of keys and values, and the embeddings hold the rest only.
        soft (batch, k, llm_dim); answer (batch, length, llm_dim) or None; returns (batch, length, llm_dim) and cache.
        """
        batch = len(soft)
        before, between = prompt.around(self.place)
        ids = torch.tensor([between], dtype=torch.long, device=soft.device)
        parts = [soft.to(self.table.dtype), self._embed(ids).expand(batch, -1, -1)]
        parts += [] if answer is None else [answer]
        prefix = self._prefix(before)
        if not self._share_prefix:
            return torch.cat([prefix.embeds.expand(batch, -1, -1), *parts], dim=1), None
        return torch.cat(parts, dim=1), _copies(prefix.cache, batch)

    @torch.no_grad()
    def _prefix(self, before: list[int]) -> Prefix:
        key = tuple(before)
        if key not in self._prefixes:
            ids = torch.tensor([before], device=self.table.device)
            cache = DynamicCache(config=self.llm.config)
            if self._share_prefix:
                self.llm.base_model(input_ids=ids, cache=cache, use_cache=True)
            self._prefixes[key] = Prefix(self._embed(ids), cache)
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
    """What the LLM's embedding layer makes of each token, (vocab, llm_dim): its weights, which Gemma's layer scales."""
    layer = llm.get_input_embeddings()
    if type(layer) is nn.Embedding:
        return layer.weight
    weight = cast(Tensor, layer.weight)
    with torch.no_grad():
        return layer(torch.arange(len(weight), device=weight.device))


def make_adapter(config: SummaryTrainingConfig, table: Tensor) -> EmbeddingAdapter:
    """A fresh adapter of the config's shape, seeded, its output at the scale of `table` (vocab, llm_dim)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return EmbeddingAdapter(
            embedding_dim=config.embedding_dim,
            llm_dim=table.shape[1],
            num_soft_tokens=config.num_soft_tokens,
            hidden_dim=config.hidden_dim,
            dropout_rate=config.dropout_rate,
            residual_scale=config.residual_scale,
            token_rms=token_embedding_rms(table),
        )
