"""What a run logs can be read back: from metrics.jsonl, from wandb's own files, and as curves."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from wandb_files import read_run

from elmlib.config import SummaryTrainingConfig
from elmlib.plots import Series, curves_info, draw_curves, smooth
from elmlib.tables import examples_frame, examples_info, examples_table, sample_table, score_table
from elmlib.tracking import MetricsLog, Row, read_metrics


def test_rows_round_trip_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [Row("step", 1, 0.5, {"loss": 2.0}), Row("step", 2, 1.0, {"loss": 1.0})]
    log = MetricsLog(path, 0)
    for row in rows:
        log.log(row)
    log.close()
    assert read_metrics(path) == rows
    with open(path, "a") as file:
        file.write('{"kind": "st')
    assert read_metrics(path) == rows


def test_resuming_drops_the_rows_of_steps_that_are_repeated(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        log = MetricsLog(path, step - 1)
        log.log(Row("step", step, 0.0, {"loss": float(step)}))
        log.log(Row("step", step + 1, 0.0, {"loss": -1.0}))  # lost again at the next start
        log.close()
    assert [(row.step, row.values["loss"]) for row in read_metrics(path)] == [(1, 1), (2, 2), (3, 3), (4, -1)]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 1, "epoch": 0, "loss": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_smooth_equals_its_naive_twin() -> None:
    values = np.random.default_rng(0).normal(size=50)
    expected = [values[max(0, i - 6) : i + 1].mean() for i in range(50)]
    np.testing.assert_allclose(smooth(Series(np.arange(50), values), 7).values, expected)


def test_curves_show_each_score_with_its_control(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2):
        log.log(Row("step", step, 0.0, {"nll": 3.0 / step, "drift_similarity": 0.1 * step}))
        scores = dict.fromkeys(("val_nll", "drift_similarity", "bertscore_f1"), 0.1 * step)
        log.log(Row("eval", step, 0.0, scores | {f"{name}_shuffled": 0.0 for name in scores}))
    log.close()
    curves = curves_info(tmp_path)
    assert curves.bertscore.values.tolist() == [0.1, 0.2] and curves.bertscore_shuffled.values.tolist() == [0, 0]
    figure = draw_curves(tmp_path)
    assert len(figure.axes) == 3
    for ax in figure.axes:
        assert sum("shuffled" in line.get_label() for line in ax.lines) == 1
    assert "torch" not in subprocess.check_output(
        [sys.executable, "-c", "import sys, elmlib.plots; print([m for m in sys.modules if m == 'torch'])"], text=True
    )


def test_tables_show_the_control_and_the_difference(tmp_path: Path) -> None:
    table = score_table({"bertscore_f1": 0.3, "bertscore_f1_shuffled": 0.1, "empty_prediction_rate": 0.25})
    assert ["BERTScore", "F1", "0.300", "0.100", "+0.200"] in [line.split() for line in table.splitlines()]
    assert "empty rate                     0.250" in table
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps({"source_id": "a.b", "prediction": "", "target_text": "Open a file."}) + "\n")
    assert sample_table(path) == "a.b\nreference: Open a file.\ngenerated: (empty)"


def example(number: int, f1: float) -> dict[str, object]:
    texts = {"source_id": f"s{number}", "prediction": f"p{number}", "target_text": f"t{number}"}
    return texts | {"bertscore_f1": f1, "rank": number + 1}


@pytest.mark.parametrize(("total", "count", "each"), [(20, 3, 3), (11, 5, 3), (3, 3, 1), (5, 1, 1)])
def test_examples_are_the_best_the_middle_and_the_worst(tmp_path: Path, total: int, count: int, each: int) -> None:
    values = np.random.default_rng(total).permutation(total) / total
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(example(number, f1)) + "\n" for number, f1 in enumerate(values)))
    found = examples_info(path, count)
    assert [it.group for it in found] == ["best"] * each + ["median"] * each + ["worst"] * each
    assert len({it.source_id for it in found}) == 3 * each
    ranked = sorted(values, reverse=True)
    f1 = [it.f1 for it in found]
    assert f1[:each] == ranked[:each] and f1[2 * each :] == ranked[-each:]
    middle = f1[each : 2 * each]
    assert abs(sum(v > middle[0] for v in values) - sum(v < middle[-1] for v in values)) <= 1
    for it in found:
        assert it == (it.group, *(example(int(it.source_id[1:]), it.f1)[name] for name in EXAMPLE_FIELDS))
    frame = examples_frame(found)
    assert frame["group"].tolist() == [it.group for it in found] and frame["bertscore_f1"].tolist() == f1
    table = examples_table(found)
    assert table.count("reference: t") == table.count("generated: p") == 3 * each
    assert f"best: F1 {f1[0]:.3f}, rank {found[0].rank}, {found[0].source_id}\n" in table


EXAMPLE_FIELDS = ("bertscore_f1", "rank", "source_id", "target_text", "prediction")


def test_examples_of_a_file_without_scores_or_too_short_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(example(0, 0.5)) + "\n" + json.dumps({"source_id": "x", "prediction": "y"}) + "\n")
    with pytest.raises(ValueError, match=r"predictions\.jsonl, line 2 has no 'bertscore_f1'"):
        examples_info(path)
    path.write_text((json.dumps(example(0, 0.5)) + "\n") * 2)
    with pytest.raises(ValueError, match="2 lines; best, median and worst need at least 3"):
        examples_info(path)
    with pytest.raises(ValueError, match="count is 0"):
        examples_info(path, 0)


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


def test_without_the_flag_wandb_is_not_imported(tiny_config: SummaryTrainingConfig, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(replace(tiny_config, max_epochs=1).to_json())
    code = f"import sys; from elmlib import cli; cli.main(['train', '--config', {str(settings)!r}]); " + (
        "print('wandb' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1] == "False"
