"""How good summaries are: BERTScore, identification, baselines, and one report of all of them."""
# ruff: noqa: I001

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elmlib.evaluation.baselines import Baseline, list_baselines, rerank
    from elmlib.evaluation.bertscore import BERTScoreEvaluator, create_evaluator
    from elmlib.evaluation.metrics import (
        POOL, BERTScores, Identification, SummaryScores, bertscore_means, bootstrap_interval, correlation, embed_texts,
        identify_sources, objective, permutation_p, quality_metrics, score_summaries, score_texts, swap_sources,
    )  # fmt: skip
    from elmlib.evaluation.report import (
        BaselineScores, Report, examples_frame, read_predictions, sample_frame, score_adapters, score_checkpoint,
        score_frame, score_rows,
    )  # fmt: skip

_NAMES = {
    "baselines": "Baseline list_baselines rerank",
    "bertscore": "BERTScoreEvaluator create_evaluator",
    "metrics": "POOL BERTScores Identification SummaryScores bertscore_means bootstrap_interval correlation "
    "embed_texts identify_sources objective permutation_p quality_metrics score_summaries score_texts swap_sources",
    "report": "BaselineScores Report examples_frame read_predictions sample_frame score_adapters score_checkpoint "
    "score_frame score_rows",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
