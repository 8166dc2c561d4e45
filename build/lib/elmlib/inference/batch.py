"""Summaries for a file of embeddings, written to JSONL as they are made; a stopped run resumes."""

import json
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import torch
from tqdm.auto import tqdm

from elmlib import data
from elmlib.data import EmbeddingFile, PromptBatch, find_records, parse_line, read_lines, read_records
from elmlib.evaluation import rerank
from elmlib.models import (
    BEST,
    Sampling,
    SoftTokenModel,
    build_model,
    default_device,
    encode,
    load_adapter,
    load_embedder,
)
from elmlib.models.pretrained import public_name

_CHECKED = 4096  # rows checked at a time


class Request(NamedTuple):
    """One line of the input: the embedding to summarise and the prompt to use."""

    embedding_index: int
    template: str
    source_id: str


def generate_file(
    checkpoint: Path,
    source: Path,
    output: Path,
    embeddings: Path | None = None,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    device: torch.device | None = None,
    sampling: Sampling | None = None,
    progress: bool = True,
) -> int:
    """Write one summary a line for each record of `source`, in its order; return how many lines this call wrote.

    `checkpoint` is an adapter file, or a run's folder: then its best adapter is used. `source` is a records file or a
    safetensors file of embeddings. The embeddings of records are found beside them, or are `embeddings`. A stopped run
    resumes after its last complete line. Records of one embedding and prompt in one batch are generated once. With
    `sampling`, each line also has `best_candidate`: the candidate whose re-embedding is nearest to the embedding.

    Raises ValueError before anything is written: for bad records, for embeddings of another size or model than the
    adapter reads, for rows that are not finite or zero, and for an `output` of another checkpoint, input or decoding.
    """
    device = device or default_device()
    checkpoint = checkpoint / BEST if checkpoint.is_dir() else checkpoint
    adapter = load_adapter(checkpoint)
    config = adapter.config
    length = max_new_tokens or config.max_new_tokens
    records = None if source.suffix == ".safetensors" else find_records(source)
    with EmbeddingFile(embeddings or data.find_embeddings(records) if records else source) as vectors:
        _check_embedder(vectors, checkpoint, config.embedding_model_name, config.embedding_dim)
        total = _check_requests(records, vectors)
        files = {"checkpoint": checkpoint, "records": records, "embeddings": vectors.path}
        made_from: dict[str, Any] = {name: data.file_digest(path)[:16] for name, path in files.items() if path}
        made_from["max_new_tokens"] = length
        choose = None
        if sampling:
            made_from["candidates"] = list(sampling)
            embedder = load_embedder(config.embedding_model_name, device)
            choose = _Choice(sampling, lambda texts: encode(embedder, texts, batch_size))
        done = _resume_output(output, made_from)
        # The LLM takes longest to load: only now is it known that it is needed.
        model = build_model(config, device, adapter.weights, origin=str(checkpoint))
        remaining = islice(_requests(records, vectors), done, None)
        with (
            open(output, "ab") as file,
            tqdm(total=total, initial=done, desc="generate", unit="summary", disable=not progress) as bar,
        ):
            while chunk := list(islice(remaining, batch_size)):
                texts = _answer(model, chunk, vectors, length, device, choose)
                for request in chunk:
                    line = {"source_id": request.source_id, "embedding_index": request.embedding_index}
                    file.write(orjson.dumps(line | texts[request[:2]]) + b"\n")
                file.flush()
                bar.update(len(chunk))
    return total - done


class TextPairs(NamedTuple):
    """Predictions beside their references, in one order."""

    predictions: list[str]
    references: list[str]
    sources: list[str]


