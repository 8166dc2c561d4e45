"""`make benchmark`: elmlib beside its naive twin and beside fair rivals, in one process and in turns.

Every job prints the median of its ratios, turn by turn: contestants alternate, so a slow moment of the machine affects
both. `--tiny` uses a small random LLM: it shows that the benchmark runs, not how fast elmlib is.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from bert_score import BERTScorer
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).parent.parent))
import reference

from elmlib import SummaryTrainingConfig, filter_corpus
from elmlib.config import FilterConfig
from elmlib.data import SPLITS, TASK_TEMPLATES, Record, SummaryDataset, write_embeddings
from elmlib.models import default_device
from elmlib.training import TrainingComponents, build_components
from elmlib.training.losses import compute_losses, total_loss

Job = Callable[[], object]
LONG_TOKENS = 128
"""Tokens of a long answer: the guide's token_count."""
JOBS = ("step", "long step", "generation", "bertscore", "filter")


def compare(name: str, ours: Job, rivals: dict[str, Job], turns: int) -> Iterator[dict[str, object]]:
    """Time `ours` and every rival in turns, after one turn that is not counted."""
    jobs = {"elmlib": ours} | rivals
    seconds: dict[str, list[float]] = {job: [] for job in jobs}
    for turn in range(turns + 1):
        for job in list(jobs)[:: 1 if turn % 2 else -1]:
            spent = Timer("job()", globals={"job": jobs[job]}, num_threads=torch.get_num_threads()).timeit(1).mean
            if turn:
                seconds[job].append(spent)
    for rival in rivals:
        ratios = np.divide(seconds[rival], seconds["elmlib"])
        yield {
            "job": name, "rival": rival, "elmlib s": np.median(seconds["elmlib"]), "rival s": np.median(seconds[rival]),
            "ratio": np.median(ratios), "lowest": ratios.min(), "highest": ratios.max(),
        }  # fmt: skip


def with_long_answers(dataset: SummaryDataset, tokenizer: Any, count: int) -> SummaryDataset:
    """The `count` rows of the longest texts, each with the first LONG_TOKENS tokens of its text as the answer."""
    texts = [record.source_text or record.target_text for record in dataset.records]
    ids = [tokens[:LONG_TOKENS] for tokens in tokenizer(texts, add_special_tokens=False).input_ids]
    longest = sorted(range(len(ids)), key=lambda row: -len(ids[row]))[:count]
    return replace(dataset, answers=ids).take(longest)


