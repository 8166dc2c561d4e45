from .baselines import rerank as rerank
from .bertscore import BERTScoreEvaluator as BERTScoreEvaluator, create_evaluator as create_evaluator
from .metrics import BERTScores as BERTScores, score_texts as score_texts
from .report import (
    examples_frame as examples_frame,
    read_predictions as read_predictions,
    sample_frame as sample_frame,
    score_adapters as score_adapters,
    score_checkpoint as score_checkpoint,
    score_frame as score_frame,
)
