"""The public `Elm`: it is saved and loaded with the same summaries and scores, and with no other models."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from huggingface_hub import HfApi
from transformers import LlamaConfig, LlamaForCausalLM

from elmlib import Elm
from elmlib.config import OFFLINE_EMBEDDER, InputError
from elmlib.models import Sampling

TEXTS = ["Each day the parser opens the file and then it rests until noon.", "The garden sorts two keys."]


@pytest.fixture(scope="module")
def elm(trained_run: Path) -> Elm:
    return Elm.from_pretrained(trained_run)


@pytest.fixture
def run(trained_run: Path) -> Path:
    return trained_run


def test_summarize_takes_arrays_and_tensors_and_samples(elm: Elm) -> None:
    vectors = elm.embed(TEXTS)
    summaries = elm.summarize(vectors)
    assert vectors.shape == (2, 384) and len(summaries) == 2
    assert elm.summarize(torch.from_numpy(vectors[:1])) == summaries[:1]
    drawn = elm.summarize(vectors, sampling=Sampling(count=3, temperature=1.0))
    assert len(drawn) == 2
    assert elm.metrics["bertscore_f1_shuffled"] < 1
    np.testing.assert_allclose(elm.mean_vector(), elm.model.adapter.mean.numpy())


def test_save_pretrained_keeps_summaries_and_scores_with_their_controls(
    elm: Elm, tiny_llm: Path, tmp_path: Path
) -> None:
    elm.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "best_summary_model.safetensors", "config.json", "README.md",
    }  # fmt: skip
    about = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (
        about["llm"] == tiny_llm.name and about["embedding_model"] == OFFLINE_EMBEDDER and about["embedding_revision"]
    )
    assert str(tiny_llm) not in json.dumps(about), "paths of this machine must not be published"
    card = (tmp_path / "saved" / "README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("| BERTScore F1 |"))
    assert f"{elm.metrics['bertscore_f1']:.3f} | {elm.metrics['bertscore_f1_shuffled']:.3f}" in line
    again = Elm.from_pretrained(tmp_path / "saved", llm_model=str(tiny_llm))
    vectors = elm.embed(TEXTS)
    assert again.summarize(vectors) == elm.summarize(vectors)
    assert again.metrics == elm.metrics


def test_push_to_hub_is_private_by_default(elm: Elm, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Repository:
        repo_id = "me/adapter"

    def create(_: HfApi, repo_id: str, private: bool | None, **__: Any) -> Repository:
        calls.append((repo_id, private))
        return Repository()

    def upload(_: HfApi, folder_path: Path, **__: Any) -> str:
        calls.append(("files", sorted(path.name for path in Path(folder_path).iterdir())))
        return "url"

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert elm.push_to_hub("me/adapter") == "url"
    elm.push_to_hub("me/adapter", private=False)
    files = ["README.md", "best_summary_model.safetensors", "config.json"]
    assert calls == [("me/adapter", True), ("files", files), ("me/adapter", False), ("files", files)]


def test_from_pretrained_refuses_another_llm_embedder_or_size(
    elm: Elm, run: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"LLM .*{tiny_llm.name}; smollm2-135m-instruct is another"):
        Elm.from_pretrained(run, llm_model="smollm2-135m-instruct")
    with pytest.raises(InputError, match=rf"embedder {OFFLINE_EMBEDDER}; Qwen/Qwen3-Embedding-4B is another"):
        Elm.from_pretrained(run, embedding_model="Qwen/Qwen3-Embedding-4B")
    tokenizer = make_tokenizer()
    other = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                        num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    folder = tmp_path / "elsewhere" / tiny_llm.name
    LlamaForCausalLM(other).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"token embeddings of size 16; .* writes 32"):
        Elm.from_pretrained(run, llm_model=str(folder))
    with pytest.raises(InputError, match=rf"shape \(1, 8\); this adapter reads \(n, 384\), of {OFFLINE_EMBEDDER}"):
        elm.summarize(np.zeros((1, 8), np.float32))


def test_embed_refuses_another_version_of_a_wheel(elm: Elm, tiny_llm: Path, tmp_path: Path) -> None:
    elm.save_pretrained(tmp_path / "saved")
    about = tmp_path / "saved" / "config.json"
    values = json.loads(about.read_text())
    about.write_text(json.dumps(values | {"embedding_revision": "0.0.1"}))
    elm = Elm.from_pretrained(tmp_path / "saved", llm_model=str(tiny_llm))
    with pytest.raises(
        InputError, match=rf"{OFFLINE_EMBEDDER} is installed as {values['embedding_revision']}; .* 0\.0\.1"
    ):
        elm.embed(TEXTS)


def test_from_pretrained_names_what_is_no_adapter(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"best_summary_model\.safetensors does not exist"):
        Elm.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no adapter 'papermill_runs/never-run': there is no such folder"):
        Elm.from_pretrained("papermill_runs/never-run", local_files_only=True)
    with pytest.raises(InputError, match="no adapter '/no/such/folder'"):
        Elm.from_pretrained("/no/such/folder")
    assert Elm.from_pretrained(run / "best_summary_model.safetensors").metrics
    shutil.copy(run / "best_summary_model.safetensors", tmp_path / "alone.safetensors")
    elm = Elm.from_pretrained(tmp_path / "alone.safetensors")
    assert elm.metrics == {}
    elm.save_pretrained(tmp_path / "saved")
    assert "No scores were saved" in (tmp_path / "saved" / "README.md").read_text()


def test_summarize_reads_bfloat16_tensors_with_candidates(elm: Elm) -> None:
    vectors = torch.from_numpy(elm.embed(TEXTS)).to(torch.bfloat16).requires_grad_()
    sampling = Sampling(count=2, temperature=1.0)
    same = vectors.detach().float().numpy()
    assert elm.summarize(vectors, 4) == elm.summarize(same, 4)
    assert elm.summarize(vectors, 4, sampling) == elm.summarize(same, 4, sampling)


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "NaN or infinite"), (-np.inf, "NaN or infinite"), (0, "all zero")]
)
def test_summarize_refuses_a_bad_row_with_its_number(elm: Elm, value: float, reason: str) -> None:
    vectors = np.ones((70, 384), np.float32)
    vectors[66] = value
    with pytest.raises(InputError, match=f"row 66 is {reason}"):
        elm.summarize(vectors, sampling=Sampling(count=2))
