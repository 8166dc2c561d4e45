"""The report: scores of an adapter and of every baseline on the same texts; and tables of scores and summaries.

torch is imported only by the functions that score adapters: reading a finished report needs files alone.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from tqdm.auto import tqdm

from elmlib.config import SummaryTrainingConfig
from elmlib.data.records import atomic_path, parse_line, read_lines
from elmlib.evaluation.metrics import (
    COPY,
    POOL,
    Identification,
    bertscore_means,
    bootstrap_interval,
    cosine_rows,
    embed_texts,
    identify_sources,
    permutation_p,
    quality_metrics,
)

if TYPE_CHECKING:
    import pandas
    import torch

    from elmlib.data.dataset import SummaryDataset
    from elmlib.evaluation.baselines import Baseline
    from elmlib.evaluation.bertscore import BERTScoreEvaluator
    from elmlib.models.elm import Sampling

logger = logging.getLogger(__name__)

_ROWS = {
    "val_nll": "NLL (nats per token)",
    "bertscore_precision": "BERTScore precision",
    "bertscore_recall": "BERTScore recall",
    "bertscore_f1": "BERTScore F1",
    "bertscore_composite": "BERTScore composite",
    "bertscore_f1_rescaled": "BERTScore F1, rescaled",
    "drift_similarity": "drift similarity",
}
_QUALITY = {
    "identification_top_1": "own source first (top-1)",
    "identification_chance": "top-1 by chance",
    "identification_mrr": "own source (MRR)",
    "drift_correlation": "drift similarity, predicted and true (r)",
    "length_ratio": "length ratio",
    "empty_prediction_rate": "empty rate",
    "short_prediction_rate": "short rate (< 5 words)",
    "avg_unique_token_ratio": "unique-token ratio",
    "repeated_bigram_rate": "repeated bigrams",
    "distinct_prediction_rate": "distinct summaries",
}
_TEXTS = ("source_id", "target_text", "prediction")
_COMMON = (
    *("llm_model_name", "embedding_model_name", "embedding_dim", "bertscore_model"),
    *("soft_token_position", "max_new_tokens"),
)


@dataclass(frozen=True, eq=False)
class BaselineScores:
    """The scores of one system over n texts."""

    name: str
    predictions: tuple[str, ...]
    f1: np.ndarray
    """(n,) raw BERTScore F1."""
    composite: float
    """0.3 P + 0.3 R + 0.4 F1 over all texts."""
    consistency: np.ndarray
    """(n,) semantic consistency: cosine of the re-embedded summary and the source vector, 0 for an empty one."""
    by_reference: Identification
    """Nearest reference summary among those of the whole split."""
    by_source: Identification
    """Nearest source embedding among those of the whole split."""
    quality: dict[str, float]
    p_value: float
    """Of the paired permutation test that F1 equals the adapter's; 1 for the adapter itself."""
    p_copy: float
    """The same against the nearest training neighbour's summary; NaN where that is not in the report."""

    def row(self) -> dict[str, str | float]:
        """One line of the CSV file."""
        row: dict[str, str | float] = {"system": self.name, "bertscore_composite": self.composite}
        for name, values in (("bertscore_f1", self.f1), ("semantic_consistency", self.consistency)):
            interval = bootstrap_interval(values)
            row |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
        row |= {"p_value": self.p_value, "p_copy": self.p_copy}
        for name, ranks in (("reference", self.by_reference), ("source", self.by_source)):
            for pool, among in ((name, ranks.among(POOL)), (f"{name}_all", ranks)):
                for figure in ("top_1", "top_5", "mrr", "chance", "chance_mrr"):
                    row[f"{pool}_{figure}"] = getattr(among, figure)
        return row | self.quality


