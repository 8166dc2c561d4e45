"""The public `Elm`: three lines from a text to its summary; saved, loaded and shared as models are."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from elmlib.config import InputError, read_settings
from elmlib.data.dataset import PromptBatch
from elmlib.data.prompts import TASK_TEMPLATES, prompt_ids
from elmlib.data.records import check_rows, write_json
from elmlib.evaluation.baselines import rerank
from elmlib.evaluation.report import score_frame
from elmlib.models.adapter import BEST, AdapterFile, find_adapter, load_adapter, save_adapter
from elmlib.models.elm import Sampling, SoftTokenModel, build_model
from elmlib.models.pretrained import default_device, encode, load_embedder, public_name, revision_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_ABOUT = "config.json"
_BATCH = 64  # texts embedded, and vectors summarised, at once


class Elm(ModelHubMixin, library_name="elmlib", tags=["elm", "text-embedding", "soft-tokens"]):
    """A trained adapter on its frozen LLM, with the embedder whose vectors it reads.

    >>> elm = Elm.from_pretrained("papermill_runs/demo")
    >>> vectors = elm.embed(["Some text."])
    >>> elm.summarize(vectors)
    """

    def __init__(
        self, model: SoftTokenModel, file: AdapterFile, embedder_name: str, device: torch.device, about: dict[str, Any]
    ):
        """`about`: what `save_pretrained` writes into config.json; revisions are hub commits or versions of wheels."""
        self.model, self.file, self.embedder_name, self.device, self.about = model, file, embedder_name, device, about
        self.metrics: dict[str, Any] = about.get("metrics", {})

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

        `llm_model` and `embedding_model` say where those two are on this machine, if not where their names say.
        `kwargs` go to the hub's `snapshot_download`: revision, token, cache_dir and so on.
        Raises InputError for a file or model that does not exist and, naming both, for an LLM,
        embedder or revision other than the adapter was trained with.
        """
        name = str(pretrained_model_name_or_path)
        path = Path(name).expanduser()
        if not path.exists():
            try:
                path = Path(snapshot_download(name, allow_patterns=[BEST, _ABOUT], **kwargs))
            except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
                raise InputError(
                    f"no adapter {name!r}: there is no such folder or file, and the hub gave none ({error}); "
                    "`make demo` trains papermill_runs/demo"
                ) from error
        path = find_adapter(path)
        file, about = load_adapter(path), _read_about(path.parent)
        llm = _same_model(path, "LLM", file.config.llm_model_name, llm_model)
        embedder = _same_model(path, "embedder", file.config.embedding_model_name, embedding_model)
        device = torch.device(device) if device else default_device()
        config = replace(file.config, llm_model_name=llm)
        model = build_model(config, device, file.weights, about.get("llm_revision", ""), origin=str(path))
        return cls(model, file, embedder, device, about)

    @cached_property
    def embedder(self) -> "SentenceTransformer":
        """The text embedder, loaded when it is first used; InputError for one of another size."""
        size = self.file.config.embedding_dim
        embedder = load_embedder(self.embedder_name, self.device, self.about.get("embedding_revision", ""))
        if (own := embedder.get_embedding_dimension()) != size:
            raise InputError(f"{self.embedder_name} makes vectors of size {own}; the adapter reads {size}")
        return embedder

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(len(texts), embedding_dim) float32. Raises InputError for no texts."""
        return encode(self.embedder, texts, _BATCH)

    def summarize(
        self,
        vectors: np.ndarray | torch.Tensor,
        max_new_tokens: int = 0,
        sampling: Sampling | None = None,
        task: str = "summary",
        batch_size: int = _BATCH,
    ) -> list[str]:
        """One summary for each of `vectors` (n, embedding_dim), of any float type and device, by greedy decoding.
        `max_new_tokens` 0 uses the training's. With `sampling`, that many candidates are drawn and the one whose
        re-embedding is nearest to the vector is kept. `task` is a task's name or a prompt template with `{text}`.
        Raises InputError for vectors of another size and, with its number, for a row that is zero or not finite."""
        length = max_new_tokens or self.file.config.max_new_tokens
        rows, texts = self.check_vectors(vectors), list[str]()
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batch = self.batch(part, task)
            if sampling is None:
                texts += self.model.generate(batch, length)
            else:
                texts += rerank(self.embed, self.model.candidates(batch, length, sampling), part)
        return texts

    def check_vectors(self, vectors: np.ndarray | torch.Tensor) -> np.ndarray:
        """Vectors (n, embedding_dim) as float32 on the CPU; raises InputError as `summarize` does."""
        rows = torch.as_tensor(vectors).detach().float().cpu().numpy()
        size = self.file.config.embedding_dim
        if rows.ndim != 2 or rows.shape[1] != size:
            name = self.file.config.embedding_model_name
            raise InputError(f"vectors of shape {rows.shape}; this adapter reads (n, {size}), of {name}")
        check_rows(rows, range(len(rows)))
        return rows

    def batch(self, vectors: np.ndarray | torch.Tensor, task: str = "summary") -> PromptBatch:
        """Vectors (n, embedding_dim) under the prompt of `task`; raises InputError as `summarize` does."""
        rows = torch.from_numpy(self.check_vectors(vectors))
        return PromptBatch(rows, prompt_ids(self.model.tokenizer, TASK_TEMPLATES.get(task, task))).to(self.device)

    def mean_vector(self) -> np.ndarray:
        """(embedding_dim,): the mean of the vectors that the adapter was trained on."""
        return self.model.adapter.mean.cpu().numpy()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write the adapter, `config.json` and a model card into a folder; `push_to_hub=True` uploads them too."""
        return super().save_pretrained(Path(save_directory).expanduser(), **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        file, llm, embedder = self.file, self.file.config.llm_model_name, self.file.config.embedding_model_name
        config = replace(file.config, llm_model_name=public_name(llm), embedding_model_name=public_name(embedder))
        save_adapter(save_directory / BEST, self.model.adapter, config, file.step, file.data_fingerprint)
        about = {
            "llm": config.llm_model_name,
            "llm_revision": self.about.get("llm_revision") or revision_of(llm),
            "embedding_model": config.embedding_model_name,
            "embedding_revision": self.about.get("embedding_revision") or revision_of(embedder),
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
        """The README of the adapter: its two models, how to use it, and its scores beside the shuffled control."""
        config = self.file.config
        llm, embedder = public_name(config.llm_model_name), public_name(config.embedding_model_name)
        header = ModelCardData(library_name="elmlib", tags=self._hub_mixin_info.model_card_data.tags).to_yaml()
        rows = score_frame(self.metrics).dropna().itertuples()
        table = "".join(f"| {name} | {a:.3f} | {b:.3f} | {difference:+.3f} |\n" for name, a, b, difference in rows)
        scores = "No scores were saved with this adapter.\n"
        if table:
            head = "| | true | shuffled | difference |\n|---|---:|---:|---:|\n"
            control = "*shuffled* is the control: the same scoring, each text's embedding replaced by another text's"
            scores = f"Validation, {config.eval_samples} summaries; {control}.\n\n{head}{table}"
        return ModelCard(
            f"---\n{header}\n---\n\n# An adapter that lets {llm} read vectors of {embedder}\n\n"
            f"It turns one embedding of size {config.embedding_dim} into {config.num_soft_tokens} soft tokens of the "
            "frozen LLM, which writes a summary of the text behind the vector. No other models go with it.\n\n"
            '```python\nfrom elmlib import Elm\n\nelm = Elm.from_pretrained("this repository or folder")\n'
            f'elm.summarize(elm.embed(["Some text."]))\n```\n\n## Scores\n\n{scores}\n## Training\n\n'
            f"{self.file.step} optimizer steps, data {self.file.data_fingerprint}, seed {config.seed}, learning rate "
            f"{config.learning_rate:g}, batch size {config.batch_size} x {config.gradient_accumulation_steps}.\n"
        )


def _read_about(folder: Path) -> dict[str, Any]:
    """What `save_pretrained` wrote beside an adapter, or the results of its run."""
    saved, run = folder / _ABOUT, folder / "result.json"
    about = read_settings(saved) if saved.is_file() else {"metrics": read_settings(run)} if run.is_file() else {}
    if not isinstance(metrics := about.get("metrics", {}), dict):
        raise InputError(f"{saved}: metrics is {metrics!r:.80}; expected names and numbers")
    return about


def _same_model(path: Path, kind: str, trained: str, wanted: str) -> str:
    """`wanted`, or the name that the adapter was trained with; both must mean the same model."""
    last, other = (public_name(name).rpartition("/")[2].lower() for name in (trained, wanted or trained))
    if last != other:
        raise InputError(f"{path} was trained with the {kind} {trained}; {wanted} is another")
    return wanted or trained
