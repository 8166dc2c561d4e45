"""Sources of pairs of text and summary: docstrings, a JSONL file or a Hugging Face dataset.

The first paragraph of a docstring is the summary of the rest. Files are parsed; nothing is imported.
"""

import ast
import os
import re
import reprlib
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from multiprocessing import get_context
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tqdm.auto import tqdm

from elmlib.config import CorpusConfig
from elmlib.data.records import parse_line, read_lines

SUMMARY_WORDS = range(4, 31)
MIN_TEXT_WORDS = 25
_NO_MODULES = {"..", "test", "tests", "idle_test"}
_CHUNK = 32
_FILES_A_PROCESS = 128  # starting a process takes longer than parsing fewer
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
_SURROGATE = re.compile("[\ud800-\udfff]")  # from an escape in a string literal; UTF-8 cannot hold it

_Function = ast.FunctionDef | ast.AsyncFunctionDef


class Pair(NamedTuple):
    """A text with its summaries, keywords and category."""

    source_id: str
    group: str
    """Pairs of one group stay in one split."""
    text: str
    summaries: tuple[str, ...]
    """Several are variations of one another."""
    keywords: tuple[str, ...] = ()
    category: str = ""


class SourceFile(NamedTuple):
    """A Python file and the name it is imported under."""

    module: str
    path: Path


class SourcePairs(NamedTuple):
    """The pairs of a source, and the files that could not be read."""

    pairs: list[Pair]
    skipped: tuple[str, ...]
    """`module: reason` of each Python file that is not UTF-8 or does not parse."""


def jsonl_pairs(config: CorpusConfig) -> list[Pair]:
    """One pair a line. Raises FileNotFoundError for no such file; ValueError naming the line that is malformed."""
    path = Path(config.source)
    lines = ((number, f"{path}, line {number}", line) for number, line in read_lines(path))
    return [_row_pair(parse_line(line, at), f"{path.name}:{number:08d}", at, config) for number, at, line in lines]


def dataset_pairs(config: CorpusConfig) -> list[Pair]:
    """One pair a row of a dataset: a folder that `save_to_disk` wrote, a folder of data files or a name on the hub.

    Raises FileNotFoundError where it cannot be read; ValueError for an unknown split or a malformed row.
    """
    import datasets  # a second to import, and only this function needs it

    source, split = config.source, config.dataset_split
    try:
        if any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(source)
            if isinstance(rows, dict):
                if split not in rows:
                    raise ValueError(f"expected one of the splits {', '.join(rows)}")
                rows = rows[split]
        else:
            rows = datasets.load_dataset(source, split=split)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(
            f"dataset {source!r} cannot be read: {error}. Where the hub is out of reach, run "
            f"`datasets.load_dataset({source!r}, split={split!r}).save_to_disk('folder')` on a machine that reaches "
            "it, copy the folder here and give it as the source"
        ) from error
    except ValueError as error:
        raise ValueError(f"dataset {source!r}, split {split!r}: {error}") from error
    name = Path(source).name
    return [_row_pair(row, f"{name}:{at:08d}", f"{source}, row {at}", config) for at, row in enumerate(rows)]


def _row_pair(row: Any, source_id: str, where: str, config: CorpusConfig) -> Pair:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")

    def strings(name: str, several: bool = False) -> tuple[str, ...]:
        if name not in row:
            raise ValueError(f"{where}: expected the field {name!r}, found {', '.join(row) or 'no field'}")
        found = row[name] if several and isinstance(row[name], list) else [row[name]]
        if not found or not all(isinstance(it, str) and it.strip() for it in found):
            expected = "text that is not blank" + (", or a list of such" if several else "")
            raise ValueError(f"{where}: field {name!r} is {reprlib.repr(row[name])}; expected {expected}")
        return tuple(found)

    group = source_id
    if config.group_field:
        value = row.get(config.group_field)
        group = str(value) if isinstance(value, int) else strings(config.group_field)[0]
    # Both are optional: a field of that name with another meaning, and so another type, is ignored.
    keywords = row.get("keywords") or ()
    keywords = (keywords,) if isinstance(keywords, str) else keywords
    if not isinstance(keywords, list | tuple) or not all(isinstance(it, str) and it.strip() for it in keywords):
        keywords = ()
    category = row.get("category")
    category = category if isinstance(category, str) and category.strip() else ""
    text, summaries = strings(config.text_field)[0], strings(config.summary_field, several=True)
    return Pair(source_id, group, text, summaries, tuple(keywords), category)


def docstring_pairs(progress: bool) -> SourcePairs:
    """The docstrings of the standard library and of elmlib's installed dependencies, ordered by module.

    Raises PackageNotFoundError where elmlib is not installed, since its metadata lists the dependencies.
    """
    return read_files(source_files(), progress)