@dataclass(frozen=True, eq=False)
class Report:
    """All systems on the same texts, the adapter first."""

    systems: tuple[BaselineScores, ...]
    source_ids: tuple[str, ...]
    references: tuple[str, ...]
    """(n,) of the texts, as are `source_ids`."""

    def __getitem__(self, name: str) -> BaselineScores:
        """The system of that name; KeyError names those that there are."""
        for system in self.systems:
            if system.name == name:
                return system
        raise KeyError(f"no system {name!r}; there are {[system.name for system in self.systems]}")

    def to_frame(self) -> "pandas.DataFrame":
        """One row a system; intervals are 95% bootstrap intervals of the mean, `..._low` and `..._high`."""
        import pandas

        return pandas.DataFrame([system.row() for system in self.systems]).set_index("system")

    def write_csv(self, path: Path) -> None:
        """`to_frame` as CSV."""
        with atomic_path(path) as temporary:
            self.to_frame().to_csv(temporary)

    def write_texts(self, path: Path) -> None:
        """JSONL, one line a text: its reference, and for each system the summary and its F1."""
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            for place, (source_id, reference) in enumerate(zip(self.source_ids, self.references, strict=True)):
                line: dict[str, Any] = {"source_id": source_id, "reference": reference}
                line["summaries"] = {system.name: system.predictions[place] for system in self.systems}
                line["bertscore_f1"] = {system.name: system.f1[place].item() for system in self.systems}
                file.write(orjson.dumps(line) + b"\n")

    def display_frame(self) -> "pandas.DataFrame":
        """The main columns for people, chance in the last row.

        `p` is against the adapter, `p copy` against the nearest training neighbour's summary. top-1, top-5, MRR and
        source are in pools of `POOL` sources, top-1 of N is among the whole split.
        """
        import pandas

        every = self.systems[0].by_reference
        few, top_all = every.among(POOL), f"top-1 of {every.num_sources}"
        rows: list[dict[str, Any]] = []
        for system in self.systems:
            f1, near, source = bootstrap_interval(system.f1), system.by_reference.among(POOL), system.by_source
            rows.append(
                {"": system.name, "F1 [95%]": f"{f1.mean:.3f} [{f1.low:.3f}, {f1.high:.3f}]"}
                | {"p": "" if system is self.systems[0] else f"{system.p_value:.4f}"}
                | {"p copy": "" if system.name == COPY or np.isnan(system.p_copy) else f"{system.p_copy:.4f}"}
                | {"top-1": f"{near.top_1:.2f}", "top-5": f"{near.top_5:.2f}", "MRR": f"{near.mrr:.2f}"}
                | {"source": f"{source.among(POOL).top_1:.2f}", top_all: f"{system.by_reference.top_1:.3f}"}
                | {"consistency": f"{system.consistency.mean():.3f}"}
            )
        chance = {"": f"chance, 1 of {few.pool}", "top-1": few.chance, "top-5": min(1.0, 5 * few.chance)}
        chance |= {"MRR": few.chance_mrr, "source": few.chance}
        shown = {name: x if isinstance(x, str) else f"{x:.2f}" for name, x in chance.items()}
        return pandas.DataFrame([*rows, shown | {top_all: f"{every.chance:.3f}"}]).fillna("").set_index("")


