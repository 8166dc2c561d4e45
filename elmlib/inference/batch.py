"""Summaries for a file of embeddings, written to JSONL as they are made; a stopped run resumes."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import torch
from tqdm.auto import tqdm

from elmlib import data
from elmlib.config import InputError, read_settings
from elmlib.data import EmbeddingFile, find_records, read_records
from elmlib.evaluation import read_predictions
from elmlib.inference.summarizer import Elm
from elmlib.models import Sampling, find_adapter, load_adapter

_CHECKED = 4096  # rows checked at a time
_ABOUT = ".about.json"


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

    Raises InputError before anything is written: for bad records, for embeddings of another size or model than the
    adapter reads, for rows that are not finite or zero, and for an `output` of another checkpoint, input or decoding.
    """
    checkpoint, output = find_adapter(checkpoint), Path(output).expanduser()
    config = load_adapter(checkpoint).config
    length = max_new_tokens or config.max_new_tokens
    records = None if source.suffix == ".safetensors" else find_records(source)
    with EmbeddingFile(embeddings or data.find_embeddings(records) if records else source) as vectors:
        model, size = config.embedding_model_name, config.embedding_dim
        if vectors.dim != size:
            raise InputError(f"{vectors.path} holds vectors of size {vectors.dim}; {checkpoint} reads {size} ({model})")
        vectors.check_embedder(model)
        requests = _read_requests(records, vectors)
        files = {"checkpoint": checkpoint, "records": records, "embeddings": vectors.path}
        made_from: dict[str, Any] = {name: data.file_digest(path)[:16] for name, path in files.items() if path}
        made_from |= {"max_new_tokens": length} | ({"candidates": list(sampling)} if sampling else {})
        done = _resume_output(output, made_from, requests)
        # The LLM takes longest to load: only now is it known that it is needed.
        elm = Elm.from_pretrained(checkpoint, device=device)
        if sampling:
            elm.embed(["a text"])  # an embedder that is missing fails before anything is written
        data.write_json(output.with_name(output.name + _ABOUT), made_from)
        with (
            open(output, "ab") as file,
            tqdm(total=len(requests), initial=done, desc="generate", unit="summary", disable=not progress) as bar,
        ):
            for start in range(done, len(requests), batch_size):
                lines = _answer(elm, requests[start : start + batch_size], vectors, length, sampling)
                file.write(b"".join(orjson.dumps(line) + b"\n" for line in lines))
                file.flush()
                bar.update(len(lines))
    return len(requests) - done


class TextPairs(NamedTuple):
    """Predictions beside their references, in one order."""

    predictions: list[str]
    references: list[str]
    sources: list[str]


def read_pairs(predictions: Path, references: Path) -> TextPairs:
    """The lines of a predictions file beside the records that it was written for. Raises InputError for files of
    unequal length, or where a line belongs to another embedding than its record."""
    references = find_records(references)
    records = list(read_records(references, num_rows=sys.maxsize))
    lines = read_predictions(predictions, "prediction")
    if len(lines) != len(records):
        raise InputError(f"{predictions} has {len(lines)} lines, {references} has {len(records)}; expected as many")
    for number, (line, record) in enumerate(zip(lines, records, strict=True), start=1):
        if line.get("embedding_index", record.embedding_index) != record.embedding_index:
            raise InputError(
                f"{predictions}, line {number}: made from embedding {line['embedding_index']}, but its record in "
                f"{references} has {record.embedding_index}; were they written for the same file?"
            )
    texts = [line["prediction"] for line in lines]
    return TextPairs(texts, [record.target_text for record in records], [record.source for record in records])


def _read_requests(records: Path | None, vectors: EmbeddingFile) -> list[tuple[int, str, str]]:
    """(embedding row, prompt template, source_id) of each record, or of each row where there are no records. Raises
    InputError for a bad record, or for a row that is used and not finite or zero."""
    requests = [(row, data.TASK_TEMPLATES["summary"], "") for row in range(vectors.num_rows)]
    if records:
        read = read_records(records, vectors.num_rows)
        requests = [(record.embedding_index, record.input_prompt_template, record.source_id) for record in read]
    used = np.unique([row for row, _, _ in requests])
    for start in range(0, vectors.num_rows, _CHECKED):
        rows = used[(start <= used) & (used < start + _CHECKED)]
        block = vectors.rows(start, min(start + _CHECKED, vectors.num_rows))
        try:
            data.check_rows(block[rows - start], rows.tolist())
        except InputError as error:
            raise InputError(f"{vectors.path}: {error}") from error
    return requests


def _answer(
    elm: Elm, chunk: list[tuple[int, str, str]], vectors: EmbeddingFile, length: int, sampling: Sampling | None
) -> list[dict[str, Any]]:
    """The output lines of `chunk`; each embedding under each prompt is generated once."""
    fields: dict[tuple[int, str], dict[str, str]] = {(row, template): {} for row, template, _ in chunk}
    for template in dict.fromkeys(template for _, template in fields):
        rows = [row for row, other in fields if other == template]
        own = np.concatenate([vectors.rows(row, row + 1) for row in rows])
        for row, text in zip(rows, elm.summarize(own, length, None, template, len(rows)), strict=True):
            fields[row, template]["prediction"] = text
        if sampling:
            for row, text in zip(rows, elm.summarize(own, length, sampling, template, len(rows)), strict=True):
                fields[row, template]["best_candidate"] = text
    return [{"source_id": name, "embedding_index": row} | fields[row, template] for row, template, name in chunk]


def _resume_output(output: Path, made_from: dict[str, Any], requests: list[tuple[int, str, str]]) -> int:
    """Cut an incomplete last line off an output that was made from the same files; return its complete lines. Raises
    InputError for lines that were not made from these requests."""
    if not output.exists():
        return 0
    about = output.with_name(output.name + _ABOUT)
    before = read_settings(about) if about.exists() else None
    if before != made_from:
        raise InputError(f"{output} exists and was made from {before}, not from {made_from}; remove it or name another")
    with open(output, "r+b") as file:
        complete = [line for line in file if line.endswith(b"\n")]
        for number, line in enumerate(complete):
            values = data.parse_line(line, f"{output}, line {number + 1}")
            row, _, name = requests[number] if number < len(requests) else (-1, "", "")
            made = isinstance(values, dict) and {"source_id": name, "embedding_index": row}.items() <= values.items()
            if not made or not isinstance(values.get("prediction"), str):
                raise InputError(f"{output}, line {number + 1} is not a summary of record {number + 1}; remove it")
        file.truncate(sum(map(len, complete)))
    return len(complete)
