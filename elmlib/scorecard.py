"""One table: every system's scores with confidence intervals, and how sure its distance to the adapter is."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from elmlib.bertscore import BERTScoreEvaluator
from elmlib.checkpoint import AdapterFile, load_adapter
from elmlib.config import SummaryTrainingConfig
from elmlib.controls import COPY, TRUE, System, list_systems
from elmlib.data import Split, load_split
from elmlib.decoding import Sampling
from elmlib.evaluation import cosine_rows, embed_predictions
from elmlib.identification import POOL, Identification, identify_sources
from elmlib.model import make_adapter
from elmlib.quality import bertscore_means, quality_metrics
from elmlib.records import atomic_path
from elmlib.significance import Interval, bootstrap_interval, permutation_p
from elmlib.tracking import bars_are_seen
from elmlib.workbench import Workbench, prepare

if TYPE_CHECKING:
    import pandas
    import torch

logger = logging.getLogger(__name__)

_SHARED = (
    *("llm_model_name", "embedding_model_name", "embedding_dim", "bertscore_model"),
    *("soft_token_place", "max_new_tokens"),
)


@dataclass(frozen=True, eq=False)
class SystemScores:
    """The scores of one system over n samples."""

    name: str
    predictions: tuple[str, ...]
    f1: np.ndarray
    """(n,) raw BERTScore F1."""
    composite: float
    """0.3 P + 0.3 R + 0.4 F1 over all samples."""
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
    """The same against the nearest training neighbour's summary; NaN where that is not among the systems."""


@dataclass(frozen=True, eq=False)
class Scorecard:
    """All systems beside each other, on the same samples."""

    systems: tuple[SystemScores, ...]

    def __getitem__(self, name: str) -> SystemScores:
        """The system of that name; KeyError names those that there are."""
        for system in self.systems:
            if system.name == name:
                return system
        raise KeyError(f"no system {name!r}; there are {[system.name for system in self.systems]}")

    def to_frame(self) -> "pandas.DataFrame":
        """One row a system; intervals are 95% bootstrap intervals of the mean, `..._low` and `..._high`."""
        import pandas

        return pandas.DataFrame([_row(system) for system in self.systems]).set_index("system")

    def write_csv(self, path: Path) -> None:
        """`to_frame` as CSV."""
        with atomic_path(path) as temporary:
            self.to_frame().to_csv(temporary)

    def to_text(self) -> str:
        """The main columns as an aligned table, chance in the last line.

        `p` is against the adapter, `p copy` against the nearest training neighbour's summary. top-1, top-5, MRR and
        source are in pools of `POOL` sources, top-1 of N is among the whole split.
        """
        every = self.systems[0].by_reference
        few = every.among(POOL)
        top_all = f"top-1 of {every.num_sources}"
        head = f"{'p':>8}{'p copy':>8}{'top-1':>8}{'top-5':>8}{'MRR':>8}{'source':>8}{top_all:>14}{'consist.':>9}"
        lines = [f"{'':<28}{'F1 [95%]':>21}{head}"]
        for it in self.systems:
            f1 = bootstrap_interval(it.f1)
            interval = f"{f1.mean:.3f} [{f1.low:.3f}, {f1.high:.3f}]"
            p_value = "" if it.name == TRUE else f"{it.p_value:.4f}"
            p_copy = "" if it.name == COPY or np.isnan(it.p_copy) else f"{it.p_copy:.4f}"
            found, source = it.by_reference.among(POOL), it.by_source.among(POOL)
            ranks = f"{found.top_1:>8.2f}{found.top_5:>8.2f}{found.mrr:>8.2f}{source.top_1:>8.2f}"
            last = f"{it.by_reference.top_1:>14.3f}{it.consistency.mean():>9.3f}"
            lines.append(f"{it.name:<28}{interval:>21}{p_value:>8}{p_copy:>8}{ranks}{last}")
        last = f"{few.chance:>8.2f}{min(1.0, 5 * few.chance):>8.2f}{few.chance_mrr:>8.2f}{few.chance:>8.2f}"
        lines.append(f"{f'chance, 1 of {few.pool}':<28}{'':>21}{'':>16}{last}{every.chance:>14.3f}")
        return "\n".join(lines)


def _row(system: SystemScores) -> dict[str, str | float]:
    row: dict[str, str | float] = {"system": system.name, "bertscore_composite": system.composite}
    for name, values in (("bertscore_f1", system.f1), ("semantic_consistency", system.consistency)):
        row |= _columns(name, bootstrap_interval(values))
    row |= {"p_value": system.p_value, "p_copy": system.p_copy}
    for name, found in (("reference", system.by_reference), ("source", system.by_source)):
        for pool, ranks in ((name, found.among(POOL)), (f"{name}_all", found)):
            for figure in ("top_1", "top_5", "mrr", "chance", "chance_mrr"):
                row[f"{pool}_{figure}"] = getattr(ranks, figure)
    return row | system.quality


