"""The report: scores of an adapter and of every baseline on the same texts; and tables of scores and summaries.

torch is imported only by the functions that score adapters: tables of finished runs need files alone.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from tqdm.auto import tqdm

from elmlib.config import InputError
from elmlib.data.records import atomic_path, parse_line, read_lines
from elmlib.evaluation import metrics
from elmlib.evaluation.metrics import COPY, POOL, SHUFFLED, TRUE, Embed

if TYPE_CHECKING:
    import pandas
    import torch

    from elmlib.data.dataset import SummaryDataset
    from elmlib.evaluation.baselines import Baselines
    from elmlib.evaluation.bertscore import BERTScoreEvaluator
    from elmlib.models.elm import Sampling

logger = logging.getLogger(__name__)

_LABELS = {
    "val_nll": "NLL (nats per token)",
    "bertscore_precision": "BERTScore precision",
    "bertscore_recall": "BERTScore recall",
    "bertscore_f1": "BERTScore F1",
    "bertscore_composite": "BERTScore composite",
    "bertscore_f1_rescaled": "BERTScore F1, rescaled",
    "drift_similarity": "drift similarity",
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
_FIELDS = {"prediction": str, "target_text": str, "source_id": str, "rank": int, "embedding_index": int}  # of text
_MODELS = ("llm_model_name", "embedding_model_name", "embedding_dim", "bertscore_model")
_COMMON = (*_MODELS, "soft_token_position", "max_new_tokens")  # to adapters that are compared


@dataclass(frozen=True, eq=False)
class Report:
    """All systems on the same texts, the adapter first."""

    frame: "pandas.DataFrame"
    """One row a system.

    `..._low` and `..._high`: 95 % bootstrap interval of the mean. bertscore_f1 is raw. semantic_consistency: cosine of
    the re-embedded summary and the source vector, 0 for an empty one. p_value, p_copy: paired permutation test that F1
    equals that of the adapter, or of the nearest training neighbour's summary (NaN where it is not in the report).
    reference_ and source_: `Identification.figures` of the own reference summary and of the own source embedding in
    pools of `POOL`, with all_ in the whole split. Then `quality_metrics`.
    """
    texts: list[dict[str, Any]]  # One a text: source_id, reference, and by system `summaries` and `bertscore_f1`

    def write_csv(self, path: Path) -> None:
        """`frame` as CSV."""
        with atomic_path(path) as temporary:
            self.frame.to_csv(temporary)

    def write_texts(self, path: Path) -> None:
        """`texts` as JSONL."""
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"".join(orjson.dumps(text) + b"\n" for text in self.texts))

    def display_frame(self) -> "pandas.DataFrame":
        """The main columns for people, chance in the last row. `p` is against the adapter, `p copy` against the nearest
        training neighbour's summary. top-1, top-5, MRR and source are in pools of `POOL`, top-1 of N in the split."""
        import pandas

        frame, first = self.frame, self.frame.iloc[0]
        pool, total = (round(1 / first[f"{name}_chance"]) for name in ("reference", "reference_all"))
        two, three, four = "{:.2f}".format, "{:.3f}".format, "{:.4f}".format
        means, lows, highs = (frame[f"bertscore_f1{end}"].map(three) for end in ("", "_low", "_high"))
        columns = {
            "F1 [95%]": means + " [" + lows + ", " + highs + "]",
            "p": frame.p_value.map(four),
            "p copy": frame.p_copy.map(four),
            "top-1": frame.reference_top_1.map(two),
            "top-5": frame.reference_top_5.map(two),
            "MRR": frame.reference_mrr.map(two),
            "source": frame.source_top_1.map(two),
            f"top-1 of {total}": frame.reference_all_top_1.map(three),
            "consistency": frame.semantic_consistency.map(three),
        }
        shown = pandas.DataFrame(columns)
        shown.loc[frame.index[0], "p"] = ""  # of a test against itself
        shown.loc[frame.p_copy.isna() | (frame.index == COPY), "p copy"] = ""
        chance = first.reference_chance, min(1.0, 5 * first.reference_chance), first.reference_chance_mrr
        texts = map(two, (*chance, first.source_chance))
        shown.loc[f"chance, 1 of {pool}"] = ["", "", "", *texts, three(first.reference_all_chance), ""]
        return shown.rename_axis("")


