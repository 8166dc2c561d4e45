"""The settings of `elm plan` and `elm benchmark`; every field's docstring is its help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg as flag

from elmlib.config import OFFLINE_EMBEDDER, OFFLINE_LLM, EvaluationDevice, SummaryTrainingConfig, require
from elmlib.settings import Preset

Contest = Literal["steps", "tried", "evaluation", "filter", "loading", "trials", "memory"]


@dataclass(frozen=True)
class PlanConfig:
    """The step whose memory and work are foretold, and the cards that it may run on."""

    llm_model_name: Annotated[str, flag(name="llm-model", aliases=("--llm-model-name",))] = OFFLINE_LLM
    """The frozen LLM: only its config is looked at."""
    embedding_model_name: Annotated[str, flag(name="embedding-model", aliases=("--embedding-model-name",))] = (
        OFFLINE_EMBEDDER
    )
    """The embedder, which lies beside the LLM for the evaluations."""
    bertscore_model: str = OFFLINE_EMBEDDER
    """BERTScore's encoder, which does too, in float32."""
    evaluation_device: EvaluationDevice = ""
    """`cpu` where those two do not lie on the card."""
    embedding_dim: int = SummaryTrainingConfig.embedding_dim
    """Size of one embedding."""
    hidden_dim: int = SummaryTrainingConfig.hidden_dim
    """Hidden size of the adapter's MLP."""
    num_soft_tokens: int = SummaryTrainingConfig.num_soft_tokens
    """Soft tokens that one embedding becomes."""
    drift_top_k: int = SummaryTrainingConfig.drift_top_k
    """Tokens per answer position that the drift loss looks at."""
    batch_size: int = SummaryTrainingConfig.batch_size
    """Rows per forward pass, at least 1."""
    answer_tokens: int = 128
    """Tokens of each answer with its end of turn; the guide's token_count."""
    prompt_tokens: int = 48
    """Tokens of the chat prompt."""
    bf16: bool = True
    """The LLM in bfloat16, else in float32."""
    fused_attention: bool = True
    """Attention by a fused kernel, which keeps no weights of it; else as on a CPU in bfloat16, which does."""
    gpu_memory: tuple[str, ...] = ("16GiB", "40GiB")
    """Cards, by their memory: what is the largest batch that fits? The guide names these two."""

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "hidden_dim", "num_soft_tokens", "drift_top_k", "batch_size"):
            require(self, name, 1)
        require(self, "answer_tokens", 2)
        require(self, "prompt_tokens", 1)

    def training(self) -> SummaryTrainingConfig:
        """The settings of that step."""
        return SummaryTrainingConfig(
            llm_model_name=self.llm_model_name,
            embedding_dim=self.embedding_dim,
            hidden_dim=self.hidden_dim,
            num_soft_tokens=self.num_soft_tokens,
            drift_top_k=self.drift_top_k,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True)
class BenchmarkConfig:
    """On which data to hold elmlib against its naive twin, and how often."""

    data_dir: str = "data/summary_filtered"
    """Folder that `elm filter` wrote; its records need source_text."""
    output_dir: Path = Path("papermill_runs/benchmark")
    """Folder for `benchmark.json`, `benchmark.txt` and the picture."""
    preset: Preset = ""
    """`qwen3-4b`: the guide's models in the place of the offline ones."""
    config: Path | None = None
    """JSON or YAML file of training settings that replace the defaults: models, batch size."""
    turns: int = 3
    """How often each contestant runs; medians are taken over turns. At least 1."""
    steps: int = 12
    """Batches in a turn of short answers, a quarter as many of long ones; at least 2."""
    eval_samples: int = 100
    """Validation summaries of the evaluation, at least 2."""
    filter_lines: int = 1_000_000
    """Lines of the largest generated corpus that is filtered, at least 1000."""
    compile: bool = True
    """Also try torch.compile, which takes minutes to compile."""
    notebook: Path = Path("notebooks/02_train.ipynb")
    """The notebook of a study's trial."""
    only: tuple[Contest, ...] = ()
    """Contests to run; empty runs all."""
    seed: int = 0
    """Of the adapters, rows and generated lines."""

    def __post_init__(self) -> None:
        require(self, "turns", 1)
        require(self, "steps", 2)
        require(self, "eval_samples", 2)
        require(self, "filter_lines", 1000)
