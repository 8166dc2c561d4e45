"""A filtered split as tensors: tokenised targets, embeddings, batches of rows of like length.

`Batch` carries targets and goes to the loss; `PromptBatch` carries none and is all that generation accepts, so a
target cannot reach it.
"""

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from elmlib.config import SummaryTrainingConfig
from elmlib.layout import SplitPaths, find_split
from elmlib.prompts import IGNORE_INDEX, OPENING_TEMPLATE, PromptIds, prompt_ids
from elmlib.records import TENSOR, EmbeddingFile, Record, check_rows, read_records

_HASHED = 4096  # rows read at a time


class Batch(NamedTuple):
    """Rows to learn from, all of one prompt."""

    embeddings: Tensor
    """(batch, embedding_dim) float32."""
    labels: Tensor
    """(batch, longest answer) token ids of target and end of turn, right-padded with IGNORE_INDEX."""
    sources: Tensor
    """(batch,) number of each row's source; equal numbers are the same text."""
    prompt: PromptIds
    rows: list[int]
    """Of the split, (batch,)."""

    @property
    def num_tokens(self) -> int:
        """Answer tokens, which is what the NLL is divided by."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        embeddings, labels, sources = (
            x.to(device, non_blocking=True) for x in (self.embeddings, self.labels, self.sources)
        )
        return Batch(embeddings, labels, sources, self.prompt, self.rows)


class PromptBatch(NamedTuple):
    """Rows to generate for, all of one prompt: no target in it."""

    embeddings: Tensor
    """(batch, embedding_dim) float32."""
    prompt: PromptIds

    def to(self, device: torch.device) -> "PromptBatch":
        """The same batch on `device`."""
        return PromptBatch(self.embeddings.to(device), self.prompt)


@dataclass(frozen=True, eq=False)
class Split(Dataset[int]):
    """One split, tokenised. Row i is `records[i]`, `answers[i]`, `embeddings[records[i].embedding_index]`."""

    records: list[Record]
    answers: list[list[int]]
    """Target token ids with the end of turn."""
    sources: list[int]
    prompts: list[PromptIds]
    """The prompt of each row; rows of one template share one object."""
    embeddings: Tensor
    """(embedding rows, embedding_dim), as on disk; the file is mapped, not read."""
    too_long: int
    """Rows left out because they exceed max_seq_length."""
    fingerprint: str
    """Hash of the records file and of all embeddings: runs on equal data have it equal."""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> int:
        return row

    def vectors(self, rows: Sequence[int]) -> Tensor:
        """(rows, embedding_dim) float32."""
        return self.embeddings[[self.records[row].embedding_index for row in rows]].float()

    def collate(self, rows: Sequence[int]) -> Batch:
        """Rows of one prompt as a Batch."""
        prompt = self.prompts[rows[0]]
        assert all(self.prompts[row] is prompt for row in rows), "rows of different prompts in one batch"
        labels = torch.full((len(rows), max(len(self.answers[row]) for row in rows)), IGNORE_INDEX)
        for i, row in enumerate(rows):
            labels[i, : len(self.answers[row])] = torch.tensor(self.answers[row])
        return Batch(self.vectors(rows), labels, torch.tensor([self.sources[row] for row in rows]), prompt, list(rows))

    def collate_prompts(self, rows: Sequence[int]) -> PromptBatch:
        """Rows of one prompt as a PromptBatch."""
        prompt = self.prompts[rows[0]]
        assert all(self.prompts[row] is prompt for row in rows), "rows of different prompts in one batch"
        return PromptBatch(self.vectors(rows), prompt)

    def source_texts(self, wanted_by: str) -> list[str]:
        """The text of each row; ValueError, naming the first record that has none, and what wanted it."""
        for record in self.records:
            if not record.source_text:
                raise ValueError(
                    f"the record of source {record.source!r}, embedding_index {record.embedding_index}, has no "
                    f"source_text, which {wanted_by} needs; add the field to the records, or do without {wanted_by}"
                )
        return [record.source_text for record in self.records]

    def subset(self, count: int, seed: int) -> list[int]:
        """A seeded choice of `count` rows, no two of one source while there are enough sources."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        first = {self.sources[row]: row for row in reversed(order)}
        distinct = set(first.values())
        ranked = [row for row in order if row in distinct] + [row for row in order if row not in distinct]
        return sorted(ranked[:count])

    def digest(self) -> str:
        """Hash of the fingerprint and of the answers, which differ from tokenizer to tokenizer."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for answer in self.answers:
            digest.update(array("q", [len(answer), *answer]).tobytes())
        return digest.hexdigest()

    def take(self, rows: Sequence[int]) -> "Split":
        """These rows alone, under a fingerprint of their own."""
        chosen = ",".join(map(str, rows)).encode()
        return dataclasses.replace(
            self,
            records=[self.records[row] for row in rows],
            answers=[self.answers[row] for row in rows],
            sources=[self.sources[row] for row in rows],
            prompts=[self.prompts[row] for row in rows],
            fingerprint=hashlib.sha256(self.fingerprint.encode() + chosen).hexdigest()[:16],
        )

    def bucket(self, rows: Sequence[int], batch_size: int) -> list[list[int]]:
        """Cut rows into batches of one prompt and like answer length, shortest first."""
        numbers = {id(prompt): number for number, prompt in enumerate(self.prompts)}
        ordered = sorted(rows, key=lambda row: (numbers[id(self.prompts[row])], len(self.answers[row])))
        batches: list[list[int]] = []
        for row in ordered:
            last = batches[-1] if batches else None
            if last is not None and len(last) < batch_size and self.prompts[last[0]] is self.prompts[row]:
                last.append(row)
            else:
                batches.append([row])
        return batches


def locate_split(config: SummaryTrainingConfig, split: str) -> SplitPaths:
    """Where a split of `config.summary_data_path` lies; of its files only the header of the embeddings is read.

    Raises FileNotFoundError for missing files and ValueError for another embedding size than `embedding_dim`.
    """
    paths = find_split(Path(config.summary_data_path), split)
    with EmbeddingFile(paths.embeddings) as file:
        if file.dim != config.embedding_dim:
            raise ValueError(
                f"{paths.embeddings} holds vectors of size {file.dim}, but embedding_dim is {config.embedding_dim}; "
                f"pass --embedding-dim {file.dim} if that is the embedder's size"
            )
    return paths


def load_split(config: SummaryTrainingConfig, split: str, tokenizer: Any) -> Split:
    """Read, check and tokenise one split of `config.summary_data_path`.

    Raises as `locate_split` does, and ValueError, naming file and line, for bad records, another task than the summary
    (with `summary_only`), or no row short enough.
    """
    paths = locate_split(config, split)
    with EmbeddingFile(paths.embeddings) as file:
        records = list(read_records(paths.records, file.num_rows))
    if config.summary_only:
        for record in records:
            if record.task_type != "summary":
                raise ValueError(
                    f"{paths.records} holds a record of task {record.task_type!r}; run `elm filter`, "
                    "or pass --no-summary-only to train on all tasks"
                )
    prompts = {template: prompt_ids(tokenizer, template) for template in {r.input_prompt_template for r in records}}
    # A target that spells out a special token is text like any other, not an end of turn.
    targets = [record.target_text.strip() for record in records]
    encoded = tokenizer(targets, add_special_tokens=False, split_special_tokens=True).input_ids
    kept: list[tuple[Record, list[int]]] = []
    for record, ids in zip(records, encoded, strict=True):
        prompt = prompts[record.input_prompt_template]
        if len(prompt.before) + config.num_soft_tokens + len(prompt.behind) + len(ids) + 1 <= config.max_seq_length:
            kept.append((record, [*ids, prompt.end_of_turn]))
    if not kept:
        raise ValueError(f"{paths.records}: all {len(records)} rows exceed max_seq_length {config.max_seq_length}")
    with safe_open(str(paths.embeddings), framework="pt") as tensors:
        embeddings = tensors.get_tensor(TENSOR)
    used = sorted({record.embedding_index for record, _ in kept})
    for start in range(0, len(used), _HASHED):
        rows = used[start : start + _HASHED]
        try:
            check_rows(embeddings[rows].float().numpy(), rows)
        except ValueError as error:
            raise ValueError(f"{paths.embeddings}: {error}") from error
    numbers: dict[str, int] = {}
    loaded = Split(
        records=[record for record, _ in kept],
        answers=[answer for _, answer in kept],
        sources=[numbers.setdefault(record.source, len(numbers)) for record, _ in kept],
        prompts=[prompts[record.input_prompt_template] for record, _ in kept],
        embeddings=embeddings,
        too_long=len(records) - len(kept),
        fingerprint=_fingerprint(paths),
    )
    if split == "train" and 0 < config.train_rows < len(loaded):
        return loaded.take(loaded.subset(config.train_rows, config.eval_seed))
    return loaded


def opening_split(split: Split, tokenizer: Any, num_tokens: int) -> Split:
    """One row a source of `split`, its target the first `num_tokens` tokens of the text itself.

    Raises ValueError for a record without source_text.
    """
    texts = split.source_texts("--pretrain-epochs")
    rows = list({source: row for row, source in reversed(list(enumerate(split.sources)))}.values())[::-1]
    prompt = prompt_ids(tokenizer, OPENING_TEMPLATE)
    encoded = tokenizer([texts[row] for row in rows], add_special_tokens=False, split_special_tokens=True).input_ids
    answers = [[*ids[:num_tokens], prompt.end_of_turn] for ids in encoded]
    return dataclasses.replace(split.take(rows), answers=answers, prompts=[prompt] * len(rows))


def _fingerprint(paths: SplitPaths) -> str:
    with open(paths.records, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    with EmbeddingFile(paths.embeddings) as embeddings:
        digest.update(json.dumps([embeddings.num_rows, embeddings.dim, embeddings.dtype]).encode())
        for start in range(0, embeddings.num_rows, _HASHED):
            digest.update(embeddings.raw(start, min(start + _HASHED, embeddings.num_rows)))
    return digest.hexdigest()[:16]


def epoch_batches(split: Split, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, a pure function of seed and epoch, so that a resumed run sees the same ones.

    Rows are shuffled, sorted by answer length within chunks of 64 batches, and the batches are shuffled again:
    like lengths share a batch (little padding), while which rows meet still changes from epoch to epoch.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(split), generator=generator).tolist()
    chunk = 64 * batch_size
    batches = [
        batch
        for start in range(0, len(order), chunk)
        for batch in split.bucket(order[start : start + chunk], batch_size)
    ]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def load_batches(split: Split, batches: list[list[int]], config: SummaryTrainingConfig) -> Iterator[Batch]:
    """Iterate over collated `batches`, in worker processes where the config asks for them."""
    workers = config.num_workers
    return iter(
        DataLoader(
            split,
            batch_sampler=batches,
            collate_fn=split.collate,
            num_workers=workers,
            # A generator of its own: by default each new loader draws from the global one, which a resumed run would
            # then draw from once more than the run that was never stopped.
            generator=torch.Generator(),
            pin_memory=config.pin_memory,
            persistent_workers=config.persistent_workers,
            prefetch_factor=config.prefetch_factor if workers else None,
        )
    )
