"""A small study, of the tiny model or of a notebook that trains nothing."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from study.studies import SPACE, tiny_study

from elmlib.config import StudyConfig, SummaryTrainingConfig

# The notebook of a trial without a model: under test here are launchers, kernels and storages. `weight_decay` is its
# duration in seconds, and `spike_factor` its fate.
STUB = """
import json, os, time
from pathlib import Path
folder = Path(checkpoint_dir)
begun = folder / "adapter_step_1.safetensors"
resumed = begun.exists()
begun.write_text(str(learning_rate))
time.sleep(weight_decay)
if spike_factor > 90:
    raise ValueError(f"no luck at step {os.getpid()} in {folder}/x.json")
if spike_factor > 80 and not resumed:
    os.kill(os.getpid(), 9)
score = learning_rate * 50
metrics = {f"{name}{end}": score for name in ("bertscore_composite", "bertscore_f1", "val_nll", "drift_similarity")
           for end in ("", "_shuffled")}
metrics |= {"empty_prediction_rate": 0.0, "short_prediction_rate": 0.0, "stopped": "", "resumed": int(resumed)}
row = {"kind": "eval", "step": 1, "epoch": 2.0, "bertscore_f1": score, "bertscore_f1_shuffled": 0.0}
(folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
temporary = folder / "result.tmp"
temporary.write_text(json.dumps(metrics))
temporary.rename(folder / "result.json")
"""


@pytest.fixture
def study_config(tiny_config: SummaryTrainingConfig, tmp_path: Path) -> StudyConfig:
    """A study of the tiny model."""
    return tiny_study(tiny_config, tmp_path)


def write_stub(path: Path) -> None:
    """The notebook that trains nothing."""
    cells = [nbformat.v4.new_code_cell("", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(STUB)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


@pytest.fixture
def stub_config(tmp_path: Path) -> StudyConfig:
    """A study of the stub, on data that it never reads."""
    for folder, name in (("synthesis", "synthesis.jsonl"), ("embeddings", "embeddings.safetensors")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for split in ("train", "val", "test"):
            (tmp_path / "data" / folder / f"{split}_{name}").write_bytes(np.zeros(4).tobytes())
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"weight_decay": 0.0, "hidden_dim": 32}))
    (tmp_path / "space.yaml").write_text(SPACE)
    write_stub(tmp_path / "stub.ipynb")
    return StudyConfig(
        study_name="tiny",
        data_dir=str(tmp_path / "data"),
        checkpoint_dir=tmp_path / "runs",
        trials=3,
        training_config=tmp_path / "base.yaml",
        space=tmp_path / "space.yaml",
        notebook=tmp_path / "stub.ipynb",
        heartbeat=1,
    )
