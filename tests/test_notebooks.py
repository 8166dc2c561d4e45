"""The real notebooks, run by the real Makefile through papermill and a real kernel, on the tiny model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from conftest import sentences

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def workplace(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts and with parameters of every notebook of the tour but the study."""
    place = tmp_path_factory.mktemp("workplace")
    texts = [json.dumps({"text": text, "summary": summary}) + "\n" for text, summary in sentences(120, 2)]
    (place / "texts.jsonl").write_text("".join(texts))
    run = place / "runs" / "tour"
    filtered = f"{run}/data/summary_filtered"
    parameters: dict[str, dict[str, Any]] = {
        "00_build_corpus": {
            "source": str(place / "texts.jsonl"), "output_dir": f"{run}/data/synthesis", "limit": 0,
            "output_embeddings_dir": f"{run}/data/embeddings", "val_fraction": 0.2, "test_fraction": 0.1,
        },
        "01_filter_summaries": {
            "input_dir": f"{run}/data/synthesis", "input_embeddings_dir": f"{run}/data/embeddings",
            "output_dir": f"{filtered}/synthesis", "output_embeddings_dir": f"{filtered}/embeddings",
        },
        "02_train": {
            "data_dir": filtered, "checkpoint_dir": str(run), "resume_from": "latest", "llm_model_name": str(tiny_llm),
            "max_epochs": 1, "batch_size": 8, "hidden_dim": 32, "eval_samples": 8, "max_new_tokens": 8,
        },
        "04_analysis": {"run_dir": str(run), "data_dir": filtered, "samples": 6, "candidates": 2},
        "05_ask": {"checkpoint": str(run), "data_dir": filtered, "cluster_size": 2},
    }  # fmt: skip
    (place / "parameters" / "tour").mkdir(parents=True)
    for name, values in parameters.items():
        (place / "parameters" / "tour" / f"{name}.yaml").write_text(yaml.safe_dump(values))
    (place / "library.py").touch()
    return place


def make(place: Path, *notebooks: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`make` of executed notebooks in `place`, without installing anything."""
    variables = [f"RUNS={place}/runs", f"SETTINGS={place}/parameters", f"BIN={Path(sys.executable).parent}"]
    variables += [f"CODE={place}/library.py"]  # the real one may be edited while the test runs
    targets = [f"{place}/runs/tour/{name}.ipynb" for name in notebooks]
    command = ["make", "--old-file=.venv/.installed", *flags, *variables, *targets]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def outputs(notebook: Path) -> list[Any]:
    """What the cells of an executed notebook show."""
    cells = nbformat.read(notebook, as_version=4).cells
    return [output for cell in cells for output in cell.get("outputs", ())]


@pytest.mark.slow
def test_make_runs_the_notebooks_reuses_resumes_and_repeats(workplace: Path) -> None:
    run, names = workplace / "runs" / "tour", ("02_train", "04_analysis", "05_ask")
    done = make(workplace, *names)
    assert done.returncode == 0, done.stdout + done.stderr

    result = json.loads((run / "result.json").read_text())
    assert {
        "val_nll", "val_nll_shuffled", "bertscore_f1", "bertscore_f1_shuffled", "bertscore_composite",
        "drift_similarity", "drift_similarity_shuffled", "train_seconds", "num_parameters_trained",
    } <= result.keys()  # fmt: skip
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "report_val.png").read_bytes().startswith(b"\x89PNG")
    shown = {name: [output.get("data", {}) for output in outputs(run / f"{name}.ipynb")] for name in names}
    assert sum("image/png" in data for data in shown["04_analysis"]) >= 4  # curves, report, ranks, similarities
    assert "best of 2 candidates" in "".join(str(data.get("text/html", "")) for data in shown["04_analysis"])
    assert any("application/vnd.jupyter.widget-view+json" in data for data in shown["05_ask"])

    assert make(workplace, *names, flags=("--question",)).returncode == 0, "finished notebooks would run again"

    (last,) = run.glob("adapter_step_*.safetensors")
    trained, written = last.read_bytes(), last.stat().st_mtime_ns
    # As if killed after the training: it resumes at the last checkpoint and trains no further step.
    (run / "02_train.ipynb").unlink()
    (run / "result.json").unlink()
    assert make(workplace, "02_train").returncode == 0
    resumed = json.loads((run / "result.json").read_text())
    assert resumed["val_nll"] == result["val_nll"] and resumed["train_seconds"] == result["train_seconds"]
    assert last.stat().st_mtime_ns == written

    (workplace / "library.py").touch()
    assert make(workplace, "00_build_corpus", flags=("--question",)).returncode == 1, "a changed library counts"

    # A changed setting begins again.
    settings = workplace / "parameters" / "tour" / "02_train.yaml"
    settings.write_text(settings.read_text() + "learning_rate: 0.01\n")
    assert make(workplace, "02_train").returncode == 0
    assert last.read_bytes() != trained


@pytest.mark.slow
def test_make_leaves_no_target_of_a_failed_notebook(workplace: Path) -> None:
    settings = workplace / "parameters" / "tour" / "00_build_corpus.yaml"
    (workplace / "parameters" / "failed").mkdir()
    (workplace / "parameters" / "failed" / settings.name).write_text(settings.read_text() + "limit: -1\n")
    target = workplace / "runs" / "failed" / "00_build_corpus.ipynb"
    done = make(workplace, "../failed/00_build_corpus")
    assert done.returncode != 0 and "limit is -1" in done.stdout + done.stderr
    assert not target.exists()
    errors = [output for output in outputs(target.with_suffix(".unfinished.ipynb")) if output.output_type == "error"]
    assert len(errors) == 1
