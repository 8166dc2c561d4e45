"""Questions to a trained adapter: the summary of a vector, of one between two, along a direction, of a cluster.

Interpolation between embeddings: Tennenholtz et al., ICLR 2024, https://arxiv.org/abs/2310.04475.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from html import escape
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from sentence_transformers.util import cos_sim, semantic_search

from elmlib.config import InputError
from elmlib.data.dataset import load_split
from elmlib.data.records import EmbeddingFile
from elmlib.evaluation.metrics import swap_sources
from elmlib.inference.summarizer import Elm
from elmlib.models.adapter import BEST
from elmlib.models.elm import Sampling

if TYPE_CHECKING:
    import ipywidgets
    import pandas

GREEDY, SAMPLED, BEST_OF = "greedy", "sampled", "best of several samples"


class Question(NamedTuple):
    """A vector (dim,) to summarise, and what is known about it."""

    vector: np.ndarray
    reference: str = ""
    text: str = ""
    other: np.ndarray | None = None  # the shuffled control: the vector of another source


class Explorer:
    """A trained adapter and the data that it was trained on: summaries, comparisons, and cards for a notebook."""

    def __init__(self, elm: Elm, data_dir: Path | str, split: str = "val"):
        """`split` holds the texts to choose from. Raises as `load_split` does, and for a split of one source."""
        self.elm = elm
        config = replace(elm.file.config, summary_data_path=str(data_dir))
        self.train, self.val = (load_split(config, name, elm.model.tokenizer) for name in ("train", split))
        self.vectors = self.val.vectors(range(len(self.val))).numpy()
        # A row of another group, here the part before the colon of `module:name`: rows of one module are alike.
        sources = [record.source for record in self.val.records]
        groups = [source.rpartition(":")[0] or source for source in sources]
        self.swap = swap_sources(groups if len(set(groups)) > 1 else sources, config.eval_seed)
        """(rows,): for each text the row of its shuffled control."""
        self._one_at_a_time = threading.Lock()  # JupyterLab calls widgets from a thread of its own

    def question(self, row: int) -> Question:
        """The question about text `row` of the split."""
        record = self.val.records[row]
        return Question(self.vectors[row], record.target_text, record.source_text, self.vectors[self.swap[row]])

    def text_question(self, text: str) -> Question:
        """The question about a new text; its control is a vector of the split."""
        if not text.strip():
            raise InputError("the text is empty; type one")
        return Question(self.elm.embed([text])[0], "", text, self.vectors[self.swap[0]])

    def stream(
        self,
        vector: np.ndarray,
        decoding: str = GREEDY,
        tokens: int = 32,
        temperature: float = 0.7,
        top_p: float = 0.95,
        candidates: int = 8,
    ) -> Iterator[str]:
        """The summary of `vector` (embedding_dim,) after each token; with BEST_OF only the whole one.
        `decoding` is GREEDY, SAMPLED or BEST_OF and takes of the other settings what it needs. BEST_OF: the
        candidate whose re-embedding is nearest to the vector."""
        batch, model = self.elm.batch(vector[None]), self.elm.model
        if decoding == BEST_OF:
            yield self.elm.summarize(vector[None], tokens, Sampling(candidates, temperature, top_p))[0]
        else:
            sampling = Sampling(1, temperature if decoding == SAMPLED else 0.0, top_p)
            yield from (texts[0] for texts in model.stream(batch, tokens, sampling))

    def summarize(self, vector: np.ndarray, **decoding: Any) -> str:
        """The whole summary of `vector` (embedding_dim,), decoded as by `stream`."""
        *_, text = self.stream(vector, **decoding)
        return text

    def similarity(self, text: str, vector: np.ndarray) -> float:
        """Cosine of the re-embedded `text` and `vector`, -1 to 1; 0 for an empty text."""
        return float(cos_sim(self.elm.embed([text])[0], vector)) if text.strip() else 0.0

    def neighbours(self, vector: np.ndarray, count: int = 3) -> "pandas.DataFrame":
        """The `count` training texts nearest to `vector` (embedding_dim,): similarity (cosine), source_id, summary."""
        import pandas

        train = self.train.vectors(range(len(self.train)))
        (hits,) = semantic_search(torch.from_numpy(vector[None]), train, top_k=count)
        rows = [(hit["score"], self.train.records[int(hit["corpus_id"])]) for hit in hits]
        nearest = [(score, record.source, record.target_text) for score, record in rows]
        return pandas.DataFrame(nearest, columns=["similarity", "source_id", "summary"])

    def answer(self, question: Question, **decoding: Any) -> Iterator[list[tuple[str, str]]]:
        """The rows (name, value) of a card: the summary after each token, and last all that it is compared with. Raises
        InputError for a vector of another size, zero or not finite."""
        vector, text = question.vector, ""
        for text in self.stream(vector, **decoding):
            yield [("summary", text)]
        rows = [("summary", text), ("similarity", f"{self.similarity(text, vector):.3f} (summary and vector, cosine)")]
        rows += [("reference", question.reference)] if question.reference else []
        if question.other is not None:
            rows.append(("from another text's vector", self.summarize(question.other, **decoding)))
            rows.append(("from the mean vector", self.summarize(self.elm.mean_vector(), **decoding)))
        near = self.neighbours(vector).itertuples()
        rows += [(f"near: {it.similarity:.3f}", f"{it.source_id}: {it.summary}") for it in near]
        yield rows + ([("text", question.text)] if question.text else [])

    @cached_property
    def decoding(self) -> "ipywidgets.interactive":
        """The controls of how all cards decode; `kwargs` are the settings of `stream`."""
        from ipywidgets import FloatSlider, IntSlider, interactive

        return interactive(
            lambda **_: None,
            decoding=[GREEDY, SAMPLED, BEST_OF],
            tokens=IntSlider(32, 4, 128),
            temperature=FloatSlider(value=0.7, min=0.1, max=1.5, step=0.1),
            top_p=FloatSlider(value=0.95, min=0.05, max=1.0, step=0.05),
            candidates=IntSlider(8, 2, 32),
        )

    def texts(self, row: int = 0) -> "ipywidgets.Dropdown":
        """A control that chooses a text of the split by its row."""
        import ipywidgets

        records = enumerate(self.val.records)
        options = [(f"{i}  {record.source_id}: {record.target_text[:60]}", i) for i, record in records]
        return ipywidgets.Dropdown(options=options, value=row)

    def card(
        self, question: Callable[..., Question | np.ndarray], button: str = "", **controls: Any
    ) -> "ipywidgets.VBox":
        """A card that calls `question` with the values of its `controls`, as `ipywidgets.interactive` does. `question`
        returns a vector (dim,) or a `Question`. With `button`, it is called by that button alone. An InputError or
        OSError, which what was typed can cause, is shown on the card in one line."""
        import ipywidgets

        html = ipywidgets.HTML()

        def show(**values: Any) -> None:
            with self._one_at_a_time:
                try:
                    asked = question(**values)
                    asked = asked if isinstance(asked, Question) else Question(asked)
                    for rows in self.answer(asked, **self.decoding.kwargs):
                        html.value = _table(rows)
                except (InputError, OSError) as error:
                    html.value = _table([("error", str(error))])

        panel = ipywidgets.interactive(show, {"manual": bool(button), "manual_name": button}, **controls)
        for child in panel.children:
            if not isinstance(child, ipywidgets.Button):
                child.layout.width = "95%"
            if not button and child.has_trait("continuous_update"):
                child.continuous_update = False  # one summary when a slider is released, not one for each move
        return ipywidgets.VBox([panel, html])


def _table(rows: list[tuple[str, str]]) -> str:
    """An HTML table of names and values, the summary in bold."""
    cell = "<tr><td style='vertical-align:top;padding-right:1em;color:#666'>{}<td style='white-space:pre-wrap{}'>{}"
    bold = {"summary": ";font-weight:bold"}
    cells = (cell.format(escape(name), bold.get(name, ""), escape(value[:1500])) for name, value in rows)
    return f"<table class='elm-card'>{''.join(cells)}</table>"


def newest_run(runs: Mapping[str, str]) -> tuple[str, str]:
    """The run that saved its adapter last, and its data, of several runs (folder -> data folder). Raises
    InputError where none has an adapter."""
    found = {run: Path(run).expanduser() / BEST for run in runs}
    saved = {path.stat().st_mtime: run for run, path in found.items() if path.is_file()}
    if not saved:
        raise InputError(f"no {BEST} in {' or '.join(runs)}; train one: `make demo`, or notebooks 00 to 02")
    newest = saved[max(saved)]
    return newest, runs[newest]


def interpolate(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """The vector `share` of the way from `a` to `b` (dim,), at a length between theirs: 0 is a, 1 is b."""
    length = (1 - share) * np.linalg.norm(a) + share * np.linalg.norm(b)
    return _with_length((1 - share) * a + share * b, length)


def add_direction(start: np.ndarray, a: np.ndarray, b: np.ndarray, steps: float) -> np.ndarray:
    """`start` plus `steps` times the direction from `b` to `a` (dim,), at the length of `start`."""
    return _with_length(start + steps * (a - b), np.linalg.norm(start))


def mean_vector(vectors: np.ndarray) -> np.ndarray:
    """The mean of vectors (n, dim), at their mean length. Raises InputError for no vector."""
    if not len(vectors):
        raise InputError("no vectors to average; choose at least one")
    return _with_length(vectors.mean(axis=0), np.linalg.norm(vectors, axis=1).mean())


def _with_length(vector: np.ndarray, length: float | np.floating) -> np.ndarray:
    """`vector` at `length`: the adapter was trained on vectors of the embedder's own length."""
    norm = np.linalg.norm(vector)
    return (vector * (length / norm) if norm else vector).astype(np.float32)


