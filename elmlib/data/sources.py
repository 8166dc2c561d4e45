"""Sources of pairs of text and summary: docstrings (their first paragraph), a JSONL file, a Hugging Face dataset."""

import ast
import os
import re
import reprlib
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from multiprocessing import get_context
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from elmlib.config import CorpusConfig, InputError
from elmlib.data.records import parse_line, read_lines

SUMMARY_WORDS = range(4, 31)
MIN_TEXT_WORDS = 25
# A list, and not what elmlib requires: a change of its requirements would draw another corpus.
PACKAGES = Path(__file__).with_name("packages.txt")
_NO_MODULES = {"..", "test", "tests", "idle_test"}
_FILES_A_PROCESS = 128  # starting a process takes longer than parsing fewer
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
_SURROGATE = re.compile("[\ud800-\udfff]")  # from an escape in a string literal; UTF-8 cannot hold it

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Documented = ast.Module | ast.ClassDef | _Function


class Pair(NamedTuple):
    """A text with its summaries, keywords and category; pairs of one group stay in one split."""

    source_id: str
    group: str
    text: str
    summaries: tuple[str, ...]
    keywords: tuple[str, ...] = ()
    category: str = ""


def read_source(config: CorpusConfig, progress: bool) -> tuple[list[Pair], list[str]]:
    """The pairs that `config.source` names, and `module: reason` of each Python file that could not be read."""
    if config.source == "docstrings":
        return read_docstrings(source_files(), progress)
    is_jsonl = config.source.endswith(".jsonl") or Path(config.source).is_file()
    return (jsonl_pairs if is_jsonl else dataset_pairs)(config), []


def jsonl_pairs(config: CorpusConfig) -> list[Pair]:
    """One pair a line; errors name the file and the line."""
    path = Path(config.source)
    lines = ((number, f"{path}, line {number}", line) for number, line in read_lines(path))
    return [_row_pair(parse_line(line, at), f"{path.name}:{number:08d}", at, config) for number, at, line in lines]


def dataset_pairs(config: CorpusConfig) -> list[Pair]:
    """One pair a row of a dataset: a folder that `save_to_disk` wrote, a folder of data files or a name on the hub."""
    import datasets  # a second to import, and only this function needs it

    source, split = config.source, config.dataset_split
    try:
        if any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(source)
            if isinstance(rows, dict):
                if split not in rows:
                    raise InputError(f"expected one of the splits {', '.join(rows)}")
                rows = rows[split]
        else:
            rows = datasets.load_dataset(source, config.dataset_config or None, split=split)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"dataset {source!r} cannot be read: {error}. Where the hub is out of reach, run "
            f"`datasets.load_dataset({source!r}, {config.dataset_config or None!r}, split={split!r})"
            ".save_to_disk('folder')` on a machine that reaches "
            "it, copy the folder here and give it as the source"
        ) from error
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # of datasets: a script, a damaged folder
        reason = str(error).partition("\nExample of usage")[0]
        hint = "; choose one with --dataset-config" if "onfig" in reason else ""
        raise InputError(f"dataset {source!r}, split {split!r}: {reason}{hint}") from error
    name = Path(source).name
    return [_row_pair(row, f"{name}:{at:08d}", f"{source}, row {at}", config) for at, row in enumerate(rows)]


def _row_pair(row: Any, source_id: str, where: str, config: CorpusConfig) -> Pair:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")

    def strings(name: str, several: bool = False) -> tuple[str, ...]:
        if name not in row:
            raise InputError(f"{where}: expected the field {name!r}, found {', '.join(row) or 'no field'}")
        values = row[name] if several and isinstance(row[name], list) else [row[name]]
        if not values or not all(map(_is_text, values)):
            expected = "text that is not blank" + (", or a list of such" if several else "")
            raise InputError(f"{where}: field {name!r} is {reprlib.repr(row[name])}; expected {expected}")
        return tuple(values)

    group = source_id
    if config.group_field:
        value = row.get(config.group_field)
        group = str(value) if isinstance(value, int) else strings(config.group_field)[0]
    text, summaries = strings(config.text_field)[0], strings(config.summary_field, several=True)
    # Both are optional: a field of that name with another meaning, and so another type, is ignored.
    keywords, category = row.get("keywords"), row.get("category")
    keywords = [keywords] if isinstance(keywords, str) else keywords
    if not isinstance(keywords, list) or not all(map(_is_text, keywords)):
        keywords = []
    return Pair(source_id, group, text, summaries, tuple(keywords), str(category) if _is_text(category) else "")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def documented_packages() -> list[Distribution]:
    """Those of PACKAGES that are installed, ordered by name."""
    found = []
    for name in PACKAGES.read_text(encoding="utf-8").split():
        with suppress(PackageNotFoundError):  # of an extra that was not asked for
            found.append(distribution(name))
    return found


