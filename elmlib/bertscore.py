"""BERTScore as `bert_score` computes it, each text encoded once.

BERTScore: Zhang et al., ICLR 2020, https://arxiv.org/abs/1904.09675.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from elmlib.config import OFFLINE_EMBEDDER, SummaryTrainingConfig
from elmlib.pretrained import locate, public_name, quiet_bars
from elmlib.quality import BERTScores, bertscore_means, check_pairs, quality_metrics

if TYPE_CHECKING:  # imported inside the methods: torch and bert_score take 5 s, which `elm --help` need not wait for
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BASELINE_PAIRS = 1000
CACHED_REFERENCES = 2048
MATCH_BATCH = 64
"""Pairs matched at once, as many as `BERTScorer.score` takes. Figures depend on it: bert_score counts a token whose
best cosine is negative as 0 where its pair is padded, and as negative where the pair is the longest of its batch."""
MAX_TOKENS = 512
"""Longest text of a tokenizer that names no limit of its own, DeBERTa's for one."""


class EncoderId(NamedTuple):
    """Which encoder BERTScore uses, and down to which layer."""

    place: str
    """Local folder or hub id, as `from_pretrained` takes it."""
    name: str
    """The same on every machine."""
    num_layers: int


class Encoding(NamedTuple):
    """One text as BERTScore sees it, on the CPU and without padding."""

    tokens: "Tensor"
    """(tokens, dim)"""
    weights: "Tensor"
    """(tokens,): 0 for the special tokens at both ends, 1 for the others."""


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
    ):
        """`baseline_texts` make the baseline of a model that `bert_score` ships none for; a few hundred are enough.

        `device` defaults to CUDA where there is one. Models are loaded by the first call that needs them.
        Raises ValueError for a batch_size below 1 or for fewer than two different baseline texts.
        """
        self.model = model
        self.batch_size = batch_size
        self._device = device
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
        self._predictions = self._predictions if same else self._encode(predictions, {})
        referred = self._encode(references, self._references)
        self._references = dict(islice((self._references | referred).items(), CACHED_REFERENCES))
        for index, text in enumerate(references):
            if not referred[text].weights.any():
                raise ValueError(f"reference {index} is {text!r}, which has no token; expected a text")
        return self._match([self._predictions.get(text) for text in predictions], [referred[t] for t in references])

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
        encoded = self._encode([self._baseline_texts[row] for row in {*first, *other}], {})
        pairs = [[encoded[self._baseline_texts[row]] for row in rows] for rows in (first, other)]
        return np.array([values.mean() for values in self._match(*pairs)])

    @property
    def hash(self) -> str:
        """bert_score's own description of the settings; scores are comparable only where it is equal."""
        from bert_score.utils import get_hash

        shipped = self._shipped_baseline.is_file()
        rescaled = shipped or bool(self._baseline_texts)
        return get_hash(self.encoder_id.name, self.encoder_id.num_layers, False, rescaled, not shipped, False)

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
    def _encoder(self) -> "tuple[nn.Module, PreTrainedTokenizerBase]":
        return load_encoder(self.encoder_id, self.device)

    def _encode(self, texts: Sequence[str], known: dict[str, Encoding]) -> dict[str, Encoding]:
        """The encoding of each different text that is not empty, taken from `known` where it is there."""
        from bert_score.utils import get_bert_embedding

        encodings = {text: known[text] for text in texts if text in known}
        # Longest first, as bert_score does it: texts of like length share a batch, and too large a batch fails at once.
        new = dict.fromkeys(text for text in texts if text.strip() and text not in known)
        new = sorted(new, key=lambda text: (-len(text.split()), text))
        encoder, tokenizer = self._encoder
        weights = defaultdict(lambda: 1.0, {tokenizer.sep_token_id: 0.0, tokenizer.cls_token_id: 0.0})
        for start in range(0, len(new), self.batch_size):
            batch = new[start : start + self.batch_size]
            hidden, mask, idf = get_bert_embedding(batch, encoder, tokenizer, weights, device=self.device)
            for text, row, row_idf, length in zip(batch, hidden.cpu(), idf, mask.sum(1).tolist(), strict=True):
                encodings[text] = Encoding(row[:length].clone(), row_idf[:length].clone())  # a view keeps its batch
        return encodings

    def _match(self, predicted: Sequence[Encoding | None], referred: Sequence[Encoding]) -> BERTScores:
        """Scores pair by pair, all 0 where nothing is predicted."""
        import torch
        from bert_score.utils import greedy_cos_idf

        scores = np.zeros((len(referred), 3))
        rows = [row for row, encoding in enumerate(predicted) if encoding is not None and encoding.weights.any()]
        for start in range(0, len(rows), MATCH_BATCH):
            batch = rows[start : start + MATCH_BATCH]
            reference = _pad([referred[row] for row in batch], self.device)
            prediction = _pad([predicted[row] for row in batch], self.device)
            scores[batch] = torch.stack(greedy_cos_idf(*reference, *prediction), dim=1).cpu().numpy()
        assert np.isfinite(scores).all(), scores
        return BERTScores(*scores.T)


