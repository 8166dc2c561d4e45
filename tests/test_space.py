"""The search space is the guide's, range by range; another one is checked before anything runs."""

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from elmlib.config import SummaryTrainingConfig
from elmlib.space import GUIDE_BEST, first_trials, load_space, suggest

GUIDE = {
    "learning_rate": FloatDistribution(1e-5, 5e-3, log=True),
    "hidden_dim": CategoricalDistribution([2048, 4096, 6144]),
    "dropout_rate": FloatDistribution(0.0, 0.3),
    "residual_scale": FloatDistribution(0.05, 0.5),
    "contrastive_weight": FloatDistribution(0.0, 0.1),
    "text_drift_weight": FloatDistribution(0.01, 0.1),
    "text_drift_target_similarity": FloatDistribution(0.7, 0.9),
    "batch_size": CategoricalDistribution([4, 8, 16]),
    "gradient_accumulation_steps": CategoricalDistribution([2, 4, 8]),
}


def asked(space, seed: int = 0) -> optuna.Trial:
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    trial.set_user_attr("returned", space(trial))
    return trial


def test_the_space_is_the_guides() -> None:
    trial = asked(suggest)
    assert trial.distributions == GUIDE
    assert trial.user_attrs["returned"] == trial.params
    SummaryTrainingConfig(**trial.params)


def test_what_is_tried_first_lies_in_the_guides_space() -> None:
    base = SummaryTrainingConfig()
    best, defaults = first_trials(suggest, base)
    assert best.params == GUIDE_BEST
    assert defaults.params["learning_rate"] == base.learning_rate and defaults.params["hidden_dim"] == base.hidden_dim
    rows = defaults.params["batch_size"] * defaults.params["gradient_accumulation_steps"]
    assert rows == base.batch_size * base.gradient_accumulation_steps
    for first in (best, defaults):
        for name, value in first.params.items():
            assert GUIDE[name]._contains(GUIDE[name].to_internal_repr(value)), (name, value)


def test_defaults_that_no_trial_could_have_are_not_tried_first() -> None:
    names = [first.origin for first in first_trials(suggest, replace(SummaryTrainingConfig(), learning_rate=1.0))]
    assert names == ["guide's typical best"]


def test_a_yaml_space(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "learning_rate: {low: 1.0e-4, high: 1.0e-3, log: true}\nhidden_dim: {choices: [2048]}\n"
        "num_soft_tokens: {low: 4, high: 8, step: 4}\ndropout_rate: 0.2\n"
    )
    trial = asked(load_space(path))
    assert trial.distributions["learning_rate"] == FloatDistribution(1e-4, 1e-3, log=True)
    assert trial.user_attrs["returned"] == trial.params | {"dropout_rate": 0.2}
    assert trial.params["num_soft_tokens"] in (4, 8)
    assert first_trials(load_space(path), SummaryTrainingConfig()) == ()  # neither says how many soft tokens


def test_a_python_space(tmp_path: Path) -> None:
    path = tmp_path / "space.py"
    path.write_text("def suggest(trial):\n    return {'seed': trial.suggest_int('seed', 1, 9)}\n")
    assert asked(load_space(path)).params.keys() == {"seed"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("learning_rat: 1", "learning_rat"),
        ("learning_rate: {low: 1.0e-4}", "low"),
        ("learning_rate: {low: 1.0e-3, high: 1.0e-4}", "above high"),
        ("hidden_dim: {choices: [2048, many]}", "many"),
        ("hidden_dim: {choices: []}", "choices"),
        ("dropout_rate: {low: 0.0, high: 1.5}", "1.5"),
        ("llm_model_name: {low: 1, high: 2}", "llm_model_name"),
        ("- learning_rate", "list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_space_is_told_with_its_file(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"space\.yaml.*" + told):
        load_space(path)


def test_a_space_that_is_missing_or_no_space(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_space(tmp_path / "none.yaml")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"suggest\(trial\)"):
        load_space(tmp_path / "empty.py")
