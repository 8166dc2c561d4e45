"""Questions to a trained adapter: what does this vector say, and one between two, along a direction, of a cluster?

Interpolation between embeddings: Tennenholtz et al., ICLR 2024.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from elmlib.checkpoint import BEST
from elmlib.data import load_split
from elmlib.decoding import Sampling
from elmlib.hub import Elm
from elmlib.identification import unit_rows
from elmlib.records import EmbeddingFile


@dataclass(frozen=True)
class Manner:
    """How an answer is decoded."""

    num_beams: int = 1
    """Beam search with so many; 1 takes the best token each time, or draws."""
    temperature: float = 0.0
    """Above 0 draws tokens; 0 takes the best."""
    top_p: float = 0.95
    """Of what is drawn, above 0 to 1."""
    candidates: int = 1
    """Above 1, so many are drawn and the one nearest to the vector is kept: semantic consistency."""
    max_new_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.candidates > 1 and not self.temperature:
            raise ValueError("candidates are drawn: set a temperature above 0, or candidates to 1")
        if self.num_beams > 1 and self.temperature:
            raise ValueError("beam search takes the best tokens: set temperature to 0, or num_beams to 1")


class Neighbour(NamedTuple):
    """A training text near to a vector."""

    similarity: float
    """Cosine of its vector, -1 to 1."""
    source_id: str
    summary: str


class Controls(NamedTuple):
    """What the model says without the vector: what it would have said anyway."""

    shuffled: str
    """Given another text's vector."""
    mean: str
    """Given the mean of all training vectors."""


def newest_run(runs: Mapping[str, str]) -> tuple[str, str]:
    """The folder of the adapter that was saved last, and of its data, out of several runs' (run -> data).

    Raises FileNotFoundError where none has an adapter.
    """
    trained = [run for run in runs if Path(run, BEST).is_file()]
    if not trained:
        raise FileNotFoundError(f"no {BEST} in {' or '.join(runs)}; train one: `make demo`, or notebooks 00 to 02")
    newest = max(trained, key=lambda run: Path(run, BEST).stat().st_mtime)
    return newest, runs[newest]


