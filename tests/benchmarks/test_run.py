"""The benchmark runs from end to end, on a random LLM."""

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
