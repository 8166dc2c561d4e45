"""BERTScore as `bert_score` computes it, each text encoded once.

BERTScore: Zhang et al., ICLR 2020, https://arxiv.org/abs/1904.09675.
"""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from elmlib.config import OFFLINE_EMBEDDER, InputError, SummaryTrainingConfig, read_settings
from elmlib.data.records import build_once, cache_folder
from elmlib.evaluation.metrics import BERTScores, bertscore_means, check_pairs, quality_metrics
from elmlib.models.pretrained import default_device, loading, locate, public_name

if TYPE_CHECKING:  # imported inside the functions: torch and bert_score take 5 s, too long for `elm --help`
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

BASELINE_TEXTS, BASELINE_PAIRS = 1000, 1000  # training targets that make the baseline, and random pairs of them
CACHED_REFERENCES = 2048
MAX_TOKENS = 512  # of a text for a tokenizer that has no limit of its own, such as DeBERTa's
# Pairs matched at once, as in `BERTScorer.score`: a token whose best cosine is negative counts 0 where padding is.
MATCH_BATCH = 64

_VERSION = 4  # of the cached encodings: raise it where values or layout change


class EncoderId(NamedTuple):
    """An encoder: its folder or hub id, a name that is the same on every machine, and the layer that is compared."""

    path: str
    name: str
    num_layers: int


class Encoding(NamedTuple):
    """One text as BERTScore sees it, on the CPU and without padding."""

    tokens: "Tensor"  # (tokens, dim)
    weights: "Tensor"  # (tokens,): 0 for the special tokens at both ends, 1 for the others


