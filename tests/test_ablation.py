"""An ablation compares equal times fairly, loses no finished cell, and its table and picture say what the cells say."""

import json
import math
import random
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch
from matplotlib.figure import Figure

from elmlib import ablation, cli, trainer
from elmlib.ablation import base_settings, command_line, plan, run_ablation, variants
from elmlib.ablation_plots import DEFAULTS, FIGURES, Cell, aggregate, draw_ablation, spread, to_frame, to_markdown
from elmlib.checkpoint import BEST
from elmlib.commands import AblateConfig
from elmlib.config import SummaryTrainingConfig
from elmlib.data import load_split
from elmlib.tracking import read_metrics
from elmlib.trainer import TrainResult, UnstableTrainingError
from elmlib.workbench import Workbench, prepare

METRICS = (
    "bertscore_f1", "bertscore_f1_shuffled", "val_nll", "val_nll_shuffled", "identification_top_1",
    "identification_mrr", "drift_similarity",
)  # fmt: skip
PAIR = ("random start", "no drift loss")


def random_metrics(seed: object) -> dict[str, float]:
    rng = random.Random(str(seed))
    return {name: rng.random() for name in METRICS}


class Training:
    """Stands in for `trainer.train`: what a run leaves behind, at once; `failures` are raised at those calls."""

    def __init__(self) -> None:
        self.configs: list[SummaryTrainingConfig] = []
        self.failures: dict[int, BaseException] = {}
        self.epoch = 1.5

    def __call__(self, config: SummaryTrainingConfig, bench: Workbench) -> TrainResult:
        self.configs.append(config)
        folder = Path(config.checkpoint_dir)
        folder.mkdir(parents=True)  # fails where an earlier run's files were left
        if failure := self.failures.get(len(self.configs)):
            raise failure
        for name in (BEST, "adapter_step_9.safetensors", "run_state_step_9.safetensors"):
            (folder / name).touch()
        best, last = (random_metrics([config.identity(), place]) for place in ("best", "last"))
        rows = [{"kind": "eval", "step": step, "epoch": self.epoch} | values for step, values in ((5, best), (9, last))]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        times = {"steps": 9.0, "train_seconds": config.max_train_seconds}
        return TrainResult(folder / BEST, folder / "adapter_step_9.safetensors", best | times)

    @property
    def names(self) -> list[str]:
        return [Path(config.checkpoint_dir).name for config in self.configs]


@pytest.fixture(scope="module")
def bench(tiny_llm: Path, small_data: Path) -> Workbench:
    """Models and data that all stand-in trainings are given."""
    config = SummaryTrainingConfig(llm_model_name=str(tiny_llm), summary_data_path=str(small_data), hidden_dim=32)
    return prepare(config, torch.device("cpu"))


