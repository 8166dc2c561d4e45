"""elmlib: a frozen language model learns to read a text embedding.

The names below are imported when they are first used: `import elmlib` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "SummaryTrainingConfig": "config",
    "CorpusConfig": "commands",
    "FilterConfig": "commands",
    "build_corpus": "corpus",
    "filter_corpus": "filtering",
    "BERTScoreEvaluator": "bertscore",
    "create_evaluator": "bertscore",
    "Elm": "hub",
    "generate_file": "generation",
    "load_elm": "generation",
    "train": "trainer",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'elmlib' has no attribute {name!r}")
    return getattr(import_module(f"elmlib.{_HOMES[name]}"), name)
