"""Notebooks run through papermill, one after the other; what is finished and unchanged is not run again."""

import hashlib
import json
import logging
from pathlib import Path
from typing import NamedTuple

from elmlib.commands import DemoConfig, TourConfig
from elmlib.execution import Value, execute_notebook
from elmlib.records import write_json
from elmlib.study_commands import StudyDemoConfig
from elmlib.tables import sample_table, score_table

logger = logging.getLogger(__name__)


class Stage(NamedTuple):
    """A notebook, its parameters, and the file that its last cell demands."""

    notebook: str
    parameters: dict[str, Value]
    result: Path


def run_stages(stages: list[Stage], folder: Path, notebooks: Path) -> None:
    """Execute each stage's notebook into `folder`, unless it ended well before with the same notebooks and settings.

    Raises FileNotFoundError for a missing notebook or a result that a notebook did not leave, and papermill's own
    errors for a cell that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = _library_digest()
    for stage in stages:
        source = notebooks / f"{stage.notebook}.ipynb"
        if not source.is_file():
            raise FileNotFoundError(f"{source} does not exist; run this in the repository's folder")
        key = hashlib.sha256(
            b"".join([key.encode(), source.read_bytes(), json.dumps(stage.parameters, sort_keys=True).encode()])
        ).hexdigest()
        about = folder / f"{stage.notebook}.about.json"
        before = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
        same = before.get("key") == key
        if same and before["finished"] and stage.result.is_file():
            print(f"{stage.notebook}: finished and unchanged", flush=True)
            continue
        write_json(about, {"key": key, "finished": False})
        # A stage that knows how to go on is told to, but only behind a stop of this very stage.
        resume: dict[str, Value] = {"resume_from": "latest"} if same and "resume_from" in stage.parameters else {}
        print(f"{stage.notebook}: running{' on from where it stopped' if resume else ''}", flush=True)
        execute_notebook(source, folder / f"{stage.notebook}.ipynb", stage.parameters | resume)
        if not stage.result.is_file():
            raise FileNotFoundError(f"{source} ran to its end but left no {stage.result}")
        write_json(about, {"key": key, "finished": True})


def _library_digest() -> str:
    """Of elmlib's own source: a changed library is a changed experiment."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def demo_stages(config: DemoConfig, extra: dict[str, Value] | None = None) -> list[Stage]:
    """Corpus, filter and training of the demo; `extra` are further parameters of the training notebook."""
    folder, data = config.output_dir, config.output_dir / "data"
    train: dict[str, Value] = {
        "data_dir": f"{data}/summary_filtered",
        "checkpoint_dir": str(folder),
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "evals_per_epoch": config.evals_per_epoch,
        "resume_from": "",
    }
    return [
        *_data_stages(data, config.limit, val_fraction=0.05, test_fraction=0.05),
        Stage("02_train", train | (extra or {}), folder / "result.json"),
    ]


def _data_stages(data: Path, limit: int, val_fraction: float, test_fraction: float) -> list[Stage]:
    """Corpus and filter."""
    corpus: dict[str, Value] = {
        "output_dir": f"{data}/synthesis",
        "output_embeddings_dir": f"{data}/embeddings",
        "limit": limit,
        "val_fraction": val_fraction,
        "test_fraction": test_fraction,
        "embedding_batch_size": 8,
    }
    filtered: dict[str, Value] = {
        "input_dir": f"{data}/synthesis",
        "input_embeddings_dir": f"{data}/embeddings",
        "output_dir": f"{data}/summary_filtered/synthesis",
        "output_embeddings_dir": f"{data}/summary_filtered/embeddings",
    }
    return [
        Stage("00_build_corpus", corpus, data / "synthesis" / "corpus.json"),
        Stage("01_filter_summaries", filtered, data / "summary_filtered" / "synthesis" / "filter_report.json"),
    ]


def study_stages(config: StudyDemoConfig, notebooks: Path, extra: dict[str, Value] | None = None) -> list[Stage]:
    """Corpus, filter, study and analysis; `extra` are further parameters of the study's notebook."""
    folder, data = config.output_dir, config.output_dir / "data"
    study: dict[str, Value] = {
        "study_name": "study",
        "data_dir": f"{data}/summary_filtered",
        "checkpoint_dir": str(folder),
        "trials": config.trials,
        "jobs": config.jobs,
        "eval_samples": config.eval_samples,
        "evals_per_epoch": config.evals_per_epoch,
        "notebook": str(notebooks / "02_train.ipynb"),
    }
    analysis: dict[str, Value] = {
        "study_name": "study",
        "study_dir": str(folder),
        "data_dir": f"{data}/summary_filtered",
        "split": "test",
        "samples": config.eval_samples,
        "candidates": 0,
    }
    return [
        *_data_stages(data, config.limit, val_fraction=0.1, test_fraction=0.2),
        Stage("03_study", study | (extra or {}), folder / "study" / "study_results.json"),
        Stage("04_analysis", analysis, folder / "04_analysis.ipynb"),
    ]


def tour_stages(config: TourConfig, notebooks: Path, extra: dict[str, Value] | None = None) -> list[Stage]:
    """All seven notebooks, each reading what the one before wrote; `extra` are further parameters of the training's.

    The study reads its trials' settings from `tour_settings`, which `run_tour` writes.
    """
    folder, filtered = config.output_dir, str(config.output_dir / "data" / "summary_filtered")
    demo = demo_stages(DemoConfig(folder, limit=config.limit), {"eval_samples": config.samples} | (extra or {}))
    study: dict[str, Value] = {
        "study_name": "study", "data_dir": filtered, "checkpoint_dir": str(folder), "trials": config.trials,
        "eval_samples": config.samples, "evals_per_epoch": 1, "config_file": str(tour_settings(config)),
        "notebook": str(notebooks / "02_train.ipynb"),
    }  # fmt: skip
    analysis: dict[str, Value] = {"run_dir": str(folder), "data_dir": filtered, "samples": config.samples}
    ask: dict[str, Value] = {"checkpoint": str(folder), "data_dir": filtered}
    benchmark: dict[str, Value] = {
        "data_dir": filtered, "output_dir": str(folder / "benchmark"), "turns": 1, "steps": 2,
        "eval_samples": max(2, config.samples // 5), "filter_lines": 100_000, "only": "steps,evaluation,filter,memory",
    }  # fmt: skip
    return [
        *demo,
        Stage("03_study", study, folder / "study" / "study_results.json"),
        Stage("04_analysis", analysis, folder / "scorecard_val.csv"),
        Stage("05_ask", ask, folder / "05_ask.ipynb"),
        Stage("06_benchmark", benchmark, folder / "benchmark" / "benchmark.json"),
    ]


def tour_settings(config: TourConfig) -> Path:
    """Where the tour keeps the settings that its study's trials have in common."""
    return config.output_dir / "trial_settings.json"


def run_tour(config: TourConfig, notebooks: Path, extra: dict[str, Value] | None = None) -> None:
    """Execute all seven notebooks; raises as `run_stages` does."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(tour_settings(config), {"train_rows": config.trial_rows})
    run_stages(tour_stages(config, notebooks, extra), config.output_dir, notebooks)


def report(folder: Path) -> str:
    """What the demo ends with: scores beside their control, five summaries, and where the curves are."""
    metrics = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return "\n\n".join(
        [
            score_table(metrics),
            sample_table(folder / "predictions.jsonl"),
            f"curves: {folder / 'curves.png'}",
        ]
    )
