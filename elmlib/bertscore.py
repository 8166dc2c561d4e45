"""BERTScore as `bert_score` computes it, each text encoded once.

BERTScore: Zhang et al., ICLR 2020, https://arxiv.org/abs/1904.09675.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from elmlib.config import OFFLINE_EMBEDDER, SummaryTrainingConfig
from elmlib.encodings import Encoder, EncoderId, Encoding, encode, encode_once, identify, load_encoder, pad
from elmlib.quality import BERTScores, bertscore_means, check_pairs, quality_metrics

if TYPE_CHECKING:  # imported inside the methods: torch and bert_score take 5 s, which `elm --help` need not wait for
    import torch

BASELINE_PAIRS = 1000
CACHED_REFERENCES = 2048
MATCH_BATCH = 64
"""Pairs matched at once, as many as `BERTScorer.score` takes. Figures depend on it: bert_score counts a token whose
best cosine is negative as 0 where its pair is padded, and as negative where the pair is the longest of its batch."""


class BERTScoreEvaluator:
    """BERTScore as `bert_score` computes it, without idf weights, each reference encoded once.

    What it adds: an empty prediction scores 0; a local folder knows its layer, baseline and longest text; and
    weights stored in half precision are computed with in float32, as they were for the published figures.
    """

    def __init__(
        self,
        model: str = OFFLINE_EMBEDDER,
        batch_size: int = 16,
        device: "torch.device | str | None" = None,
        baseline_texts: Sequence[str] = (),
        keep: bool = False,
    ):
        """`baseline_texts` make the baseline of a model that `bert_score` ships none for; a few hundred are enough.

        `keep` leaves the encodings of references and baseline on disk, where the next run on the same data finds them.
        `device` defaults to CUDA where there is one. Models are loaded by the first call that needs them.
        Raises ValueError for a batch_size below 1 or for fewer than two different baseline texts.
        """
        self.model = model
        self.batch_size = batch_size
        self._device = device
        self._keep = keep
        self._baseline_texts = list(dict.fromkeys(text for text in baseline_texts if text.strip()))
        self._predictions: dict[str, Encoding] = {}
        self._references: dict[str, Encoding] = {}
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        if len(baseline_texts) and len(self._baseline_texts) < 2:
            raise ValueError(f"{len(self._baseline_texts)} different baseline_texts; expected at least 2")

    def evaluate_batch(
        self, predictions: Sequence[str], references: Sequence[str], return_detailed: bool = False
    ) -> dict[str, float]:
        """`bertscore_means` over all pairs; `return_detailed` adds `rescaled_means` and `quality_metrics`.

        Raises ValueError for unequal lengths, no pairs, or an empty reference (naming its index).
        """
        means = bertscore_means(self.score_pairs(predictions, references))
        if not return_detailed:
            return means
        return means | self.rescaled_means(means) | quality_metrics(predictions, references)

    def score_pairs(self, predictions: Sequence[str], references: Sequence[str]) -> BERTScores:
        """Raw scores, pair by pair; raises as `evaluate_batch` does."""
        check_pairs(predictions, references)
        # The shuffled control scores the last call's predictions once more. They are reused all or not at all, and
        # apart from references: which texts share a batch changes the last bits, and the same call must give the
        # same bits whatever was scored before.
        same = self._predictions.keys() == {text for text in predictions if text.strip()}
        self._predictions = self._predictions if same else encode(predictions, self._encoder)
        known = self._references | self._encode_fixed(text for text in references if text not in self._references)
        self._references = dict(islice(known.items(), CACHED_REFERENCES))
        for index, text in enumerate(references):
            if not known[text].weights.any():
                raise ValueError(f"reference {index} is {text!r}, which has no token; expected a text")
        return self._match([self._predictions.get(text) for text in predictions], [known[text] for text in references])

    def forget_predictions(self) -> None:
        """Encode the next predictions anew, even if they are the last ones again."""
        self._predictions = {}

    def rescaled_means(self, means: dict[str, float]) -> dict[str, float]:
        """(x - b) / (1 - b) of the three means, as `bertscore_..._rescaled`; {} where no baseline b is known.

        A random pair is about 0, an empty prediction -b / (1 - b): below 0, and so unfit for comparing models.
        """
        if self.baseline is None:
            return {}
        keys = (f"bertscore_{name}" for name in BERTScores._fields)
        return {
            f"{key}_rescaled": float((means[key] - base) / (1 - base))
            for key, base in zip(keys, self.baseline, strict=True)
        }

    @cached_property
    def baseline(self) -> np.ndarray | None:
        """(3,): the mean P, R and F1 of unrelated texts. bert_score's own English file, else made of baseline_texts."""
        if self._shipped_baseline.is_file():
            return np.loadtxt(self._shipped_baseline, delimiter=",", skiprows=1)[self.encoder_id.num_layers, 1:]
        if not self._baseline_texts:
            return None
        rng, total = np.random.default_rng(0), len(self._baseline_texts)
        first = rng.integers(total, size=BASELINE_PAIRS)
        other = (first + rng.integers(1, total, size=BASELINE_PAIRS)) % total  # never the same text
        encoded = self._encode_fixed(self._baseline_texts[row] for row in {*first, *other})
        pairs = [[encoded[self._baseline_texts[row]] for row in rows] for rows in (first, other)]
        return np.array([values.mean() for values in self._match(*pairs)])

    @property
    def hash(self) -> str:
        """bert_score's own description of the settings, and a digest of the texts that the baseline is made of; scores
        are comparable only where it is equal."""
        from bert_score.utils import get_hash

        shipped = self._shipped_baseline.is_file()
        rescaled = shipped or bool(self._baseline_texts)
        settings = get_hash(self.encoder_id.name, self.encoder_id.num_layers, False, rescaled, not shipped, False)
        if shipped or not rescaled:
            return settings
        return f"{settings}-{hashlib.sha256(json.dumps(self._baseline_texts).encode()).hexdigest()[:8]}"

    @cached_property
    def encoder_id(self) -> EncoderId:
        """The encoder that `model` means; raises FileNotFoundError where it is out of reach."""
        return identify(self.model)

    @property
    def _shipped_baseline(self) -> Path:
        import bert_score

        return Path(bert_score.__file__).parent / "rescale_baseline" / "en" / f"{self.encoder_id.name}.tsv"

    @cached_property
    def device(self) -> "torch.device":
        """Where the encoder runs."""
        import torch

        return torch.device(self._device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @cached_property
    def _encoder(self) -> Encoder:
        return load_encoder(self.encoder_id, self.device, self.batch_size)

    def _encode_fixed(self, texts: Iterable[str]) -> dict[str, Encoding]:
        """Encode texts that every evaluation on the same data asks for."""
        texts = set(texts)
        return (encode_once if self._keep and len(texts) <= CACHED_REFERENCES else encode)(texts, self._encoder)

    def _match(self, predicted: Sequence[Encoding | None], referred: Sequence[Encoding]) -> BERTScores:
        """Scores pair by pair, all 0 where nothing is predicted."""
        import torch
        from bert_score.utils import greedy_cos_idf

        scores = np.zeros((len(referred), 3))
        told = {row: it for row, it in enumerate(predicted) if it is not None and it.weights.any()}
        rows = list(told)
        for start in range(0, len(rows), MATCH_BATCH):
            batch = rows[start : start + MATCH_BATCH]
            reference = pad([referred[row] for row in batch], self.device)
            prediction = pad([told[row] for row in batch], self.device)
            scores[batch] = torch.stack(greedy_cos_idf(*reference, *prediction), dim=1).cpu().numpy()
        assert np.isfinite(scores).all(), scores
        return BERTScores(*scores.T)


def create_evaluator(
    config: SummaryTrainingConfig,
    baseline_texts: Sequence[str] = (),
    device: "torch.device | str | None" = None,
) -> BERTScoreEvaluator:
    """The evaluator that `config` asks for: bertscore_model and bertscore_batch_size."""
    return BERTScoreEvaluator(config.bertscore_model, config.bertscore_batch_size, device, baseline_texts, keep=True)
