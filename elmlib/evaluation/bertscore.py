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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from elmlib.config import OFFLINE_EMBEDDER, SummaryTrainingConfig
from elmlib.data.records import build_once, cache_folder
from elmlib.evaluation.metrics import BERTScores, bertscore_means, check_pairs, quality_metrics
from elmlib.models.pretrained import locate, public_name, quiet_bars

if TYPE_CHECKING:  # imported inside the functions: torch and bert_score take 5 s, too long for `elm --help`
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BASELINE_TEXTS, BASELINE_PAIRS = 1000, 1000
"""Training targets from which the baseline is made, and random pairs of them. Equal texts give equal baselines."""
CACHED_REFERENCES = 2048
MAX_TOKENS = 512
"""Longest text for a tokenizer that has no limit of its own, such as DeBERTa's."""
MATCH_BATCH = 64
"""Pairs matched at once, as in `BERTScorer.score`. Scores depend on it: bert_score counts a token whose best cosine is
negative as 0 where its pair is padded, and as negative where the pair is the longest of its batch."""

_VERSION = 2  # of the code that encodes: raise it where the values change
_FILE = "encodings.safetensors"


class EncoderId(NamedTuple):
    """Which encoder BERTScore uses, up to which layer."""

    path: str
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


class Encoder(NamedTuple):
    """A loaded encoder."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    device: "torch.device"
    batch_size: int


class BERTScoreEvaluator:
    """BERTScore as `bert_score` computes it, without idf weights, each reference encoded once.

    Beyond bert_score: an empty prediction scores 0; a local folder gets the layer, baseline and maximum length of the
    model that it is a copy of; half-precision weights are computed with in float32, as for the published figures.
    """

    def __init__(
        self,
        model: str = OFFLINE_EMBEDDER,
        batch_size: int = 16,
        device: "torch.device | str | None" = None,
        baseline_texts: Sequence[str] = (),
        keep: bool = False,
    ):
        """`baseline_texts` make the baseline of a model for which `bert_score` ships none; a few hundred are enough.

        `keep` caches the encodings of references and baseline on disk, for the next run on the same data.
        `device` defaults to CUDA where there is one. Models are loaded by the first call that needs them.
        Raises ValueError for a batch_size below 1 or for fewer than two different baseline texts.
        """
        self.model, self.batch_size = model, batch_size
        self._device, self._keep = device, keep
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
        scores = self.score_pairs(predictions, references)
        return self.detailed_metrics(scores, predictions, references) if return_detailed else bertscore_means(scores)

    def detailed_metrics(
        self, scores: BERTScores, predictions: Sequence[str], references: Sequence[str]
    ) -> dict[str, float]:
        """What `evaluate_batch` gives with `return_detailed`, for pairs that are scored already."""
        means = bertscore_means(scores)
        return means | self.rescaled_means(means) | quality_metrics(predictions, references)

    def score_pairs(self, predictions: Sequence[str], references: Sequence[str]) -> BERTScores:
        """Raw scores, pair by pair; raises as `evaluate_batch` does."""
        check_pairs(predictions, references)
        # The shuffled control scores the last call's predictions again. They are reused all or not at all, and apart
        # from references: which texts share a batch changes the last bits, and the same call must give the same bits
        # whatever was scored before.
        same = self._predictions.keys() == {text for text in predictions if text.strip()}
        self._predictions = self._predictions if same else encode(predictions, self._encoder)
        known = self._references | self._encode_fixed(text for text in references if text not in self._references)
        self._references = dict(islice(known.items(), CACHED_REFERENCES))
        for index, text in enumerate(references):
            if not known[text].weights.any():
                raise ValueError(f"reference {index} is {text!r}, which has no token; expected a text")
        return self._match([self._predictions.get(text) for text in predictions], [known[text] for text in references])

    def rescaled_means(self, means: dict[str, float]) -> dict[str, float]:
        """(x - b) / (1 - b) of the three means, as `bertscore_..._rescaled`; {} where no baseline b is known.

        A random pair is about 0, an empty prediction -b / (1 - b): below 0, so these do not rank models.
        """
        if self.baseline is None:
            return {}
        pairs = zip((f"bertscore_{name}" for name in BERTScores._fields), self.baseline, strict=True)
        return {f"{key}_rescaled": float((means[key] - base) / (1 - base)) for key, base in pairs}

    @cached_property
    def baseline(self) -> np.ndarray | None:
        """(3,): the mean P, R and F1 of unrelated texts, from bert_score's English file or from `baseline_texts`."""
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
        """bert_score's own description of the settings, and a digest of the texts that make the baseline.

        Scores are comparable only where it is equal.
        """
        from bert_score.utils import get_hash

        shipped = self._shipped_baseline.is_file()
        rescaled = shipped or bool(self._baseline_texts)
        settings = get_hash(self.encoder_id.name, self.encoder_id.num_layers, False, rescaled, not shipped, False)
        if shipped or not rescaled:
            return settings
        return f"{settings}-{hashlib.sha256(json.dumps(self._baseline_texts).encode()).hexdigest()[:8]}"

    @cached_property
    def encoder_id(self) -> EncoderId:
        """The encoder that `model` names; raises FileNotFoundError as `locate` does."""
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
        """Encode texts that every evaluation on the same data needs."""
        texts = set(texts)
        return (encode_cached if self._keep and len(texts) <= CACHED_REFERENCES else encode)(texts, self._encoder)

    def _match(self, predictions: Sequence[Encoding | None], references: Sequence[Encoding]) -> BERTScores:
        """Scores pair by pair, all 0 for an empty prediction."""
        import torch
        from bert_score.utils import greedy_cos_idf

        scores = np.zeros((len(references), 3))
        full = {row: text for row, text in enumerate(predictions) if text is not None and text.weights.any()}
        rows = list(full)
        for start in range(0, len(rows), MATCH_BATCH):
            batch = rows[start : start + MATCH_BATCH]
            padded = (
                _pad(texts, self.device) for texts in ([references[row] for row in batch], [full[row] for row in batch])
            )
            reference, prediction = padded
            scores[batch] = torch.stack(greedy_cos_idf(*reference, *prediction), dim=1).cpu().numpy()
        assert np.isfinite(scores).all(), scores
        return BERTScores(*scores.T)


