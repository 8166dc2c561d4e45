"""Where the files of a split lie, in the layouts that the guide names."""

from pathlib import Path
from typing import NamedTuple

SPLITS = ("train", "val", "test")


class SplitPaths(NamedTuple):
    """The two files of one split."""

    records: Path
    embeddings: Path


def find_split(data_dir: Path, split: str) -> SplitPaths:
    """The files of `split` under `synthesis/` and `embeddings/` of `data_dir`, or directly in it.

    Raises FileNotFoundError that names every place looked at.
    """
    records = find_records(Path(data_dir) / f"{split}_synthesis.jsonl")
    return SplitPaths(records, find_embeddings(records))


def find_records(path: Path) -> Path:
    """`path`, or the file of that name in `synthesis/` beside it: the guide names both.

    Raises FileNotFoundError that names both places.
    """
    return _first_existing([path, path.parent / "synthesis" / path.name], "`elm filter` writes it")


def find_embeddings(records: Path) -> Path:
    """The embeddings of a records file: in the same folder, or in `embeddings/` in or beside it.

    Raises FileNotFoundError that names every place looked at.
    """
    name = records.name.replace("_synthesis.jsonl", "_embeddings.safetensors")
    if name == records.name:
        raise FileNotFoundError(f"{records} is not named SPLIT_synthesis.jsonl; name its embeddings with --embeddings")
    folders = [records.parent, records.parent / "embeddings", records.parent.parent / "embeddings"]
    return _first_existing([folder / name for folder in folders], "`elm filter` writes it, or use --embeddings")


def _first_existing(places: list[Path], hint: str) -> Path:
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"no {places[0].name}: looked at {', '.join(map(str, places))}; {hint}")