@cache
def dependencies(root: str = "elmlib") -> tuple[Distribution, ...]:
    """The installed distributions that `root` requires, directly or not, all its extras included, ordered by name.

    Raises PackageNotFoundError where `root` itself is not installed; a dependency that is not is passed over.
    """
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(root, extra) for extra in ["", *(distribution(root).metadata.get_all("Provides-Extra") or ())]]
    while waiting:
        name, extra = waiting.pop()
        name = canonicalize_name(name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            package = found[name] = distribution(name)
        except PackageNotFoundError:  # an extra that was not asked for
            continue
        for required in map(Requirement, package.requires or ()):
            if required.marker is None or required.marker.evaluate({"extra": extra}):
                waiting += [(required.name, wanted) for wanted in ["", *required.extras]]
    del found[canonicalize_name(root)]
    return tuple(found[name] for name in sorted(found))


def source_files() -> list[SourceFile]:
    """The modules of the standard library and of the dependencies, tests left out, ordered by module."""
    library = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(library) for path in library.rglob("*.py")]
    paths: dict[PurePath, Path] = {
        name: library / name for name in names if name.parts[0].removesuffix(".py") in sys.stdlib_module_names
    }
    for package in dependencies():
        for file in package.files or ():
            if file.suffix == ".py":
                paths[PurePath(file)] = Path(str(package.locate_file(file)))
    return sorted(SourceFile(_module(name), path) for name, path in paths.items() if _is_module(name))


def _is_module(name: PurePath) -> bool:
    parts = name.with_suffix("").parts
    return _NO_MODULES.isdisjoint(parts) and all(part.isidentifier() for part in parts)


def _module(name: PurePath) -> str:
    return ".".join(name.with_suffix("").parts).removesuffix(".__init__")


def read_files(files: list[SourceFile], progress: bool) -> SourcePairs:
    """The pairs of `files`, in their order; where a name comes twice (setters, overloads) the first stays."""
    pairs: dict[str, Pair] = {}
    skipped: list[str] = []
    for source, (found, error) in zip(files, _parse_all(files, progress), strict=True):
        for pair in found:
            pairs.setdefault(pair.source_id, pair)
        if error:
            skipped.append(f"{source.module}: {error}")
    return SourcePairs(list(pairs.values()), tuple(skipped))


def _parse_all(files: list[SourceFile], progress: bool) -> Iterator[tuple[list[Pair], str]]:
    workers = min(os.cpu_count() or 1, len(files) // _FILES_A_PROCESS)
    bar = {"total": len(files), "desc": "docstrings", "unit": "file", "disable": not progress}
    if workers < 2:
        yield from tqdm(map(file_pairs, files), **bar)
        return
    # spawn: torch has threads by the time this is called, and a forked copy of them may hang
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from tqdm(pool.map(file_pairs, files, chunksize=_CHUNK), **bar)


def file_pairs(source: SourceFile) -> tuple[list[Pair], str]:
    """The pairs of one file in source order, or none and the reason why it cannot be read."""
    try:
        code = source.path.read_bytes()
        if b'"""' not in code and b"'''" not in code:  # most files without docstrings; parsing is the slow part
            return [], ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # escapes like "\d" in other people's strings
            warnings.simplefilter("ignore", DeprecationWarning)
            tree = ast.parse(code.decode("utf-8-sig"))
        found = [_pair(node, name, source.module) for name, node in _definitions(tree, source.module)]
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        return [], f"{type(error).__name__}: {error}"
    return [pair for pair in found if pair], ""


def _definitions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.Module | ast.ClassDef | _Function]]:
    if isinstance(node, ast.Module | ast.ClassDef | _Function):
        yield name, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | _Function):
            yield from _definitions(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):  # no definition hides in an expression
            yield from _definitions(child, name)


def _pair(node: ast.Module | ast.ClassDef | _Function, name: str, module: str) -> Pair | None:
    first, *rest = _BLANK_LINES.split(ast.get_docstring(node) or "", maxsplit=1)
    words = first.split()
    if not rest or len(words) not in SUMMARY_WORDS or len(rest[0].split()) < MIN_TEXT_WORDS:
        return None
    if _SURROGATE.search(first + rest[0]):
        return None
    return Pair(name, module, rest[0], (" ".join(words),), _parameters(node), module.partition(".")[0])


def _parameters(node: ast.Module | ast.ClassDef | _Function) -> tuple[str, ...]:
    """Parameters by name, without *args and **kwargs, which say nothing about the text."""
    if isinstance(node, ast.ClassDef):
        return next((_parameters(it) for it in node.body if isinstance(it, _Function) and it.name == "__init__"), ())
    if isinstance(node, ast.Module):
        return ()
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return tuple(it.arg for it in arguments if it.arg not in ("self", "cls"))
