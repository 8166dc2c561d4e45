"""The settings of the study's commands; every field's docstring is its help."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from elmlib.config import require
from elmlib.settings import Preset


@dataclass(frozen=True)
class StudyPlace:
    """Where a study is."""

    study_name: str = "elm-summary-optimization"
    """Name of the study; `elm study` goes on with one that exists."""
    checkpoint_dir: Path = Path("papermill_runs")
    """Folder for the study's folder, in which each trial has its own."""
    storage: str = ""
    """The study's storage: a path of a journal file, sqlite:///file.db, or postgresql+psycopg://...; empty takes the
    environment variable ELM_STUDY_STORAGE or else a journal file in the study's folder."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.study_name):
            raise ValueError(f"study_name is {self.study_name!r}; expected letters, digits, dots, dashes, underscores")

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return self.checkpoint_dir / self.study_name


@dataclass(frozen=True)
class StudyConfig(StudyPlace):
    """What to search, on which data, for how long and with how many workers."""

    project: str = "elm-summary-optimization"
    """wandb project, with --wandb."""
    trials: int = 50
    """Finished trials that the study is to have in all, those before a restart counted; at least 1."""
    timeout: float = 0.0
    """Hours after which trials are stopped, to be taken up when the study goes on; 0 is no limit."""
    data_dir: str = "data/summary_filtered"
    """Folder that `elm filter` wrote."""
    results_dir: Path | None = None
    """Folder for the results; the study's folder where none is named."""
    eval_samples: int = 100
    """Validation summaries generated at each evaluation, at least 2."""
    resume: bool = True
    """Go on with a study of that name; --no-resume refuses."""
    jobs: int = 1
    """Worker processes, each with a trial at a time, sharing the processors and dealt out over the GPUs; at least 1."""
    evals_per_epoch: int = 4
    """Evaluations per epoch that a trial reports, at least 1."""
    warmup_reports: int = 2
    """Reports before a trial can be pruned. The guide's warm-up of two epochs would prune none of two epochs."""
    startup_trials: int = 5
    """Finished trials before one can be pruned, and before the sampler stops drawing at random."""
    max_retries: int = 2
    """How often a trial that was killed is run again, at least 0."""
    seed: int = 0
    """Seed of the sampler and of every trial's training."""
    preset: Preset = ""
    """`qwen3-4b`: the guide's models in the place of the offline ones."""
    config: Path | None = None
    """JSON or YAML file of training settings that replace the defaults; what is searched, and the flags here, stand
    over it."""
    space: Path | None = None
    """YAML or Python file with another search space than the guide's."""
    notebook: Path = Path("notebooks/02_train.ipynb")
    """The notebook that is a trial."""
    heartbeat: int = 30
    """Seconds between signs of life of a trial in a database; after three without one it counts as lost."""
    wandb: bool = False
    """Log each trial as a wandb run, grouped under the study, and the study as one more."""
    slurm: bool = False
    """Submit the workers as SLURM jobs, one each, and return."""
    slurm_cluster: Literal["slurm", "local"] = "slurm"
    """`local` runs them as processes of this machine instead, to try a study out before it is sent off."""
    slurm_partition: str = ""
    """SLURM partition; empty takes the cluster's default."""
    slurm_gpus: int = 1
    """GPUs of each SLURM job."""
    slurm_hours: float = 24.0
    """Time limit of each SLURM job in hours, above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("trials", "jobs", "evals_per_epoch", "heartbeat"):
            require(self, name, 1)
        for name in ("timeout", "warmup_reports", "startup_trials", "max_retries", "slurm_gpus"):
            require(self, name, 0)
        require(self, "slurm_hours", 1e-3)
        require(self, "eval_samples", 2)


@dataclass(frozen=True)
class ReapConfig(StudyPlace):
    """Which study to clear of trials whose worker is gone."""

    max_retries: int = 2
    """How often a trial that was killed is run again, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "max_retries", 0)


@dataclass(frozen=True)
class DashboardConfig(StudyPlace):
    """Which study to watch, and at which port."""

    port: int = 8080
    """Port on 127.0.0.1, 1 to 65535."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "port", 1, 65535)


@dataclass(frozen=True)
class StudyDemoConfig:
    """The size of the study's demo."""

    output_dir: Path = Path("papermill_runs/study-demo")
    """Folder for the executed notebooks, the data and the study."""
    limit: int = 200
    """Pairs of text and summary, seven in ten of them for training, one for validation, two for the test; 0 takes
    all."""
    trials: int = 12
    """Finished trials, at least 1."""
    jobs: int = 1
    """Worker processes; with one the same command gives the same figures."""
    eval_samples: int = 40
    """Summaries generated at each evaluation, as far as there are as many validation pairs, and by the analysis of the
    test split; at least 2."""
    evals_per_epoch: int = 2
    """Evaluations per epoch that a trial reports, at least 1."""

    def __post_init__(self) -> None:
        require(self, "limit", 0)
        require(self, "eval_samples", 2)
        for name in ("trials", "jobs", "evals_per_epoch"):
            require(self, name, 1)
