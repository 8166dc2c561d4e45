from .corpus import build_corpus as build_corpus
from .dataset import Batch as Batch, PromptBatch as PromptBatch, SummaryDataset as SummaryDataset
from .filtering import filter_corpus as filter_corpus
from .prompts import (
    IGNORE_INDEX as IGNORE_INDEX,
    PromptIds as PromptIds,
    TASK_TEMPLATES as TASK_TEMPLATES,
    prompt_ids as prompt_ids,
)
from .records import (
    EmbeddingFile as EmbeddingFile,
    Record as Record,
    SPLITS as SPLITS,
    check_rows as check_rows,
    file_digest as file_digest,
    find_embeddings as find_embeddings,
    find_records as find_records,
    find_split as find_split,
    parse_line as parse_line,
    read_lines as read_lines,
    read_records as read_records,
    write_embeddings as write_embeddings,
    write_json as write_json,
)