def read_vector(text: Path | str, row: int = 0) -> np.ndarray:
    """A vector (dim,) of what a person typed: numbers between spaces or commas, or row `row` of a file. A file is
    .safetensors with the tensor `embeddings`, .npy, or numbers as text or JSON. Raises InputError for no such file or
    row, and for text that is no vector."""
    text = str(text).strip()
    typed, path = text.lstrip("[-+. ")[:1].isdigit(), Path(text).expanduser()
    if not typed and not path.is_file():
        raise InputError(f"no file {path}; expected a vector as .safetensors, .npy, or as numbers")
    if not typed and path.suffix == ".safetensors":
        with EmbeddingFile(path) as file:
            rows = file.rows(0, file.num_rows)
    else:
        try:
            if not typed and path.suffix == ".npy":
                rows = np.atleast_2d(np.lib.format.open_memmap(path, mode="r").astype(np.float32, casting="same_kind"))
            else:
                numbers = (text if typed else path.read_text(encoding="utf-8")).replace(",", " ").strip(" \n[]").split()
                rows = np.array([numbers], np.float32)
        except (ValueError, TypeError, OverflowError, TokenError) as error:  # of numpy and of the text's decoder
            name = "the text" if typed else path
            raise InputError(f"{name} is no vector: {error}; expected numbers between spaces or commas") from error
    if rows.ndim != 2:
        raise InputError(f"{path} is an array of shape {rows.shape}; expected one vector or rows of vectors")
    if not 0 <= row < len(rows):
        raise InputError(f"{path} has {len(rows)} vectors; there is no row {row}")
    return rows[row]
