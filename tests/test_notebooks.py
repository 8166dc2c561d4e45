"""The real notebooks, through papermill and a real kernel, on the tiny model: the demo from end to end."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas
import pytest
from conftest import sentences

from elmlib.config import SummaryTrainingConfig
from elmlib.plots import draw_curves
from elmlib.trainer import train

ROOT = Path(__file__).parent.parent

# In a process of its own, as a person runs it: papermill leaves sockets and an event loop behind.
DEMO = """
import json, sys
from pathlib import Path
from elmlib.commands import DemoConfig
from elmlib.demo import demo_stages, report, run_stages

folder = Path(sys.argv[1])
stages = demo_stages(DemoConfig(folder, limit=0), extra=json.loads(sys.argv[3]))
stages[0].parameters.update(source=sys.argv[2], val_fraction=0.2, test_fraction=0.1)
run_stages(stages, folder, Path("notebooks"))
print(report(folder))
"""

ANALYSIS = """
import json, sys
from pathlib import Path
from elmlib.demo import Stage, run_stages

folder, parameters = Path(sys.argv[1]), json.loads(sys.argv[2])
stage = Stage("04_analysis", parameters, Path(parameters["run_dir"], "scorecard_val.csv"))
run_stages([stage], folder, Path("notebooks"))
"""


@pytest.mark.slow
def test_the_demo_runs_reuses_and_goes_on(tiny_llm: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": t, "summary": s}) + "\n" for t, s in sentences(120, 2)))
    folder = tmp_path / "demo"
    small = {"llm_model": str(tiny_llm), "batch_size": 8, "hidden_dim": 32, "eval_samples": 8}

    def demo() -> str:
        command = [sys.executable, "-c", DEMO, str(folder), str(texts), json.dumps(small)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return run.stdout

    printed = demo()
    assert "BERTScore F1" in printed and "shuffled" in printed and str(folder / "curves.png") in printed
    assert printed.count("reference:") == printed.count("generated:") == 5
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((folder / "result.json").read_text())
    assert {
        "val_nll", "val_nll_shuffled", "bertscore_f1", "bertscore_f1_shuffled", "bertscore_composite",
        "drift_similarity", "drift_similarity_shuffled", "train_seconds", "num_parameters_trained",
    } <= result.keys()  # fmt: skip
    executed = nbformat.read(folder / "02_train.ipynb", as_version=4)
    shown = [output.get("data", {}) for cell in executed.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in data for data in shown) == 1

    written = (folder / "result.json").stat().st_mtime_ns
    assert demo().count("finished and unchanged") == 3
    assert (folder / "result.json").stat().st_mtime_ns == written

    (folder / "result.json").unlink()  # as if it had been stopped before the end
    assert "02_train: running on from where it stopped" in demo()
    assert json.loads((folder / "result.json").read_text())["val_nll"] == result["val_nll"]


@pytest.mark.slow
@pytest.mark.parametrize("ablated", [pytest.param(False, marks=pytest.mark.heavy), True])
def test_the_analysis_shows_every_picture_and_leaves_a_scorecard(
    ablated: bool, tiny_config: SummaryTrainingConfig, tmp_path: Path
) -> None:
    run = train(replace(tiny_config, max_epochs=1)).best.parent
    ablation, folder = tmp_path / "ablation", tmp_path / "executed"
    if ablated:
        metrics = json.loads((run / "result.json").read_text())
        ablation.mkdir()
        cells = [{"variant": "defaults", "seed": seed} | metrics for seed in (0, 1)]
        pandas.DataFrame(cells).to_csv(ablation / "ablation.csv", index=False)
        draw_curves(run).savefig(ablation / "ablation.png")
    parameters = {
        "run_dir": str(run),
        "data_dir": tiny_config.summary_data_path,
        "samples": 6,
        "candidates": 2 * ablated,
    }
    command = [sys.executable, "-c", ANALYSIS, folder, json.dumps(parameters | {"ablation_dir": str(ablation)})]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    executed = nbformat.read(folder / "04_analysis.ipynb", as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures == 4 + ablated  # curves, scorecard, ranks, similarities
    assert ("elm ablate" in printed) is not ablated
    assert "chance, 1 of 24" in printed and "top-1 of 24" in printed and "worst: F1" in printed
    assert ("best of 2 candidates" in printed) is ablated
    assert (run / "scorecard_val.png").read_bytes().startswith(b"\x89PNG")


BENCHMARK = """
import json, sys
from pathlib import Path
from elmlib.demo import Stage, run_stages

folder, parameters = Path(sys.argv[1]), json.loads(sys.argv[2])
run_stages([Stage("06_benchmark", parameters, folder / "benchmark.json")], folder, Path("notebooks"))
"""


@pytest.mark.heavy
def test_the_benchmark_notebook_shows_tables_and_pictures(tiny_config: SummaryTrainingConfig, tmp_path: Path) -> None:
    settings, folder = tmp_path / "tiny.json", tmp_path / "benchmark"
    settings.write_text(tiny_config.to_json())
    parameters = {
        "data_dir": tiny_config.summary_data_path,
        "output_dir": str(folder),
        "config_file": str(settings),
        "turns": 1,
        "steps": 2,
        "eval_samples": 4,
        "filter_lines": 1000,
        "only": "filter,evaluation,memory",
    }
    command = [sys.executable, "-c", BENCHMARK, folder, json.dumps(parameters)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    executed = nbformat.read(folder / "06_benchmark.ipynb", as_version=4)
    shown = [output.get("data", {}) for cell in executed.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in data for data in shown) == 3
    assert any("generation: row by row / elmlib" in data.get("text/html", "") for data in shown)
