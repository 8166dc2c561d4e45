"""Training time of two checkouts of elmlib side by side: `python tests/benchmarks/compare.py OLD NEW --data-dir DIR`.

Each turn trains both for one epoch, each in a process of its own; the order changes from turn to turn. What is compared
is `train_seconds` of result.json over the optimizer steps: models, evaluations and checkpoints are not in it. Flags
that this script does not know go to `elm train` of both checkouts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas

_MAIN = "import elmlib; print(elmlib.__file__); from elmlib.cli import main; main()"


def step_seconds(checkout: Path, flags: list[str]) -> float:
    """Seconds of an optimizer step of `elm train` from the checkout, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _MAIN, "train", *flags, "--checkpoint-dir", folder]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{checkout}: elm train failed: {done.stderr[-2000:]}")
        if not Path(done.stdout.splitlines()[0]).is_relative_to(checkout):
            raise RuntimeError(f"{checkout}: Python imported {done.stdout.splitlines()[0]}")
        result = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
    return result["train_seconds"] / result["steps"]


def compare(old: Path, new: Path, flags: list[str], turns: int) -> pandas.DataFrame:
    """Seconds of a step, turn by turn, after one turn that is not counted; the last row is the median."""
    rows = []
    for turn in range(turns + 1):
        order = (old, new) if turn % 2 else (new, old)
        seconds = {checkout: step_seconds(checkout, flags) for checkout in order}
        rows.append({"old s": seconds[old], "new s": seconds[new], "new / old": seconds[new] / seconds[old]})
    frame = pandas.DataFrame(rows[1:], index=[f"turn {turn}" for turn in range(1, turns + 1)])
    return pandas.concat([frame, pandas.DataFrame([np.median(frame, axis=0)], ["median"], frame.columns)]).round(3)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--data-dir", type=Path, default=Path("papermill_runs/demo/data/summary_filtered"))
    parser.add_argument("--rows", type=int, default=640, help="training rows")
    parser.add_argument("--turns", type=int, default=5)
    options, more = parser.parse_known_args()
    flags = ["--data-dir", str(options.data_dir.resolve()), "--train-rows", str(options.rows), "--epochs", "1"]
    flags += ["--eval-samples", "2", "--eval-nll-samples", "2", "--no-eval-first", *more]
    print(compare(options.old.resolve(), options.new.resolve(), flags, options.turns).to_string())


if __name__ == "__main__":
    main()
