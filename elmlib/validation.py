"""One evaluation of an adapter on the validation split: each figure beside its shuffled control."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import orjson
import torch

from elmlib.config import SummaryTrainingConfig
from elmlib.data import Split
from elmlib.evaluation import SummaryScores, score_summaries, swap_sources
from elmlib.losses import predict
from elmlib.records import atomic_path
from elmlib.workbench import Workbench


class Validation(NamedTuple):
    """One evaluation: figures beside their shuffled controls, and the summaries they come from."""

    val_nll: float
    """Nats per answer token."""
    val_nll_shuffled: float
    """The same with each row's embedding swapped for another source's."""
    scores: SummaryScores
    rows: list[int]
    """Of the split, in the order of `predictions`."""
    predictions: list[str]

    def values(self) -> dict[str, float]:
        """All figures, flat."""
        return {"val_nll": self.val_nll, "val_nll_shuffled": self.val_nll_shuffled} | self.scores.to_dict()

    def write_predictions(self, path: Path, split: Split) -> None:
        """One JSON line a summary, beside its reference."""
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            for row, prediction in zip(self.rows, self.predictions, strict=True):
                record = split.records[row]
                line = {"source_id": record.source_id, "embedding_index": record.embedding_index}
                file.write(orjson.dumps(line | {"prediction": prediction, "target_text": record.target_text}) + b"\n")


@torch.no_grad()
def validate(bench: Workbench, config: SummaryTrainingConfig, device: torch.device) -> Validation:
    """NLL with true and with shuffled embeddings, and greedy summaries with their scores, on fixed seeded subsets."""
    split, elm = bench.val, bench.elm
    elm.adapter.eval()
    rows = split.subset(config.eval_nll_samples, config.seed)
    swapped = dict(zip(rows, swap_sources([str(split.sources[row]) for row in rows], config.seed), strict=True))
    totals = torch.zeros(3, dtype=torch.float64)
    for chosen in split.bucket(rows, config.batch_size):
        batch = split.collate(chosen).to(device)
        other = split.vectors([rows[swapped[row]] for row in chosen]).to(device)
        for place, given in enumerate((batch, batch._replace(embeddings=other))):
            totals[place] += predict(elm(given).hidden, elm.head, batch.labels, top_k=1).nll.item()
        totals[2] += batch.num_tokens
    sample = split.subset(config.eval_samples, config.seed)
    texts = _summarise(bench, sample, config, device)
    scores = score_summaries(
        bench.evaluator,
        bench.embed,
        texts,
        [split.records[row].target_text for row in sample],
        split.vectors(sample).numpy(),
        [str(split.sources[row]) for row in sample],
        config.seed,
    )
    elm.adapter.train()
    nll, nll_shuffled = (totals[:2] / totals[2]).tolist()
    return Validation(nll, nll_shuffled, scores, sample, texts)


def _summarise(bench: Workbench, rows: Sequence[int], config: SummaryTrainingConfig, device: torch.device) -> list[str]:
    texts: dict[int, str] = {}
    for chosen in bench.val.bucket(rows, len(rows)):
        batch = bench.val.collate_prompts(chosen).to(device)
        texts |= zip(chosen, bench.elm.generate(batch, config.max_new_tokens), strict=True)
    return [texts[row] for row in rows]
