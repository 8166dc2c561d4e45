"""`Elm` for those who use one: three lines from a text to its summary; saved, loaded and shared as models are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from elmlib import model
from elmlib.checkpoint import BEST, AdapterFile, load_adapter, save_adapter
from elmlib.controls import rerank
from elmlib.data import PromptBatch
from elmlib.decoding import Sampling
from elmlib.generation import build_elm
from elmlib.pretrained import default_device, encode, load_embedder, public_name, revision_of
from elmlib.prompts import TASK_TEMPLATES, prompt_ids
from elmlib.records import write_json
from elmlib.tables import score_rows

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_ABOUT = "config.json"
_BATCH = 64  # vectors summarised at once


class Named(NamedTuple):
    """A pretrained model that an adapter belongs to."""

    name: str
    revision: str
    """The hub's commit or the wheel's version; empty for a folder, which has none."""


class Elm(ModelHubMixin, library_name="elmlib", tags=["elm", "text-embedding", "soft-tokens"]):
    """A trained adapter on its frozen LLM, with the embedder whose vectors it reads.

    >>> elm = Elm.from_pretrained("papermill_runs/demo")
    >>> vectors = elm.embed(["Some text."])
    >>> elm.summarize(vectors)
    """

    def __init__(
        self,
        reader: model.Elm,
        file: AdapterFile,
        llm: Named,
        embedder: Named,
        metrics: Mapping[str, Any],
        device: torch.device,
    ):
        self.reader, self.file, self.device = reader, file, device
        self.llm_name, self.embedder_name = llm, embedder
        self.metrics = dict(metrics)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        llm_model: str = "",
        embedding_model: str = "",
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load from a folder (of `save_pretrained` or of a training run), an adapter file, or the hub.

        `llm_model` and `embedding_model` say where those two lie on this machine, if not where their names say.
        `kwargs` go to the hub's `snapshot_download`: revision, token, cache_dir and so on.
        Raises FileNotFoundError for what is not there, and ValueError, naming both, for an LLM, embedder or revision
        other than the adapter was trained with.
        """
        place = Path(pretrained_model_name_or_path)
        if not place.exists():
            place = _download(str(pretrained_model_name_or_path), **kwargs)
        path = place / BEST if place.is_dir() else place
        file, about = load_adapter(path), _about(path.parent)
        trained = Named(file.config.llm_model_name, about.get("llm_revision", ""))
        embedder = Named(file.config.embedding_model_name, about.get("embedding_revision", ""))
        where = torch.device(device) if device else default_device()
        config = replace(
            file.config,
            llm_model_name=_checked(path, "LLM", trained.name, llm_model),
            embedding_model_name=_checked(path, "embedder", embedder.name, embedding_model),
        )
        file = file._replace(config=config)
        reader = build_elm(file, where, origin=str(path), revision=trained.revision)
        return cls(reader, file, trained, embedder, about.get("metrics", {}), where)

    @cached_property
    def embedder(self) -> "SentenceTransformer":
        """The text embedder, loaded when it is first asked for; ValueError for one of another size."""
        name, size = self.file.config.embedding_model_name, self.file.config.embedding_dim
        embedder = load_embedder(name, self.device, self.embedder_name.revision)
        if (found := embedder.get_embedding_dimension()) != size:
            raise ValueError(f"{name} makes vectors of size {found}; the adapter reads {size}")
        return embedder

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(len(texts), embedding_dim) float32. Raises ValueError for no texts."""
        return encode(self.embedder, texts, _BATCH)

    def summarize(
        self,
        vectors: np.ndarray | torch.Tensor,
        max_new_tokens: int = 0,
        sampling: Sampling | None = None,
        task: str = "summary",
    ) -> list[str]:
        """One summary for each of `vectors` (n, embedding_dim), by greedy decoding.

        `max_new_tokens` 0 takes the training's. With `sampling`, that many candidates are drawn and the one whose
        re-embedding is nearest to the vector is kept. Raises ValueError for vectors of another size.
        """
        length = max_new_tokens or self.file.config.max_new_tokens
        texts: list[str] = []
        for start in range(0, len(vectors), _BATCH):
            part = vectors[start : start + _BATCH]
            batch = self.batch(part, task)
            if sampling is None:
                texts += self.reader.generate(batch, length)
            else:
                texts += rerank(self.embed, self.reader.candidates(batch, length, sampling), np.asarray(part))
        return texts

    def batch(self, vectors: np.ndarray | torch.Tensor, task: str = "summary") -> PromptBatch:
        """Vectors (n, embedding_dim) under the prompt of `task`; ValueError for vectors of another size."""
        given = torch.as_tensor(vectors).float()
        size = self.file.config.embedding_dim
        if given.ndim != 2 or given.shape[1] != size:
            raise ValueError(
                f"vectors of shape {tuple(given.shape)}; this adapter reads (n, {size}), of {self.embedder_name.name}"
            )
        return PromptBatch(given, prompt_ids(self.reader.tokenizer, TASK_TEMPLATES[task])).to(self.device)

    def mean_vector(self) -> np.ndarray:
        """(embedding_dim,): the mean of the vectors that the adapter was trained on."""
        return self.reader.adapter.mean.cpu().numpy()

    def _save_pretrained(self, save_directory: Path) -> None:
        config = replace(
            self.file.config,
            llm_model_name=public_name(self.llm_name.name),
            embedding_model_name=public_name(self.embedder_name.name),
        )
        save_adapter(save_directory / BEST, self.reader.adapter, config, self.file.step, self.file.data_fingerprint)
        about = {
            "llm": config.llm_model_name,
            "llm_revision": self.llm_name.revision or revision_of(self.llm_name.name),
            "embedding_model": config.embedding_model_name,
            "embedding_revision": self.embedder_name.revision or revision_of(self.embedder_name.name),
            "embedding_dim": config.embedding_dim,
            "elmlib": version("elmlib"),
            "metrics": self.metrics,
        }
        write_json(save_directory / _ABOUT, about)
        self.generate_model_card().save(save_directory / "README.md")

    def push_to_hub(self, repo_id: str, *, private: bool | None = True, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes, into a private repository unless `private` says otherwise."""
        return super().push_to_hub(repo_id, private=private, **kwargs)

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """What the adapter reads and speaks through, how to use it, and its scores beside their controls."""
        config = self.file.config
        llm, embedder = public_name(self.llm_name.name), public_name(self.embedder_name.name)
        data = ModelCardData(library_name="elmlib", tags=self._hub_mixin_info.model_card_data.tags)
        rows = "\n".join(
            f"| {label} | {true:.3f} | {shuffled:.3f} | {true - shuffled:+.3f} |"
            for label, true, shuffled in score_rows(self.metrics)
        )
        scores = (
            f"Validation, {config.eval_samples} summaries; *shuffled* is the control: the same scoring, each text's "
            f"embedding swapped for another text's.\n\n| | true | shuffled | difference |\n|---|---:|---:|---:|\n{rows}"
            if rows
            else "No scores were saved with this adapter."
        )
        return ModelCard(
            f"---\n{data.to_yaml()}\n---\n\n# An adapter that lets {llm} read vectors of {embedder}\n\n"
            f"It turns one embedding of size {config.embedding_dim} into {config.num_soft_tokens} soft tokens of the "
            f"frozen LLM, which writes a summary of the text behind the vector. Here is the adapter alone: it works "
            f"with these two models and no other.\n\n"
            '```python\nfrom elmlib import Elm\n\nelm = Elm.from_pretrained("this repository or folder")\n'
            'vectors = elm.embed(["Some text."])\nelm.summarize(vectors)\n```\n\n'
            f"## Scores\n\n{scores}\n\n"
            f"## Training\n\n{self.file.step} optimizer steps, data {self.file.data_fingerprint}, seed {config.seed}, "
            f"learning rate {config.learning_rate:g}, batch size {config.batch_size} x "
            f"{config.gradient_accumulation_steps}.\n"
        )


def _download(hub_id: str, **kwargs: Any) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[BEST, _ABOUT], **kwargs))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"no adapter {hub_id!r}: there is no such folder or file, and the hub gave none ({error}); `make demo` "
            "trains papermill_runs/demo"
        ) from error


def _about(folder: Path) -> dict[str, Any]:
    """What stands beside an adapter: what `save_pretrained` wrote, or a run's results."""
    saved, run = folder / _ABOUT, folder / "result.json"
    if saved.is_file():
        return json.loads(saved.read_text(encoding="utf-8"))
    return {"metrics": json.loads(run.read_text(encoding="utf-8"))} if run.is_file() else {}


def _checked(path: Path, kind: str, trained: str, asked: str) -> str:
    """`asked`, or the name that the adapter was trained with; both must mean the same model."""
    if asked and _last_part(asked) != _last_part(trained):
        raise ValueError(f"{path} was trained with the {kind} {trained}; {asked} is another")
    return asked or trained


def _last_part(name: str) -> str:
    return public_name(name).rpartition("/")[2].lower()