def create_evaluator(config: SummaryTrainingConfig, baseline_texts: Sequence[str] = ()) -> BERTScoreEvaluator:
    """The evaluator that `config` asks for: bertscore_model and bertscore_batch_size."""
    return BERTScoreEvaluator(config.bertscore_model, config.bertscore_batch_size, baseline_texts=baseline_texts)


def identify(model: str) -> EncoderId:
    """Place, public name and layer of a BERTScore encoder.

    The layer is the one that bert_score tuned, for a local copy too where its config or its folder's name tells what
    it is a copy of; any other model is read at its last layer. Raises FileNotFoundError as `locate` does.
    """
    from bert_score.utils import model2layers
    from transformers import AutoConfig

    place, name = locate(model), public_name(model)
    folder, names = Path(place), [name]
    if (folder / "config.json").is_file():
        origin = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
        names += [str(origin), *(known for known in model2layers if known.rpartition("/")[2] == name)]
    for known in names:
        if known in model2layers:
            return EncoderId(place, known, model2layers[known])
    num_layers = AutoConfig.from_pretrained(place).num_hidden_layers
    logger.info("bert_score has no tuned layer for %s: its last, %d, is used", name, num_layers)
    return EncoderId(place, name, num_layers)


def load_encoder(encoder: EncoderId, device: "torch.device") -> "tuple[nn.Module, PreTrainedTokenizerBase]":
    """The model, cut after its layer, and its tokenizer, by bert_score's loaders with their traps taken out."""
    from bert_score.utils import get_model, get_tokenizer
    from transformers import AutoConfig, AutoModel, AutoTokenizer, GPT2Tokenizer, RobertaTokenizer

    with quiet_bars():
        tokenizer = get_tokenizer(encoder.place)
        if isinstance(tokenizer, GPT2Tokenizer | RobertaTokenizer):
            # bert_score hands add_prefix_space to encode(), where transformers 5 no longer looks at it.
            tokenizer = AutoTokenizer.from_pretrained(encoder.place, use_fast=False, add_prefix_space=True)
        if "t5" in encoder.place and "t5" not in AutoConfig.from_pretrained(encoder.place).model_type:
            # bert_score takes any path with "t5" in it for a T5.
            model = AutoModel.from_pretrained(encoder.place, num_hidden_layers=encoder.num_layers)
        else:
            model = get_model(encoder.place, encoder.num_layers)
    if tokenizer.model_max_length > 1_000_000:  # "none given", which the tokenizers library takes for an overflow
        tokenizer.model_max_length = MAX_TOKENS
    return model.float().to(device).requires_grad_(False).eval(), tokenizer


def _pad(encodings: Sequence[Encoding], device: "torch.device") -> "tuple[Tensor, Tensor, Tensor]":
    """Tokens (n, longest, dim), mask and weights (n, longest): copies, as greedy_cos_idf writes into what it gets."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    # Padding is divided by its norm before the mask takes it out, so it must not be 0.
    tokens = pad_sequence([encoding.tokens for encoding in encodings], batch_first=True, padding_value=2.0)
    mask = pad_sequence([torch.ones(len(encoding.tokens)) for encoding in encodings], batch_first=True)
    weights = pad_sequence([encoding.weights for encoding in encodings], batch_first=True)
    return tokens.to(device), mask.to(device), weights.to(device)