def score_baselines(
    baselines: Sequence["Baseline"],
    evaluator: "BERTScoreEvaluator",
    embed: Callable[[list[str]], np.ndarray],
    dataset: "SummaryDataset",
    rows: Sequence[int],
) -> Report:
    """Let each system write summaries of `rows` of `dataset`, and score them.

    A summary has to identify its own source among all sources of the dataset. The first system is the adapter, with
    which the others are compared. Raises ValueError as `check_pairs` and `identify_sources` do.
    """
    references = [record.target_text for record in dataset.records]
    embeddings = dataset.vectors(range(len(dataset))).numpy()
    sources = [str(source) for source in dataset.sources]
    targets = embed_texts(embed, references, embeddings.shape[1])
    chosen = [references[row] for row in rows]
    scored: list[BaselineScores] = []
    for number, baseline in enumerate(tqdm(baselines, desc="report", unit="system"), start=1):
        logger.info("report, %d of %d: %s", number, len(baselines), baseline.name)
        predictions = baseline.write()
        scores = evaluator.score_pairs(predictions, chosen)
        vectors = embed_texts(embed, predictions, embeddings.shape[1])
        scored.append(
            BaselineScores(
                name=baseline.name,
                predictions=tuple(predictions),
                f1=scores.f1,
                composite=bertscore_means(scores)["bertscore_composite"],
                consistency=cosine_rows(vectors, embeddings[rows]),
                by_reference=identify_sources(vectors, targets, sources, rows),
                by_source=identify_sources(vectors, embeddings, sources, rows),
                quality=quality_metrics(predictions, chosen),
                p_value=permutation_p(scores.f1, scored[0].f1) if scored else 1.0,
                p_copy=float("nan"),
            )
        )
    copied = next((system.f1 for system in scored if system.name == COPY), None)
    if copied is not None:
        scored = [replace(system, p_copy=permutation_p(system.f1, copied)) for system in scored]
    return Report(tuple(scored), tuple(dataset.records[row].source for row in rows), tuple(chosen))


class _Scorer:
    """Models and data of one config, on which several adapters can be scored."""

    def __init__(self, config: SummaryTrainingConfig, split: str, samples: int, device: "torch.device"):
        from elmlib.data.dataset import load_split, locate_split
        from elmlib.evaluation.bertscore import BASELINE_TEXTS, create_evaluator
        from elmlib.models.elm import build_model
        from elmlib.models.pretrained import encode, load_embedder
        from elmlib.models.warm_start import load_warm_start

        for name in ("train", "val", split):  # before a model is loaded or downloaded: a wrong folder fails at once
            locate_split(config, name)
        self.config, self.device = config, device
        self.model = build_model(config, device)
        self.train, val = (load_split(config, name, self.model.tokenizer) for name in ("train", "val"))
        self.warm_start = load_warm_start(self.train, val, self.model.table, config)
        embedder = load_embedder(config.embedding_model_name, config.evaluation_device or device)
        self.embed = lambda texts: encode(embedder, texts, config.batch_size)
        chosen = self.train.subset(BASELINE_TEXTS, config.eval_seed)
        references = [self.train.records[row].target_text for row in chosen]
        self.evaluator = create_evaluator(config, references, config.evaluation_device or device)
        self.dataset = {"train": self.train, "val": val}.get(split) or load_split(config, split, self.model.tokenizer)
        self.rows = self.dataset.subset(samples or len(self.dataset), config.eval_seed)

    def baselines(self, path: Path, sampling: "Sampling | None" = None) -> "list[Baseline]":
        """The adapter file at `path` and its baselines."""
        from elmlib.evaluation.baselines import list_baselines
        from elmlib.models.adapter import load_adapter, make_adapter
        from elmlib.models.warm_start import warm_started_adapter

        file = load_adapter(path)
        adapter = make_adapter(file.config, self.model.table)
        adapter.load_state_dict(file.weights)
        trained = self.model.with_adapter(adapter.to(self.device).eval())
        untrained = self.model.with_adapter(warm_started_adapter(file.config, self.warm_start, self.model.table).eval())
        return list_baselines(
            trained, untrained, self.embed, self.train, self.dataset, self.rows, self.config, sampling
        )

    def score(self, baselines: "Sequence[Baseline]") -> Report:
        return score_baselines(baselines, self.evaluator, self.embed, self.dataset, self.rows)


def score_checkpoint(
    checkpoint: Path, data_dir: str, split: str, samples: int, sampling: "Sampling | None", device: "torch.device"
) -> Report:
    """Score an adapter file and its baselines on a seeded sample of a split; 0 `samples` take the whole split.

    `split` is `train`, `val` or `test`; `sampling` adds the best of several candidates. Raises FileNotFoundError and
    ValueError as loading data and adapter does.
    """
    from elmlib.models.adapter import load_adapter

    config = replace(load_adapter(checkpoint).config, summary_data_path=data_dir)
    scorer = _Scorer(config, split, samples, device)
    return scorer.score(scorer.baselines(checkpoint, sampling))


