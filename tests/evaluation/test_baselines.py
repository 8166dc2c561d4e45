"""Baselines write what their names promise."""

import numpy as np
import torch

from elmlib.config import SummaryTrainingConfig
from elmlib.data.dataset import load_split
from elmlib.evaluation.baselines import first_sentence, nearest_summaries, rerank
from elmlib.models.pretrained import load_llm

CPU = torch.device("cpu")


def test_first_sentence_and_rerank() -> None:
    assert first_sentence("Opens the\n  file. Then reads it.") == "Opens the file."
    assert first_sentence("See numpy.ndarray for more") == "See numpy.ndarray for more"
    vectors = {"x": [1.0, 0.0], "y": [0.0, 1.0]}
    chosen = rerank(lambda texts: np.array([vectors[t] for t in texts]), [["y", "x", ""], ["", ""]], np.eye(2))
    assert chosen == ["x", ""]


def test_the_nearest_neighbour_of_a_training_vector_is_itself(tiny_config: SummaryTrainingConfig) -> None:
    train_split = load_split(tiny_config, "train", load_llm(tiny_config.llm_model_name, torch.float32, CPU)[1])
    rows = [5, 50, 95]
    found = nearest_summaries(train_split, train_split.vectors(rows).numpy())
    assert found == [train_split.records[row].target_text for row in rows]
