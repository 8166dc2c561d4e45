"""The straightforward way to do each job: tests hold elmlib equal to it, and benchmarks time elmlib beside it."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from elmlib.config import SummaryTrainingConfig
from elmlib.data import IGNORE_INDEX, Batch, PromptBatch
from elmlib.evaluation import BERTScores
from elmlib.models import SoftTokenModel
from elmlib.models.warm_start import mean_token_embedding
from elmlib.training import TrainingComponents, info_nce, text_drift
from elmlib.training.losses import Predictions, compute_losses, total_loss


def naive_embeds(model: SoftTokenModel, batch: Batch | PromptBatch, answer: Tensor | None = None) -> Tensor:
    """The whole chat prompt in every row, soft tokens in their position: (batch, length, llm_dim)."""
    soft = model.adapter(batch.embeddings).to(model.table.dtype)
    before, between = (
        model.table[torch.tensor(ids, dtype=torch.long, device=soft.device)].expand(len(soft), -1, -1)
        for ids in batch.prompt.around(model.position)
    )
    return torch.cat([before, soft, between] + ([] if answer is None else [model.table[answer]]), dim=1)


def naive_losses(components: TrainingComponents, batch: Batch, config: SummaryTrainingConfig) -> dict[str, Tensor]:
    """`compute_losses` with all logits by `labels=`, and the adapter run twice."""
    model = components.model
    embeds = naive_embeds(model, batch, batch.labels.clamp_min(0))
    start = embeds.shape[1] - batch.labels.shape[1]
    labels = torch.cat([batch.labels.new_full((len(embeds), start), IGNORE_INDEX), batch.labels], dim=1)
    output = model.llm(inputs_embeds=embeds, labels=labels, use_cache=False)
    sums = {"nll": output.loss * batch.num_tokens}  # its mean over answer tokens, as a sum
    if config.use_contrastive_loss:
        positives = mean_token_embedding(batch.labels, model.table, components.warm_start.idf)
        anchors = model.adapter(batch.embeddings).mean(1)
        sums["contrastive"] = info_nce(anchors, positives, batch.sources, config.contrastive_temperature).sum()
    if config.use_text_drift_loss:
        log_probs = output.logits[:, start - 1 : -1].float().log_softmax(-1)
        top, ids = log_probs.topk(min(config.drift_top_k, len(model.head)))  # of (batch, length, vocab)
        top = top.masked_fill(batch.labels[..., None] == IGNORE_INDEX, float("-inf"))
        vectors = components.drift_head(Predictions(sums["nll"], top, ids))
        losses, cosines = text_drift(vectors, batch.embeddings, config.text_drift_target_similarity)
        sums |= {"drift": losses.sum(), "predicted_similarity": cosines.detach().sum()}
    return sums


@torch.no_grad()
def naive_summaries(model: SoftTokenModel, batch: PromptBatch, max_new_tokens: int) -> list[str]:
    """`SoftTokenModel.generate` row by row: transformers' own generate(), which reads the whole prompt for each."""
    return [
        text
        for row in batch.embeddings
        for text in batched_summaries(model, PromptBatch(row[None], batch.prompt), max_new_tokens)
    ]


@torch.no_grad()
def batched_summaries(model: SoftTokenModel, batch: PromptBatch, max_new_tokens: int) -> list[str]:
    """All rows in one call of transformers' generate()."""
    ends = sorted({batch.prompt.end_of_turn, model.tokenizer.eos_token_id})
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=model.tokenizer.eos_token_id
    )
    embeds = naive_embeds(model, batch)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    ids = model.llm.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=settings)
    return [text.strip() for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def check_losses(components: TrainingComponents, batch: Batch, config: SummaryTrainingConfig) -> None:
    """Assert that `compute_losses` and its gradient are those of `naive_losses`."""
    adapter, results = components.model.adapter, []
    for compute in (naive_losses, compute_losses):
        sums = compute(components, batch, config)
        total_loss(sums, {"token": batch.num_tokens, "row": len(batch.labels)}, config).backward()
        results.append((sums, adapter.linear.weight.grad.clone()))
        adapter.zero_grad()
    (naive, naive_slope), (ours, slope) = results
    assert naive.keys() == ours.keys()
    for name in naive:
        torch.testing.assert_close(naive[name], ours[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(naive_slope, slope, rtol=1e-3, atol=1e-6)


def naive_bertscore(
    components: TrainingComponents, predictions: Sequence[str], references: Sequence[str]
) -> BERTScores:
    """`BERTScoreEvaluator.score_pairs` by one call of the library, which loads its encoder and encodes everything.

    No prediction may be empty: the library fails at one.
    """
    from bert_score import score

    encoder, device = components.evaluator.encoder_id, str(components.evaluator.device)
    options = {"model_type": encoder.path, "num_layers": encoder.num_layers, "device": device}
    precision, recall, f1 = score(list(predictions), list(references), idf=False, nthreads=0, **options)
    return BERTScores(*(values.double().numpy() for values in (precision, recall, f1)))


def naive_filter(lines: Path, vectors: Path, out: Path, task: str) -> int:
    """`filter_corpus` for one split, without a check: parse each line, keep the task's, renumber their vectors.

    Writes two files of the same names into the folder `out`. Returns how many records it kept.
    """
    embeddings = load_file(vectors)["embeddings"]
    numbers: dict[int, int] = {}
    kept = 0
    with open(lines, encoding="utf-8") as file, open(out / lines.name, "w", encoding="utf-8") as written:
        for line in file:
            record = json.loads(line)
            if record["task_type"] == task:
                record["embedding_index"] = numbers.setdefault(record["embedding_index"], len(numbers))
                written.write(json.dumps(record, ensure_ascii=False) + "\n")
                kept += 1
    save_file({"embeddings": embeddings[list(numbers)]}, out / vectors.name)
    return kept
