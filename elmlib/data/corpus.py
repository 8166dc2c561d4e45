"""Texts become a multi-task corpus: records and embeddings in three splits that share no group, text or summary."""

import hashlib
import json
import os
import platform
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from tqdm.auto import tqdm

from elmlib.config import CorpusConfig, InputError
from elmlib.data import records
from elmlib.data.filtering import hash_rows
from elmlib.data.prompts import TASK_TEMPLATES
from elmlib.data.records import SPLITS, EmbeddingFile, Record, SplitPaths
from elmlib.data.sources import Pair, documented_packages, read_source

if TYPE_CHECKING:
    import pandas as pd

Embed = Callable[[list[str]], np.ndarray]
_TOKEN = re.compile(r"\w+|[^\w\s]")
_COPY_ROWS = 4096
# The offline embedder reads 256 tokens: docstrings that differ later only could get one vector, and in two splits.
_DOCSTRING_OPENING = 500


@dataclass(frozen=True)
class CorpusReport:
    """What a corpus was made of; equal fingerprints mean equal pairs in equal splits."""

    fingerprint: str
    found: int  # pairs before duplicates were dropped and `limit` was applied
    dropped: int  # texts and summaries that repeated an earlier one
    skipped: list[str]  # `module: reason` of each source file that could not be read
    repeated: int  # texts left out because a text of an earlier split has their vector
    cut: int  # texts longer than the embedder reads
    splits: dict[str, dict[str, int]]  # number of groups, pairs, and records of each task
    reused: list[str]  # splits that were complete on disk and were left as they were

    def to_frame(self) -> "pd.DataFrame":
        """One row a split: its groups, pairs and records of each task."""
        import pandas as pd

        return pd.DataFrame.from_dict(self.splits, orient="index").rename_axis("split")

    def summary(self) -> str:
        """One line: what was found, dropped, skipped, cut and reused."""
        return (
            f"{self.found} pairs found, {self.dropped} duplicates dropped, {len(self.skipped)} files skipped, "
            f"{self.repeated} texts left out that have the vector of a text in an earlier split, "
            f"{self.cut} texts longer than the embedder reads, "
            f"fingerprint {self.fingerprint}, reused: {', '.join(self.reused) or 'nothing'}"
        )


def build_corpus(
    config: CorpusConfig, embed: Embed, progress: bool = True, count_cut: Callable[[list[str]], int] | None = None
) -> CorpusReport:
    """Write records, embeddings and `corpus.json`; complete and unchanged files stay as they are. `embed` maps texts to
    float32 vectors. `count_cut` counts the texts that are longer than the embedder's limit. Each vector is in one split
    only. A stopped build resumes at the first batch that was not stored. Raises InputError for a bad source, an empty
    split and a vector that is not finite or all zero."""
    found, skipped = read_source(config, progress)
    pairs, dropped = drop_duplicates(found, _DOCSTRING_OPENING if config.source == "docstrings" else None)
    if 0 < config.limit < len(pairs):
        pairs = random.Random(config.seed).sample(pairs, config.limit)
    splits = split_pairs(pairs, config)
    fingerprint = _digest([TASK_TEMPLATES, *([split, *pair] for split in SPLITS for pair in splits[split])])
    metadata = {"embedding_model": config.embedding_model_name, "fingerprint": fingerprint}
    about = config.output_dir / "corpus.json"
    paths = {split: records.split_paths(config.output_dir, config.output_embeddings_dir, split) for split in SPLITS}
    finished = {split: _finished(about, paths[split], metadata, splits[split]) for split in SPLITS}
    reused = [split for split in SPLITS if finished[split]]
    files = {split: _digests(paths[split]) for split in reused}

    # Stale files go first and embeddings come last, so embeddings on disk always belong to the records beside them.
    for path in (path for split in SPLITS if split not in reused for path in paths[split]):
        path.unlink(missing_ok=True)
    kept: dict[str, list[Pair]] = {}
    vectors: set[int] = set()  # hashes; texts that are alike as far as the embedder reads have one vector
    for split in SPLITS:
        kept[split] = finished[split] or _write_split(
            paths[split], splits[split], vectors, config, embed, metadata, progress
        )
        files[split] = _digests(paths[split])
        records.write_json(about, metadata | {"files": files})
        with EmbeddingFile(paths[split].embeddings) as file:
            vectors.update(hash_rows(file, progress=False)[0])
    for stale in config.output_embeddings_dir.glob(".*_embeddings.*.partial"):
        stale.unlink()
    texts = [pair.text for split in SPLITS for pair in kept[split]]
    repeated, cut = sum(map(len, splits.values())) - len(texts), count_cut(texts) if count_cut else 0
    counts = {split: _counts(kept[split]) for split in SPLITS}
    report = CorpusReport(fingerprint, len(found), dropped, skipped, repeated, cut, counts, reused)
    values = metadata | asdict(report) | {"files": dict(sorted(files.items()))}
    del values["reused"]  # a corpus built in two runs is the same corpus
    values["config"] = {name: str(it) if isinstance(it, Path) else it for name, it in asdict(config).items()}
    values["versions"] = {"python": platform.python_version()} | {it.name: it.version for it in documented_packages()}
    records.write_json(about, values)
    return report


