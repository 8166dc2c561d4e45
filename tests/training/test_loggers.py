"""What a run logs can be read back: from metrics.jsonl and from wandb's own files."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from wandb_files import read_run

from elmlib.config import InputError, SummaryTrainingConfig
from elmlib.training.loggers import MetricsLog, MetricsRow, WandbLog, read_metrics
from elmlib.training.trainer import train


def test_read_metrics_returns_the_logged_rows_without_an_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [MetricsRow("step", 1, 0.5, {"loss": 2.0}), MetricsRow("step", 2, 1.0, {"loss": 1.0})]
    log = MetricsLog(path, 0)
    for row in rows:
        log.log(row)
    log.close()
    assert read_metrics(path) == rows
    with open(path, "a") as file:
        file.write('{"kind": "st')
    assert read_metrics(path) == rows


def test_metrics_log_drops_rows_of_steps_that_are_repeated(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        log = MetricsLog(path, step - 1)
        log.log(MetricsRow("step", step, 0.0, {"loss": float(step)}))
        log.log(MetricsRow("step", step + 1, 0.0, {"loss": -1.0}))  # lost again at the next start
        log.close()
    assert [(row.step, row.values["loss"]) for row in read_metrics(path)] == [(1, 1), (2, 2), (3, 3), (4, -1)]


def test_read_metrics_names_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 1, "epoch": 0, "loss": 1}\nnonsense\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


@pytest.mark.slow
def test_wandb_offline_writes_the_guides_metrics(tiny_config: SummaryTrainingConfig, tmp_path: Path) -> None:
    """In a process of its own, as wandb leaves threads behind; read back from its own file."""
    settings = tmp_path / "settings.json"
    config = replace(tiny_config, max_epochs=1, use_wandb=True, wandb_run_name="try", wandb_group="tries")
    settings.write_text(config.to_json())
    command = [sys.executable, "-m", "elmlib.cli", "train", "--config", str(settings)]
    run = subprocess.run(command, env=os.environ | {"WANDB_MODE": "offline"}, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()
    (log,) = Path(tiny_config.checkpoint_dir).glob("wandb/offline-run-*/run-*.wandb")
    run = read_run(log)
    assert (run.project, run.name, run.group) == (config.wandb_project, "try", "tries")
    names = {name for row in run.history for name in row}
    assert {"train/loss", "val/bertscore_composite", "val/drift_similarity", "val/bertscore_f1", "epoch"} <= names


@pytest.mark.parametrize("variable", ["WANDB_MODE=foo", "WANDB_BASE_URL=foo", "ACCELERATE_DYNAMO_BACKEND=foo"])
def test_a_variable_that_a_library_does_not_know_is_one_line(
    tiny_config: SummaryTrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(*variable.split("="))
    start = WandbLog if variable.startswith("W") else train
    with pytest.raises(InputError, match=rf"{variable.partition('_')[0]}_\.\.\."):
        start(replace(tiny_config, checkpoint_dir=str(tmp_path)))


def test_without_the_flag_wandb_is_not_imported(tiny_config: SummaryTrainingConfig, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(replace(tiny_config, max_epochs=1).to_json())
    code = f"import sys; from elmlib import cli; cli.main(['train', '--config', {str(settings)!r}]); " + (
        "print('wandb' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1] == "False"