def score_baselines(
    baselines: "Baselines",
    evaluator: "BERTScoreEvaluator",
    embed: Embed,
    dataset: "SummaryDataset",
    rows: Sequence[int],
) -> Report:
    """Let each system write summaries of `rows` of `dataset`, and score them. A summary has to identify its own source
    among all sources of the dataset. The first system is the adapter, with which the others are compared. Raises
    InputError as `check_pairs` and `identify_sources` do."""
    import pandas

    every = [record.target_text for record in dataset.records]
    embeddings = dataset.vectors(range(len(dataset))).numpy()
    targets = {"reference": metrics.embed_texts(embed, every, embeddings.shape[1]), "source": embeddings}
    sources, references = [str(source) for source in dataset.sources], [every[row] for row in rows]
    systems: list[dict[str, Any]] = []
    summaries: dict[str, list[str]] = {}
    f1: dict[str, np.ndarray] = {}
    for number, (name, write) in enumerate(tqdm(baselines.items(), desc="report", unit="system"), start=1):
        logger.info("report, %d of %d: %s", number, len(baselines), name)
        predictions = summaries[name] = write()
        scores = evaluator.score_pairs(predictions, references)
        vectors = metrics.embed_texts(embed, predictions, embeddings.shape[1])
        f1[name] = scores.f1
        composite = metrics.bertscore_means(scores)["bertscore_composite"]
        line: dict[str, Any] = {"system": name, "bertscore_composite": composite}
        consistency = metrics.cosine_rows(vectors, embeddings[rows])
        for column, values in (("bertscore_f1", scores.f1), ("semantic_consistency", consistency)):
            line |= zip((column, f"{column}_low", f"{column}_high"), metrics.bootstrap_interval(values), strict=True)
        line |= {"p_value": np.nan, "p_copy": np.nan}  # below
        for target, pool in targets.items():
            ranks = metrics.identify_sources(vectors, pool, sources, rows)
            for prefix, figures in ((target, ranks.figures(POOL)), (f"{target}_all", ranks.figures())):
                line |= {f"{prefix}_{figure}": value for figure, value in figures.items()}
        systems.append(line | metrics.quality_metrics(predictions, references))
    frame = pandas.DataFrame(systems).set_index("system")
    for column, other in (("p_value", next(iter(f1))), ("p_copy", COPY)):
        if other in f1:
            frame[column] = [metrics.permutation_p(values, f1[other]) for values in f1.values()]
    texts: list[dict[str, Any]] = []
    for place, row in enumerate(rows):
        text = {"source_id": dataset.records[row].source, "reference": every[row]}
        written = {name: summaries[name][place] for name in summaries}
        texts.append(text | {"summaries": written, "bertscore_f1": {name: f1[name][place].item() for name in f1}})
    return Report(frame, texts)


def score_checkpoint(
    checkpoint: Path, data_dir: str, split: str, samples: int, sampling: "Sampling | None", device: "torch.device"
) -> Report:
    """Score an adapter file and its baselines on a seeded sample of a split; 0 `samples` take the whole split.
    `sampling` adds the best of several candidates. Raises InputError as loading the data does."""
    return _score({TRUE: checkpoint}, data_dir, split, samples, device, sampling, True)


def score_adapters(
    checkpoints: Mapping[str, Path], data_dir: str, split: str, samples: int, device: "torch.device"
) -> Report:
    """Several adapters on the same texts, the first with its shuffled control. Raises InputError where they differ in
    models, position of the soft tokens or length of the summaries."""
    return _score(checkpoints, data_dir, split, samples, device)


