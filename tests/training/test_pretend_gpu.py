"""Whole runs on a pretend GPU: nothing lies on the wrong device, and no step waits for the device more than today."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import save_qwen_pair, tiny_settings

from elmlib.training.loggers import read_metrics
from elmlib.training.trainer import train

pytestmark = pytest.mark.heavy

STEP_WAITS = 4  # of an optimizer step: the counts go up and come down, the sums of the losses and the norm come down
BATCH_WAITS = 5  # of each micro-batch in it
TOKEN_WAITS = 3  # of each decoded token
REFUSED = ("sum", "product", "cat", "where", "index of a CPU tensor", "values on the CPU", "numpy")
WAITING = ("item", "float", "bool", "tolist", "cpu", "nonzero", "boolean index", "torch.tensor", "upload")


@pytest.fixture(scope="module")
def found(tiny_llm: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What pretend_runs found, in a process of its own: the pretend GPU cannot be removed again."""
    folder = tmp_path_factory.mktemp("pretend")
    other = save_qwen_pair(folder, 384)
    command = [sys.executable, str(Path(__file__).with_name("pretend_runs.py"))]
    command += map(str, (tiny_llm, small_data, *other, folder))
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "results.json").read_text())


def test_the_device_refuses_what_cuda_would_and_counts_what_waits(found: dict[str, Any]) -> None:
    assert {name for name, error in found["refused"].items() if error} == set(REFUSED)
    assert {name: waits for name, waits in found["single_waits"].items() if waits} == dict.fromkeys(WAITING, 1)


def test_all_weights_lie_on_the_device(found: dict[str, Any]) -> None:
    assert found["devices"] == ["gpu:0"]


def test_training_on_the_device_is_training_on_the_cpu(
    found: dict[str, Any], tiny_llm: Path, small_data: Path, tmp_path: Path
) -> None:
    config = replace(tiny_settings(tiny_llm, small_data, tmp_path), gradient_accumulation_steps=2, train_rows=88)
    metrics = train(config).metrics
    losses = [row.values["loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if row.kind == "step"]
    assert found["losses"] == pytest.approx(losses, rel=1e-3)
    for name in ("val_nll", "val_nll_shuffled", "bertscore_f1", "drift_similarity", "identification_mrr"):
        assert found["metrics"][name] == pytest.approx(metrics[name], abs=0.02), name


def test_a_run_resumed_on_the_device_ends_in_the_same_bytes(found: dict[str, Any]) -> None:
    assert found["stopped"] and found["same_bytes"] == [True, True]


def test_re_embedding_and_checkpointing_run_on_the_device(found: dict[str, Any]) -> None:
    assert 0 < found["other"] < 20


def test_a_step_waits_for_the_device_no_more_than_today(found: dict[str, Any]) -> None:
    waits = dict(found["steps"])
    assert set(waits) == {1, 2} and len(found["steps"]) == 2, found["steps"]  # equal steps wait equally often
    batch = waits[2] - waits[1]
    step = waits[1] - batch
    places = "\n".join(f"{count} {place}" for place, count in found["places"].items())
    assert step <= STEP_WAITS and batch <= BATCH_WAITS, f"{step} a step, {batch} a micro-batch\n{places}"


def test_a_decoded_token_waits_for_the_device_no_more_than_today(found: dict[str, Any]) -> None:
    assert max(found["token_waits"]) <= TOKEN_WAITS, found["token_waits"]


def test_generation_takes_vectors_of_the_device_and_draws_candidates(found: dict[str, Any]) -> None:
    from_array, from_tensor = found["summaries"]
    assert from_array == from_tensor and len(from_array) == 2
    assert len(found["sampled"]) == 2
    assert len(found["generated"]) == 24 and {"prediction", "best_candidate"} <= found["generated"][0].keys()


def test_a_report_on_the_device_has_every_baseline(found: dict[str, Any]) -> None:
    assert len(found["report"]) == 8 and all(-1 <= f1 <= 1 for f1 in found["report"].values())


def test_an_llm_is_sharded_before_its_layers_are_moved_to_the_device(found: dict[str, Any]) -> None:
    assert found["layers_at_sharding"] == ["cpu"]
