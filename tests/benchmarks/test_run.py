"""The benchmarks run from end to end, on a random LLM."""

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
