"""Drift heads: predicted tokens -> a vector in the embedder's space, which the text drift loss compares.

There are two: a fitted linear map (`DriftReadout`), and the embedder itself (`ReEmbed`).
"""

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from elmlib.config import InputError
from elmlib.models.adapter import LinearMap
from elmlib.training.losses import Predictions

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel


def expected_token_embedding(top_log_probs: Tensor, top_ids: Tensor, table: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean embedding of the predicted tokens, (batch, llm_dim) float32. Each answer position contributes its
    most probable tokens (batch, length, k), by probability times `weights` (vocab,); probability outside the top k is
    left out. Padding has log-probability -inf. table (vocab, llm_dim)."""
    mass = (top_log_probs.exp() * weights[top_ids]).flatten(1)  # (batch, length * k)
    total = mass[:, None] @ table[top_ids.flatten(1)].float()  # (batch, 1, length * k) @ (batch, length * k, llm_dim)
    return total[:, 0] / mass.sum(1).clamp_min(1e-6)[:, None]


class DriftReadout(NamedTuple):
    """A linear map from the expected token embedding, fitted in closed form and frozen. It works for any two models."""

    table: Tensor  # (vocab, llm_dim) the LLM's token embeddings
    idf: Tensor  # (vocab,) weight of each token
    to_embedding: LinearMap  # Mean token embedding -> embedding

    def __call__(self, predictions: Predictions) -> Tensor:
        """(batch, embedding_dim): the vector of the expected text."""
        top, ids = predictions.top_log_probs, predictions.top_ids
        return self.to_embedding(expected_token_embedding(top, ids, self.table, self.idf))


class ReEmbed:
    """The frozen embedder reads the expected tokens; it must share the LLM's tokenizer.

    Each position is the mean of the embedder's own token embeddings under the predicted distribution, cut to its top
    k; then come the embedder's own layers, pooling and normalisation. Where the LLM is sure of each token this is
    the embedding of the text that they spell.
    """

    def __init__(self, embedder: "SentenceTransformer", llm_tokenizer: Any):
        """Raises InputError where the two tokenizers number their tokens differently."""
        small, large = sorted((embedder.tokenizer, llm_tokenizer), key=len)
        numbers = large.get_vocab()
        different = sum(numbers.get(token) != number for token, number in small.get_vocab().items())
        if different:
            raise InputError(
                f"text_drift_head re_embed needs an embedder with the LLM's tokenizer, but {different} of {len(small)} "
                f"tokens of {small.name_or_path} have other numbers in {large.name_or_path}; use --drift-head readout"
            )
        self.transformer = cast("PreTrainedModel", embedder[0].auto_model)
        self.after = list(embedder)[1:]  # pooling and whatever follows it
        self.table = cast(Tensor, self.transformer.get_input_embeddings().weight)
        # The special tokens that the embedder adds are those that two texts of one token each have in common.
        first, second = (embedder.preprocess([text])["input_ids"][0].tolist() for text in ("a", "b"))
        place = next(place for place, (x, y) in enumerate(zip(first, second, strict=True)) if x != y)
        self.before, self.behind = first[:place], first[place + 1 :]

    def __call__(self, predictions: Predictions) -> Tensor:
        """(batch, embedding_dim): the embedding of the expected text. The last answer position, which predicts the end
        of the turn, is no text and left out."""
        top, ids = predictions.top_log_probs, predictions.top_ids
        known = ids < len(self.table)  # LLMs pad their vocabulary beyond the tokenizer's
        mass = top.exp() * known
        share = mass / mass.sum(-1, keepdim=True).clamp_min(1e-6)
        tokens = (share[..., None, :] @ self.table[ids * known].float())[..., 0, :]  # (batch, length, embedder dim)
        lengths = (top[..., 0] > float("-inf")).sum(1) - 1  # of the texts
        before, behind = (
            self.table[torch.tensor(x, dtype=torch.long, device=ids.device)] for x in (self.before, self.behind)
        )
        room = tokens.new_zeros(len(tokens), len(behind), tokens.shape[-1])
        embeds = torch.cat([before.float().expand(len(tokens), -1, -1), tokens, room], dim=1)
        ends = lengths + len(before)
        places = torch.arange(embeds.shape[1], device=ids.device)
        for number, special in enumerate(behind.float()):
            embeds = torch.where((places == ends[:, None] + number)[..., None], special, embeds)
        mask = (places < (ends + len(behind))[:, None]).long()
        output = self.transformer(inputs_embeds=embeds.to(self.table.dtype), attention_mask=mask)
        features = {"token_embeddings": output.last_hidden_state, "attention_mask": mask}
        for module in self.after:
            features = module(features)
        return features["sentence_embedding"].float()


DriftHead = DriftReadout | ReEmbed  # predictions of a batch -> (batch, embedding_dim) vector of the expected text