def score_adapters(
    checkpoints: Mapping[str, Path], data_dir: str, split: str, samples: int, device: "torch.device"
) -> Report:
    """Several adapters on the same texts, the first with its shuffled control.

    Raises ValueError where they differ in models, position of the soft tokens or length of the summaries.
    """
    from elmlib.models.adapter import load_adapter

    configs = {name: load_adapter(path).config for name, path in checkpoints.items()}
    first, config = next(iter(configs.items()))
    for name, other in configs.items():
        for setting in _COMMON:
            theirs, ours = getattr(other, setting), getattr(config, setting)
            if theirs != ours:
                raise ValueError(f"{checkpoints[name]} has {setting} {theirs!r}, {checkpoints[first]} {ours!r}")
    scorer = _Scorer(replace(config, summary_data_path=data_dir), split, samples, device)
    baselines: list[Baseline] = []
    for name, path in checkpoints.items():
        adapter, shuffled, *_ = scorer.baselines(path)
        baselines += [adapter._replace(name=name)] + ([] if baselines else [shuffled])
    return scorer.score(baselines)


def score_rows(metrics: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Label, score with true embeddings and score with shuffled ones, for each score that has both."""
    return [
        (label, metrics[name], metrics[f"{name}_shuffled"])
        for name, label in _ROWS.items()
        if name in metrics and f"{name}_shuffled" in metrics
    ]


def score_frame(metrics: Mapping[str, Any]) -> "pandas.DataFrame":
    """Each score with true and with shuffled embeddings and the difference; then the form of the summaries."""
    import pandas

    rows = [{"": label, "true": a, "shuffled": b, "difference": a - b} for label, a, b in score_rows(metrics)]
    rows += [{"": label, "true": metrics[name]} for name, label in _QUALITY.items() if name in metrics]
    return pandas.DataFrame(rows, columns=["", "true", "shuffled", "difference"]).set_index("").round(3)


def read_predictions(path: Path, *fields: str) -> list[dict[str, Any]]:
    """The lines of a predictions file, each with at least `fields`.

    Raises FileNotFoundError for no such file and ValueError for an empty one or, naming it, for a line without them.
    """
    lines = []
    for number, line in read_lines(path):
        values = parse_line(line, f"{path}, line {number}")
        if missing := [field for field in fields if field not in values]:
            raise ValueError(f"{path}, line {number} has no {missing[0]!r}, which a training run's predictions have")
        lines.append(values)
    return lines


def sample_frame(predictions: Path, count: int = 5) -> "pandas.DataFrame":
    """The first `count` summaries of a predictions file beside their references."""
    import pandas

    return pandas.DataFrame(read_predictions(predictions, *_TEXTS)[:count], columns=list(_TEXTS))


def examples_frame(predictions: Path, count: int = 3) -> "pandas.DataFrame":
    """By F1, the `count` best, median and worst summaries of a predictions file, best first; none is in two groups.

    A file of fewer than 3 x `count` lines gives a third of its lines to each group. Raises as `read_predictions` does,
    and ValueError for fewer than three lines or a `count` below 1.
    """
    import pandas

    if count < 1:
        raise ValueError(f"count is {count}; expected at least 1")
    lines = read_predictions(predictions, "bertscore_f1", "rank", *_TEXTS)
    if len(lines) < 3:
        raise ValueError(f"{predictions} has {len(lines)} lines; best, median and worst need at least 3")
    lines.sort(key=lambda values: -values["bertscore_f1"])
    size = min(count, len(lines) // 3)
    starts = {"best": 0, "median": (len(lines) - size) // 2, "worst": len(lines) - size}
    rows = [{"group": group} | line for group, start in starts.items() for line in lines[start : start + size]]
    return pandas.DataFrame(rows, columns=["group", "bertscore_f1", "rank", *_TEXTS])