def source_files() -> list[tuple[str, Path]]:
    """(module, file) of the standard library and of PACKAGES, tests left out, ordered by module."""
    library = Path(sysconfig.get_path("stdlib"))
    paths: dict[PurePath, Path] = {path.relative_to(library): path for path in library.rglob("*.py")}
    paths = {name: path for name, path in paths.items() if name.parts[0].removesuffix(".py") in sys.stdlib_module_names}
    for package in documented_packages():
        for file in package.files or ():
            if file.suffix == ".py":
                paths[PurePath(file)] = Path(str(package.locate_file(file)))
    files = []
    for name, path in paths.items():
        parts = name.with_suffix("").parts
        if _NO_MODULES.isdisjoint(parts) and all(part.isidentifier() for part in parts):
            files.append((".".join(parts).removesuffix(".__init__"), path))
    return sorted(files)


def read_docstrings(files: list[tuple[str, Path]], progress: bool) -> tuple[list[Pair], list[str]]:
    """The pairs of all files in their order, and what could not be read; of one name (overloads) the first stays."""
    pairs: dict[str, Pair] = {}
    skipped: list[str] = []
    workers = min(os.cpu_count() or 1, 1 + len(files) // _FILES_A_PROCESS)
    # spawn: torch has threads by the time this is called, and a forked copy of them may hang
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        results = pool.map(file_pairs, files, chunksize=32)
        bar = tqdm(results, total=len(files), desc="docstrings", unit="file", disable=not progress)
        for (module, _), (found, error) in zip(files, bar, strict=True):
            for pair in found:
                pairs.setdefault(pair.source_id, pair)
            if error:
                skipped.append(f"{module}: {error}")
    return list(pairs.values()), skipped


def file_pairs(source: tuple[str, Path]) -> tuple[list[Pair], str]:
    """The pairs of one (module, file) in source order, or none and the reason why it cannot be read."""
    module, path = source
    try:
        code = path.read_bytes()
        if b'"""' not in code and b"'''" not in code:  # most files without docstrings; parsing is the slow part
            return [], ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes like "\d" in other people's strings
            tree = ast.parse(code.decode("utf-8-sig"))
        found = [_pair(node, name, module) for name, node in _definitions(tree, module)]
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        return [], f"{type(error).__name__}: {error}"
    return [pair for pair in found if pair], ""


def _definitions(node: ast.AST, name: str) -> Iterator[tuple[str, _Documented]]:
    if isinstance(node, _Documented):
        yield name, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | _Function):
            yield from _definitions(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):  # no definition hides in an expression
            yield from _definitions(child, name)


def _pair(node: _Documented, name: str, module: str) -> Pair | None:
    doc = ast.get_docstring(node) or ""
    first, *rest = _BLANK_LINES.split(doc, maxsplit=1)
    words = first.split()
    if not rest or len(words) not in SUMMARY_WORDS or len(rest[0].split()) < MIN_TEXT_WORDS or _SURROGATE.search(doc):
        return None
    return Pair(name, module, rest[0], (" ".join(words),), _parameters(node), module.partition(".")[0])


def _parameters(node: _Documented) -> tuple[str, ...]:
    """Parameters by name, without *args and **kwargs, which say nothing about the text."""
    if isinstance(node, ast.ClassDef):
        return next((_parameters(it) for it in node.body if isinstance(it, _Function) and it.name == "__init__"), ())
    if isinstance(node, ast.Module):
        return ()
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return tuple(it.arg for it in arguments if it.arg not in ("self", "cls"))
