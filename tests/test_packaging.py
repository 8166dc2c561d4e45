"""The files that describe the project agree with one another and with the plan of its modules."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "elmlib").glob("*.py"))

# Data walks one way: a module imports only from modules above it.
LAYERS = [
    "config",
    "settings",
    "commands",
    "study_commands",
    "benchmark_commands",
    "prompts",
    "layout",
    "records",
    "sources",
    "corpus",
    "leaks",
    "lines",
    "reports",
    "filtering",
    "caching",
    "pretrained",
    "shapes",
    "data",
    "decoding",
    "ridge",
    "adapter",
    "fits",
    "model",
    "losses",
    "drift",
    "teacher",
    "checkpoint",
    "quality",
    "encodings",
    "bertscore",
    "evaluation",
    "identification",
    "significance",
    "workbench",
    "objective",
    "schedule",
    "sharding",
    "validation",
    "tracking",
    "trainer",
    "controls",
    "generation",
    "scorecard",
    "plots",
    "tables",
    "hub",
    "exploring",
    "widgets",
    "watching",
    "report_plots",
    "ablation_plots",
    "ablation",
    "forking",
    "execution",
    "demo",
    "space",
    "storage",
    "live",
    "search",
    "tally",
    "trial",
    "notes",
    "results",
    "worker",
    "study",
    "study_plots",
    "racing",
    "resident",
    "naive",
    "contests",
    "attempts",
    "files_contests",
    "tracing",
    "planning",
    "memory",
    "benchmark_tables",
    "benchmark_plots",
    "benchmark",
    "foresight",
    "actions",
    "cli",
    "__main__",
]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_from_modules_above_it(module: Path) -> None:
    if module.stem == "__init__":
        return
    above = set(LAYERS[: LAYERS.index(module.stem)])
    for node in ast.walk(ast.parse(module.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module == "elmlib":
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("elmlib."):
            names = [node.module.split(".")[1]]
        for name in names:
            assert name in above, f"{module.name}:{node.lineno} imports {name}, which stands below it"


def test_environment_names_no_versions_and_only_extras_that_exist() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python, pip, nested = environment["dependencies"]
    assert python.startswith("python=") and pip == "pip"
    (requirement,) = nested["pip"]
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", requirement)[1].split(",")
    assert set(extras) == set(project["optional-dependencies"])
    assert f">={python.removeprefix('python=')}" == project["requires-python"]


def test_every_dependency_says_why_it_is_there() -> None:
    for line in (ROOT / "pyproject.toml").read_text().splitlines():
        if re.match(r'    "[a-z]', line) and ">=" in line:
            assert "#" in line, line


def test_notebooks_are_committed_without_outputs_and_begin_with_parameters() -> None:
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        cells = json.loads(path.read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code), path
        assert code[0]["metadata"]["tags"] == ["parameters"], path
        for node in ast.parse("".join(code[0]["source"])).body:
            assert isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant), ast.unparse(node)


def test_import_is_light() -> None:
    code = "import sys, elmlib; print([name for name in ('torch', 'transformers', 'wandb') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
