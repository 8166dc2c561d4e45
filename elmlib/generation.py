"""Summaries for a whole file of embeddings: streamed to JSONL as they are made, and taken up where a stop left them."""

import hashlib
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

from elmlib.checkpoint import AdapterFile, load_adapter
from elmlib.controls import rerank
from elmlib.data import PromptBatch
from elmlib.decoding import Sampling
from elmlib.layout import find_embeddings, find_records
from elmlib.model import Elm, make_adapter, token_table
from elmlib.pretrained import check_head, default_device, encode, load_embedder, load_llm, native_bf16
from elmlib.prompts import TASK_TEMPLATES, prompt_ids
from elmlib.records import EmbeddingFile, parse_line, read_lines, read_records, write_json


class Request(NamedTuple):
    """What one line of output answers."""

    embedding_index: int
    template: str
    source_id: str


class LoadedElm(NamedTuple):
    """An `Elm` built from an adapter file."""

    elm: Elm
    file: AdapterFile


def load_elm(checkpoint: Path, device: torch.device) -> LoadedElm:
    """The adapter of `checkpoint` on the LLM that it was trained with.

    Raises FileNotFoundError or ValueError for a file that is missing or no adapter, or an LLM that cannot be found.
    """
    file = load_adapter(checkpoint)
    return LoadedElm(build_elm(file, device, str(checkpoint)), file)


def build_elm(file: AdapterFile, device: torch.device, origin: str, revision: str = "") -> Elm:
    """The adapter of `file`, read from `origin`, on the LLM that its settings name, of `revision` where it has one.

    Raises FileNotFoundError for an LLM that cannot be found and ValueError for one of another size.
    """
    config = file.config
    dtype = torch.bfloat16 if config.use_bf16 and native_bf16(device) else torch.float32
    llm, tokenizer = load_llm(config.llm_model_name, dtype, device, revision)
    check_head(llm)
    table = token_table(llm)
    if (size := len(file.weights["norm.weight"])) != table.shape[1]:
        raise ValueError(
            f"{config.llm_model_name} has token embeddings of size {table.shape[1]}; {origin} writes {size}: it was "
            "trained with another LLM"
        )
    adapter = make_adapter(config, table)
    adapter.load_state_dict(file.weights)
    return Elm(llm, tokenizer, adapter.to(device).eval(), place=config.soft_token_place)


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
    """Write one summary a line for each record of `source`, in its order; return how many this call made.

    `source` is a records file, whose embeddings are found beside it or given, or a bare safetensors file of
    embeddings. A stopped run goes on behind its last whole line. Records that share embedding and prompt within a
    batch are generated once. With `sampling`, the candidate nearest to the embedding stands beside each greedy
    prediction, as `best_candidate`. Raises ValueError where `output` belongs to another checkpoint, input or decoding,
    where the embeddings have another size than the adapter's, and for bad records.
    """
    device = device or default_device()
    adapter = load_adapter(checkpoint)
    config = adapter.config
    length = max_new_tokens or config.max_new_tokens
    bare = source.suffix == ".safetensors"
    source = source if bare else find_records(source)
    with EmbeddingFile(source if bare else embeddings or find_embeddings(source)) as vectors:
        if vectors.dim != config.embedding_dim:
            raise ValueError(
                f"{vectors.path} holds vectors of size {vectors.dim}; {checkpoint} reads {config.embedding_dim} "
                f"(from {config.embedding_model_name})"
            )
        made_by = {"checkpoint": _digest(checkpoint), "input": source.name, "max_new_tokens": length}
        if sampling:
            made_by["candidates"] = list(sampling)
            embedder = load_embedder(config.embedding_model_name, device)
            choose = _Choice(sampling, lambda texts: encode(embedder, texts, batch_size))
        elm = build_elm(adapter, device, str(checkpoint))  # takes longest: not before the vectors are known to fit
        done = _open_output(output, made_by)
        requests = _bare_requests(vectors) if bare else _record_requests(source, vectors)
        total = vectors.num_rows if bare else sum(1 for _ in read_lines(source))
        remaining = islice(requests, done, None)
        with (
            open(output, "ab") as file,
            tqdm(total=total, initial=done, desc="generate", unit="summary", disable=not progress) as bar,
        ):
            while chunk := list(islice(remaining, batch_size)):
                texts = _answer(elm, chunk, vectors, length, device, choose if sampling else None)
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
    elm: Elm, chunk: list[Request], vectors: EmbeddingFile, length: int, device: torch.device, choice: _Choice | None
) -> dict[tuple[int, str], dict[str, str]]:
    """The fields that answer each (embedding, template) of `chunk`."""
    answers: dict[tuple[int, str], dict[str, str]] = {}
    for template in dict.fromkeys(request.template for request in chunk):
        rows = list(dict.fromkeys(request.embedding_index for request in chunk if request.template == template))
        given = torch.cat([torch.from_numpy(vectors.rows(row, row + 1).copy()) for row in rows])
        batch = PromptBatch(given, prompt_ids(elm.tokenizer, template)).to(device)
        fields = [{"prediction": text} for text in elm.generate(batch, length)]
        if choice:
            best = rerank(choice.embed, elm.candidates(batch, length, choice.sampling), given.numpy())
            fields = [field | {"best_candidate": text} for field, text in zip(fields, best, strict=True)]
        answers |= zip(((row, template) for row in rows), fields, strict=True)
    return answers


def _record_requests(records: Path, vectors: EmbeddingFile) -> Iterator[Request]:
    for record in read_records(records, vectors.num_rows):
        yield Request(record.embedding_index, record.input_prompt_template, record.source_id)


def _bare_requests(vectors: EmbeddingFile) -> Iterator[Request]:
    for row in range(vectors.num_rows):
        yield Request(row, TASK_TEMPLATES["summary"], "")


def _open_output(output: Path, made_by: dict[str, Any]) -> int:
    """Cut a torn last line off an output of the same making, and return its whole lines."""
    about = output.with_name(output.name + ".about.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists():
        write_json(about, made_by)
        return 0
    before = json.loads(about.read_text(encoding="utf-8")) if about.exists() else None
    if before != made_by:
        raise ValueError(f"{output} exists and was made from {before}, not from {made_by}; remove it or name another")
    with open(output, "r+b") as file:
        lines = size = 0
        for line in file:
            if line.endswith(b"\n"):
                lines, size = lines + 1, size + len(line)
        file.truncate(size)
    return lines


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
