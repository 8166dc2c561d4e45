from .baselines import Baseline as Baseline, list_baselines as list_baselines, rerank as rerank
from .bertscore import BERTScoreEvaluator as BERTScoreEvaluator, create_evaluator as create_evaluator
from .metrics import (
    BERTScores as BERTScores,
    Identification as Identification,
    POOL as POOL,
    SummaryScores as SummaryScores,
    bertscore_means as bertscore_means,
    bootstrap_interval as bootstrap_interval,
    correlation as correlation,
    embed_texts as embed_texts,
    identify_sources as identify_sources,
    objective as objective,
    permutation_p as permutation_p,
    quality_metrics as quality_metrics,
    score_summaries as score_summaries,
    score_texts as score_texts,
    swap_sources as swap_sources,
)
from .report import (
    BaselineScores as BaselineScores,
    Report as Report,
    examples_frame as examples_frame,
    read_predictions as read_predictions,
    sample_frame as sample_frame,
    score_adapters as score_adapters,
    score_checkpoint as score_checkpoint,
    score_frame as score_frame,
    score_rows as score_rows,
)