class BERTScoreEvaluator:
    """BERTScore as `bert_score` computes it, without idf weights, each reference encoded once. Beyond bert_score: an
    empty prediction scores 0; a local copy of a model has its layer and baseline; weights in half precision are
    computed with in float32, as for the published figures."""

    def __init__(
        self,
        model: str = OFFLINE_EMBEDDER,
        batch_size: int = 16,
        device: "torch.device | str | None" = None,
        baseline_texts: Sequence[str] = (),
        keep: bool = False,
    ):
        """`baseline_texts`, a few hundred, make the baseline of a model for which `bert_score` ships none. `keep`
        caches the encodings of references and baseline on disk. `device` defaults to CUDA where there is one. Raises
        InputError for a batch_size below 1 or for fewer than two different baseline texts."""
        self.model, self.batch_size = model, batch_size
        self._device, self._keep = device, keep
        self._baseline_texts = list(dict.fromkeys(text for text in baseline_texts if text.strip()))
        self._predictions: dict[str, Encoding] = {}
        self._references: dict[str, Encoding] = {}
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1")
        if len(baseline_texts) and len(self._baseline_texts) < 2:
            raise InputError(f"{len(self._baseline_texts)} different baseline_texts; expected at least 2")

    def evaluate_batch(
        self, predictions: Sequence[str], references: Sequence[str], return_detailed: bool = False
    ) -> dict[str, float]:
        """`bertscore_means` over all pairs; `return_detailed` adds `quality_metrics` and `bertscore_..._rescaled`.
        Rescaled means are (x - b) / (1 - b), where a baseline b is known: about 0 for a random pair, below 0 for an
        empty prediction, so they do not rank models. Raises as `check_pairs`."""
        means = bertscore_means(self.score_pairs(predictions, references))
        if not return_detailed:
            return means
        bases = () if self.baseline is None else zip(BERTScores._fields, self.baseline.tolist(), strict=True)
        rescaled = {f"bertscore_{name}_rescaled": (means[f"bertscore_{name}"] - b) / (1 - b) for name, b in bases}
        return means | rescaled | quality_metrics(predictions, references)

    def score_pairs(self, predictions: Sequence[str], references: Sequence[str]) -> BERTScores:
        """Raw scores, pair by pair; raises as `evaluate_batch` does."""
        check_pairs(predictions, references)
        # The shuffled control scores the last predictions again. They are reused all or not at all, and apart from
        # references: which texts share a batch changes the last bits, and equal calls must give equal bits.
        if self._predictions.keys() != {text for text in predictions if text.strip()}:
            self._predictions = self._encode(predictions)
        known = self._references | self._encode_fixed(text for text in references if text not in self._references)
        self._references = dict(islice(known.items(), CACHED_REFERENCES))
        for index, text in enumerate(references):
            if not known[text].weights.any():
                raise InputError(f"reference {index} is {text!r}, which has no token; expected a text")
        return self._match([self._predictions.get(text) for text in predictions], [known[text] for text in references])

    @cached_property
    def baseline(self) -> np.ndarray | None:
        """(3,): the mean P, R and F1 of unrelated texts, from bert_score's English file or from `baseline_texts`."""
        if self._shipped_baseline.is_file():
            return np.loadtxt(self._shipped_baseline, delimiter=",", skiprows=1)[self.encoder_id.num_layers, 1:]
        texts, total = self._baseline_texts, len(self._baseline_texts)
        if not texts:
            return None
        rng = np.random.default_rng(0)
        first = rng.integers(total, size=BASELINE_PAIRS)
        other = (first + rng.integers(1, total, size=BASELINE_PAIRS)) % total  # never the same text
        encoded = self._encode_fixed(texts[row] for row in {*first, *other})
        scores = self._match(*([encoded[texts[row]] for row in rows] for rows in (first, other)))
        return np.array([values.mean() for values in scores])

    @property
    def hash(self) -> str:
        """bert_score's own description of the settings, and a digest of the texts that make the baseline. Scores are
        comparable only where it is equal."""
        from bert_score.utils import get_hash

        shipped, texts = self._shipped_baseline.is_file(), self._baseline_texts
        rescaled = shipped or bool(texts)
        settings = get_hash(self.encoder_id.name, self.encoder_id.num_layers, False, rescaled, not shipped, False)
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:8]
        return f"{settings}-{digest}" if texts and not shipped else settings

    @property
    def _shipped_baseline(self) -> Path:
        import bert_score

        return Path(bert_score.__file__).parent / "rescale_baseline" / "en" / f"{self.encoder_id.name}.tsv"

    @cached_property
    def encoder_id(self) -> EncoderId:
        """The encoder that `model` names, read at the layer that bert_score tuned, or at its last. The config or the
        folder of a local copy names the original. Raises as `locate` does."""
        from bert_score.utils import model2layers
        from transformers import AutoConfig

        path, name = locate(self.model), public_name(self.model)
        names = [name]
        if (file := Path(path, "config.json")).is_file():
            names += [str(read_settings(file).get("_name_or_path"))]
            names += [known for known in model2layers if known.rpartition("/")[2] == name]
        for known in names:
            if known in model2layers:
                return EncoderId(path, known, model2layers[known])
        with loading(path):
            num_layers = AutoConfig.from_pretrained(path).num_hidden_layers
        logger.info("bert_score has no tuned layer for %s: its last layer, %d, is used", name, num_layers)
        return EncoderId(path, name, num_layers)

    @cached_property
    def device(self) -> "torch.device":
        """Where the encoder runs."""
        import torch

        return torch.device(self._device or default_device())

    @cached_property
    def _encoder(self) -> tuple[Any, Any]:
        """The model, cut after its layer, and its tokenizer, by bert_score's loaders without their defects."""
        from bert_score.utils import get_model, get_tokenizer
        from transformers import AutoConfig, AutoModel, AutoTokenizer, GPT2Tokenizer, RobertaTokenizer

        path, _, num_layers = self.encoder_id
        with loading(path):
            tokenizer = get_tokenizer(path)
            if isinstance(tokenizer, GPT2Tokenizer | RobertaTokenizer):
                # bert_score passes add_prefix_space to encode(), where transformers 5 ignores it.
                tokenizer = AutoTokenizer.from_pretrained(path, use_fast=False, add_prefix_space=True)
            if "t5" in path and "t5" not in AutoConfig.from_pretrained(path).model_type:
                # bert_score takes any path with "t5" in it for a T5.
                model = AutoModel.from_pretrained(path, num_hidden_layers=num_layers)
            else:
                model = get_model(path, num_layers)
        if tokenizer.model_max_length > 1_000_000:  # no limit: the tokenizers library raises OverflowError
            tokenizer.model_max_length = MAX_TOKENS
        return model.float().to(self.device).requires_grad_(False).eval(), tokenizer

    def _encode(self, texts: Iterable[str]) -> dict[str, Encoding]:
        """The encoding of each different text that is not empty."""
        from bert_score.utils import get_bert_embedding

        model, tokenizer = self._encoder
        # Longest first, as in bert_score: texts of like length share a batch, and too large a batch fails at once.
        ordered = sorted({text for text in texts if text.strip()}, key=lambda text: (-len(text.split()), text))
        weights = defaultdict(lambda: 1.0, {tokenizer.sep_token_id: 0.0, tokenizer.cls_token_id: 0.0})
        encodings = {}
        for start in range(0, len(ordered), self.batch_size):
            batch = ordered[start : start + self.batch_size]
            hidden, mask, idf = get_bert_embedding(batch, model, tokenizer, weights, device=self.device)
            for text, row, row_idf, length in zip(batch, hidden.cpu(), idf, mask.sum(1).tolist(), strict=True):
                encodings[text] = Encoding(row[:length].clone(), row_idf[:length].clone())  # a view keeps its batch
        return encodings

    def _encode_fixed(self, texts: Iterable[str]) -> dict[str, Encoding]:
        """`_encode`, with `keep` from the cache on disk: the key is the whole set, for the bits depend on it."""
        from elmlib.models.adapter import load_cached, save_tensors

        ordered = sorted({text for text in texts if text.strip()})
        if not ordered or not self._keep or len(ordered) > CACHED_REFERENCES:
            return self._encode(ordered)
        model, tokenizer = self._encoder
        # Five digits: the last digits of a sum depend on the number of threads.
        weights = [f"{name} {p.abs().mean().item():.4e}" for name, p in model.named_parameters()]
        settings = [self.batch_size, self.device.type, model.config.to_json_string(), weights]
        key = json.dumps([_VERSION, ordered, *settings, tokenizer(ordered).input_ids])

        def build(folder: Path) -> None:
            encoded = self._encode(ordered)
            tensors = {f"tokens {row}": encoded[text].tokens for row, text in enumerate(ordered)}
            tensors |= {f"weights {row}": encoded[text].weights for row, text in enumerate(ordered)}
            save_tensors(folder / "encodings.safetensors", {name: x.cpu() for name, x in tensors.items()}, {})

        folder = cache_folder() / "bertscore" / hashlib.sha256(key.encode()).hexdigest()[:24]
        build_once(folder, build)
        cached = load_cached(folder / "encodings.safetensors")
        return {text: Encoding(cached[f"tokens {row}"], cached[f"weights {row}"]) for row, text in enumerate(ordered)}

    def _match(self, predictions: Sequence[Encoding | None], references: Sequence[Encoding]) -> BERTScores:
        """Scores pair by pair, all 0 for an empty prediction."""
        import torch
        from bert_score.utils import greedy_cos_idf

        scores = np.zeros((len(references), 3))
        full = {row: text for row, text in enumerate(predictions) if text is not None and text.weights.any()}
        for start in range(0, len(full), MATCH_BATCH):
            rows = list(full)[start : start + MATCH_BATCH]
            padded = self._pad([references[row] for row in rows]) + self._pad([full[row] for row in rows])
            scores[rows] = torch.stack(greedy_cos_idf(*padded), dim=1).cpu().numpy()
        if not np.isfinite(scores).all():
            raise InputError(f"{self.model} gives scores that are not finite; its weights are damaged")
        return BERTScores(*scores.T)

    def _pad(self, encodings: Sequence[Encoding]) -> "tuple[Tensor, Tensor, Tensor]":
        """Tokens (n, longest, dim), mask and weights (n, longest): copies, as greedy_cos_idf changes its arguments."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        tokens, weights = (list(rows) for rows in zip(*encodings, strict=True))
        mask = pad_sequence([torch.ones(len(row)) for row in tokens], batch_first=True).to(self.device)
        # Padding is divided by its norm before the mask removes it, so it must not be 0.
        padded = pad_sequence(tokens, batch_first=True, padding_value=2.0).to(self.device)
        return padded, mask, pad_sequence(weights, batch_first=True).to(self.device)


def create_evaluator(
    config: SummaryTrainingConfig, baseline_texts: Sequence[str] = (), device: "torch.device | str | None" = None
) -> BERTScoreEvaluator:
    """The evaluator of a config: its bertscore_model and bertscore_batch_size."""
    return BERTScoreEvaluator(config.bertscore_model, config.bertscore_batch_size, device, baseline_texts, keep=True)
