"""One split as tensors: tokenised targets, embeddings, batches of rows of similar length."""

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from elmlib.config import InputError, SummaryTrainingConfig
from elmlib.data.prompts import IGNORE_INDEX, PromptIds, prompt_ids
from elmlib.data.records import TENSOR, EmbeddingFile, Record, SplitPaths, check_rows, find_split, read_records

_BLOCK_ROWS = 4096  # read at a time


class Batch(NamedTuple):
    """Rows to learn from, all of one prompt."""

    embeddings: Tensor  # (batch, embedding_dim) float32
    labels: Tensor  # (batch, longest answer) token ids of target and end of turn, right-padded with IGNORE_INDEX
    sources: Tensor  # (batch,) number of each row's source; equal numbers are the same text
    prompt: PromptIds
    rows: list[int]  # (batch,) row numbers of the dataset

    @property
    def num_tokens(self) -> int:
        """Number of answer tokens; the NLL is divided by it."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        embeddings, labels, sources = (tensor.to(device, non_blocking=True) for tensor in self[:3])
        return Batch(embeddings, labels, sources, self.prompt, self.rows)


class PromptBatch(NamedTuple):
    """Rows to generate for, all of one prompt. It holds no targets, so none can reach the generation."""

    embeddings: Tensor  # (batch, embedding_dim) float32
    prompt: PromptIds

    def to(self, device: torch.device) -> "PromptBatch":
        """The same batch on `device`."""
        return PromptBatch(self.embeddings.to(device), self.prompt)


@dataclass(frozen=True, eq=False)
class SummaryDataset(Dataset[int]):
    """One split, tokenised. Row i is `records[i]`, `answers[i]`, `embeddings[records[i].embedding_index]`."""

    records: list[Record]
    answers: list[list[int]]  # target token ids with the end of turn
    sources: list[int]
    prompts: list[PromptIds]  # rows of one template share one object
    embeddings: Tensor  # (embedding rows, embedding_dim), as on disk; the file is mapped, not read
    too_long: int  # rows left out because they exceed max_seq_length
    fingerprint: str  # hash of the records file and of all embeddings; equal for equal data

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> int:
        return row

    def vectors(self, rows: Sequence[int]) -> Tensor:
        """(rows, embedding_dim) float32."""
        return self.embeddings[[self.records[row].embedding_index for row in rows]].float()

    def collate(self, rows: Sequence[int]) -> Batch:
        """Rows of one prompt as a Batch."""
        embeddings, prompt = self.collate_prompts(rows)
        answers = [torch.tensor(self.answers[row]) for row in rows]
        labels = pad_sequence(answers, batch_first=True, padding_value=IGNORE_INDEX)
        return Batch(embeddings, labels, torch.tensor([self.sources[row] for row in rows]), prompt, list(rows))

    def collate_prompts(self, rows: Sequence[int]) -> PromptBatch:
        """Rows of one prompt as a PromptBatch."""
        prompt = self.prompts[rows[0]]
        assert all(self.prompts[row] is prompt for row in rows), "rows of different prompts in one batch"
        return PromptBatch(self.vectors(rows), prompt)

    def subset(self, count: int, seed: int) -> list[int]:
        """A seeded sample of `count` rows, sorted; no two of one source while there are enough sources."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        first = {self.sources[row]: row for row in reversed(order)}
        distinct = set(first.values())
        ranked = [row for row in order if row in distinct] + [row for row in order if row not in distinct]
        return sorted(ranked[:count])

    def digest(self) -> str:
        """Hash of the fingerprint and of the answers, so of the tokenizer too."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for answer in self.answers:
            digest.update(array("q", [len(answer), *answer]).tobytes())
        return digest.hexdigest()

    def take(self, rows: Sequence[int]) -> "SummaryDataset":
        """A dataset of these rows alone, with another fingerprint."""
        columns = ("records", "answers", "sources", "prompts")
        chosen: dict[str, Any] = {name: [getattr(self, name)[row] for row in rows] for name in columns}
        digest = hashlib.sha256(self.fingerprint.encode() + ",".join(map(str, rows)).encode())
        return dataclasses.replace(self, **chosen, fingerprint=digest.hexdigest()[:16])

    def bucket(self, rows: Sequence[int], batch_size: int) -> list[list[int]]:
        """Cut rows into batches of one prompt and of similar answer length, shortest first."""
        batches: list[list[int]] = []
        for row in sorted(rows, key=lambda row: (self.records[row].input_prompt_template, len(self.answers[row]))):
            if batches and len(batches[-1]) < batch_size and self.prompts[batches[-1][0]] is self.prompts[row]:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches


def locate_split(config: SummaryTrainingConfig, split: str) -> SplitPaths:
    """The files of a split of `config.summary_data_path`; InputError where the vectors are not of `embedding_dim` or of
    another embedder than the config's."""
    paths = find_split(Path(config.summary_data_path), split)
    with EmbeddingFile(paths.embeddings) as file:
        if file.dim != config.embedding_dim:
            raise InputError(
                f"{paths.embeddings} holds vectors of size {file.dim}, but embedding_dim is {config.embedding_dim}; "
                f"pass --embedding-dim {file.dim} if that is the embedder's size"
            )
        file.check_embedder(config.embedding_model_name)
    return paths


