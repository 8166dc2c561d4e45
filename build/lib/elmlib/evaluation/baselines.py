"""Baselines: every other system that could have written the summaries."""

import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from sentence_transformers.util import semantic_search

from elmlib.config import SummaryTrainingConfig
from elmlib.data.dataset import PromptBatch, SummaryDataset
from elmlib.evaluation.metrics import COPY, SHUFFLED, TRUE, swap_sources, unit_rows
from elmlib.models.elm import Sampling, SoftTokenModel

_READ_BATCH = 8  # texts that the LLM reads at once
_DECODED = 200  # sequences decoded at once
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")

Written = TypeVar("Written")


class Baseline(NamedTuple):
    """A system that writes summaries."""

    name: str
    write: Callable[[], list[str]]
    """Writes the n summaries; may take minutes."""


def list_baselines(
    model: SoftTokenModel,
    untrained: SoftTokenModel,
    embed: Callable[[list[str]], np.ndarray],
    train: SummaryDataset,
    dataset: SummaryDataset,
    rows: Sequence[int],
    config: SummaryTrainingConfig,
    sampling: Sampling | None = None,
) -> list[Baseline]:
    """All systems that can summarise `rows` of `dataset`: the adapter of `model` first, then its baselines.

    `untrained` has an adapter before its first step. The mean embedding gives one text for all rows. The LLM that
    reads the text is the upper bound. `sampling` adds the best of several candidates. Baselines that need
    `source_text` are left out where a record has none.
    """
    length, vectors, device = config.max_new_tokens, dataset.vectors(rows).numpy(), model.table.device

    @cache
    def true() -> list[str]:
        return _write(dataset, rows, _DECODED, lambda batch: model.generate(batch.to(device), length))

    def shuffled() -> list[str]:
        swap = swap_sources([str(dataset.sources[row]) for row in rows], config.eval_seed)
        return [true()[row] for row in swap]

    def from_mean(batch: PromptBatch) -> list[str]:
        mean = model.adapter.mean[None].to(device)
        return model.generate(PromptBatch(mean, batch.prompt), length) * len(batch.embeddings)

    def without_training() -> list[str]:
        return _write(dataset, rows, _DECODED, lambda batch: untrained.generate(batch.to(device), length))

    def best_of(sampling: Sampling) -> list[str]:
        size = max(1, _DECODED // sampling.count)
        drawn = _write(dataset, rows, size, lambda batch: model.candidates(batch.to(device), length, sampling))
        return rerank(embed, drawn, vectors)

    baselines = [
        Baseline(TRUE, true),
        Baseline(SHUFFLED, shuffled),
        Baseline("mean embedding", lambda: _write(dataset, rows, len(rows), from_mean)),
        Baseline("no training", without_training),
    ]
    texts = [dataset.records[row].source_text for row in rows]
    if all(texts):
        baselines.append(Baseline("first sentence", lambda: [first_sentence(text) for text in texts]))
        baselines.append(Baseline("LLM reads the text", lambda: _read(model, dataset, rows, texts, config)))
    baselines.append(Baseline(COPY, lambda: nearest_summaries(train, vectors)))
    if sampling:
        baselines.append(Baseline(f"best of {sampling.count} candidates", lambda: best_of(sampling)))
    return baselines


def first_sentence(text: str) -> str:
    """The text before the first full stop, question or exclamation mark that white space follows."""
    return " ".join(_SENTENCE_END.split(text.strip(), maxsplit=1)[0].split())


def nearest_summaries(train: SummaryDataset, vectors: np.ndarray) -> list[str]:
    """For each of `vectors` (n, dim), the target of the training row whose embedding has the highest cosine with it."""
    corpus = train.vectors(range(len(train))).double()
    nearest = semantic_search(torch.as_tensor(vectors).double(), corpus, top_k=1)
    return [train.records[int(hit["corpus_id"])].target_text for (hit,) in nearest]


def rerank(embed: Callable[[list[str]], np.ndarray], drawn: list[list[str]], vectors: np.ndarray) -> list[str]:
    """Of each row's candidates, the one whose embedding is nearest to the row's vector (n, dim).

    The vector is the model's own input, so no other information is used. Empty candidates come last.
    """
    texts = list(dict.fromkeys(text for candidates in drawn for text in candidates if text))
    embedded = dict(zip(texts, unit_rows(embed(texts)), strict=True)) if texts else {}

    def nearness(text: str, vector: np.ndarray) -> float:
        return embedded[text] @ vector if text else -np.inf

    return [
        max(candidates, key=partial(nearness, vector=vector))
        for candidates, vector in zip(drawn, unit_rows(vectors), strict=True)
    ]


def _write(
    dataset: SummaryDataset, rows: Sequence[int], size: int, write: Callable[[PromptBatch], list[Written]]
) -> list[Written]:
    """`write` batches of one prompt and at most `size` rows; the results in the order of `rows`."""
    written: dict[int, Written] = {}
    for chosen in dataset.bucket(rows, size):
        written |= zip(chosen, write(dataset.collate_prompts(chosen)), strict=True)
    return [written[row] for row in rows]


def _read(
    model: SoftTokenModel,
    dataset: SummaryDataset,
    rows: Sequence[int],
    texts: Sequence[str],
    config: SummaryTrainingConfig,
) -> list[str]:
    written: dict[int, str] = {}
    text_of = dict(zip(rows, texts, strict=True))
    for chosen in dataset.bucket(sorted(rows, key=lambda row: len(text_of[row])), _READ_BATCH):
        prompt = dataset.prompts[chosen[0]]
        room = config.max_seq_length - len(prompt.before) - len(prompt.behind)
        batch = [text_of[row] for row in chosen]
        written |= zip(chosen, model.read(batch, prompt, config.max_new_tokens, max(1, room)), strict=True)
    return [written[row] for row in rows]
