"""The benchmarks run from end to end, on a random LLM."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.heavy
def test_run_prints_every_job(tiny_llm: Path, small_data: Path) -> None:
    script = Path(__file__).with_name("run.py")
    command = [sys.executable, str(script), "--tiny", str(tiny_llm), "--data-dir", str(small_data), "--turns", "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for job in ("step", "long step", "generation", "bertscore", "filter"):
        assert any(line.strip().startswith(job) for line in printed.splitlines()), printed


@pytest.mark.heavy
def test_compare_trains_both_checkouts(tiny_llm: Path, small_data: Path) -> None:
    here = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(Path(__file__).with_name("compare.py")), str(here), str(here), "--turns", "1"]
    command += ["--rows", "32", "--data-dir", str(small_data), "--llm-model", str(tiny_llm), "--hidden-dim", "32"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in printed] == ["old", "turn", "median"]
    assert 0.2 < float(printed[-1].split()[-1]) < 5


@pytest.mark.heavy
def test_gpu_check_runs_every_part_on_a_cpu(tmp_path: Path) -> None:
    command = ["make", "gpu-check", f"PYTHON={sys.executable}", f"OUT={tmp_path}", "ARGS=--tiny"]
    here = Path(__file__).resolve().parents[2]
    printed = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert not [name for name, figures in results.items() if "error" in figures], results
    steps = [figures for name, figures in results.items() if name.startswith("step ")]
    assert len(steps) == 6 and all(step["ms"] > 0 and step["planned_gib"] > 0 for step in steps)
    assert all(name in printed for name in results if name != "machine"), printed
