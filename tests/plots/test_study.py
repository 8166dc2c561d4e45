"""Plots of a study show its trials, and need no torch."""

import subprocess
import sys
from pathlib import Path

import optuna
import pandas
import pytest
from matplotlib.figure import Figure
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from elmlib.config import InputError
from elmlib.plots.study import draw_study, draw_variants, plot_drift, plot_reports


@pytest.fixture(scope="module")
def study() -> optuna.Study:
    """Six trials, the last one pruned; the value is the square of the one parameter."""
    study = optuna.create_study(direction="maximize")
    for number in range(6):
        x = number / 10
        names = ("drift_similarity", "bertscore_composite", "bertscore_composite_shuffled")
        pruned = number == 5
        study.add_trial(
            create_trial(
                state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
                value=None if pruned else x * x,
                params={"dropout_rate": x, "learning_rate": x + 0.1},
                distributions={"dropout_rate": FloatDistribution(0, 1), "learning_rate": FloatDistribution(0, 1)},
                user_attrs=dict.fromkeys(names, x) | {"folder": str(Path("trial"))},
                intermediate_values={1: x / 2} if pruned else {1: x / 2, 2: x * x},
            )
        )
    return study


def test_plot_reports_draws_every_trial_and_marks_the_best_and_the_pruned(study: optuna.Study) -> None:
    ax = Figure().subplots()
    plot_reports(study, ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["trial 4, the best", "pruned (1)"]
    drawn = [list(line.get_ydata()) for line in ax.lines]
    assert drawn[4] == pytest.approx([0.2, 0.16]) and drawn[5] == drawn[6] == [0.25] and len(drawn) == 8


def test_plot_drift_has_a_dot_and_a_control_a_trial(study: optuna.Study) -> None:
    ax = Figure().subplots()
    plot_drift(study, ax)
    true, shuffled = ([list(line.get_xdata()), list(line.get_ydata())] for line in ax.lines)
    assert true == [[number / 10 for number in range(6)]] * 2 and shuffled[0] == true[0]


def test_draw_study_has_all_plots_and_refuses_a_study_without_a_complete_trial(study: optuna.Study) -> None:
    figures = draw_study(study)
    assert set(figures) == {"reports", "drift", "history", "importance", "parallel", "slice", "contour"}
    with pytest.raises(InputError, match="no complete trial"):
        draw_study(optuna.create_study())


def test_draw_variants_has_a_dot_a_seed_and_a_bar_a_mean() -> None:
    cells = pandas.DataFrame(
        {"variant": ["defaults", "a", "defaults", "a"], "f1_gap": [0.1, 0.2, 0.3, 0.6], "nll_gap": [1.0, 2.0, 3.0, 4.0]}
    )
    ax, _ = draw_variants(cells).axes
    dots, bars, dashed = ax.lines
    assert dots.get_xdata().tolist() == [0.1, 0.2, 0.3, 0.6] and list(dots.get_ydata()) == [0, 1, 0, 1]
    assert bars.get_xdata().tolist() == pytest.approx([0.2, 0.4]) and set(dashed.get_xdata()) == {bars.get_xdata()[0]}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["defaults", "a"]
    top, bottom = ax.get_ylim()
    assert top > bottom  # the first variant is the uppermost


def test_importing_the_plots_of_a_study_loads_no_torch() -> None:
    code = "import sys, elmlib.plots.study; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
