"""The closed formula of `elm plan` agrees with traces of the code that trains, and with a measured step."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest

from elmlib.config import PlanConfig
from elmlib.models.plan import GIB, parse_memory, plan_step, plan_training, read_shape

SMALL = PlanConfig()
LARGE = PlanConfig(llm_model_name="Qwen/Qwen3-4B-Instruct-2507", embedding_dim=2560)
# Peak bytes and operations of one step, traced with fake tensors through the code of commit 34c5200 (torch 2.13.0,
# transformers 5.24.0): settings, batch size, checkpointing, peak MiB, TFLOP.
TRACED = [
    (replace(SMALL, answer_tokens=24, bf16=False), 4, False, 945.7, 0.064),
    (replace(SMALL, answer_tokens=24, bf16=False), 4, True, 852.4, 0.196),
    (replace(SMALL, answer_tokens=128, bf16=False), 16, False, 3217.8, 1.151),
    (replace(SMALL, answer_tokens=128, bf16=False), 16, True, 1272.1, 1.944),
    (replace(SMALL, answer_tokens=128), 16, False, 2075.3, 1.151),
    (replace(SMALL, answer_tokens=128, fused_attention=False), 16, False, 2590.0, 1.233),
    (replace(SMALL, answer_tokens=128), 4, True, 778.7, 0.486),
    (LARGE, 8, False, 15555.9, 17.296),
    (LARGE, 8, True, 10680.6, 30.890),
    (LARGE, 32, False, 31940.9, 69.183),
    (LARGE, 32, True, 12432.3, 123.560),
    (replace(LARGE, bf16=False), 8, False, 26701.4, 17.296),
    (replace(LARGE, fused_attention=False), 8, False, 16536.6, 17.646),
    (replace(LARGE, answer_tokens=512), 1, True, 10203.5, 12.141),
]


@pytest.mark.parametrize(("config", "batch_size", "checkpointing", "peak", "flops"), TRACED)
def test_plan_step_equals_a_trace(
    config: PlanConfig, batch_size: int, checkpointing: bool, peak: float, flops: float
) -> None:
    step = plan_step(config, read_shape(config.llm_model_name), batch_size, checkpointing)
    assert step.step / 2**20 == pytest.approx(peak, rel=0.02)
    assert step.flops / 1e12 == pytest.approx(flops, rel=0.1)


def test_plan_answers_within_two_seconds_and_loads_no_torch() -> None:
    started = time.perf_counter()
    code = (
        "import sys; from elmlib import cli; cli.main(['plan', '--preset', 'qwen3-4b']); print('torch' in sys.modules)"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    assert printed[-1] == "False" and "16GiB" in "".join(printed)
    assert time.perf_counter() - started < 10  # 2 s on an idle machine


def test_fits_frame_holds_margin_and_context_and_grows_with_the_card() -> None:
    estimate = plan_training(replace(LARGE, evaluation_device="cpu", gpu_memory=("4GiB", "16GiB", "40GiB", "80GiB")))
    plain, checkpointed = (estimate.fits_frame()[name].tolist() for name in estimate.fits_frame())
    assert plain == sorted(plain) and plain[0] == 0 and checkpointed[-1] > plain[-1] > 0
    assert all(more >= less for more, less in zip(checkpointed, plain, strict=True))
    assert estimate.card_bytes(8, False) > 1.1 * estimate.estimate(8, False).step
    assert estimate.card_bytes(plain[2], False) <= 40 * GIB < estimate.card_bytes(2 * plain[2], False)


def test_plan_refuses_a_mixture_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("elmlib.models.plan").models.plan.SHAPES, "moe", {"num_experts": 8})
    with pytest.raises(ValueError, match="moe is a mixture of experts"):
        plan_training(replace(SMALL, llm_model_name="moe"))


@pytest.mark.parametrize(("text", "size"), [("16GiB", 16 * GIB), ("40GB", 40e9), ("512", 512)])
def test_parse_memory(text: str, size: float) -> None:
    assert parse_memory(text) == size


def test_parse_memory_refuses_other_units() -> None:
    with pytest.raises(ValueError, match="expected a size such as 16GiB"):
        parse_memory("16 bananas")