@pytest.fixture
def training(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> Training:
    """Nothing is loaded, nothing is trained, and the picture, which takes longer than the rest, is empty."""
    stand_in = Training()
    monkeypatch.setattr(ablation, "prepare", lambda config, device: bench)
    monkeypatch.setattr(trainer, "train", stand_in)
    monkeypatch.setattr(ablation, "draw_ablation", lambda cells: Figure())
    return stand_in


@pytest.fixture
def config(tiny_config: SummaryTrainingConfig, tmp_path: Path) -> AblateConfig:
    """Two variants beside the defaults, two seeds, a tenth of a second each."""
    settings = tmp_path / "settings.json"
    settings.write_text(tiny_config.to_json())
    return AblateConfig(
        tiny_config.summary_data_path, tmp_path / "ablation", 0.1, 2, eval_samples=4, config=settings,
        only=(DEFAULTS, *PAIR),
    )  # fmt: skip


def cell_files(config: AblateConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (config.output_dir / "cells").iterdir()}


def table(config: AblateConfig) -> pandas.DataFrame:
    return pandas.read_csv(config.output_dir / "ablation.csv")


def test_variants_undo_each_choice_of_the_defaults_alone() -> None:
    base = replace(
        SummaryTrainingConfig(), num_soft_tokens=4, soft_token_place="answer", warm_start=True, warm_start_views=True,
        use_contrastive_loss=True, use_text_drift_loss=True, use_teacher_kl=False, pretrain_epochs=0,
    )  # fmt: skip
    assert {variant.name: variant.changes for variant in variants(base)} == {
        DEFAULTS: {},
        "random start": {"warm_start": False},
        "one view": {"warm_start_views": False},
        "1 soft token": {"num_soft_tokens": 1},
        "8 soft tokens": {"num_soft_tokens": 8},
        "in the text's place": {"soft_token_place": "text"},
        "no contrastive loss": {"use_contrastive_loss": False},
        "no drift loss": {"use_text_drift_loss": False},
        "NLL only": {"use_contrastive_loss": False, "use_text_drift_loss": False},
        "teacher KL": {"use_teacher_kl": True},
        "paraphrase stage": {"pretrain_epochs": 1},
        "guide's plain settings": {"num_soft_tokens": 1, "warm_start": False, "soft_token_place": "text"},
    }


@pytest.mark.parametrize("soft_tokens", [1, 2, 8])
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("losses", [(True, True, True), (True, False, False), (False, False, False)])
def test_whatever_the_base_no_two_variants_are_equal_and_their_names_are_true(
    soft_tokens: int, warm: bool, losses: tuple[bool, bool, bool]
) -> None:
    contrastive, drift, teacher = losses
    base = SummaryTrainingConfig(
        num_soft_tokens=soft_tokens, warm_start=warm, use_contrastive_loss=contrastive, use_text_drift_loss=drift,
        use_teacher_kl=teacher, pretrain_epochs=1,
    )  # fmt: skip
    found = {variant.name: replace(base, **variant.changes) for variant in variants(base)}
    assert found[DEFAULTS] == base
    assert len(set(found.values())) == len(found) == len(variants(base))
    assert found["guide's plain settings"].pretrain_epochs == 0
    assert found["random start" if warm else "warm start"].warm_start is not warm
    for name, settings in found.items():
        if "soft token" in name:
            assert settings.num_soft_tokens == int(name.split()[0]) != soft_tokens
        for part, on in (
            ("contrastive loss", settings.use_contrastive_loss),
            ("drift loss", settings.use_text_drift_loss),
            ("teacher KL", settings.use_teacher_kl),
        ):
            assert on or name != part
            assert not on or name not in (f"no {part}", "NLL only")
        assert settings.pretrain_epochs or name in ("no paraphrase stage", "guide's plain settings")


def test_every_variant_has_one_seed_before_any_has_the_next_and_all_have_the_same_time(config: AblateConfig) -> None:
    base = base_settings(config)
    jobs = plan(config, base, 96, ["train", "val"])
    names = [variant.name for variant in variants(base)]
    assert [job.variant.name for job in jobs] == names * 2
    assert [job.config.seed for job in jobs] == [0] * len(names) + [1] * len(names)
    assert len({job.file for job in jobs}) == len({job.config.checkpoint_dir for job in jobs}) == len(jobs)
    for job in jobs:
        alike = replace(job.config, **{name: getattr(base, name) for name in job.variant.changes})
        assert replace(alike, seed=0, checkpoint_dir="") == replace(jobs[0].config, checkpoint_dir="")
        assert replace(job.config, **job.variant.changes) == job.config
    assert (base.max_train_seconds, base.eval_samples, base.eval_first) == (0.1, 4, False)
    assert (
        base.summary_data_path == config.data_dir and base.hidden_dim == 32
    )  # the file's, where nothing stands over it


@pytest.mark.parametrize("seconds", [0.1, 150])
def test_the_epochs_last_longer_than_the_time_even_at_a_hundred_steps_a_second(
    config: AblateConfig, seconds: float
) -> None:
    config = replace(config, train_seconds=seconds)
    settings = plan(config, base_settings(config), 96, ["train", "val"])[0].config
    steps_per_epoch = 96 / settings.batch_size
    assert settings.max_epochs * steps_per_epoch > 100 * seconds
    assert settings.early_stopping_patience == settings.max_epochs


def test_a_run_writes_table_and_picture_of_cells_that_all_trained_for_their_time(
    config: AblateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real training; a second run makes the same table without it."""
    config = replace(config, seeds=1, only=(DEFAULTS, "1 soft token"))
    text = run_ablation(config)
    rows = table(config)
    assert rows.variant.tolist() == [DEFAULTS, "1 soft token"]
    assert [json.loads(changes) for changes in rows.changes] == [{}, {"num_soft_tokens": 1}]
    assert (rows.train_seconds >= config.train_seconds).all() and (rows.steps >= 1).all()
    log = read_metrics(config.output_dir / "runs" / "1-soft-token-seed-0" / "metrics.jsonl")
    assert log[-1].kind == "eval" and rows.bertscore_f1[1] == log[-1].values["bertscore_f1"]
    assert rows.num_parameters_trained[1] < rows.num_parameters_trained[0]
    assert (config.output_dir / "ablation.md").read_text() == text
    assert f"`{command_line(config)}`" in text and "| 1 soft token |" in text
    assert (config.output_dir / "ablation.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(trainer, "train", lambda *_, **__: pytest.fail("a finished cell was trained again"))
    assert run_ablation(config) == text


def test_a_cell_has_the_last_evaluation_and_keeps_the_best_adapter_alone(
    config: AblateConfig, training: Training
) -> None:
    run_ablation(config)
    assert training.names[:3] == [f"{name}-seed-0" for name in ("defaults", "random-start", "no-drift-loss")]
    for settings in training.configs:
        folder = Path(settings.checkpoint_dir)
        assert sorted(path.name for path in folder.iterdir()) == [BEST, "metrics.jsonl"]
    last = random_metrics([training.configs[0].identity(), "last"])
    assert table(config).loc[0, list(METRICS)].to_dict() == pytest.approx(last)


@pytest.mark.parametrize("change", [{"train_seconds": 0.2}, {"eval_samples": 5}])
def test_a_cell_of_other_settings_is_run_again_and_not_lost(
    config: AblateConfig, training: Training, change: dict[str, float]
) -> None:
    run_ablation(config)
    files, text = cell_files(config), (config.output_dir / "ablation.md").read_text()
    run_ablation(replace(config, **change))
    assert training.names[6:] == training.names[:6]
    assert cell_files(config).items() > files.items()
    assert run_ablation(config) == text and len(training.configs) == 12


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_cell_of_other_data_is_run_again(
    config: AblateConfig, training: Training, bench: Workbench, split: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run_ablation(config)
    data = Path(shutil.copytree(config.data_dir, tmp_path / "data"))
    config = replace(config, data_dir=str(data))
    run_ablation(config)
    assert len(training.configs) == 6  # equal data elsewhere are equal data
    records = data / "synthesis" / f"{split}_synthesis.jsonl"
    records.write_text(records.read_text().replace("the file", "a file"))
    other = replace(bench, **{split: load_split(base_settings(config), split, bench.elm.tokenizer)})
    monkeypatch.setattr(ablation, "prepare", lambda *_: other)
    run_ablation(config)
    assert training.names[6:] == training.names[:6]


def test_a_killed_run_keeps_its_finished_cells_and_goes_on_to_the_table_of_one_that_was_not(
    config: AblateConfig, training: Training
) -> None:
    training.failures[3] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_ablation(config)
    kept = cell_files(config)
    assert table(config).variant.tolist() == [DEFAULTS, "random start"] and len(kept) == 2
    run_ablation(config)
    assert training.names[3] == training.names[2] and len(training.configs) == 3 + 4
    assert cell_files(config).items() > kept.items()
    whole = replace(config, output_dir=config.output_dir / "whole")
    run_ablation(whole)
    assert table(config).equals(table(whole))


def test_a_kill_between_a_cell_and_its_table_leaves_no_gap(
    config: AblateConfig, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, only=PAIR[:1], seeds=1)
    real = ablation.write_results
    monkeypatch.setattr(ablation, "write_results", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_ablation(config)
    monkeypatch.setattr(ablation, "write_results", real)
    assert "| random start |" in run_ablation(config)
    assert len(training.configs) == 1


def test_an_unstable_run_leaves_its_cell_empty_and_the_rest_go_on(
    config: AblateConfig, training: Training, caplog: pytest.LogCaptureFixture
) -> None:
    training.failures[1] = UnstableTrainingError("step 3: the loss is nan")
    run_ablation(config)
    assert "defaults, seed 0: left empty: step 3: the loss is nan" in caplog.text
    found = table(config)
    assert found.variant.tolist() == [DEFAULTS, *(name for name in PAIR for _ in range(2))]  # the defaults still first
    assert found.seed.tolist() == [1, 0, 1, 0, 1]
    run_ablation(config)
    assert training.names[6:] == ["defaults-seed-0"]  # tried again
    assert len(table(config)) == 6


def test_a_paraphrase_stage_that_took_all_the_time_leaves_its_cell_empty(
    config: AblateConfig, training: Training, caplog: pytest.LogCaptureFixture
) -> None:
    training.epoch = 1.0
    run_ablation(replace(config, only=(DEFAULTS, "paraphrase stage"), seeds=1))
    assert "paraphrase stage, seed 0: left empty: its 0.1 s ended within the paraphrase stage" in caplog.text
    assert table(config).variant.tolist() == [DEFAULTS]


def test_a_run_in_which_every_cell_is_unstable_ends_with_an_empty_table(
    config: AblateConfig, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "draw_ablation", draw_ablation)
    training.failures = {call: UnstableTrainingError("step 1") for call in (1, 2)}
    assert run_ablation(replace(config, only=(DEFAULTS,))).startswith("| variant | seeds |")


def test_only_the_named_variants_are_run_and_the_table_keeps_the_others(
    config: AblateConfig, training: Training
) -> None:
    run_ablation(replace(config, only=PAIR[1:], seeds=1))
    assert training.names == ["no-drift-loss-seed-0"]
    run_ablation(replace(config, only=(DEFAULTS,), seeds=1))
    assert training.names[1:] == ["defaults-seed-0"]
    assert table(config).variant.tolist() == [DEFAULTS, "no drift loss"]


def test_an_unknown_variant_is_named_beside_those_that_there_are(config: AblateConfig, training: Training) -> None:
    with pytest.raises(ValueError, match=r"no variant 'no loss'; there are 'defaults', .*\"guide's plain settings\""):
        run_ablation(replace(config, only=(DEFAULTS, "no loss")))
    assert not training.configs and not config.output_dir.exists()


def test_a_text_that_the_teacher_lacks_is_told_before_anything_is_trained(
    config: AblateConfig, training: Training, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [replace(record, source_text="") for record in bench.train.records]
    without = replace(bench, train=replace(bench.train, records=records))
    monkeypatch.setattr(ablation, "prepare", lambda *_: without)
    with pytest.raises(ValueError, match="no source_text, which teacher_kl needs"):
        run_ablation(replace(config, only=()))
    assert not training.configs
    run_ablation(replace(config, only=(DEFAULTS,), seeds=1))
    assert len(training.configs) == 1


@pytest.mark.parametrize(
    "config",
    [
        AblateConfig(),
        AblateConfig("my data", Path("a b/c"), 0.1, 5, 7, "qwen3-4b", Path("s.json"), ("no drift loss", "one view")),
    ],
)
def test_the_command_under_the_table_means_the_same_settings(config: AblateConfig) -> None:
    program, *arguments = shlex.split(command_line(config))
    assert program == "elm"
    assert cli.parse(arguments)[:2] == (cli.COMMANDS["ablate"], config)


@pytest.fixture
def cells() -> list[Cell]:
    """Variants with other seeds than the defaults have, seed by seed; one has no seed in common with them."""
    seeds = {DEFAULTS: (0, 1, 2), "a": (0, 1, 2), "b": (1, 3), "c": (5,)}
    return [
        Cell(variant, seed, {"num_soft_tokens": 1}, random_metrics((variant, seed)) | {"steps": 10.0 * seed}, "here")
        for seed in range(6)
        for variant, own in seeds.items()
        if seed in own
    ]


@pytest.mark.parametrize("values", [[0.1, 0.4], [3.0, -1.0, 2.5, 7.0]])
def test_spread_is_mean_and_sample_deviation(values: list[float]) -> None:
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    assert spread(values) == pytest.approx((mean, deviation))


def test_the_spread_of_one_value_is_not_known() -> None:
    assert spread([2.0]).mean == 2.0 and math.isnan(spread([2.0]).deviation)


def naive_row(cells: Sequence[Cell], variant: str) -> dict[str, float]:
    """Each figure of a variant, written out."""
    f1 = {(cell.variant, cell.seed): cell.metrics["bertscore_f1"] for cell in cells}
    own = [cell for cell in cells if cell.variant == variant]
    difference = [
        f1[variant, cell.seed] - f1[DEFAULTS, cell.seed] for cell in own if (DEFAULTS, cell.seed) in f1
    ] * (variant != DEFAULTS)  # fmt: skip
    row = {
        "seeds": len(own),
        "steps": statistics.mean(cell.metrics["steps"] for cell in own),
        "difference": statistics.mean(difference) if difference else math.nan,
        "pairs": len(difference),
        "defaults_better": len([d for d in difference if d < 0]),
    }
    for name, plus, minus in (
        ("f1", "bertscore_f1", None),
        ("f1_gap", "bertscore_f1", "bertscore_f1_shuffled"),
        ("nll_gap", "val_nll_shuffled", "val_nll"),
        ("top_1", "identification_top_1", None),
        ("mrr", "identification_mrr", None),
        ("consistency", "drift_similarity", None),
    ):
        values = [cell.metrics[plus] - (cell.metrics[minus] if minus else 0) for cell in own]
        row[name] = statistics.mean(values)
        row[f"{name}_deviation"] = statistics.stdev(values) if len(values) > 1 else math.nan
    return row


def test_the_rows_equal_their_naive_twin(cells: list[Cell]) -> None:
    frame = to_frame(aggregate(cells))
    assert frame.index.tolist() == [DEFAULTS, "a", "b", "c"]
    assert frame.pairs.tolist() == [0, 3, 1, 0]
    for variant in frame.index:
        assert frame.loc[variant].to_dict() == pytest.approx(naive_row(cells, variant), nan_ok=True)


def test_the_order_of_the_cells_changes_no_figure(cells: list[Cell]) -> None:
    turned = to_frame(aggregate(cells[::-1]))
    pandas.testing.assert_frame_equal(turned, to_frame(aggregate(cells)).loc[turned.index])


def test_the_markdown_has_the_frames_figures(cells: list[Cell]) -> None:
    rows = aggregate(cells)
    frame = to_frame(rows)
    head, _, *lines = (
        [text.strip() for text in line.split("|")[1:-1]]
        for line in to_markdown(rows).splitlines()
        if line.startswith("|")
    )
    columns = ["variant", "seeds", "steps", *FIGURES, "difference", "defaults better"]
    assert len(head) == len(columns) and len(lines) == len(frame)
    for line in lines:
        shown = dict(zip(columns, line, strict=True))
        expected = frame.loc[shown["variant"]]
        for name in ("seeds", "steps", *FIGURES):
            mean, _, deviation = shown[name].partition(" ± ")
            half_a_digit = 0.5 * 10.0 ** -len(mean.partition(".")[2]) + 1e-9
            assert float(mean) == pytest.approx(expected[name], abs=half_a_digit)
            if deviation:
                assert float(deviation) == pytest.approx(expected[f"{name}_deviation"], abs=half_a_digit)
        assert ("±" in shown["f1"]) == (expected.seeds > 1)
        if expected.pairs:
            assert float(shown["difference"]) == pytest.approx(expected.difference, abs=0.0005 + 1e-9)
            assert shown["defaults better"] == f"{expected.defaults_better:.0f} of {expected.pairs:.0f}"
        else:
            assert shown["difference"] == shown["defaults better"] == ""


def test_the_picture_has_a_dot_a_cell_and_a_bar_a_mean(cells: list[Cell]) -> None:
    rows = aggregate(cells)
    figure = draw_ablation(cells)
    for ax, name in zip(figure.axes, ("f1_gap", "nll_gap"), strict=True):
        dots = {int(line.get_ydata()[0]): list(line.get_xdata()) for line in ax.lines if line.get_marker() == "o"}
        bars = {int(line.get_ydata()[0]): list(line.get_xdata()) for line in ax.lines if line.get_marker() == "|"}
        for place, row in enumerate(rows):
            assert dots[place] == [FIGURES[name](cell.metrics) for cell in cells if cell.variant == row.variant]
            assert bars[place] == [getattr(row, name).mean]
        (line,) = (line for line in ax.lines if line.get_linestyle() == "--")
        assert set(line.get_xdata()) == {getattr(rows[0], name).mean}
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [row.variant for row in rows]
    top, bottom = figure.axes[1].get_ylim()
    assert top > bottom  # the first variant is the uppermost


def test_reading_an_ablation_needs_no_torch() -> None:
    code = "import sys, elmlib.ablation_plots; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
