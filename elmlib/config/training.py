"""The settings of a training run, checked where they are made.

The note on each field gives its meaning, unit and range; `elm train --help` prints the same words.
`flag(...)` gives the name on the command line where the user's guide differs from the config.
"""

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from tyro.conf import arg as flag

from elmlib.config.files import InputError, Settings, make_config, preset_settings, read_settings, require

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
DriftHead = Literal["readout", "re_embed"]
SoftTokenPosition = Literal["before_answer", "in_prompt"]
EvaluationDevice = Literal["", "cpu"]

OFFLINE_LLM = "smollm2-135m-instruct"
OFFLINE_EMBEDDER = "all-minilm-l6-v2"


@dataclass(frozen=True)
class SummaryTrainingConfig(Settings):
    """All settings of one training run; equal configs on equal data give equal adapters."""

    # Data
    summary_data_path: Annotated[str, flag(name="data-dir", aliases=("--summary-data-path",))] = "data/summary_filtered"
    """Folder that `elm filter` wrote: split files in `synthesis/` and `embeddings/`, or directly in it."""
    checkpoint_dir: str = "data/checkpoints"  # Folder for checkpoints, metrics.jsonl and predictions of this run
    summary_only: bool = True  # Refuse records of other tasks than `summary`
    max_seq_length: int = 512  # Longest row in tokens, prompt and target together; longer rows are left out and counted
    train_rows: int = 0
    """Training rows to take, a fixed sample drawn by eval_seed, distinct sources first; 0 takes all."""

    # Models
    llm_model_name: Annotated[str, flag(name="llm-model", aliases=("--llm-model-name",))] = OFFLINE_LLM
    """The frozen LLM: a name inside an installed wheel, a local folder or a hub id."""
    embedding_model_name: Annotated[str, flag(name="embedding-model", aliases=("--embedding-model-name",))] = (
        OFFLINE_EMBEDDER
    )
    """The model that made the embeddings; it re-embeds generated summaries for the drift similarity."""
    embedding_dim: int = 384  # Size of one embedding: 384 for all-MiniLM-L6-v2, 2560 for Qwen3-Embedding-4B
    hidden_dim: int = 4096  # Hidden size of the adapter's MLP; the guide searches 2048, 4096, 6144
    num_soft_tokens: int = 8  # Soft tokens that one embedding becomes, at least 1
    soft_token_position: SoftTokenPosition = "before_answer"
    """Where the soft tokens stand: `before_answer`, or `in_prompt` in the place of the text (longer rows)."""
    dropout_rate: Annotated[float, flag(name="dropout", aliases=("--dropout-rate",))] = 0.1
    """Dropout inside the adapter's MLP, 0 to below 1; the guide searches 0.0 to 0.3."""
    residual_scale: float = 0.1  # Weight of the adapter's linear path, above 0; the guide searches 0.05 to 0.5
    warm_start: bool = True  # Start the linear path at the ridge regression onto the targets' tokens, not at random
    warm_start_whitening: bool = True  # Whiten the warm start more from soft token to soft token, or start all equal

    # Optimisation
    max_epochs: Annotated[int, flag(name="epochs", aliases=("--max-epochs",))] = 2
    """Passes over the training rows; the guide fixes 2 for the search."""
    learning_rate: float = 1.6e-3  # Peak AdamW rate, linear warm-up then cosine to 0; the guide searches 1e-5 to 5e-3
    batch_size: int = 16  # Rows per forward pass; the guide searches 4, 8, 16
    gradient_accumulation_steps: int = 1  # Batches per optimizer step; the guide searches 2, 4, 8
    weight_decay: float = 0.01  # AdamW weight decay, at least 0
    warmup_fraction: float = 0.03  # Share of the optimizer steps that warm up, 0 to 1
    max_grad_norm: float = 1.0  # Gradient norm above which gradients are scaled down, above 0
    spike_factor: float = 3.0  # Stop when the loss exceeds this many times its running mean, above 1
    seed: int = 0  # Seed of the adapter, the row order and dropout

    # Losses
    use_contrastive_loss: Annotated[bool, flag(name="use-contrastive", aliases=("--use-contrastive-loss",))] = True
    """Add InfoNCE between soft tokens and the row's own target."""
    contrastive_weight: float = 0.01  # Weight of InfoNCE; the guide searches 0.0 to 0.1
    contrastive_temperature: float = 0.07  # InfoNCE temperature, above 0
    use_text_drift_loss: Annotated[bool, flag(name="use-drift-loss", aliases=("--use-text-drift-loss",))] = True
    """Add the text drift loss."""
    text_drift_weight: Annotated[float, flag(name="drift-weight", aliases=("--text-drift-weight",))] = 0.03
    """Weight of the text drift loss; the guide searches 0.01 to 0.1."""
    text_drift_target_similarity: Annotated[
        float, flag(name="drift-target-similarity", aliases=("--text-drift-target-similarity",))
    ] = 0.75
    """Cosine above which the text drift loss is zero, -1 to 1; the guide searches 0.7 to 0.9."""
    text_drift_head: Annotated[DriftHead, flag(name="drift-head", aliases=("--text-drift-head",))] = "readout"
    """Predicted tokens -> embedding: `readout`, a fitted map, or `re_embed`, an embedder with the LLM's tokenizer."""
    drift_top_k: int = 32  # Most probable tokens per answer position that make up the expected text, at least 1

    # Evaluation
    bertscore_model: str = OFFLINE_EMBEDDER  # BERTScore's encoder; the guide's is microsoft/deberta-xlarge-mnli
    bertscore_batch_size: int = 16  # Texts per call of BERTScore's encoder, at least 1
    evaluation_device: EvaluationDevice = ""
    """`cpu` keeps embedder and BERTScore's encoder off the GPU, which then holds the LLM alone; empty: with the LLM."""
    eval_interval: int = 250  # Optimizer steps between evaluations, also made at the end of each epoch; at least 1
    evals_per_epoch: int = 0
    """Evaluations per epoch in the place of eval_interval, at equal shares of the data; 0 keeps that."""
    eval_samples: int = 100  # Validation summaries at each evaluation, a fixed seeded subset; at least 2, for shuffling
    eval_first: bool = True  # Evaluate before the first step, where the warm start alone stands
    eval_seed: int = 0  # Seed of the evaluation subsets and of the shuffled control, not the run's own seed
    eval_nll_samples: int = 256  # Validation rows whose NLL is measured, a fixed seeded subset; at least 2
    max_new_tokens: int = 48  # Longest generated summary in tokens, at least 1
    early_stopping_patience: int = 2  # Epochs without a better BERTScore composite before training stops, at least 1

    # Checkpoints
    save_interval: int = 100  # Optimizer steps between step checkpoints, at least 1
    keep_checkpoints: int = 2  # Newest step checkpoints that are kept, at least 1
    resume_from: str = ""  # A step checkpoint, adapter_step_N.safetensors, or `latest` in checkpoint_dir; empty: none

    # Hardware
    use_bf16: bool = True  # Frozen LLM in bfloat16 where the device multiplies it natively; the adapter is float32
    use_gradient_checkpointing: Annotated[
        bool, flag(name="gradient-checkpointing", aliases=("--use-gradient-checkpointing",))
    ] = False
    """Recompute the LLM's activations in the backward pass: less memory, slower, no shared prompt prefix."""
    num_workers: int = 0  # Data loading processes; 0 loads in the training process, which is enough for vectors
    pin_memory: bool = False  # Page-locked batches, for GPUs
    persistent_workers: bool = False  # Keep loading processes between epochs; needs num_workers above 0
    prefetch_factor: int = 2  # Batches that each loading process prepares ahead, at least 1

    # Tracking
    use_wandb: Annotated[bool, flag(name="wandb", aliases=("--use-wandb",))] = False
    """Log to Weights & Biases; `WANDB_MODE=offline` needs no account."""
    wandb_project: str = "elm-summary"  # wandb project
    wandb_run_name: str = ""  # wandb run name; empty lets wandb choose
    wandb_group: str = ""  # wandb group, which a study gives to all of its trials
    log_level: LogLevel = "INFO"  # Least severity of messages on standard error

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 1, "embedding_dim", "hidden_dim", "num_soft_tokens", "max_epochs", "batch_size", "drift_top_k")
        require(self, 1, "gradient_accumulation_steps", "bertscore_batch_size", "eval_interval", "max_new_tokens")
        require(self, 1, "early_stopping_patience", "save_interval", "keep_checkpoints", "prefetch_factor")
        require(self, 1e-12, "residual_scale", "learning_rate", "max_grad_norm", "contrastive_temperature")
        require(self, 0, "weight_decay", "contrastive_weight", "text_drift_weight")
        require(self, 0, "num_workers", "evals_per_epoch", "train_rows")
        require(self, 0, "dropout_rate", high=0.999)
        require(self, 0, "warmup_fraction", high=1)
        require(self, -1, "text_drift_target_similarity", high=1)
        require(self, 1 + 1e-9, "spike_factor")
        require(self, 2, "eval_samples", "eval_nll_samples")
        require(self, 8, "max_seq_length")
        if self.persistent_workers and not self.num_workers:
            raise InputError("persistent_workers is set but num_workers is 0; expected num_workers of 1 or more")

    def to_json(self) -> str:
        """All fields as a JSON object, which `from_json` reads back to an equal config."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def identity(self) -> dict[str, Any]:
        """The settings that decide which adapter comes out; paths, hardware and tracking are left out. Data are known
        by their fingerprint, not by their path."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _NOT_IDENTITY}

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read a config written by `to_json` or by hand; fields that it lacks take their defaults. Raises as
        `read_settings` and `from_dict` do."""
        return cls.from_dict(read_settings(path), origin=str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "settings") -> Self:
        """Make a config from plain values, those of earlier versions of elmlib too, which are read with a warning.
        Raises InputError, naming `origin`, for a setting that is unknown, mistyped or out of range."""
        return make_config(cls, _renamed(values, origin), origin)


def base_config(preset: str = "", path: Path | None = None) -> SummaryTrainingConfig:
    """The defaults of a training run, changed by `preset` and then by the settings file at `path`. Raises
    FileNotFoundError for no such file and InputError, naming it, for an unknown or bad setting in it."""
    values = preset_settings(preset, SummaryTrainingConfig) | (read_settings(path) if path else {})
    return SummaryTrainingConfig.from_dict(values, origin=str(path) if path else preset)


def _renamed(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """`values` in today's names; InputError for a setting that is gone and was switched on."""
    values = dict(values)
    for name, unused in _GONE.items():
        if values.pop(name, unused) != unused and unused is not None:
            raise InputError(f"{origin}: {name} is gone; this version of elmlib cannot do what it asks for")
    for old, (new, names) in _OLD_NAMES.items():
        if old in values:
            warnings.warn(f"{origin}: {old} is now called {new}", UserWarning, stacklevel=4)
            value = values.pop(old)
            values.setdefault(new, names.get(str(value), value))
    return values


_OLD_NAMES: dict[str, tuple[str, dict[Any, str]]] = {
    "soft_token_place": ("soft_token_position", {"answer": "before_answer", "text": "in_prompt"}),
    "warm_start_views": ("warm_start_whitening", {}),
}
"""Old setting -> its name now, and old value -> its name now."""

_GONE: dict[str, Any] = {
    "use_teacher_kl": False,
    "teacher_kl_weight": None,
    "teacher_top_k": None,
    "teacher_text_tokens": None,
    "pretrain_epochs": 0,
    "pretrain_tokens": None,
    "max_train_seconds": 0.0,
}
"""Setting of earlier versions -> the value with which it did nothing; None for one that depended on another."""

_NOT_IDENTITY = frozenset(
    {
        *("summary_data_path", "checkpoint_dir", "resume_from", "save_interval", "keep_checkpoints"),
        *("evaluation_device", "num_workers", "pin_memory", "persistent_workers", "prefetch_factor"),
        *("use_wandb", "wandb_project", "wandb_run_name", "wandb_group", "log_level"),
    }
)