def create_evaluator(
    config: SummaryTrainingConfig, baseline_texts: Sequence[str] = (), device: "torch.device | str | None" = None
) -> BERTScoreEvaluator:
    """The evaluator of a config: its bertscore_model and bertscore_batch_size."""
    return BERTScoreEvaluator(config.bertscore_model, config.bertscore_batch_size, device, baseline_texts, keep=True)


def identify(model: str) -> EncoderId:
    """Path, public name and layer of a BERTScore encoder.

    The layer is the one that bert_score tuned, for a local copy too where its config or its folder's name names the
    original; any other model is read at its last layer. Raises FileNotFoundError as `locate` does.
    """
    from bert_score.utils import model2layers
    from transformers import AutoConfig

    path, name = locate(model), public_name(model)
    file, names = Path(path, "config.json"), [name]
    if file.is_file():
        origin = json.loads(file.read_text(encoding="utf-8")).get("_name_or_path")
        names += [str(origin), *(known for known in model2layers if known.rpartition("/")[2] == name)]
    for known in names:
        if known in model2layers:
            return EncoderId(path, known, model2layers[known])
    num_layers = AutoConfig.from_pretrained(path).num_hidden_layers
    logger.info("bert_score has no tuned layer for %s: its last layer, %d, is used", name, num_layers)
    return EncoderId(path, name, num_layers)