def _score(
    checkpoints: Mapping[str, Path],
    data_dir: str,
    split: str,
    samples: int,
    device: "torch.device",
    sampling: "Sampling | None" = None,
    every_baseline: bool = False,
) -> Report:
    """Score adapters; of the first one also all baselines, or the shuffled control alone."""
    from elmlib.data.dataset import load_split, locate_split
    from elmlib.evaluation.baselines import list_baselines
    from elmlib.evaluation.bertscore import BASELINE_TEXTS, create_evaluator
    from elmlib.models.adapter import load_adapter, make_adapter
    from elmlib.models.elm import build_model
    from elmlib.models.pretrained import encode, load_embedder
    from elmlib.models.warm_start import load_warm_start, warm_started_adapter

    files = {name: load_adapter(path) for name, path in checkpoints.items()}
    first, file = next(iter(files.items()))
    config = replace(file.config, summary_data_path=data_dir)
    for name, setting in product(files, _COMMON):
        theirs, ours = getattr(files[name].config, setting), getattr(config, setting)
        if theirs != ours:
            both = f"{checkpoints[name]} has {setting} {theirs!r}, {checkpoints[first]} {ours!r}"
            raise InputError(f"{both}; report them one by one")
    for name in ("train", "val", split):  # before a model is loaded or downloaded: a wrong folder fails at once
        locate_split(config, name)
    model = build_model(config, device)
    train, val = (load_split(config, name, model.tokenizer) for name in ("train", "val"))
    dataset = {"train": train, "val": val}.get(split) or load_split(config, split, model.tokenizer)
    rows = dataset.subset(samples or len(dataset), config.eval_seed)
    warm_start = load_warm_start(train, val, model.table, config)
    evaluation_device = config.evaluation_device or device
    embedder = load_embedder(config.embedding_model_name, evaluation_device)

    def embed(texts: list[str]) -> np.ndarray:
        return encode(embedder, texts, config.batch_size)

    references = [train.records[row].target_text for row in train.subset(BASELINE_TEXTS, config.eval_seed)]
    evaluator = create_evaluator(config, references, evaluation_device)
    baselines: Baselines = {}
    for name, file in files.items():
        adapter = make_adapter(file.config, model.table)
        adapter.load_state_dict(file.weights)
        trained = model.with_adapter(adapter.to(device).eval())
        untrained = model.with_adapter(warm_started_adapter(file.config, warm_start, model.table).eval())
        found = list_baselines(trained, untrained, embed, train, dataset, rows, config, sampling)
        if not every_baseline:
            found = {name: found[TRUE]} | ({} if baselines else {SHUFFLED: found[SHUFFLED]})
        baselines |= found
    return score_baselines(baselines, evaluator, embed, dataset, rows)


def score_frame(metrics: Mapping[str, Any]) -> "pandas.DataFrame":
    """Each score with true and with shuffled embeddings and the difference; then the form of the summaries."""
    import pandas

    found = [name for name in _LABELS if name in metrics]
    rows = [(metrics[name], metrics.get(f"{name}_shuffled", np.nan)) for name in found]
    frame = pandas.DataFrame(rows, [_LABELS[name] for name in found], ["true", "shuffled"], float).rename_axis("")
    return frame.assign(difference=frame.true - frame.shuffled).round(3)


def read_predictions(path: Path, *fields: str) -> list[dict[str, Any]]:
    """The lines of a predictions file, each with at least `fields`. Raises FileNotFoundError for no such file and
    InputError for an empty one or, naming it, for a line without them."""
    lines = []
    for number, line in read_lines(path):
        values = parse_line(line, f"{path}, line {number}")
        for field in fields:
            kind = _FIELDS.get(field, int | float)
            if not isinstance(values, dict) or not isinstance(values.get(field), kind):
                raise InputError(f"{path}, line {number} has no {field!r} of its type; expected a run's predictions")
        lines.append(values)
    return lines


def sample_frame(predictions: Path, count: int = 5) -> "pandas.DataFrame":
    """The first `count` summaries of a predictions file beside their references."""
    import pandas

    columns = ["source_id", "target_text", "prediction"]
    return pandas.DataFrame(read_predictions(predictions, *columns)[:count])[columns]


def examples_frame(predictions: Path, count: int = 3) -> "pandas.DataFrame":
    """By F1, the `count` best, median and worst summaries of a predictions file, best first; none is in two groups. A
    file of fewer than 3 x `count` lines gives a third of its lines to each group. Raises as `read_predictions` does,
    and InputError for fewer than three lines or a `count` below 1."""
    import pandas

    if count < 1:
        raise InputError(f"count is {count}; expected at least 1")
    columns = ["bertscore_f1", "rank", "source_id", "target_text", "prediction"]
    lines = pandas.DataFrame(read_predictions(predictions, *columns))
    if len(lines) < 3:
        raise InputError(f"{predictions} has {len(lines)} lines; best, median and worst need at least 3")
    lines = lines.sort_values("bertscore_f1", ascending=False, kind="stable", ignore_index=True)
    size = min(count, len(lines) // 3)
    starts = {"best": 0, "median": (len(lines) - size) // 2, "worst": len(lines) - size}
    groups = [lines[start : start + size].assign(group=group) for group, start in starts.items()]
    return pandas.concat(groups, ignore_index=True)[["group", *columns]]
