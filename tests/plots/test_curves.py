"""Curves of a run: what is read is what was logged, and each quantity has its own axis."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from elmlib.plots.curves import LiveCurves, curves_info, draw_curves, draw_map, to_png
from elmlib.training.loggers import MetricsRow

EVALS = {"val_nll": 3.0, "val_nll_shuffled": 4.0, "drift_similarity": 0.3, "drift_similarity_shuffled": 0.1,
         "bertscore_f1": 0.4, "bertscore_f1_shuffled": 0.2}  # fmt: skip


def write_metrics(run: Path, steps: int, **values: float) -> Path:
    """A run's metrics with an evaluation at every third step."""
    lines = []
    for step in range(1, steps + 1):
        lines.append({"kind": "step", "step": step, "epoch": step / steps, "nll": 5 - step / steps} | values)
        if step % 3 == 0:
            lines.append({"kind": "eval", "step": step, "epoch": step / steps} | EVALS)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.mark.parametrize("name", ["predicted_similarity", "drift_similarity"])  # the second in earlier versions
def test_curves_info_keeps_predicted_and_drift_similarity_apart(name: str, tmp_path: Path) -> None:
    steps, evaluations = curves_info(write_metrics(tmp_path, 6, **{name: 0.6}))
    assert steps.step.tolist() == [1, 2, 3, 4, 5, 6] and evaluations.step.tolist() == [3, 6]
    assert steps.predicted_similarity.tolist() == [0.6] * 6 and "drift_similarity" not in steps
    assert {figure: evaluations[figure].tolist() for figure in EVALS} == {f: [x] * 2 for f, x in EVALS.items()}


def test_curves_info_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        curves_info(tmp_path)


def test_draw_curves_has_an_axis_of_its_own_for_the_predicted_similarity(tmp_path: Path) -> None:
    axes = draw_curves(write_metrics(tmp_path, 6, predicted_similarity=0.6)).axes
    drawn = [{round(float(value), 6) for line in ax.lines for value in line.get_ydata()} for ax in axes]
    assert len(axes) == 4 and drawn[1:] == [{0.3, 0.1}, {0.4, 0.2}, {0.6}]
    assert len({ax.get_title() for ax in axes}) == 4
    assert len(draw_curves(write_metrics(tmp_path, 6)).axes) == 3  # a run without the drift loss


def test_draw_curves_smooths_the_training_loss_by_a_running_mean(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=50)
    lines = [{"kind": "step", "step": i + 1, "epoch": 0.1, "nll": x} for i, x in enumerate(values.tolist())]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (smooth,) = draw_curves(tmp_path).axes[0].lines
    naive = [values[max(0, i - 19) : i + 1].mean() for i in range(50)]
    np.testing.assert_allclose(np.asarray(smooth.get_ydata(), float), naive, atol=1e-12)


def test_draw_curves_of_a_run_that_has_just_begun_is_empty(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert not any(ax.lines for ax in draw_curves(tmp_path).axes)


def test_live_curves_draw_every_evaluation_and_few_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside a notebook IPython prints what it would display."""
    clock = [0.0]
    monkeypatch.setattr("elmlib.plots.curves.time.monotonic", lambda: clock[0])
    live = LiveCurves(write_metrics(tmp_path, 6, predicted_similarity=0.6))
    seen = []
    for kind, second in (("step", 1), ("step", 5), ("eval", 6), ("step", 7), ("step", 17), ("step", 18)):
        clock[0] = second
        live.log(MetricsRow(kind, 1, 0.1, {}))
        seen.append(capsys.readouterr().out.count("Image"))
    live.close()
    assert seen == [1, 0, 1, 0, 1, 0] and capsys.readouterr().out.count("Image") == 1


def test_draw_map_rings_the_chosen_point() -> None:
    points = np.random.default_rng(0).normal(size=(30, 2))
    figure = draw_map(points, [f"g{i % 10}" for i in range(30)], chosen=4)
    assert isinstance(figure, Figure) and to_png(figure).startswith(b"\x89PNG")
    ax = figure.axes[0]
    assert ax.collections[-1].get_offsets().tolist() == [points[4].tolist()]
    assert ax.get_legend().get_texts()[0].get_text() == "others"


def test_curves_import_no_torch() -> None:
    code = "import sys, elmlib.plots.curves; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
