from .checkpoint import find_checkpoint as find_checkpoint
from .loggers import MetricsRow as MetricsRow, RunLogger as RunLogger, read_metrics as read_metrics
from .losses import info_nce as info_nce, text_drift as text_drift
from .setup import TrainingComponents as TrainingComponents, build_components as build_components
from .trainer import TrainResult as TrainResult, UnstableTrainingError as UnstableTrainingError, train as train
from .validation import validate as validate
