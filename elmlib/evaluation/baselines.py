"""Baselines: every other system that could have written the summaries."""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from sentence_transformers.util import semantic_search

from elmlib.config import SummaryTrainingConfig
from elmlib.data.dataset import PromptBatch, SummaryDataset
from elmlib.evaluation.metrics import COPY, SHUFFLED, TRUE, Embed, swap_sources, unit_rows
from elmlib.models.elm import Sampling, SoftTokenModel

_READ_BATCH = 8  # texts that the LLM reads at once
_DECODED = 200  # sequences decoded at once

Written = TypeVar("Written")
Baselines = dict[str, Callable[[], list[str]]]  # name -> what writes the n summaries; it may take minutes


def list_baselines(
    model: SoftTokenModel,
    untrained: SoftTokenModel,
    embed: Embed,
    train: SummaryDataset,
    dataset: SummaryDataset,
    rows: Sequence[int],
    config: SummaryTrainingConfig,
    sampling: Sampling | None = None,
) -> Baselines:
    """All systems that can summarise `rows` of `dataset`: the adapter of `model`, TRUE, and then its baselines.
    `untrained` has an adapter before its first step. The mean embedding gives one text for all rows. The LLM that reads
    the text is the upper bound. `sampling` adds the best of several candidates. Baselines that need `source_text` are
    left out where a record has none."""
    length, vectors, device = config.max_new_tokens, dataset.vectors(rows).numpy(), model.table.device
    records = [dataset.records[row] for row in rows]

    def in_batches(size: int, write: Callable[[list[int]], list[Written]]) -> list[Written]:
        """`write` at most `size` rows of one prompt; the results in the order of `rows`."""
        written: dict[int, Written] = {}
        for chosen in dataset.bucket(rows, size):
            written |= zip(chosen, write(chosen), strict=True)
        return [written[row] for row in rows]

    def prompts(chosen: list[int]) -> PromptBatch:
        return dataset.collate_prompts(chosen).to(device)

    def greedy(model: SoftTokenModel) -> list[str]:
        return in_batches(_DECODED, lambda chosen: model.generate(prompts(chosen), length))

    @cache
    def true() -> list[str]:
        return greedy(model)

    def shuffled() -> list[str]:
        return [true()[place] for place in swap_sources([record.source for record in records], config.eval_seed)]

    def from_mean(chosen: list[int]) -> list[str]:
        batch = prompts(chosen)._replace(embeddings=model.adapter.mean[None].to(device))
        return model.generate(batch, length) * len(chosen)

    def read(chosen: list[int]) -> list[str]:
        prompt, texts = dataset.prompts[chosen[0]], [dataset.records[row].source_text for row in chosen]
        room = config.max_seq_length - len(prompt.before) - len(prompt.behind)
        return model.read(texts, prompt, length, max(1, room))

    def best_of(sampling: Sampling) -> list[str]:
        size = max(1, _DECODED // sampling.count)
        return rerank(embed, in_batches(size, lambda rows: model.candidates(prompts(rows), length, sampling)), vectors)

    baselines: Baselines = {
        TRUE: true,
        SHUFFLED: shuffled,
        "mean embedding": lambda: in_batches(len(rows), from_mean),
        "no training": lambda: greedy(untrained),
    }
    if all(record.source_text for record in records):
        baselines["first sentence"] = lambda: [first_sentence(record.source_text) for record in records]
        baselines["LLM reads the text"] = lambda: in_batches(_READ_BATCH, read)
    baselines[COPY] = lambda: nearest_summaries(train, vectors)
    if sampling:
        baselines[f"best of {sampling.count} candidates"] = lambda: best_of(sampling)
    return baselines


def first_sentence(text: str) -> str:
    """The text before the first full stop, question or exclamation mark that white space follows."""
    return " ".join(re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0].split())


def nearest_summaries(train: SummaryDataset, vectors: np.ndarray) -> list[str]:
    """For each of `vectors` (n, dim), the target of the training row whose embedding has the highest cosine with it."""
    corpus = train.vectors(range(len(train))).double()
    nearest = semantic_search(torch.as_tensor(vectors).double(), corpus, top_k=1)
    return [train.records[int(hit["corpus_id"])].target_text for (hit,) in nearest]


def rerank(embed: Embed, drawn: list[list[str]], vectors: np.ndarray) -> list[str]:
    """Of each row's candidates, the one whose embedding is nearest to the row's vector (n, dim). The vector is the
    model's own input, so no other information is used. Empty candidates come last."""
    texts = list(dict.fromkeys(text for candidates in drawn for text in candidates if text))
    embedded = dict(zip(texts, unit_rows(embed(texts)), strict=True)) if texts else {}
    return [
        max(candidates, key=lambda text: embedded[text] @ vector if text else -np.inf)
        for candidates, vector in zip(drawn, unit_rows(vectors), strict=True)
    ]