def load_encoder(encoder: EncoderId, device: "torch.device", batch_size: int) -> Encoder:
    """The model, cut after its layer, and its tokenizer, by bert_score's loaders without three of their defects."""
    from bert_score.utils import get_model, get_tokenizer
    from transformers import AutoConfig, AutoModel, AutoTokenizer, GPT2Tokenizer, RobertaTokenizer

    with quiet_bars():
        tokenizer = get_tokenizer(encoder.path)
        if isinstance(tokenizer, GPT2Tokenizer | RobertaTokenizer):
            # bert_score passes add_prefix_space to encode(), where transformers 5 ignores it.
            tokenizer = AutoTokenizer.from_pretrained(encoder.path, use_fast=False, add_prefix_space=True)
        if "t5" in encoder.path and "t5" not in AutoConfig.from_pretrained(encoder.path).model_type:
            # bert_score takes any path with "t5" in it for a T5.
            model = AutoModel.from_pretrained(encoder.path, num_hidden_layers=encoder.num_layers)
        else:
            model = get_model(encoder.path, encoder.num_layers)
    if tokenizer.model_max_length > 1_000_000:  # no limit: the tokenizers library raises OverflowError
        tokenizer.model_max_length = MAX_TOKENS
    return Encoder(model.float().to(device).requires_grad_(False).eval(), tokenizer, device, batch_size)


def encode(texts: Iterable[str], encoder: Encoder) -> dict[str, Encoding]:
    """The encoding of each different text that is not empty."""
    from bert_score.utils import get_bert_embedding

    # Longest first, as in bert_score: texts of like length share a batch, and a batch that is too large fails at once.
    ordered = sorted({text for text in texts if text.strip()}, key=lambda text: (-len(text.split()), text))
    tokenizer, size = encoder.tokenizer, encoder.batch_size
    weights = defaultdict(lambda: 1.0, {tokenizer.sep_token_id: 0.0, tokenizer.cls_token_id: 0.0})
    encodings = {}
    for start in range(0, len(ordered), size):
        batch = ordered[start : start + size]
        hidden, mask, idf = get_bert_embedding(batch, encoder.model, tokenizer, weights, device=encoder.device)
        for text, row, row_idf, length in zip(batch, hidden.cpu(), idf, mask.sum(1).tolist(), strict=True):
            encodings[text] = Encoding(row[:length].clone(), row_idf[:length].clone())  # a view would keep its batch
    return encodings


def encode_cached(texts: Iterable[str], encoder: Encoder) -> dict[str, Encoding]:
    """`encode`, from the cache on disk where the same set of texts was encoded before.

    The whole set is the key: which texts share a batch changes the last bits, and the same call must give the same.
    """
    import torch
    from safetensors.torch import load_file, save_file

    ordered = sorted({text for text in texts if text.strip()})
    if not ordered:
        return {}
    # Five digits: the last digits of a sum depend on the number of threads.
    weights = [f"{name} {p.abs().mean().item():.4e}" for name, p in encoder.model.named_parameters()]
    parts = [_VERSION, ordered, encoder.batch_size, encoder.device.type, encoder.model.config.to_json_string(), weights]
    digest = hashlib.sha256(json.dumps([*parts, encoder.tokenizer(ordered).input_ids]).encode())

    def build(folder: Path) -> None:
        encodings = encode(ordered, encoder)
        tokens, weights = zip(*(encodings[text] for text in ordered), strict=True)
        lengths = torch.tensor([len(row) for row in weights])
        tensors = {"tokens": torch.cat(tokens), "weights": torch.cat(weights), "lengths": lengths}
        save_file(tensors, folder / _FILE)

    folder = cache_folder() / "bertscore" / digest.hexdigest()[:24]
    build_once(folder, build)
    cached = load_file(folder / _FILE)
    lengths = cached["lengths"].tolist()
    pieces = zip(cached["tokens"].split(lengths), cached["weights"].split(lengths), strict=True)
    return {text: Encoding(*piece) for text, piece in zip(ordered, pieces, strict=True)}


def _pad(encodings: Sequence[Encoding], device: "torch.device") -> "tuple[Tensor, Tensor, Tensor]":
    """Tokens (n, longest, dim), mask and weights (n, longest): copies, as greedy_cos_idf changes its arguments."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    # Padding is divided by its norm before the mask removes it, so it must not be 0.
    tokens = pad_sequence([encoding.tokens for encoding in encodings], batch_first=True, padding_value=2.0)
    mask = pad_sequence([torch.ones(len(encoding.tokens)) for encoding in encodings], batch_first=True)
    weights = pad_sequence([encoding.weights for encoding in encodings], batch_first=True)
    return tokens.to(device), mask.to(device), weights.to(device)
