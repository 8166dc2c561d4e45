"""The closed formula of `elm plan` agrees with traces of the code that trains, and with a measured step."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from elmlib.config import OFFLINE_EMBEDDER, OFFLINE_LLM, InputError, PlanConfig
from elmlib.models.plan import GIB, SHAPES, Shape, plan_step, plan_training, read_shape

SMALL = PlanConfig()
LARGE = PlanConfig(llm_model_name="Qwen/Qwen3-4B-Instruct-2507", embedding_dim=2560)
# Peak bytes and operations of one step, traced with fake tensors through the code of commit 34c5200 (torch 2.13.0,
# transformers 5.24.0): settings, batch size, checkpointing, peak MiB, TFLOP. That code kept each norm in float32, which
# decides no peak of these settings.
TRACED = [
    (replace(SMALL, answer_tokens=24, use_bf16=False), 4, False, 945.7, 0.064),
    (replace(SMALL, answer_tokens=24, use_bf16=False), 4, True, 852.4, 0.196),
    (replace(SMALL, answer_tokens=128, use_bf16=False), 16, False, 3217.8, 1.151),
    (replace(SMALL, answer_tokens=128, use_bf16=False), 16, True, 1272.1, 1.944),
    (replace(SMALL, answer_tokens=128), 4, True, 778.7, 0.486),
    (LARGE, 8, True, 10680.6, 30.890),
    (LARGE, 32, True, 12432.3, 123.560),
    (replace(LARGE, use_bf16=False), 8, False, 26701.4, 17.296),
    (replace(LARGE, answer_tokens=512), 1, True, 10203.5, 12.141),
]


MEASURED = [(8, 24, 10.718), (32, 24, 14.670), (128, 24, 29.268), (32, 128, 28.420)]  # rows, tokens, peak GiB: an H100


@pytest.mark.parametrize(("rows", "tokens", "peak"), MEASURED)
def test_plan_step_equals_a_measured_peak(rows: int, tokens: int, peak: float) -> None:
    step = plan_step(replace(LARGE, answer_tokens=tokens), read_shape(LARGE.llm_model_name), rows, False)
    assert step.memory / GIB == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize(("config", "batch_size", "checkpointing", "peak", "flops"), TRACED)
def test_plan_step_equals_a_trace(
    config: PlanConfig, batch_size: int, checkpointing: bool, peak: float, flops: float
) -> None:
    step = plan_step(config, read_shape(config.llm_model_name), batch_size, checkpointing)
    assert step.memory / 2**20 == pytest.approx(peak, rel=0.02)
    assert step.operations / 1e12 == pytest.approx(flops, rel=0.1)


def test_plan_answers_within_two_seconds_and_loads_no_torch() -> None:
    started = time.perf_counter()
    code = (
        "import sys; from elmlib import cli; cli.main(['plan', '--preset', 'qwen3-4b']); print('torch' in sys.modules)"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    assert printed[-1] == "False" and "largest batch size on a card of 16 GiB" in "".join(printed)
    assert time.perf_counter() - started < 10  # 2 s on an idle machine


def test_plan_training_holds_margin_and_context_and_the_batch_size_grows_with_the_card() -> None:
    frame = plan_training(replace(LARGE, evaluation_device="cpu", gpu_memory=(4, 16, 40, 80)))
    largest = frame[frame.index.str.startswith("largest")]
    plain, checkpointed = (largest[name].astype(int).tolist() for name in ("plain", "checkpointing"))
    assert plain == sorted(plain) and plain[0] == 0 and checkpointed[-1] > plain[-1] > 0
    assert all(more >= less for more, less in zip(checkpointed, plain, strict=True))
    shape = read_shape(LARGE.llm_model_name)
    assert frame.plain["frozen llm"] == pytest.approx(2 * shape.parameters / GIB, abs=0.01)
    total, step = frame.plain["total, batch size 16"], plan_step(LARGE, shape, 16, False)
    assert total == pytest.approx(1.1 * step.memory / GIB + 0.5, abs=0.01)
    assert frame.plain[f"total, batch size {plain[2]}"] <= 40 < frame.plain[f"total, batch size {2 * plain[2]}"]


@pytest.mark.parametrize(
    ("kind", "is_bf16", "checkpointing", "peak"),
    [
        ("llama", False, False, 83.40), ("llama", False, True, 50.23), ("llama", True, True, 27.84),
        ("qwen3", False, False, 87.69), ("qwen3", True, True, 29.04),
        ("gemma3_text", False, False, 93.42), ("gemma3_text", True, True, 31.01),
    ],
)  # fmt: skip
def test_plan_step_equals_a_trace_where_activations_decide(
    kind: str, is_bf16: bool, checkpointing: bool, peak: float
) -> None:
    shape = Shape(kind, 256, 768, 6, 8, 1000, 2, 32, tie_word_embeddings=kind == "gemma3_text")
    config = PlanConfig(hidden_dim=32, embedding_dim=64, drift_top_k=1, answer_tokens=64, use_bf16=is_bf16)
    assert plan_step(config, shape, 8, checkpointing).memory / 2**20 == pytest.approx(peak, rel=0.05)


def test_plan_refuses_models_that_the_formula_does_not_describe(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    for config, message in (
        ({"model_type": "qwen3_moe", "vocab_size": 8, **sizes}, "is a 'qwen3_moe'; `elm plan` knows llama, "),
        ({"model_type": "gpt2", "n_embd": 8}, "no hidden_size, intermediate_size, num_hidden_layers"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=message):
            plan_training(replace(SMALL, llm_model_name=str(tmp_path)))


def test_read_shape_of_a_folder_is_that_of_the_loaded_model(tiny_llm: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(tiny_llm)
    assert read_shape(str(tiny_llm)).parameters == sum(weight.numel() for weight in loaded.parameters())


def test_shapes_have_the_parameters_of_their_models() -> None:
    # counted in the models that transformers builds of their configs
    counts = {
        OFFLINE_EMBEDDER: 22713216,
        "Qwen/Qwen3-Embedding-4B": 4021774336,
        "microsoft/deberta-xlarge-mnli": 640781312,
    }
    counts |= {OFFLINE_LLM: 134515008, "Qwen/Qwen3-4B-Instruct-2507": 4022468096}
    assert {name: shape.parameters for name, shape in SHAPES.items()} == pytest.approx(counts, rel=0.01)


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory of a process in /proc")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_plan_step_is_within_15_percent_of_a_measured_step(checkpointing: bool) -> None:
    size, length = 8, 48
    plan = replace(SMALL, use_bf16=False, batch_size=size, answer_tokens=length)
    script = Path(__file__).with_name("measured_step.py")
    command = [sys.executable, script, size, length, plan.prompt_tokens, int(checkpointing)]
    measured = int(subprocess.check_output(list(map(str, command)), text=True))
    planned = plan_step(plan, read_shape(plan.llm_model_name), size, checkpointing).memory
    assert planned == pytest.approx(measured, rel=0.15)
