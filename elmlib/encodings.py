"""What BERTScore compares: each text as one vector a token, by the encoder that `bert_score` would take."""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from elmlib.caching import build_once, cache_folder
from elmlib.pretrained import locate, public_name, quiet_bars

if TYPE_CHECKING:  # imported inside the functions: torch and bert_score take 5 s, which `elm --help` need not wait for
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MAX_TOKENS = 512
"""Longest text of a tokenizer that names no limit of its own, DeBERTa's for one."""

_VERSION = 2  # of the code that encodes: raise it where the values change
_FILE = "encodings.safetensors"


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


class Encoder(NamedTuple):
    """A loaded encoder."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    device: "torch.device"
    batch_size: int


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


def load_encoder(encoder: EncoderId, device: "torch.device", batch_size: int) -> Encoder:
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
    return Encoder(model.float().to(device).requires_grad_(False).eval(), tokenizer, device, batch_size)


def encode(texts: Iterable[str], encoder: Encoder) -> dict[str, Encoding]:
    """The encoding of each different text that is not empty."""
    from bert_score.utils import get_bert_embedding

    # Longest first, as bert_score does it: texts of like length share a batch, and too large a batch fails at once.
    ordered = sorted({text for text in texts if text.strip()}, key=lambda text: (-len(text.split()), text))
    tokenizer, size = encoder.tokenizer, encoder.batch_size
    weights = defaultdict(lambda: 1.0, {tokenizer.sep_token_id: 0.0, tokenizer.cls_token_id: 0.0})
    encodings = {}
    for start in range(0, len(ordered), size):
        batch = ordered[start : start + size]
        hidden, mask, idf = get_bert_embedding(batch, encoder.model, tokenizer, weights, device=encoder.device)
        for text, row, row_idf, length in zip(batch, hidden.cpu(), idf, mask.sum(1).tolist(), strict=True):
            encodings[text] = Encoding(row[:length].clone(), row_idf[:length].clone())  # a view keeps its batch
    return encodings


def encode_once(texts: Iterable[str], encoder: Encoder) -> dict[str, Encoding]:
    """`encode`, from the cache on disk where the same texts were encoded together before.

    Together, since which texts share a batch changes the last bits, and the same call is to give the same bits.
    """
    ordered = sorted({text for text in texts if text.strip()})
    if not ordered:
        return {}
    # Five digits: the last ones of a sum depend on the number of threads.
    weights = [f"{name} {p.abs().mean().item():.4e}" for name, p in encoder.model.named_parameters()]
    parts = [_VERSION, ordered, encoder.batch_size, encoder.device.type, encoder.model.config.to_json_string(), weights]
    digest = hashlib.sha256(json.dumps([*parts, encoder.tokenizer(ordered).input_ids]).encode())
    folder = cache_folder() / "bertscore" / digest.hexdigest()[:24]
    build_once(folder, lambda place: _write(place / _FILE, encode(ordered, encoder), ordered))
    return _read(folder / _FILE, ordered)


def _write(path: Path, encodings: dict[str, Encoding], ordered: Sequence[str]) -> None:
    import torch
    from safetensors.torch import save_file

    tokens, weights = zip(*(encodings[text] for text in ordered), strict=True)
    lengths = torch.tensor([len(row) for row in weights])
    save_file({"tokens": torch.cat(tokens), "weights": torch.cat(weights), "lengths": lengths}, path)


def _read(path: Path, ordered: Sequence[str]) -> dict[str, Encoding]:
    from safetensors.torch import load_file

    found = load_file(path)
    lengths = found["lengths"].tolist()
    pieces = zip(found["tokens"].split(lengths), found["weights"].split(lengths), strict=True)
    return {text: Encoding(*piece) for text, piece in zip(ordered, pieces, strict=True)}


def pad(encodings: Sequence[Encoding], device: "torch.device") -> "tuple[Tensor, Tensor, Tensor]":
    """Tokens (n, longest, dim), mask and weights (n, longest): copies, as greedy_cos_idf writes into what it gets."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    # Padding is divided by its norm before the mask takes it out, so it must not be 0.
    tokens = pad_sequence([encoding.tokens for encoding in encodings], batch_first=True, padding_value=2.0)
    mask = pad_sequence([torch.ones(len(encoding.tokens)) for encoding in encodings], batch_first=True)
    weights = pad_sequence([encoding.weights for encoding in encodings], batch_first=True)
    return tokens.to(device), mask.to(device), weights.to(device)