def load_split(config: SummaryTrainingConfig, split: str, tokenizer: Any) -> SummaryDataset:
    """Read, check and tokenise one split of `config.summary_data_path`; `train_rows` takes a sample of the train split.
    Raises InputError that name the file, and the line of a bad record."""
    paths = locate_split(config, split)
    with EmbeddingFile(paths.embeddings) as file:
        records = list(read_records(paths.records, file.num_rows))
    others = {record.task_type for record in records} - {"summary"}
    if others and config.summary_only:
        raise InputError(
            f"{paths.records} holds a record of task {min(others)!r}; run `elm filter`, "
            "or pass --no-summary-only to train on all tasks"
        )
    prompts = {template: prompt_ids(tokenizer, template) for template in {r.input_prompt_template for r in records}}
    # A target that contains the name of a special token is plain text, not an end of turn.
    targets = [record.target_text.strip() for record in records]
    encoded = tokenizer(targets, add_special_tokens=False, split_special_tokens=True).input_ids
    kept: list[tuple[Record, list[int]]] = []
    for record, ids in zip(records, encoded, strict=True):
        prompt = prompts[record.input_prompt_template]
        if len(prompt.before) + config.num_soft_tokens + len(prompt.behind) + len(ids) + 1 <= config.max_seq_length:
            kept.append((record, [*ids, prompt.end_of_turn]))
    if not kept:
        raise InputError(f"{paths.records}: all {len(records)} rows exceed max_seq_length {config.max_seq_length}")
    with safe_open(str(paths.embeddings), framework="pt") as tensors:
        embeddings = tensors.get_tensor(TENSOR)
    used = sorted({record.embedding_index for record, _ in kept})
    for start in range(0, len(used), _BLOCK_ROWS):
        rows = used[start : start + _BLOCK_ROWS]
        check_rows(embeddings[rows].float().numpy(), rows, f"{paths.embeddings}: row")
    numbers: dict[str, int] = {}
    loaded = SummaryDataset(
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


def _fingerprint(paths: SplitPaths) -> str:
    with open(paths.records, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    with EmbeddingFile(paths.embeddings) as embeddings:
        digest.update(json.dumps([embeddings.num_rows, embeddings.dim, embeddings.dtype]).encode())
        for start in range(0, embeddings.num_rows, _BLOCK_ROWS):
            digest.update(embeddings.raw(start, min(start + _BLOCK_ROWS, embeddings.num_rows)))
    return digest.hexdigest()[:16]


def epoch_batches(split: SummaryDataset, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, a pure function of seed and epoch, so that a resumed run gets the same ones. Rows are
    shuffled, sorted by answer length within chunks of 64 batches, and the batches are shuffled again: rows of similar
    length share a batch (little padding), and the batches differ from epoch to epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(split), generator=generator).tolist()
    chunk = 64 * batch_size
    chunks = (order[start : start + chunk] for start in range(0, len(order), chunk))
    batches = [batch for rows in chunks for batch in split.bucket(rows, batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def load_batches(split: SummaryDataset, batches: list[list[int]], config: SummaryTrainingConfig) -> DataLoader[Any]:
    """A loader of collated `batches`, in worker processes where the config asks for them. The list may be changed
    between two passes, so that persistent workers stay."""
    return DataLoader(
        split,
        batch_sampler=batches,
        collate_fn=split.collate,
        num_workers=config.num_workers,
        # Without it each pass draws a seed from the global generator. A resumed run makes one pass more, so its later
        # random numbers would differ from those of a run that was never stopped.
        generator=torch.Generator(),
        pin_memory=config.pin_memory,
        persistent_workers=config.persistent_workers,
        prefetch_factor=config.prefetch_factor if config.num_workers else None,
    )