class Explorer:
    """A trained adapter and the data that it was trained on, ready to be asked."""

    def __init__(self, elm: Elm, data_dir: Path | str, split: str = "val"):
        """`split` holds the texts that can be picked. Raises as `load_split` does, and ValueError for other vectors."""
        self.elm = elm
        config = replace(elm.file.config, summary_data_path=str(data_dir))
        self.train, self.val = (load_split(config, name, elm.reader.tokenizer) for name in ("train", split))
        self.vectors = self.val.vectors(range(len(self.val))).numpy()
        self._train_units = unit_rows(self.train.vectors(range(len(self.train))).numpy()).astype(np.float32)

    def stream(self, vector: np.ndarray, manner: Manner = Manner()) -> Iterator[str]:
        """The answer to `vector` (embedding_dim,) as it grows; beams and candidates come whole, at the end."""
        batch = self.elm.batch(vector[None])
        reader, length = self.elm.reader, manner.max_new_tokens
        if manner.num_beams > 1:
            yield reader.search_beams(batch, length, manner.num_beams)[0]
            return
        sampling = Sampling(manner.candidates, manner.temperature, manner.top_p, manner.seed)
        if manner.candidates > 1:
            yield self.elm.summarize(vector[None], length, sampling)[0]
            return
        for texts in reader.stream(batch, length, sampling):
            yield texts[0]

    def answer(self, vector: np.ndarray, manner: Manner = Manner()) -> str:
        """The whole answer to `vector` (embedding_dim,)."""
        *_, text = self.stream(vector, manner)
        return text

    def controls(self, row: int, manner: Manner) -> Controls:
        """For validation text `row`: the answers to the next text's vector and to the mean of all."""
        other = self.vectors[(row + 1) % len(self.vectors)]
        return Controls(self.answer(other, manner), self.answer(self.elm.mean_vector(), manner))

    def similarity(self, text: str, vector: np.ndarray) -> float:
        """Cosine between the re-embedded `text` and `vector`, -1 to 1; 0 for an empty text."""
        if not text.strip():
            return 0.0
        return cosine(self.elm.embed([text])[0], vector)

    def neighbours(self, vector: np.ndarray, count: int = 3) -> list[Neighbour]:
        """The training texts whose vectors are nearest to `vector` (embedding_dim,), nearest first."""
        similarity = self._train_units @ unit_rows(vector[None])[0].astype(np.float32)
        nearest = np.argsort(-similarity)[:count]
        records = self.train.records
        return [Neighbour(float(similarity[i]), records[i].source, records[i].target_text) for i in nearest.tolist()]

    def labels(self) -> list[str]:
        """A name for each validation text: its number, where it comes from, how its reference begins."""
        return [f"{row}  {record.source_id}: {record.target_text[:60]}" for row, record in enumerate(self.val.records)]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two vectors (dim,), -1 to 1; 0 where one is zero."""
    return float(unit_rows(a[None])[0] @ unit_rows(b[None])[0])


def blend(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """The vector `share` of the way from `a` to `b` (dim,), as long as the two are: 0 is a, 1 is b."""
    length = (1 - share) * np.linalg.norm(a) + share * np.linalg.norm(b)
    return _as_long((1 - share) * a + share * b, length)


def move(start: np.ndarray, a: np.ndarray, b: np.ndarray, steps: float) -> np.ndarray:
    """`start` moved along the direction from `b` to `a` (dim,) by `steps` times their difference, its length kept."""
    return _as_long(start + steps * (a - b), np.linalg.norm(start))


def centre(vectors: np.ndarray) -> np.ndarray:
    """The mean of vectors (n, dim), as long as they are on average: what is this cluster about?

    Raises ValueError for no vector.
    """
    if not len(vectors):
        raise ValueError("no vectors to average; choose at least one")
    return _as_long(vectors.mean(axis=0), np.linalg.norm(vectors, axis=1).mean())


def _as_long(vector: np.ndarray, length: float | np.floating) -> np.ndarray:
    """`vector` at `length`: the adapter has only ever seen vectors of the embedder's own length."""
    norm = np.linalg.norm(vector)
    return (vector * (length / norm) if norm else vector).astype(np.float32)


def read_vector(path: Path, row: int = 0) -> np.ndarray:
    """One vector (dim,) of a file: .safetensors with a tensor `embeddings`, .npy, or numbers as text or JSON.

    Raises FileNotFoundError for no such file, and ValueError for what is none of these or for a row that is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected a vector as .safetensors, .npy, or as numbers")
    if path.suffix == ".safetensors":
        with EmbeddingFile(path) as file:
            rows = file.rows(0, file.num_rows)
    elif path.suffix == ".npy":
        rows = np.load(path, allow_pickle=False)
    else:
        rows = parse_vector(path.read_text(encoding="utf-8"), str(path))
    rows = np.atleast_2d(rows).astype(np.float32)
    if not 0 <= row < len(rows):
        raise ValueError(f"{path} has {len(rows)} vectors; there is no row {row}")
    return rows[row]


def parse_vector(text: str, origin: str = "the text") -> np.ndarray:
    """A vector (dim,) out of numbers between spaces or commas, in brackets or not; ValueError for anything else."""
    try:
        return np.array([float(number) for number in text.replace(",", " ").strip().strip("[]").split()], np.float32)
    except ValueError as error:
        raise ValueError(f"{origin} is no vector: {error}; expected numbers between spaces or commas") from error


def project(vectors: np.ndarray) -> np.ndarray:
    """Vectors (n, dim) on their first two principal components (Pearson, 1901), (n, 2)."""
    from sklearn.decomposition import PCA

    return PCA(n_components=2, random_state=0).fit_transform(vectors)