def _columns(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def score_systems(
    systems: Sequence[System],
    evaluator: BERTScoreEvaluator,
    embed: Callable[[list[str]], np.ndarray],
    references: Sequence[str],
    embeddings: np.ndarray,
    sources: Sequence[str],
    rows: Sequence[int],
) -> Scorecard:
    """Let each system write, and score its n predictions against the references of `rows` (n,).

    `references` (m,), source `embeddings` (m, dim) and `sources` (m,) are those of the whole split, so that a summary
    has to tell its own source from all others. The first system is the adapter, to which the others are compared.
    Raises ValueError as `check_pairs` and `identify_sources` do.
    """
    targets = embed_predictions(embed, references, embeddings.shape[1])
    chosen = [references[row] for row in rows]
    scored: list[SystemScores] = []
    with tqdm(systems, desc="report", unit="system", disable=not bars_are_seen()) as bar:
        for system in bar:
            bar.set_postfix_str(system.name)
            if bar.disable:
                logger.info("report, %d of %d: %s", len(scored) + 1, len(systems), system.name)
            predictions = system.write()
            scores = evaluator.score_pairs(predictions, chosen)
            vectors = embed_predictions(embed, predictions, embeddings.shape[1])
            scored.append(
                SystemScores(
                    name=system.name,
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
    return Scorecard(tuple(scored))


def score_checkpoint(
    checkpoint: Path, data_dir: str, split_name: str, samples: int, sampling: Sampling | None, device: "torch.device"
) -> Scorecard:
    """Score an adapter file and its controls on a seeded sample of a split; 0 `samples` take the whole split.

    `split_name` is `train`, `val` or `test`; `sampling` adds the best of several candidates to the systems.
    Raises FileNotFoundError and ValueError as loading data and adapter does.
    """
    file = load_adapter(checkpoint)
    config = replace(file.config, summary_data_path=data_dir)
    bench = prepare(config, device)
    fresh = bench.elm
    bench = _with_trained(bench, file, device)
    fresh.adapter.eval()
    split, rows = _sample(bench, config, split_name, samples)
    systems = list_systems(bench, fresh, split, rows, config, device, sampling)
    return _score(systems, bench, split, rows)


def score_adapters(
    checkpoints: Mapping[str, Path], data_dir: str, split_name: str, samples: int, device: "torch.device"
) -> Scorecard:
    """Adapters of one study beside each other, the first with its shuffled control, to be read as `score_checkpoint`.

    ValueError where they are not of the same models, or read and write otherwise.
    """
    files = {name: load_adapter(path) for name, path in checkpoints.items()}
    config = replace(next(iter(files.values())).config, summary_data_path=data_dir)
    first = next(iter(files))
    for name, file in files.items():
        for setting in _SHARED:
            theirs, ours = getattr(file.config, setting), getattr(config, setting)
            if theirs != ours:
                raise ValueError(f"{checkpoints[name]} has {setting} {theirs!r}, {checkpoints[first]} {ours!r}")
    bench = prepare(config, device)
    split, rows = _sample(bench, config, split_name, samples)
    systems: list[System] = []
    for name, file in files.items():
        own = list_systems(_with_trained(bench, file, device), bench.elm, split, rows, config, device)
        systems += [own[0]._replace(name=name)] + ([own[1]] if not systems else [])
    return _score(systems, bench, split, rows)


def _with_trained(bench: Workbench, file: AdapterFile, device: "torch.device") -> Workbench:
    adapter = make_adapter(file.config, bench.elm.table)
    adapter.load_state_dict(file.weights)
    return bench.with_adapter(adapter.to(device).eval())


def _sample(bench: Workbench, config: SummaryTrainingConfig, split_name: str, samples: int) -> tuple[Split, list[int]]:
    split = {"train": bench.train, "val": bench.val}.get(split_name)
    split = split or load_split(config, split_name, bench.elm.tokenizer)
    return split, split.subset(samples or len(split), config.eval_seed)


def _score(systems: Sequence[System], bench: Workbench, split: Split, rows: Sequence[int]) -> Scorecard:
    return score_systems(
        systems,
        bench.evaluator,
        bench.embed,
        [record.target_text for record in split.records],
        split.vectors(range(len(split))).numpy(),
        [str(source) for source in split.sources],
        rows,
    )
