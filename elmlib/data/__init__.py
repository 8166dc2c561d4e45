"""Records, embeddings, prompts and splits. Names load when they are first used, so that light ones load no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # isort: off
    from elmlib.data.corpus import build_corpus
    from elmlib.data.dataset import Batch, PromptBatch, SummaryDataset
    from elmlib.data.dataset import epoch_batches, load_batches, load_split, locate_split
    from elmlib.data.filtering import filter_corpus
    from elmlib.data.prompts import IGNORE_INDEX, SLOT, TASK_TEMPLATES, PromptIds, check_template, prompt_ids
    from elmlib.data.records import SPLITS, EmbeddingFile, Record, SplitPaths, atomic_path, build_once, cache_folder
    from elmlib.data.records import check_rows, file_digest, find_embeddings, find_records, find_split, parse_line
    from elmlib.data.records import read_lines, read_records, write_embeddings, write_json
    from elmlib.data.reports import CorpusReport, FilterReport
    # isort: on

_HOMES = {
    "corpus": "build_corpus",
    "dataset": "Batch PromptBatch SummaryDataset epoch_batches load_batches load_split locate_split",
    "filtering": "filter_corpus",
    "prompts": "IGNORE_INDEX SLOT TASK_TEMPLATES PromptIds check_template prompt_ids",
    "records": "SPLITS EmbeddingFile Record SplitPaths atomic_path build_once cache_folder check_rows file_digest "
    "find_embeddings find_records find_split parse_line read_lines read_records write_embeddings write_json",
    "reports": "CorpusReport FilterReport",
}
__all__ = [name for names in _HOMES.values() for name in names.split()]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