def read_pairs(predictions: Path, references: Path) -> TextPairs:
    """The lines of a predictions file beside the records that it was written for.

    Raises ValueError for files of unequal length, or where a line belongs to another embedding than its record.
    """
    references = find_records(references)
    records = list(read_records(references, num_rows=sys.maxsize))
    lines = [(f"{predictions}, line {number}", line) for number, line in read_lines(predictions)]
    if len(lines) != len(records):
        raise ValueError(f"{predictions} has {len(lines)} lines, {references} has {len(records)}; expected as many")
    texts = []
    for (where, line), record in zip(lines, records, strict=True):
        values = parse_line(line, where)
        if not isinstance(values, dict) or not isinstance(values.get("prediction"), str):
            raise ValueError(f"{where}: expected a JSON object with the text field 'prediction'")
        if values.get("embedding_index", record.embedding_index) != record.embedding_index:
            raise ValueError(
                f"{where}: made from embedding {values['embedding_index']}, but its record in {references} has "
                f"{record.embedding_index}; were they written for the same file?"
            )
        texts.append(values["prediction"])
    return TextPairs(texts, [record.target_text for record in records], [record.source for record in records])


class _Choice(NamedTuple):
    sampling: Sampling
    embed: Callable[[list[str]], np.ndarray]


def _answer(
    model: SoftTokenModel,
    chunk: list[Request],
    vectors: EmbeddingFile,
    length: int,
    device: torch.device,
    choice: _Choice | None,
) -> dict[tuple[int, str], dict[str, str]]:
    """The output fields of each (embedding, template) of `chunk`."""
    answers: dict[tuple[int, str], dict[str, str]] = {}
    for template in dict.fromkeys(request.template for request in chunk):
        rows = list(dict.fromkeys(request.embedding_index for request in chunk if request.template == template))
        own = np.concatenate([vectors.rows(row, row + 1) for row in rows])
        batch = PromptBatch(torch.from_numpy(own), data.prompt_ids(model.tokenizer, template)).to(device)
        fields = [{"prediction": text} for text in model.generate(batch, length)]
        if choice:
            best = rerank(choice.embed, model.candidates(batch, length, choice.sampling), own)
            fields = [field | {"best_candidate": text} for field, text in zip(fields, best, strict=True)]
        answers |= zip(((row, template) for row in rows), fields, strict=True)
    return answers


def _requests(records: Path | None, vectors: EmbeddingFile) -> Iterator[Request]:
    """One request a record, or one a row where there are no records."""
    if records is None:
        yield from (Request(row, data.TASK_TEMPLATES["summary"], "") for row in range(vectors.num_rows))
        return
    for record in read_records(records, vectors.num_rows):
        yield Request(record.embedding_index, record.input_prompt_template, record.source_id)


def _check_requests(records: Path | None, vectors: EmbeddingFile) -> int:
    """The number of requests; ValueError for a bad record, or for a row that is used and not finite or zero."""
    used, total = np.zeros(vectors.num_rows, bool), 0
    for request in _requests(records, vectors):
        used[request.embedding_index] = True
        total += 1
    for start in range(0, vectors.num_rows, _CHECKED):
        rows = start + np.flatnonzero(used[start : start + _CHECKED])
        try:
            data.check_rows(vectors.rows(start, min(start + _CHECKED, vectors.num_rows))[rows - start], rows.tolist())
        except ValueError as error:
            raise ValueError(f"{vectors.path}: {error}") from error
    return total


def _check_embedder(vectors: EmbeddingFile, checkpoint: Path, model: str, size: int) -> None:
    if vectors.dim != size:
        raise ValueError(
            f"{vectors.path} holds vectors of size {vectors.dim}; {checkpoint} reads {size} (from {model})"
        )
    made_by = vectors.metadata.get("embedding_model", model)
    if public_name(made_by) != public_name(model):
        raise ValueError(f"{vectors.path} holds vectors of {made_by}; {checkpoint} reads vectors of {model}")


def _resume_output(output: Path, made_from: dict[str, Any]) -> int:
    """Cut an incomplete last line off an output that was made from the same files; return its complete lines."""
    about = output.with_name(output.name + ".about.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists():
        data.write_json(about, made_from)
        return 0
    before = json.loads(about.read_text(encoding="utf-8")) if about.exists() else None
    if before != made_from:
        raise ValueError(f"{output} exists and was made from {before}, not from {made_from}; remove it or name another")
    with open(output, "r+b") as file:
        lines = size = 0
        for line in file:
            if line.endswith(b"\n"):
                lines, size = lines + 1, size + len(line)
        file.truncate(size)
    return lines
