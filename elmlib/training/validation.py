"""One evaluation of an adapter on the validation split: each figure beside its shuffled control."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import torch

from elmlib.config import SummaryTrainingConfig
from elmlib.data.dataset import SummaryDataset
from elmlib.data.records import atomic_path
from elmlib.evaluation import metrics
from elmlib.evaluation.metrics import Identification, SummaryScores
from elmlib.training.losses import predict, text_drift
from elmlib.training.setup import TrainingComponents

DECODED = 100  # summaries decoded at once: their keys and values are no part of `elm plan`


class Validation(NamedTuple):
    """One evaluation: figures beside their shuffled controls, and the summaries they come from."""

    val_nll: float  # Nats per answer token
    val_nll_shuffled: float  # The same with each row's embedding swapped for another source's
    scores: SummaryScores
    rows: list[int]  # Of the split, in the order of `predictions`
    predictions: list[str]
    identification: Identification  # Nearest reference summary among those of `rows`
    predicted_similarity: np.ndarray  # (n,) the cosine in the text drift loss, on the same rows under teacher forcing

    def values(self) -> dict[str, float]:
        """All figures, flat."""
        found = self.identification.figures(metrics.POOL)
        return (
            {"val_nll": self.val_nll, "val_nll_shuffled": self.val_nll_shuffled}
            | self.scores.metrics
            | {f"identification_{name}": found[name] for name in ("top_1", "top_5", "mrr", "chance")}
            | {"drift_correlation": metrics.correlation(self.predicted_similarity, self.scores.drift)}
        )

    def write_predictions(self, path: Path, split: SummaryDataset) -> None:
        """One JSON line a summary, beside its reference in `split`, with its own scores."""
        columns = {f"bertscore_{name}": values for name, values in self.scores.pairs._asdict().items()}
        columns |= {"drift_similarity": self.scores.drift, "predicted_similarity": self.predicted_similarity}
        columns |= {"rank": self.identification.ranks}
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            for place, (row, prediction) in enumerate(zip(self.rows, self.predictions, strict=True)):
                record = split.records[row]
                line: dict[str, Any] = {"source_id": record.source_id, "embedding_index": record.embedding_index}
                line |= {"prediction": prediction, "target_text": record.target_text}
                line |= {name: values[place].item() for name, values in columns.items()}
                file.write(orjson.dumps(line) + b"\n")


def drift_warning(history: Sequence[tuple[float, float]]) -> str:
    """A warning where (NLL, composite) both fell at each of the last three evaluations; otherwise empty. The loss then
    improves while the summaries lose the text."""
    if len(history) < 3:
        return ""
    (first, high), (second, middle), (third, low) = history[-3:]
    if not (first > second > third and high > middle > low):
        return ""
    return (
        f"drifting away from quality: over three evaluations NLL improved from {first:.3f} to {third:.3f} while "
        f"BERTScore composite fell from {high:.3f} to {low:.3f}. Try a lower --learning-rate or fewer --epochs"
    )


@torch.no_grad()
def validate(components: TrainingComponents, config: SummaryTrainingConfig, device: torch.device) -> Validation:
    """NLL with true and with shuffled embeddings, and greedy summaries with their scores, on fixed seeded subsets. The
    rows whose summaries are generated are among those whose NLL is measured, which are at least as many."""
    split, model = components.val, components.model
    model.adapter.eval()
    sample = split.subset(config.eval_samples, config.eval_seed)
    rows = split.subset(max(config.eval_nll_samples, config.eval_samples), config.eval_seed)
    others = metrics.swap_sources([str(split.sources[row]) for row in rows], config.eval_seed)
    swapped = dict(zip(rows, (rows[other] for other in others), strict=True))
    totals = torch.zeros(3, dtype=torch.float64)
    similarity: dict[int, float] = {}
    for chosen in split.bucket(rows, config.batch_size):
        batch = split.collate(chosen).to(device)
        other = split.vectors([swapped[row] for row in chosen]).to(device)
        for place, inputs in enumerate((batch, batch._replace(embeddings=other))):
            predictions = predict(model(inputs)[1], model.head, batch.labels, config.drift_top_k)
            totals[place] += predictions.nll.item()
            if place == 0:
                cosines = text_drift(components.drift_head(predictions), batch.embeddings, 1.0)[1]
                similarity |= zip(chosen, cosines.tolist(), strict=True)
        totals[2] += batch.num_tokens
    written: dict[int, str] = {}
    for chosen in split.bucket(sample, DECODED):
        prompts = split.collate_prompts(chosen).to(device)
        written |= zip(chosen, model.generate(prompts, config.max_new_tokens), strict=True)
    texts = [written[row] for row in sample]
    references = [split.records[row].target_text for row in sample]
    vectors, sources = split.vectors(sample).numpy(), [str(split.sources[row]) for row in sample]
    scores = metrics.score_summaries(
        components.evaluator, components.embed, texts, references, vectors, sources, config.eval_seed
    )
    model.adapter.train()
    nll, nll_shuffled = (totals[:2] / totals[2]).tolist()
    return Validation(
        val_nll=nll,
        val_nll_shuffled=nll_shuffled,
        scores=scores,
        rows=sample,
        predictions=texts,
        identification=metrics.identify_sources(scores.vectors, components.reference_vectors(sample), sources),
        predicted_similarity=np.array([similarity[row] for row in sample]),
    )
