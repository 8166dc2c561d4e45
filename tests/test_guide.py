"""The README's table of the guide: each name in it is looked up where it is said to be."""

import json
import re
import tomllib
from pathlib import Path
from typing import NamedTuple

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

import elmlib
from elmlib.config import SummaryTrainingConfig
from elmlib.records import Record
from elmlib.space import suggest

ROOT = Path(__file__).parent.parent


class Row(NamedTuple):
    """One line of the table."""

    kind: str
    guide: str
    here: str


def table() -> list[Row]:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- guide names -->")[1]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines[1:]]


def rows(kind: str) -> list[Row]:
    found = [row for row in table() if row.kind == kind]
    assert found, kind
    return found


def names(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_every_kind_is_looked_up() -> None:
    kinds = {"import", "setting", "searched", "metric", "record", "file", "package", "advice"}
    assert {row.kind for row in table()} == kinds


@pytest.mark.parametrize("row", rows("import"), ids=lambda row: row.guide)
def test_an_import_is_there(row: Row) -> None:
    assert row.here == f"`elmlib.{names(row.guide)[0]}`"
    assert getattr(elmlib, names(row.guide)[0])


@pytest.mark.parametrize("row", rows("setting"), ids=lambda row: row.guide)
def test_a_setting_has_the_default_that_the_table_says(row: Row) -> None:
    (name,) = names(row.guide)
    assert str(getattr(SummaryTrainingConfig(), name)) == row.here.removeprefix("offline: ")


def test_the_searched_ranges_are_the_tables() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    suggest(trial)
    told = {}
    for row in rows("searched"):
        span = re.fullmatch(r"(\S+) to ([^\s,]+)(, log)?", row.here)
        values = row.here.split(", ")
        told[names(row.guide)[0]] = (
            FloatDistribution(float(span[1]), float(span[2]), log=bool(span[3]))
            if span
            else CategoricalDistribution([int(value) for value in values])
        )
    assert told == trial.distributions


def test_the_metrics_are_in_a_runs_results_beside_their_controls(trained_run: Path) -> None:
    result = json.loads((trained_run / "result.json").read_text())
    for row in rows("metric"):
        for name in names(row.here):
            assert name in result, name
            if name.startswith(("bertscore", "drift")):
                assert f"{name}_shuffled" in result, name


def test_records_have_the_guides_fields(small_data: Path) -> None:
    fields = names(rows("record")[0].here)
    line = (small_data / "synthesis" / "train_synthesis.jsonl").read_text().splitlines()[0]
    assert set(fields) <= set(json.loads(line)) and set(fields) <= set(Record.__dataclass_fields__)


def test_the_files_are_where_the_table_says(small_data: Path, trained_run: Path) -> None:
    for row in rows("file"):
        (name,) = names(row.here)
        assert (small_data / name).is_file() or (trained_run / name).is_file(), name


def test_the_packages_are_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["summary"]]
    have = {re.split(r"[>=<\[]", requirement)[0] for requirement in wanted}
    assert set(names(rows("package")[0].here)) <= have


def test_advice_names_settings_that_there_are() -> None:
    for row in rows("advice"):
        for name in names(row.here):
            assert name in SummaryTrainingConfig.__dataclass_fields__, name