def steps(components: TrainingComponents, dataset: SummaryDataset, config: SummaryTrainingConfig, naive: bool) -> Job:
    """Optimizer steps over `dataset`: elmlib's batches of similar lengths, or random batches for the naive twin."""
    size, rows = config.batch_size, torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = [rows[start : start + size] for start in range(0, len(rows), size)]
    batches = [
        dataset.collate(batch).to(components.model.table.device)
        for batch in (mixed if naive else dataset.bucket(rows, size))
    ]
    optimizer = torch.optim.AdamW(components.model.adapter.parameters(), lr=1e-5, fused=True)
    compute = reference.naive_losses if naive else compute_losses

    def job() -> None:
        for batch in batches:
            counts = {"token": batch.num_tokens, "row": len(batch.labels)}
            total_loss(compute(components, batch, config), counts, config).backward()
            torch.nn.utils.clip_grad_norm_(components.model.adapter.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    return job


def make_corpus(folder: Path, lines: int) -> None:
    """A generated multi-task corpus of `lines` training lines, of which a third is kept."""
    tasks, rng = list(TASK_TEMPLATES), random.Random(0)
    (folder / "synthesis").mkdir(parents=True)
    for split in SPLITS:
        count = lines if split == "train" else 99
        vectors = np.random.default_rng(len(split)).normal(size=(count // 3 + 1, 64)).astype(np.float32)
        with open(folder / "synthesis" / f"{split}_synthesis.jsonl", "wb") as file:
            for line in range(count):
                text = " ".join(rng.choices(("read", "the", "file", "and", "close", "its", "handle"), k=40))
                task, source = tasks[line % 3], f"{split}-{line // 3}"
                record = Record(task, TASK_TEMPLATES[task], line // 3, text[:80], 0, 0.3, 0.85, 16, source, text)
                file.write(record.to_line())
        write_embeddings(folder / "embeddings" / f"{split}_embeddings.safetensors", vectors.shape, [vectors.tobytes()])


def filter_jobs(folder: Path, lines: int) -> tuple[Job, Job]:
    """elmlib's filter of all splits, and a json.loads loop that checks nothing."""
    make_corpus(folder, lines)
    config = FilterConfig(folder / "synthesis", folder / "embeddings", folder / "out", folder / "out_embeddings")
    (folder / "naive").mkdir()

    def naive() -> None:
        for split in SPLITS:
            files = folder / f"synthesis/{split}_synthesis.jsonl", folder / f"embeddings/{split}_embeddings.safetensors"
            reference.naive_filter(*files, folder / "naive", "summary")

    return lambda: filter_corpus(config, progress=False), naive


def run(
    config: SummaryTrainingConfig, only: list[str], turns: int, batches: int, samples: int, lines: int
) -> pandas.DataFrame:
    """The table of all jobs, or of those in `only`."""
    components = build_components(config, default_device())
    train, val, model = components.train, components.val, components.model
    results: list[dict[str, object]] = []
    count = batches * config.batch_size
    datasets = {
        "step": train.take(train.subset(count, 0)),
        "long step": with_long_answers(train, model.tokenizer, max(count // 4, config.batch_size)),
    }
    for name, dataset in datasets.items():
        if name in only:
            ours, twin = (steps(components, dataset, config, naive) for naive in (False, True))
            results += compare(name, ours, {"naive twin": twin}, turns)
    model.adapter.eval()
    rows = val.subset(samples, config.eval_seed)
    batch = val.collate_prompts(rows).to(model.table.device)
    length = config.max_new_tokens
    if "generation" in only:
        rivals: dict[str, Job] = {
            "one batched generate()": lambda: reference.batched_summaries(model, batch, length),
            "generate() row by row": lambda: reference.naive_summaries(model, batch, length),
        }
        results += compare("generation", lambda: model.generate(batch, length), rivals, turns)
    if "bertscore" in only:
        encoder = components.evaluator.encoder_id
        scorer = BERTScorer(model_type=encoder.path, num_layers=encoder.num_layers, device=str(model.table.device))
        references = [val.records[row].target_text for row in rows]
        predictions = [train.records[row].target_text for row in train.subset(len(rows), 0)]

        def score() -> object:  # references are cached, as in a run; predictions are new at each evaluation
            components.evaluator.score_pairs(references[:1], references[:1])
            return components.evaluator.score_pairs(predictions, references)

        rivals = {"BERTScorer, loaded": lambda: scorer.score(predictions, references, batch_size=16)}
        results += compare("bertscore", score, rivals, turns)
    if "filter" in only:
        with tempfile.TemporaryDirectory() as folder:
            ours_filter, naive_filter = filter_jobs(Path(folder), lines)
            results += compare("filter", ours_filter, {"json.loads loop": naive_filter}, turns)
    return pandas.DataFrame(results).round(3)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="papermill_runs/demo/data/summary_filtered")
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--rows", type=int, default=100, help="summaries to generate, and pairs to score")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tiny", metavar="LLM", help="folder of a small LLM: a quick run that measures nothing")
    options = parser.parse_args()
    config = SummaryTrainingConfig(summary_data_path=options.data_dir)
    sizes = {"batches": 12, "samples": options.rows, "lines": 200_000}
    if options.tiny:
        config = replace(config, llm_model_name=options.tiny, hidden_dim=32, batch_size=4, max_new_tokens=8)
        sizes = {"batches": 4, "samples": 8, "lines": 3_000}
    print(run(config, options.only, options.turns, **sizes).to_string(index=False))


if __name__ == "__main__":
    main()
