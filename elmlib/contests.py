"""What elmlib does beside its naive twin and beside the bare frozen LLM: jobs ready to be timed, not yet run."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from elmlib.config import SummaryTrainingConfig
from elmlib.data import Batch, Split, epoch_batches, opening_split
from elmlib.evaluation import swap_sources
from elmlib.losses import LossParts
from elmlib.naive import naive_bertscore, naive_loss, naive_summaries
from elmlib.objective import Learner, loss_parts, total_loss
from elmlib.prompts import IGNORE_INDEX
from elmlib.quality import BERTScores
from elmlib.racing import Job
from elmlib.validation import validate
from elmlib.workbench import Workbench

Loss = Callable[[Any, Batch, SummaryTrainingConfig], LossParts]

LONG_TOKENS = 128
"""Tokens of a long answer: the guide's token_count."""
_NLL_ONLY: dict[str, Any] = {"use_contrastive_loss": False, "use_text_drift_loss": False}


class Steps(NamedTuple):
    """Training steps on the same rows, batched both ways."""

    bucketed: list[Batch]
    """As elmlib trains: rows of like answer length together."""
    mixed: list[Batch]
    """The same rows in random batches."""

    @property
    def answer_tokens(self) -> int:
        """Over all rows."""
        return sum(batch.num_tokens for batch in self.bucketed)


def short_steps(bench: Workbench, config: SummaryTrainingConfig, count: int) -> Steps:
    """`count` batches of an epoch on the training rows as they are, evenly spaced from the shortest to the longest."""
    return _steps(bench, bench.train, config, count)


def long_steps(bench: Workbench, config: SummaryTrainingConfig, count: int) -> Steps:
    """`count` batches of an epoch whose answers are the beginnings of long texts, `LONG_TOKENS` of them.

    Raises ValueError where fewer than one batch of texts is so long.
    """
    split = opening_split(bench.train, bench.elm.tokenizer, LONG_TOKENS)
    rows = [row for row, answer in enumerate(split.answers) if len(answer) > 0.75 * LONG_TOKENS]
    if len(rows) < config.batch_size:
        raise ValueError(
            f"{len(rows)} training texts have more than {0.75 * LONG_TOKENS:.0f} tokens; expected at least the batch "
            f"size, {config.batch_size}"
        )
    return _steps(bench, split.take(rows), config, count)


