"""The files that describe the project agree with one another, and the packages with the plan of the house."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "elmlib").rglob("*.py"))
ORDER = ("config", "data", "models", "evaluation", "training", "inference", "study", "plots", "cli")
"""A package imports only from packages to its left."""


def package_of(module: Path) -> str:
    parts = module.relative_to(ROOT / "elmlib").with_suffix("").parts
    return parts[0]


def imported_packages(module: Path) -> list[tuple[int, str]]:
    """(line, package) of every import of elmlib's own packages, those inside functions too."""
    names: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "elmlib":
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("elmlib."):
            names.append((node.lineno, str(node.module).split(".")[1]))
        elif isinstance(node, ast.Import):
            names += [(node.lineno, n.name.split(".")[1]) for n in node.names if n.name.startswith("elmlib.")]
    return names


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(module: Path) -> None:
    own = package_of(module)
    if own == "__init__":  # the public names
        return
    allowed = ORDER[: ORDER.index(own) + 1]
    for line, package in imported_packages(module):
        assert package in allowed, f"{module.relative_to(ROOT)}:{line} imports {package}, which is to its right"


def test_the_house_does_not_grow() -> None:
    """The bounds of the plan; the package fronts' `.pyi` files, which repeat names, are not counted."""
    lines = {module: len(module.read_text(encoding="utf-8").splitlines()) for module in MODULES}
    assert {package_of(module) for module in MODULES} <= {*ORDER, "__init__"}
    assert len(MODULES) <= 45 and sum(lines.values()) <= 7300, (len(MODULES), sum(lines.values()))
    assert max(lines.values()) <= 350, {str(path): count for path, count in lines.items() if count > 350}
    for folder in {module.parent for module in MODULES}:
        assert len(list(folder.glob("*.py"))) <= 9, folder
        assert lines[folder / "__init__.py"] <= 45, folder


def test_every_name_of_a_package_front_is_there() -> None:
    code = (
        "import importlib\n"
        f"for name in ['elmlib', *('elmlib.' + p for p in {ORDER[:-1]!r})]:\n"
        "    package = importlib.import_module(name)\n"
        "    for public in package.__all__:\n"
        "        getattr(package, public)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.heavy
def test_a_wheel_in_an_empty_environment_has_every_module(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: setuptools leaves its build folder beside pyproject.toml
    shutil.copytree(ROOT / "elmlib", source / "elmlib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("elmlib-*.whl")
    venv.create(tmp_path / "env", with_pip=True, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "--quiet", "install", "--no-deps", str(wheel)], check=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES]
    # The dependencies, several GB of them, are lent by this environment; elmlib itself comes from the wheel.
    lent = next(path for path in sys.path if path.endswith("site-packages"))
    code = (
        f"import sys, importlib; sys.path.append({lent!r})\n"
        f"modules = [importlib.import_module(name) for name in {names!r}]\n"
        f"assert all(module.__file__.startswith({str(site)!r}) for module in modules)"
    )
    subprocess.run([str(python), "-c", code], cwd=tmp_path, check=True)


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
    assert len(notebooks) == 6
    for path in notebooks:
        cells = json.loads(path.read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code), path
        assert code[0]["metadata"]["tags"] == ["parameters"], path
        for node in ast.parse("".join(code[0]["source"])).body:
            assert isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant), ast.unparse(node)


def test_notebooks_import_elmlib_from_its_fronts() -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            for module in re.findall(r"^\s*from (elmlib[\w.]*) import", "".join(cell["source"]), re.MULTILINE):
                assert module.count(".") <= 1, f"{path.name}: {module} is an inner module"


@pytest.mark.parametrize("name", ["elmlib", "elmlib.data", "elmlib.plots.curves", "elmlib.study.search_space"])
def test_a_light_import_loads_no_torch(name: str) -> None:
    code = f"import sys, {name}; print([name for name in ('torch', 'transformers', 'wandb') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
