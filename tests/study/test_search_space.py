"""The search space is the guide's, range by range; another one, and a grid, are checked before anything runs."""

from dataclasses import replace
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from elmlib.config import InputError, StudyConfig, SummaryTrainingConfig
from elmlib.study.search_space import (
    GUIDE_BEST,
    GUIDE_SPACE,
    base_settings,
    check_contract,
    first_trials,
    load_grid,
    load_space,
    plan_study,
)

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


def test_load_space_without_a_file_is_the_guides() -> None:
    assert load_space(None) == (GUIDE, {})


def test_first_trials_are_in_the_guides_space() -> None:
    base = SummaryTrainingConfig()
    best, defaults = first_trials(GUIDE_SPACE, base)
    assert best.params == GUIDE_BEST
    assert defaults.params["learning_rate"] == base.learning_rate and defaults.params["hidden_dim"] == base.hidden_dim
    rows = defaults.params["batch_size"] * defaults.params["gradient_accumulation_steps"]
    assert rows == base.batch_size * base.gradient_accumulation_steps
    for first in (best, defaults):
        for name, value in first.params.items():
            assert GUIDE[name]._contains(GUIDE[name].to_internal_repr(value)), (name, value)


def test_first_trials_leave_out_defaults_outside_the_space() -> None:
    first = first_trials(GUIDE_SPACE, replace(SummaryTrainingConfig(), learning_rate=1.0))
    assert [trial.user_attrs["origin"] for trial in first] == ["guide's typical best"]


def test_load_space_reads_yaml(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "learning_rate: {low: 1.0e-4, high: 1.0e-3, log: true}\nhidden_dim: {choices: [2048]}\n"
        "num_soft_tokens: {low: 4, high: 8, step: 4}\ndropout_rate: 0.2\n"
    )
    space, fixed = load_space(path)
    assert space == {
        "learning_rate": FloatDistribution(1e-4, 1e-3, log=True),
        "hidden_dim": CategoricalDistribution([2048]),
        "num_soft_tokens": IntDistribution(4, 8, step=4),
    }
    assert fixed == {"dropout_rate": 0.2}
    assert first_trials(space, SummaryTrainingConfig()) == []  # neither has a number of soft tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "learning_rat"),
        ("learning_rate: {low: 1.0e-4}", "low"),
        ("learning_rate: {low: 1.0e-3, high: 1.0e-4}", "high"),
        ("dropout_rate: {low: 0.0, high: 0.1, log: true}", "dropout_rate.*log"),
        ("learning_rate: {low: 0.1, high: 0.5, log: true, step: 0.1}", "learning_rate.*step"),
        ("num_soft_tokens: {low: 4, high: 9, step: 4}", "num_soft_tokens"),
        ("hidden_dim: {choices: [2048, many]}", "many"),
        ("hidden_dim: {choices: []}", "choices"),
        ("llm_model_name: {choices: abc}", "choices is no list"),
        ("num_soft_tokens: {low: 4.5, high: 9}", "4.5"),
        ("dropout_rate: {low: 0.0, high: 1.5}", "1.5"),
        ("llm_model_name: {low: 1, high: 2}", "llm_model_name"),
        ("eval_samples: {choices: [10, 20]}", "eval_samples cannot be searched"),
        ("- learning_rate", "found"),
        ("a: [", "not valid YAML"),
    ],
)
def test_load_space_refuses_a_wrong_range_with_file_and_setting(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"space\.yaml.*" + message):
        load_space(path)


def test_load_space_refuses_a_file_that_is_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_space(tmp_path / "none.yaml")
    (tmp_path / "space.yaml").write_text("{}")
    with pytest.raises(InputError, match=r"space\.yaml: expected settings"):
        load_space(tmp_path / "space.yaml")


def test_load_grid_has_each_variant_at_each_seed_and_the_defaults_first(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("one token: {num_soft_tokens: 1}\ndefaults: {}\n")
    trials = [trial.user_attrs for trial in load_grid(path, 2)]
    assert [(trial["variant"], trial["seed"]) for trial in trials] == [
        ("defaults", 0), ("one token", 0), ("defaults", 1), ("one token", 1),
    ]  # fmt: skip
    assert trials[1]["changes"] == {"num_soft_tokens": 1, "seed": 0}
    path.write_text("one token: {num_soft_token: 1}\n")
    with pytest.raises(InputError, match=r"grid\.yaml: one token.*num_soft_token"):
        load_grid(path, 1)


def test_base_settings_refuse_what_the_study_sets_and_keep_the_rest(stub_config: StudyConfig) -> None:
    assert stub_config.training_config
    stub_config.training_config.write_text("max_epochs: 3\nseed: 0\n")
    base = base_settings(replace(stub_config, seed=7))
    assert (base.max_epochs, base.seed, base.eval_first, base.resume_from) == (3, 7, False, "latest")
    stub_config.training_config.write_text("eval_samples: 31\n")
    with pytest.raises(InputError, match=r"base\.yaml: eval_samples is set by the study; remove it"):
        base_settings(stub_config)


def test_base_settings_with_wandb_need_a_key(stub_config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr(type(wandb.api), "api_key", None, raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(InputError, match="wandb login"):
        base_settings(replace(stub_config, wandb=True))


def test_check_contract_names_each_difference(stub_config: StudyConfig) -> None:
    before = plan_study(stub_config).contract
    check_contract("tiny", None, before)
    check_contract("tiny", before, plan_study(stub_config).contract)
    stub_config.notebook.write_text(stub_config.notebook.read_text().replace("* 50", "* 51"))
    assert stub_config.space
    stub_config.space.write_text(stub_config.space.read_text().replace("[16, 32]", "[16, 32, 64]"))
    with pytest.raises(InputError, match=r"space: hidden_dim was .*notebook was"):
        check_contract("tiny", before, plan_study(stub_config).contract)


def test_plan_study_takes_the_fixed_settings_of_a_space_and_allows_more_seeds(stub_config: StudyConfig) -> None:
    assert stub_config.space and stub_config.training_config
    stub_config.space.write_text("learning_rate: {low: 1.0e-4, high: 1.0e-3}\ndropout_rate: 0.25\nseed: 3\n")
    plan = plan_study(stub_config)
    assert (plan.base.dropout_rate, plan.base.seed, plan.base.hidden_dim) == (0.25, 3, 32)
    assert plan.space == {"learning_rate": FloatDistribution(1e-4, 1e-3)} and plan.target == 3
    stub_config.space.write_text("faster: {learning_rate: 3.0e-3}\n")
    one, three = (plan_study(replace(stub_config, grid=stub_config.space, seeds=seeds)) for seeds in (1, 3))
    assert (one.target, three.target) == (2, 6) and one.contract == three.contract
