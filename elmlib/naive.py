"""The straightforward way to do each job, as it is written first: what elmlib is measured against, and tested against.

Nothing here is used elsewhere. Each function gives the same result as elmlib's own.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from elmlib.adapter import mean_token_embedding
from elmlib.config import SummaryTrainingConfig
from elmlib.data import Batch, PromptBatch
from elmlib.drift import text_drift
from elmlib.losses import LossParts, Predictions, info_nce
from elmlib.model import Elm
from elmlib.prompts import IGNORE_INDEX
from elmlib.quality import BERTScores
from elmlib.workbench import Workbench


def naive_embeds(elm: Elm, batch: Batch | PromptBatch, answer: Tensor | None = None) -> Tensor:
    """The whole chat prompt in every row, soft tokens in their place: (batch, length, llm_dim)."""
    soft = elm.adapter(batch.embeddings).to(elm.table.dtype)
    before, between = (
        elm.table[torch.tensor(ids, dtype=torch.long, device=soft.device)].expand(len(soft), -1, -1)
        for ids in batch.prompt.around(elm.place)
    )
    return torch.cat([before, soft, between] + ([] if answer is None else [elm.table[answer]]), dim=1)


def naive_loss(bench: Workbench, batch: Batch, config: SummaryTrainingConfig) -> LossParts:
    """`objective.loss_parts` without the teacher: all logits by `labels=`, every hidden state, the adapter run twice.

    The drift loss takes the softmax over the whole vocabulary at each position.
    """
    elm = bench.elm
    embeds = naive_embeds(elm, batch, batch.labels.clamp_min(0))
    start = embeds.shape[1] - batch.labels.shape[1]
    labels = torch.cat([batch.labels.new_full((len(embeds), start), IGNORE_INDEX), batch.labels], dim=1)
    output = elm.llm(inputs_embeds=embeds, labels=labels, output_hidden_states=True, use_cache=False)
    nll = output.loss * batch.num_tokens  # its mean over answer tokens, as a sum
    contrastive = drift = similarity = torch.zeros((), device=embeds.device)
    if config.use_contrastive_loss:
        positives = mean_token_embedding(batch.labels, elm.table, bench.idf)
        anchors = elm.adapter(batch.embeddings).mean(1)
        contrastive = info_nce(anchors, positives, batch.sources, config.contrastive_temperature).sum()
    if config.use_text_drift_loss:
        hidden = output.hidden_states[-1][:, start - 1 : -1]
        meanings = bench.drift(_predictions(hidden, elm.head, batch.labels, config.drift_top_k, nll))
        losses, cosines = text_drift(meanings, batch.embeddings, config.text_drift_target_similarity)
        drift, similarity = losses.sum(), cosines.detach().sum()
    nothing = torch.zeros((), device=embeds.device)
    return LossParts(nll, contrastive, drift, similarity, nothing, batch.num_tokens, len(batch.labels))


def _predictions(hidden: Tensor, head: Tensor, labels: Tensor, top_k: int, nll: Tensor) -> Predictions:
    log_probs = (hidden @ head.T).float().log_softmax(-1)  # (batch, length, vocab)
    top, ids = log_probs.topk(min(top_k, len(head)))
    top = top.masked_fill(labels[..., None] == IGNORE_INDEX, float("-inf"))
    return Predictions(nll, top, ids, top.new_zeros(0, 0))


@torch.no_grad()
def naive_summaries(elm: Elm, batch: PromptBatch, max_new_tokens: int) -> list[str]:
    """`Elm.generate` row by row: transformers' own generate(), which reads the whole prompt for each."""
    ends = sorted({batch.prompt.end_of_turn, elm.tokenizer.eos_token_id})
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=elm.tokenizer.eos_token_id
    )
    generate: Any = elm.llm.generate  # PreTrainedModel is typed without it
    texts = []
    for row in batch.embeddings:
        embeds = naive_embeds(elm, PromptBatch(row[None], batch.prompt))
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        ids = generate(inputs_embeds=embeds, attention_mask=mask, generation_config=settings)
        texts.append(cast(str, elm.tokenizer.decode(ids[0], skip_special_tokens=True)).strip())
    return texts


def naive_bertscore(bench: Workbench, predictions: Sequence[str], references: Sequence[str]) -> BERTScores:
    """`BERTScoreEvaluator.score_pairs` by one call of the library, which loads its encoder and encodes everything.

    No prediction may be empty: the library fails at one.
    """
    from bert_score import score

    encoder, device = bench.evaluator.encoder_id, str(bench.evaluator.device)
    options = {"model_type": encoder.place, "num_layers": encoder.num_layers, "device": device}
    precision, recall, f1 = score(list(predictions), list(references), idf=False, nthreads=0, **options)
    return BERTScores(*(values.double().numpy() for values in (precision, recall, f1)))
