"""Every setting of elmlib, checked where it is made.

Each field's docstring gives its meaning, unit and range; the `elm` command prints the same words as its help.
`flag(...)` is the field's name on the command line, where the user's guide calls it other than the config does.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from tyro.conf import arg as flag

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
DriftHead = Literal["readout", "re_embed"]
SoftTokenPlace = Literal["answer", "text"]
EvaluationDevice = Literal["", "cpu"]

OFFLINE_LLM = "smollm2-135m-instruct"
OFFLINE_EMBEDDER = "all-minilm-l6-v2"


@dataclass(frozen=True)
class SummaryTrainingConfig:
    """All settings of one training run; equal configs on equal data give equal adapters."""

    # Data
    summary_data_path: Annotated[str, flag(name="data-dir", aliases=("--summary-data-path",))] = "data/summary_filtered"
    """Folder that `elm filter` wrote: split files in `synthesis/` and `embeddings/`, or directly in it."""
    checkpoint_dir: str = "data/checkpoints"
    """Folder for checkpoints, metrics.jsonl and predictions of this run."""
    summary_only: bool = True
    """Refuse records of other tasks than `summary`."""
    max_seq_length: int = 512
    """Longest row in tokens, prompt, soft tokens and target together; longer rows are left out and counted."""
    train_rows: int = 0
    """Training rows to take, a fixed sample that eval_seed draws, of distinct sources first; 0 takes all. For learning
    curves: validation and test stay as they are."""

    # Models
    llm_model_name: Annotated[str, flag(name="llm-model", aliases=("--llm-model-name",))] = OFFLINE_LLM
    """The frozen LLM: a name inside an installed wheel, a local folder or a hub id."""
    embedding_model_name: Annotated[str, flag(name="embedding-model", aliases=("--embedding-model-name",))] = (
        OFFLINE_EMBEDDER
    )
    """The model that made the embeddings; it re-embeds generated summaries for the drift similarity."""
    embedding_dim: int = 384
    """Size of one embedding: 384 for all-MiniLM-L6-v2, 2560 for Qwen3-Embedding-4B."""
    hidden_dim: int = 4096
    """Hidden size of the adapter's MLP; the guide searches 2048, 4096, 6144."""
    num_soft_tokens: int = 8
    """Soft tokens that one embedding becomes, at least 1."""
    soft_token_place: SoftTokenPlace = "answer"
    """Where they stand: `answer`, at its beginning, or `text`, in the text's stead, which makes rows longer."""
    dropout_rate: Annotated[float, flag(name="dropout", aliases=("--dropout-rate",))] = 0.1
    """Dropout inside the adapter's MLP, 0 to below 1; the guide searches 0.0 to 0.3."""
    residual_scale: float = 0.1
    """Weight of the adapter's linear path, above 0; the guide searches 0.05 to 0.5."""
    warm_start: bool = True
    """Start the linear path at the ridge regression onto the targets' tokens instead of at random."""
    warm_start_views: bool = True
    """With the warm start: whiten the regression more from soft token to soft token, or start them all alike."""

    # Optimisation
    max_epochs: Annotated[int, flag(name="epochs", aliases=("--max-epochs",))] = 2
    """Passes over the training rows; the guide fixes 2 for the search."""
    max_train_seconds: float = 0.0
    """Seconds of training, evaluations not counted, after which the run ends; its schedule then follows the clock, so
    that runs of one length can be compared but none is repeated byte by byte. 0 is no limit."""
    pretrain_epochs: int = 0
    """Passes before the summary stage in which the target is the text's own beginning; needs source_text."""
    pretrain_tokens: int = 32
    """Tokens of that beginning, at least 1."""
    learning_rate: float = 1.6e-3
    """Peak AdamW learning rate, linear warm-up then cosine to 0; the guide searches 1e-5 to 5e-3."""
    batch_size: int = 16
    """Rows per forward pass; the guide searches 4, 8, 16."""
    gradient_accumulation_steps: int = 1
    """Batches per optimizer step; the guide searches 2, 4, 8."""
    weight_decay: float = 0.01
    """AdamW weight decay, at least 0."""
    warmup_fraction: float = 0.03
    """Share of the optimizer steps that warm up, 0 to 1."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down, above 0."""
    spike_factor: float = 3.0
    """Stop when the loss exceeds this many times its running mean, above 1."""
    seed: int = 0
    """Seed of the adapter, the row order and dropout."""

    # Losses
    use_contrastive_loss: Annotated[bool, flag(name="use-contrastive", aliases=("--use-contrastive-loss",))] = True
    """Add InfoNCE between soft tokens and the row's own target."""
    contrastive_weight: float = 0.01
    """Weight of InfoNCE; the guide searches 0.0 to 0.1."""
    contrastive_temperature: float = 0.07
    """InfoNCE temperature, above 0."""
    use_text_drift_loss: Annotated[bool, flag(name="use-drift-loss", aliases=("--use-text-drift-loss",))] = True
    """Add the text drift loss."""
    text_drift_weight: Annotated[float, flag(name="drift-weight", aliases=("--text-drift-weight",))] = 0.03
    """Weight of the text drift loss; the guide searches 0.01 to 0.1."""
    text_drift_target_similarity: Annotated[
        float, flag(name="drift-target-similarity", aliases=("--text-drift-target-similarity",))
    ] = 0.75
    """Cosine above which the text drift loss is zero, -1 to 1; the guide searches 0.7 to 0.9."""
    text_drift_head: Annotated[DriftHead, flag(name="drift-head", aliases=("--text-drift-head",))] = "readout"
    """What turns predicted tokens into an embedding: `readout`, a fitted linear map, for any pair of models, or
    `re_embed`, the embedder itself, where LLM and embedder share a tokenizer."""
    drift_top_k: int = 32
    """Most probable tokens per answer position that make up the expected text, at least 1."""
    use_teacher_kl: bool = False
    """Add the KL divergence from the same LLM reading source_text."""
    teacher_kl_weight: float = 0.3
    """Weight of the teacher KL, at least 0."""
    teacher_top_k: int = 32
    """Most probable tokens per answer position that are kept of the teacher, at least 1."""
    teacher_text_tokens: int = 128
    """Tokens of source_text that the teacher reads, at least 1; its time grows with them."""

    # Evaluation
    bertscore_model: str = OFFLINE_EMBEDDER
    """BERTScore's encoder; the guide's is microsoft/deberta-xlarge-mnli."""
    bertscore_batch_size: int = 16
    """Texts per call of BERTScore's encoder, at least 1."""
    evaluation_device: EvaluationDevice = ""
    """`cpu` keeps embedder and BERTScore's encoder off the GPU, which then holds the LLM alone; empty is the LLM's
    device."""
    eval_interval: int = 250
    """Optimizer steps between evaluations, which are also made at the end of each epoch; at least 1."""
    evals_per_epoch: int = 0
    """Evaluations per epoch, evenly spaced, in the place of eval_interval; 0 keeps that. So runs are compared at
    equal shares of the data, whatever their batch size."""
    eval_samples: int = 100
    """Validation summaries generated at each evaluation, a fixed seeded subset; at least 2 (shuffling needs a pair)."""
    eval_first: bool = True
    """Evaluate before the first step, where the warm start alone stands."""
    eval_seed: int = 0
    """Seed of the evaluation subsets and of the shuffled control; runs of other seeds stay comparable."""
    eval_nll_samples: int = 256
    """Validation rows whose NLL is measured at each evaluation, a fixed seeded subset; at least 2."""
    max_new_tokens: int = 48
    """Longest generated summary in tokens, at least 1."""
    early_stopping_patience: int = 2
    """Epochs without a better BERTScore composite after which training stops, at least 1."""

    # Checkpoints
    save_interval: int = 100
    """Optimizer steps between step checkpoints, at least 1."""
    keep_checkpoints: int = 2
    """Newest step checkpoints that are kept, at least 1."""
    resume_from: str = ""
    """A step checkpoint `adapter_step_N.safetensors`, or `latest`, the newest in checkpoint_dir; empty is a new run."""

    # Hardware
    use_bf16: bool = True
    """Frozen LLM in bfloat16 where the device multiplies it natively, else float32; the adapter is float32."""
    use_gradient_checkpointing: Annotated[
        bool, flag(name="gradient-checkpointing", aliases=("--use-gradient-checkpointing",))
    ] = False
    """Recompute the LLM's activations in the backward pass: less memory, slower, no shared prompt prefix."""
    num_workers: int = 0
    """Data loading processes; 0 loads in the training process, which is enough for vectors."""
    pin_memory: bool = False
    """Page-locked batches, for GPUs."""
    persistent_workers: bool = False
    """Keep loading processes between epochs; needs num_workers above 0."""
    prefetch_factor: int = 2
    """Batches that each loading process prepares ahead, at least 1."""

    # Tracking
    use_wandb: Annotated[bool, flag(name="wandb", aliases=("--use-wandb",))] = False
    """Log to Weights & Biases; `WANDB_MODE=offline` needs no account."""
    wandb_project: str = "elm-summary"
    """wandb project."""
    wandb_run_name: str = ""
    """wandb run name; empty lets wandb choose."""
    wandb_group: str = ""
    """wandb group, which a study gives to all of its trials."""
    log_level: LogLevel = "INFO"
    """Least severity of messages on standard error."""

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "hidden_dim", "num_soft_tokens", "max_epochs", "batch_size", "drift_top_k"):
            require(self, name, 1)
        for name in ("gradient_accumulation_steps", "bertscore_batch_size", "eval_interval", "max_new_tokens"):
            require(self, name, 1)
        for name in ("early_stopping_patience", "save_interval", "keep_checkpoints", "prefetch_factor"):
            require(self, name, 1)
        for name in ("teacher_top_k", "teacher_text_tokens", "pretrain_tokens"):
            require(self, name, 1)
        for name in ("residual_scale", "learning_rate", "max_grad_norm", "contrastive_temperature"):
            require(self, name, 1e-12)
        for name in ("weight_decay", "contrastive_weight", "text_drift_weight", "teacher_kl_weight", "num_workers"):
            require(self, name, 0)
        require(self, "max_train_seconds", 0)
        require(self, "evals_per_epoch", 0)
        require(self, "train_rows", 0)
        require(self, "pretrain_epochs", 0)
        require(self, "max_seq_length", 8)
        require(self, "dropout_rate", 0, 0.999)
        require(self, "warmup_fraction", 0, 1)
        require(self, "spike_factor", 1 + 1e-9)
        require(self, "text_drift_target_similarity", -1, 1)
        require(self, "eval_samples", 2)
        require(self, "eval_nll_samples", 2)
        literals = {"log_level": LogLevel, "text_drift_head": DriftHead, "soft_token_place": SoftTokenPlace}
        literals |= {"evaluation_device": EvaluationDevice}
        for name, literal in literals.items():
            if getattr(self, name) not in get_args(literal):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(literal))}")
        if self.persistent_workers and not self.num_workers:
            raise ValueError("persistent_workers is set but num_workers is 0; expected num_workers of 1 or more")

    def to_json(self) -> str:
        """All fields as a JSON object, which `from_json` reads back to an equal config."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def identity(self) -> dict[str, Any]:
        """The settings that decide which adapter comes out; paths, hardware and tracking are left out.

        Data are known by their fingerprint, not by where they lie.
        """
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _INDIFFERENT}

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read a config written by `to_json` or by hand; fields that it lacks take their defaults.

        Raises as `read_settings` does, and ValueError for an unknown or mistyped setting or a value out of range.
        """
        return cls.from_dict(read_settings(path), origin=str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "settings") -> Self:
        """Make a config from plain values; ValueError names `origin` and the setting that is unknown or mistyped."""
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(defaults))
        if unknown:
            raise ValueError(f"{origin}: unknown setting {', '.join(unknown)}; known are {', '.join(defaults)}")
        for name, value in values.items():
            expected = type(defaults[name])
            if type(value) is not expected and not (expected is float and type(value) is int):
                raise ValueError(f"{origin}: {name} is {value!r}; expected {expected.__name__}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error


_INDIFFERENT = frozenset(
    {
        "summary_data_path",
        "checkpoint_dir",
        "resume_from",
        "save_interval",
        "keep_checkpoints",
        "evaluation_device",
        "num_workers",
        "pin_memory",
        "persistent_workers",
        "prefetch_factor",
        "use_wandb",
        "wandb_project",
        "wandb_run_name",
        "wandb_group",
        "log_level",
    }
)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a JSON or (`.yaml`, `.yml`) YAML file.

    Raises FileNotFoundError for no such file, and ValueError, naming it, for one that is broken or holds no mapping.
    """
    text, wanted = Path(path).read_text(encoding="utf-8"), "JSON object"
    if Path(path).suffix in (".yaml", ".yml"):
        import yaml

        wanted = "mapping"
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not valid YAML: {error}") from error
    else:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected one {wanted} of settings, found {type(values).__name__}")
    return values


def require(config: Any, name: str, low: float, high: float = float("inf")) -> None:
    """Raise ValueError unless the field `name` of `config` lies between `low` and `high`."""
    value = getattr(config, name)
    if not low <= value <= high:  # written so that NaN fails too
        raise ValueError(f"{name} is {value!r}; expected a number from {low:g} to {high:g}")
