"""What else could have written the summaries: every system whose score stands beside the adapter's own."""

import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from elmlib.config import SummaryTrainingConfig
from elmlib.data import PromptBatch, Split
from elmlib.decoding import Sampling
from elmlib.evaluation import swap_sources
from elmlib.identification import unit_rows
from elmlib.model import Elm
from elmlib.workbench import Workbench

TRUE, SHUFFLED, COPY = "true embeddings", "shuffled embeddings", "nearest training neighbour"

_READ_BATCH = 8  # texts that the LLM reads at once
_DECODED = 200  # sequences decoded at once
_COMPARED = 1024  # training vectors compared at once
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")

Written = TypeVar("Written")


class System(NamedTuple):
    """A way to write summaries."""

    name: str
    write: Callable[[], list[str]]
    """Writes the n summaries, which takes its time."""


def list_systems(
    bench: Workbench,
    fresh: Elm,
    split: Split,
    rows: Sequence[int],
    config: SummaryTrainingConfig,
    device: torch.device,
    sampling: Sampling | None = None,
) -> list[System]:
    """All that can summarise `rows` of `split`: the adapter, its controls, then (with `sampling`) its candidates.

    `bench.elm` is the trained adapter, `fresh` one that was never trained. The mean embedding gives one text for all.
    The LLM that reads the text is the upper bound; the nearest training neighbour's summary is what a retrieval
    system would copy. Systems that need `source_text` are left out where a record has none.
    """
    length, vectors = config.max_new_tokens, split.vectors(rows).numpy()

    @cache
    def true() -> list[str]:
        return _write(split, rows, _DECODED, lambda batch: bench.elm.generate(batch.to(device), length))

    def shuffled() -> list[str]:
        swap = swap_sources([str(split.sources[row]) for row in rows], config.eval_seed)
        return [true()[row] for row in swap]

    def from_mean(batch: PromptBatch) -> list[str]:
        mean = bench.elm.adapter.mean[None].to(device)
        return bench.elm.generate(PromptBatch(mean, batch.prompt), length) * len(batch.embeddings)

    def untrained() -> list[str]:
        return _write(split, rows, _DECODED, lambda batch: fresh.generate(batch.to(device), length))

    def best_of(sampling: Sampling) -> list[str]:
        size = max(1, _DECODED // sampling.count)
        drawn = _write(split, rows, size, lambda batch: bench.elm.candidates(batch.to(device), length, sampling))
        return rerank(bench.embed, drawn, vectors)

    systems = [
        System(TRUE, true),
        System(SHUFFLED, shuffled),
        System("mean embedding", lambda: _write(split, rows, len(rows), from_mean)),
        System("no training", untrained),
    ]
    texts = [split.records[row].source_text for row in rows]
    if all(texts):
        systems.append(System("first sentence", lambda: [first_sentence(text) for text in texts]))
        systems.append(System("LLM reads the text", lambda: _read(bench.elm, split, rows, texts, config)))
    systems.append(System(COPY, lambda: nearest_summaries(bench.train, vectors)))
    if sampling:
        systems.append(System(f"best of {sampling.count} candidates", lambda: best_of(sampling)))
    return systems


def first_sentence(text: str) -> str:
    """What stands before the first full stop, question or exclamation mark that white space follows."""
    return " ".join(_SENTENCE_END.split(text.strip(), maxsplit=1)[0].split())


def nearest_summaries(train: Split, vectors: np.ndarray) -> list[str]:
    """For each of `vectors` (n, dim), the target of the training row whose embedding has the highest cosine with it."""
    queries = unit_rows(vectors)
    best, row_of = np.full(len(queries), -np.inf), np.zeros(len(queries), dtype=int)
    for start in range(0, len(train), _COMPARED):
        rows = range(start, min(start + _COMPARED, len(train)))
        similarity = queries @ unit_rows(train.vectors(rows).numpy()).T  # (n, rows)
        nearest = similarity.argmax(axis=1)
        values = similarity[np.arange(len(queries)), nearest]
        row_of = np.where(values > best, start + nearest, row_of)
        best = np.maximum(values, best)
    return [train.records[row].target_text for row in row_of]


def rerank(embed: Callable[[list[str]], np.ndarray], drawn: list[list[str]], vectors: np.ndarray) -> list[str]:
    """Of each row's candidates, the one whose re-embedding is nearest to the row's vector (n, dim).

    The vector is the model's own input, so nothing is used that it was not given. Empty candidates come last.
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
    split: Split, rows: Sequence[int], size: int, write: Callable[[PromptBatch], list[Written]]
) -> list[Written]:
    """`write` batches of one prompt and at most `size` rows; what was written, in the order of `rows`."""
    written: dict[int, Written] = {}
    for chosen in split.bucket(rows, size):
        written |= zip(chosen, write(split.collate_prompts(chosen)), strict=True)
    return [written[row] for row in rows]


def _read(
    elm: Elm, split: Split, rows: Sequence[int], texts: Sequence[str], config: SummaryTrainingConfig
) -> list[str]:
    written: dict[int, str] = {}
    text_of = dict(zip(rows, texts, strict=True))
    for chosen in split.bucket(sorted(rows, key=lambda row: len(text_of[row])), _READ_BATCH):
        prompt = split.prompts[chosen[0]]
        room = config.max_seq_length - len(prompt.before) - len(prompt.behind)
        given = [text_of[row] for row in chosen]
        written |= zip(chosen, elm.read(given, prompt, config.max_new_tokens, max(1, room)), strict=True)
    return [written[row] for row in rows]
