"""The guide's tables in notebooks/README.md: each command is parsed, each name is looked up."""

import json
import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

import elmlib
from elmlib import cli
from elmlib.config import SummaryTrainingConfig
from elmlib.data import Record
from elmlib.study.search_space import GUIDE_SPACE

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")


class Row(NamedTuple):
    """One line of the table of names."""

    kind: str
    guide: str
    here: str


def table_rows(marker: str) -> list[list[str]]:
    """The cells of the table between two `<!-- marker -->` comments, without its header."""
    _, table, _ = GUIDE.split(f"<!-- {marker} -->")
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def commands() -> list[list[str]]:
    """The `elm ...` commands of the guide, as argument lists."""
    return [shlex.split(here.strip("`"))[1:] for _, here in table_rows("guide commands")]


def rows(kind: str) -> list[Row]:
    """The names of one kind."""
    found = [Row(*cells) for cells in table_rows("guide names") if cells[0] == kind]
    assert found, kind
    return found


def names(text: str) -> list[str]:
    """The words in backticks."""
    return re.findall(r"`([^`]+)`", text)


def test_guide_commands_cover_every_script() -> None:
    used = [arguments[0] for arguments in commands()]
    assert used.count("train") >= 13  # three in Training, ten in Troubleshooting
    assert used.count("study") >= 4
    assert {"filter", "train", "generate", "evaluate", "study"} == set(used)


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_parse_takes_every_command_of_the_guide(arguments: list[str], trained_run: Path) -> None:
    if "--resume-from" in arguments:  # its settings come from the checkpoint, so one must exist
        last = str(max(trained_run.glob("adapter_step_*.safetensors")))
        arguments = [last if argument.endswith("step_1000.safetensors") else argument for argument in arguments]
    config = cli.parse(arguments).config
    assert isinstance(config, cli.COMMANDS[arguments[0]][0])
    for flag, value in pairwise(arguments):
        if flag == "--drift-weight":
            assert config.text_drift_weight == float(value)
        elif flag in ("--trials", "--jobs", "--eval-samples", "--batch-size", "--eval-interval"):
            assert getattr(config, flag.removeprefix("--").replace("-", "_")) == int(value)


def test_guide_names_have_all_kinds() -> None:
    kinds = {"import", "setting", "searched", "metric", "record", "file", "package", "advice"}
    assert {cells[0] for cells in table_rows("guide names")} == kinds


@pytest.mark.parametrize("row", rows("import"), ids=lambda row: row.guide)
def test_elmlib_exports_the_guides_imports(row: Row) -> None:
    (name,) = names(row.guide)
    assert row.here == f"`elmlib.{name}`"
    assert name in elmlib.__all__ and getattr(elmlib, name)


@pytest.mark.parametrize("row", rows("setting"), ids=lambda row: row.guide)
def test_training_config_has_the_defaults_of_the_table(row: Row) -> None:
    (name,) = names(row.guide)
    assert str(getattr(SummaryTrainingConfig(), name)) == row.here.removeprefix("offline: ")


def test_guide_space_has_the_ranges_of_the_table() -> None:
    expected = {}
    for row in rows("searched"):
        span = re.fullmatch(r"(\S+) to ([^\s,]+)(, log)?", row.here)
        values = row.here.split(", ")
        expected[names(row.guide)[0]] = (
            FloatDistribution(float(span[1]), float(span[2]), log=bool(span[3]))
            if span
            else CategoricalDistribution([int(value) for value in values])
        )
    assert expected == GUIDE_SPACE


def test_result_has_the_guides_metrics_beside_their_controls(trained_run: Path) -> None:
    result = json.loads((trained_run / "result.json").read_text())
    for row in rows("metric"):
        for name in names(row.here):
            assert name in result, name
            if name.startswith(("bertscore", "drift")):
                assert f"{name}_shuffled" in result, name


def test_record_has_the_guides_fields(small_data: Path) -> None:
    fields = names(rows("record")[0].here)
    line = (small_data / "synthesis" / "train_synthesis.jsonl").read_text().splitlines()[0]
    assert set(fields) <= set(json.loads(line)) and set(fields) <= set(Record.__struct_fields__)


def test_files_are_where_the_table_says(small_data: Path, trained_run: Path) -> None:
    for row in rows("file"):
        (name,) = names(row.here)
        assert (small_data / name).is_file() or (trained_run / name).is_file(), name


def test_dependencies_have_the_guides_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["summary"]]
    have = {re.split(r"[>=<\[]", requirement)[0] for requirement in wanted}
    assert set(names(rows("package")[0].here)) <= have


def test_advice_names_settings_that_exist() -> None:
    for row in rows("advice"):
        for name in names(row.here):
            assert name in SummaryTrainingConfig.__dataclass_fields__, name


def test_parse_takes_every_command_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if re.match(r"elm |accelerate ", line)]
    assert len(lines) >= 12
    for line in lines:
        assert cli.parse(shlex.split(re.sub(r"^elm |^accelerate .* elmlib\.cli ", "", line), comments=True))


def test_readme_links_to_files_that_exist() -> None:
    for page in ("README.md", "notebooks/README.md", "papermill_runs/RESULTS.md", "elmlib/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)]+)\)", text):
            assert (ROOT / page).parent.joinpath(link).is_file(), f"{page}: {link}"
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