def drop_duplicates(pairs: Iterable[Pair], opening: int | None = None) -> tuple[list[Pair], int]:
    """Pairs sorted by source_id, without repeated texts and summaries, and the number of what was dropped. Case and
    white space are ignored. `opening`: compare only so many characters of the texts, None for all."""
    texts: set[str] = set()
    summaries: set[str] = set()
    kept: list[Pair] = []
    dropped = 0
    for pair in sorted(pairs):
        text = _plain(pair.text)[:opening]
        if text in texts:
            dropped += 1
            continue
        new: dict[str, str] = {}
        for summary in pair.summaries:
            if (key := _plain(summary)) not in summaries:
                new.setdefault(key, summary)
        dropped += len(pair.summaries) - len(new)
        if new:
            texts.add(text)
            summaries.update(new)
            kept.append(pair._replace(summaries=tuple(new.values())))
    return kept, dropped


def _plain(text: str) -> str:
    return "".join(text.casefold().split())


def split_pairs(pairs: list[Pair], config: CorpusConfig) -> dict[str, list[Pair]]:
    """Split by whole groups in seeded order: into val or test while a group fits into its share, else into train."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.group, []).append(pair)
    names = sorted(groups)
    random.Random(config.seed).shuffle(names)
    share = {"val": round(config.val_fraction * len(pairs)), "test": round(config.test_fraction * len(pairs))}
    splits: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    for name in names:
        fitting = (split for split in share if len(splits[split]) + len(groups[name]) <= share[split])
        splits[next(fitting, "train")] += groups[name]
    if empty := " and ".join(split for split in SPLITS if not splits[split]):
        found = f"{len(pairs)} pairs in {len(groups)} groups"
        raise InputError(f"no pairs for {empty}: {found}, of which at most {share}; expected more or smaller groups")
    return {split: sorted(splits[split]) for split in SPLITS}


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(orjson.dumps(values)).hexdigest()[:16]


def pair_records(pair: Pair, row: int) -> Iterator[Record]:
    """All records of a pair; they share embedding `row`. temperature 0 and top_p 1: people wrote the targets, nothing
    was sampled. token_count counts words and punctuation marks, because the tokenizer is chosen later."""
    targets = [("summary", variation, summary) for variation, summary in enumerate(pair.summaries)]
    targets += [("keywords", 0, ", ".join(pair.keywords)), ("category", 0, pair.category)]
    for task, variation, target in targets:
        if target:
            count = len(_TOKEN.findall(target))
            yield Record(task, TASK_TEMPLATES[task], row, target, variation, 0.0, 1.0, count, pair.source_id, pair.text)


def _finished(about: Path, paths: SplitPaths, metadata: dict[str, str], pairs: list[Pair]) -> list[Pair]:
    """Those of `pairs` that stand in a split that an earlier build finished; none where it is absent or changed."""
    try:
        known = json.loads(about.read_bytes())
        if not metadata.items() <= known.items() or _digests(paths) not in known["files"].values():
            return []
        sources = {record.source_id for record in records.read_records(paths.records, len(pairs))}
        return [pair for pair in pairs if pair.source_id in sources]
    except (FileNotFoundError, AttributeError, KeyError, TypeError, ValueError):  # absent or damaged: built again
        return []


def _digests(paths: SplitPaths) -> list[str]:
    return [records.file_digest(path)[:16] for path in paths]


def _counts(pairs: list[Pair]) -> dict[str, int]:
    tasks = Counter(record.task_type for pair in pairs for record in pair_records(pair, 0))
    sizes = {"groups": len({pair.group for pair in pairs}), "pairs": len(pairs)}
    return sizes | {task: tasks[task] for task in TASK_TEMPLATES}


def _write_split(
    paths: SplitPaths, pairs: list[Pair], vectors: set[int], config: CorpusConfig, embed: Embed,
    metadata: dict[str, str], progress: bool,
) -> list[Pair]:  # fmt: skip
    """Write the records and embeddings of those of `pairs` whose vector is not among `vectors`; return them. The
    longest texts are embedded first, so that a batch is of equal lengths, and each batch is stored."""
    path, texts = paths.embeddings, [pair.text for pair in pairs]
    size, name = config.embedding_batch_size, path.name.removesuffix(".safetensors")
    order = sorted(range(len(texts)), key=lambda row: (-len(texts[row]), row))
    key = _digest([config.embedding_model_name, *(texts[row] for row in order)])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = next(path.parent.glob(f".{name}.{key}.*.partial"), None)
    done = 0
    if partial:  # its name holds the size of a row; whole batches stay, so that the others hold the same texts as ever
        row_bytes = 4 * int(partial.suffixes[-2].removeprefix("."))
        done = partial.stat().st_size // (row_bytes * size) * size
        os.truncate(partial, done * row_bytes)
    with tqdm(total=len(texts), initial=done, desc=name, unit="text", disable=not progress) as bar:
        for start in range(done, len(texts), size):
            rows = np.asarray(embed([texts[row] for row in order[start : start + size]]), np.float32)
            assert rows.ndim == 2 and len(rows) == min(size, len(texts) - start), (rows.shape, start, len(texts))
            records.check_rows(rows, range(start, start + len(rows)))
            target = path.with_name(f".{name}.{key}.{rows.shape[1]}.partial")
            if partial not in (None, target):
                raise InputError(f"{partial} holds rows of another size than {rows.shape[1]}; delete it")
            partial = target
            with open(partial, "ab") as file:
                file.write(rows.tobytes())
            bar.update(len(rows))
    assert partial is not None, path  # no split is empty
    stored, place = np.memmap(partial, np.float32, "r").reshape(len(texts), -1), np.argsort(order)
    own = [row for row, at in enumerate(place) if hash((stored[at] + 0.0).tobytes()) not in vectors]  # as `hash_rows`
    if not own:
        same = f"all {len(pairs)} texts have the vector of a text in another split"
        raise InputError(f"no pairs for {paths.records.name}: {same}; expected texts that begin differently")
    with records.atomic_path(paths.records) as temporary, open(temporary, "wb") as out:
        for new, row in enumerate(own):
            out.writelines(record.to_line() for record in pair_records(pairs[row], new))
    chunks = (stored[place[own[at : at + _COPY_ROWS]]].tobytes() for at in range(0, len(own), _COPY_ROWS))
    records.write_embeddings(path, (len(own), stored.shape[1]), chunks, metadata=metadata)
    return [pairs[row] for row in own]
