from .config import SummaryTrainingConfig as SummaryTrainingConfig
from .data import SummaryDataset as SummaryDataset, build_corpus as build_corpus, filter_corpus as filter_corpus
from .evaluation import BERTScoreEvaluator as BERTScoreEvaluator, create_evaluator as create_evaluator
from .inference import Elm as Elm, generate_file as generate_file
from .models import EmbeddingAdapter as EmbeddingAdapter
from .training import info_nce as info_nce, text_drift as text_drift, train as train

def version_line() -> str: ...