def _steps(bench: Workbench, split: Split, config: SummaryTrainingConfig, count: int) -> Steps:
    size, device = config.batch_size, bench.elm.table.device
    full = [rows for rows in epoch_batches(split, size, config.seed, 0) if len(rows) == size]
    # A few batches at random may be all of short answers; these are like the epoch.
    full.sort(key=lambda rows: sum(len(split.answers[row]) for row in rows))
    count = min(max(count, 1), len(full))
    full = [full[(2 * i + 1) * len(full) // (2 * count)] for i in range(count)]
    rows = np.random.default_rng(config.seed).permutation([row for batch in full for row in batch]).tolist()
    mixed = [rows[start : start + size] for start in range(0, len(rows), size)]
    return Steps(*([split.collate(batch).to(device) for batch in batches] for batches in (full, mixed)))


def step_contest(bench: Workbench, config: SummaryTrainingConfig, steps: Steps) -> dict[str, list[Job]]:
    """Whole training steps with the NLL alone and with all losses, by the naive twin and by elmlib; and the floor."""
    plain = replace(config, **_NLL_ONLY)
    return {
        "naive, NLL": training(bench, plain, naive_loss, steps.mixed),
        "elmlib, NLL": training(bench, plain, loss_parts, steps.bucketed),
        "floor, NLL": floor(bench, steps.bucketed),
        "naive, all losses": training(bench, config, naive_loss, steps.mixed),
        "elmlib, all losses": training(bench, config, loss_parts, steps.bucketed),
    }


def training(bench: Workbench, config: SummaryTrainingConfig, loss: Loss, batches: Sequence[Batch]) -> list[Job]:
    """One optimizer step on each batch, of an adapter of its own; each is a part of the job."""
    bench = bench.fresh(config)
    adapter = bench.elm.adapter.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=config.learning_rate, fused=True)

    return [partial(take_step, bench, batch, config, optimizer, loss) for batch in batches]


def take_step(
    learner: Learner,
    batch: Batch,
    config: SummaryTrainingConfig,
    optimizer: torch.optim.Optimizer,
    loss: Loss = loss_parts,
) -> None:
    """One optimizer step on one batch, as the trainer takes it in one process."""
    parts = loss(learner, batch, config)
    total_loss(parts, parts.tokens, parts.rows, config).backward()
    torch.nn.utils.clip_grad_norm_(learner.elm.adapter.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def floor(bench: Workbench, batches: Sequence[Batch]) -> list[Job]:
    """The bare frozen LLM, forward and backward to its input, on the tokens that elmlib must process and no other.

    They stand behind the same cached prompt, and logits are made where an answer token is predicted. No adapter, no
    optimizer, no other loss.
    """
    elm = bench.elm
    soft = torch.zeros(1, elm.adapter.num_soft_tokens, elm.adapter.llm_dim, device=elm.table.device)

    def run(batch: Batch) -> None:
        answer = elm.answer_so_far(batch.labels)
        embeds, cache = elm.place_tokens(batch.prompt, soft.expand(len(answer), -1, -1), answer)
        output = elm.llm.base_model(inputs_embeds=embeds.requires_grad_(), cache=cache, use_cache=True)
        asked = batch.labels != IGNORE_INDEX
        hidden = output.last_hidden_state[:, -asked.shape[1] :][asked]
        F.cross_entropy((hidden @ elm.head.T).float(), batch.labels[asked]).backward()

    return [partial(run, batch) for batch in batches]


def generation_contest(bench: Workbench, config: SummaryTrainingConfig, rows: Sequence[int]) -> dict[str, Job]:
    """Greedy summaries of validation rows."""
    bench.elm.adapter.eval()
    batch = bench.val.collate_prompts(rows).to(bench.elm.table.device)
    return {
        "naive": lambda: naive_summaries(bench.elm, batch, config.max_new_tokens),
        "elmlib": lambda: bench.elm.generate(batch, config.max_new_tokens),
    }


class ScoringContest(NamedTuple):
    """BERTScore of the same pairs by the library and by elmlib."""

    jobs: dict[str, Job]
    difference: Callable[[], float]
    """Largest between their scores of a pair: precision, recall or F1."""


def scoring_contest(bench: Workbench, predictions: Sequence[str], references: Sequence[str]) -> ScoringContest:
    """The library called afresh, the library with its encoder kept loaded, and elmlib with its references encoded.

    `predictions` must hold no empty text, at which the library fails.
    """
    from bert_score import BERTScorer

    ours, encoder = bench.evaluator, bench.evaluator.encoder_id
    kept = BERTScorer(
        model_type=encoder.place, num_layers=encoder.num_layers, idf=False, nthreads=0, device=str(ours.device)
    )
    ours.score_pairs(references, references)  # the references are known from an earlier evaluation

    def warm() -> BERTScores:
        ours.forget_predictions()
        return ours.score_pairs(predictions, references)

    def difference() -> float:
        return float(np.abs(np.array(naive_bertscore(bench, predictions, references)) - np.array(warm())).max())

    jobs: dict[str, Job] = {
        "naive": lambda: naive_bertscore(bench, predictions, references),
        "naive, encoder kept": lambda: kept.score(list(predictions), list(references)),
        "elmlib": warm,
    }
    return ScoringContest(jobs, difference)


def evaluation_contest(bench: Workbench, config: SummaryTrainingConfig) -> dict[str, Job]:
    """A whole evaluation: NLL and summaries, their scores, and all of it once more with shuffled embeddings."""
    device = bench.elm.table.device
    return {
        "naive": lambda: _naive_evaluation(bench, config, device),
        "elmlib": lambda: validate(bench, config, device),
    }


@torch.no_grad()
def _naive_evaluation(bench: Workbench, config: SummaryTrainingConfig, device: torch.device) -> float:
    """What `validate` works out, each part for itself; the mean NLL of true and shuffled embeddings, for the test."""
    split, elm = bench.val, bench.elm
    elm.adapter.eval()
    sample = split.subset(config.eval_samples, config.eval_seed)
    rows = split.subset(max(config.eval_nll_samples, config.eval_samples), config.eval_seed)
    references = [split.records[row].target_text for row in sample]
    other = swap_sources([str(split.sources[row]) for row in rows], config.eval_seed)
    nll = tokens = 0.0
    for given in (
        dict(zip(rows, rows, strict=True)),
        {row: rows[place] for row, place in zip(rows, other, strict=True)},
    ):
        for start in range(0, len(rows), config.batch_size):
            chosen = rows[start : start + config.batch_size]
            vectors = split.vectors([given[row] for row in chosen])
            batch = split.collate(chosen)._replace(embeddings=vectors).to(device)
            parts = naive_loss(bench, batch, config)
            nll, tokens = nll + parts.nll.item(), tokens + batch.num_tokens
        prompts = split.collate_prompts(sample)._replace(embeddings=split.vectors([given[row] for row in sample]))
        texts = naive_summaries(elm, prompts.to(device), config.max_new_tokens)
        # The library fails at an empty text.
        pairs = [(text, reference) for text, reference in zip(texts, references, strict=True) if text]
        if pairs:
            naive_bertscore(bench, *zip(*pairs, strict=True))
            bench.embed([text for text, _ in pairs])
        bench.embed(references)
    return nll / tokens
