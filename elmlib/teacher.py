"""The teacher: what the same frozen LLM predicts for each answer token when it reads the real text.

It never changes, so it is computed once per data and model, kept on disk and shared by every run and trial.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from elmlib.caching import build_once, cache_folder
from elmlib.config import SummaryTrainingConfig
from elmlib.data import Split
from elmlib.model import Elm

logger = logging.getLogger(__name__)

SHARD = 512
"""Rows in one folder of the cache; a stopped computation goes on behind its last whole one."""

_BATCH_TOKENS = 4096  # of text and answer together that the LLM reads at once
_CHUNK = 128  # positions whose logits are held at a time


class Lesson(NamedTuple):
    """What the teacher says at the answer positions of some rows, row by row."""

    log_probs: Tensor
    """(answer tokens, k) float32, of the teacher's most probable tokens."""
    ids: Tensor
    """(answer tokens, k)."""


class Teacher:
    """Top-k log-probabilities for every answer token of a split, mapped from disk."""

    def __init__(self, folders: Sequence[Path], lengths: Sequence[int]):
        """folders: one a shard, in the order of rows; lengths (rows,): answer tokens of each row."""
        self._shards = [
            tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("log_probs", "ids")) for folder in folders
        ]
        self._ends = [np.cumsum(lengths[start : start + SHARD]) for start in range(0, len(lengths), SHARD)]

    def __call__(self, rows: Sequence[int], device: torch.device) -> Lesson:
        """What is known of the answers of `rows`, in their order."""
        log_probs: list[np.ndarray] = []
        ids: list[np.ndarray] = []
        for row in rows:
            ends, place = self._ends[row // SHARD], row % SHARD
            tokens = slice(ends[place - 1] if place else 0, ends[place])
            for pieces, shard in zip((log_probs, ids), self._shards[row // SHARD], strict=True):
                pieces.append(shard[tokens])
        to_tensor = lambda pieces: torch.from_numpy(np.concatenate(pieces)).to(device)  # noqa: E731
        return Lesson(to_tensor(log_probs), to_tensor(ids).long())


def load_teacher(elm: Elm, split: Split, config: SummaryTrainingConfig) -> Teacher:
    """The teacher of `split`, from the cache where it was computed before; processes that ask at once share the work.

    Raises ValueError for a record without source_text.
    """
    texts = split.source_texts("teacher_kl")
    folder = cache_folder() / "teacher" / _key(elm, split, config)
    starts = range(0, len(split), SHARD)
    folders = [folder / f"{start:08d}" for start in starts]
    missing = [shard for shard in zip(folders, starts, strict=True) if not shard[0].is_dir()]
    if missing:
        logger.info("teacher: computing %d of %d shards into %s, once", len(missing), len(folders), folder)
    for target, start in tqdm(missing, desc="teacher", unit=f"{SHARD} rows", disable=not missing):
        rows = range(start, min(start + SHARD, len(split)))

        def write(place: Path, rows: range = rows) -> None:
            _write_shard(place, elm, split, texts, rows, config)

        build_once(target, write)
    return Teacher(folders, [len(answer) for answer in split.answers])


def _write_shard(
    folder: Path, elm: Elm, split: Split, texts: Sequence[str], rows: range, config: SummaryTrainingConfig
) -> None:
    lengths = [len(split.answers[row]) for row in rows]
    ends = dict(zip(rows, np.cumsum(lengths).tolist(), strict=True))
    top_k = min(config.teacher_top_k, len(elm.head))
    shape = (sum(lengths), top_k)
    log_probs, ids = np.empty(shape, np.float32), np.empty(shape, np.int32)
    encoded = elm.tokenizer([texts[row] for row in rows], add_special_tokens=False, split_special_tokens=True).input_ids
    given = {row: text[: config.teacher_text_tokens] for row, text in zip(rows, encoded, strict=True)}
    size = max(1, _BATCH_TOKENS // (config.teacher_text_tokens + max(lengths)))
    for chosen in split.bucket(sorted(rows, key=lambda row: len(given[row])), size):
        answers = [split.answers[row] for row in chosen]
        hidden = elm.reread(split.prompts[chosen[0]], [given[row] for row in chosen], answers)
        tops = [(part @ elm.head.T).float().log_softmax(-1).topk(top_k) for part in hidden.split(_CHUNK)]
        values, tokens = (torch.cat(pieces).cpu().numpy() for pieces in zip(*tops, strict=True))
        start = 0
        for row, answer in zip(chosen, answers, strict=True):
            place = slice(ends[row] - len(answer), ends[row])
            log_probs[place], ids[place] = (x[start : start + len(answer)] for x in (values, tokens))
            start += len(answer)
    np.save(folder / "log_probs.npy", log_probs)
    np.save(folder / "ids.npy", ids)


def _key(elm: Elm, split: Split, config: SummaryTrainingConfig) -> str:
    """Hash of all that the figures depend on: data, prompts, tokens, the LLM's shape and weights, and the settings."""
    # Five digits: the last ones of a sum depend on the number of threads.
    weights = [f"{name} {p.dtype} {p.float().abs().mean().item():.4e}" for name, p in elm.llm.named_parameters()]
    prompts = {id(prompt): prompt for prompt in split.prompts}
    settings = [config.teacher_top_k, config.teacher_text_tokens, elm.llm.config.to_json_string(), weights]
    digest = hashlib.sha256(json.dumps([2, settings, list(prompts.values()), split.digest()]).encode())
    digest.update(elm.tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()[:24]
