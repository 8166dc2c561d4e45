"""Races are fair, a benchmark leaves whole files, and a plan says what a step then takes."""

import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from transformers import Gemma3TextConfig, LlamaConfig, PretrainedConfig

from elmlib.attempts import AS_IT_IS, attempts
from elmlib.benchmark import run_benchmark
from elmlib.benchmark_commands import BenchmarkConfig, PlanConfig
from elmlib.benchmark_tables import (
    SHORT,
    Comparison,
    Result,
    compare,
    comparison_frame,
    evaluation_share,
    read_benchmark,
    to_text,
)
from elmlib.config import OFFLINE_LLM, SummaryTrainingConfig
from elmlib.contests import short_steps
from elmlib.files_contests import peak_memory
from elmlib.memory import Point, measure_steps
from elmlib.planning import GIB, parse_memory, plan
from elmlib.planning import to_text as plan_text
from elmlib.racing import Timing, race, ratio
from elmlib.records import write_json
from elmlib.shapes import SHAPES, load_config
from elmlib.tracing import _count_layers, count_flops, trace_layers, trace_step
from elmlib.workbench import prepare


def test_the_peak_of_a_job_is_not_that_of_the_process_that_starts_it() -> None:
    held = np.ones(2**27)  # 1 GiB, resident
    assert peak_memory(np.ones, 2**25) > 2**28, "the job holds 256 MiB"
    assert peak_memory(int) < held.nbytes / 2


def test_contestants_take_turns_and_change_their_order() -> None:
    order: list[str] = []
    timings = race({name: [lambda name=name: order.append(name)] for name in "abc"}, turns=2)
    assert order == ["c", "b", "a", "a", "b", "c", "c", "b", "a"]  # the first turn warms up
    assert all(len(timing.seconds) == 2 for timing in timings.values())


def test_all_do_a_part_before_any_does_the_next_and_a_turn_is_the_sum() -> None:
    order: list[str] = []

    def part(name: str, number: int) -> None:
        time.sleep(0.02)
        order.append(f"{name}{number}")

    contestants = {name: [partial(part, name, number) for number in range(3)] for name in "ab"}
    timings = race(contestants, turns=1, warm_up=False)
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert all(timing.median >= 0.06 for timing in timings.values())


def test_what_prepares_a_contestant_is_not_timed() -> None:
    order: list[str] = []

    def prepare() -> None:
        time.sleep(0.05)
        order.append("prepare")

    timings = race({name: [lambda name=name: order.append(name)] for name in "ab"}, turns=1, prepare=prepare)
    assert order == ["prepare", "b", "prepare", "a", "prepare", "a", "prepare", "b"]
    assert all(timing.median < 0.05 for timing in timings.values())


def test_a_ratio_is_the_median_of_the_turns_ratios() -> None:
    assert ratio(Timing((2.0, 9.0, 100.0)), Timing((1.0, 3.0, 10.0))) == 3.0
    assert Timing((1.0, 2.0, 4.0)).spread == 1.5


@pytest.fixture
def settings(tiny_config: SummaryTrainingConfig, tmp_path: Path) -> Path:
    (tmp_path / "tiny.json").write_text(tiny_config.to_json())
    return tmp_path / "tiny.json"


@pytest.mark.slow
def test_a_benchmark_leaves_a_table_pictures_and_results(
    tiny_config: SummaryTrainingConfig, settings: Path, tmp_path: Path
) -> None:
    config = BenchmarkConfig(
        data_dir=tiny_config.summary_data_path,
        output_dir=tmp_path / "out",
        config=settings,
        turns=1,
        steps=2,
        eval_samples=6,
        filter_lines=3000,
        only=("evaluation", "filter"),
    )
    path = run_benchmark(config)
    about, results = read_benchmark(path.parent)
    assert about["seed"] == 0 and about["dtype"] == "float32"
    assert list(results) == [
        "generation", "BERTScore", "whole evaluation", "filter, 30 lines", "filter, 300 lines", "filter, 3000 lines",
    ]  # fmt: skip
    assert results["BERTScore"].facts["difference"] < 1e-5
    assert all(seconds > 0 for result in results.values() for turns in result.seconds.values() for seconds in turns)
    told = (path.parent / "benchmark.txt").read_text()
    assert "filter, 3,000 lines: naive / elmlib" in told and (path.parent / "benchmark.png").stat().st_size > 10_000
    run_benchmark(replace(config, only=("filter",), filter_lines=6000))
    assert set(results) < set(read_benchmark(path.parent)[1])  # earlier results stay


def test_every_attempt_takes_the_same_step(tiny_config: SummaryTrainingConfig) -> None:
    import torch

    bench = prepare(tiny_config, torch.device("cpu"))
    found = attempts(bench, tiny_config, short_steps(bench, tiny_config, 2), compiled=False)
    assert found[0].name == AS_IT_IS and [attempt.name for attempt in found if attempt.kept] == [AS_IT_IS]
    untried = [attempt.name for attempt in found if attempt.make is None]
    assert "torch.compile" in untried and all(attempt.about for attempt in found)
    for attempt in found:
        if attempt.make:
            for job in attempt.make():
                job()


def test_figures_stand_beside_what_was_asked() -> None:
    results = {
        SHORT: Result(
            SHORT,
            {"naive, NLL": [9.0, 8.0], "elmlib, NLL": [2.0, 2.0], "floor, NLL": [1.9, 1.8],
             "naive, all losses": [9.0, 9.0], "elmlib, all losses": [3.0, 3.0]},
            {"batches": 2},
        ),
        "whole evaluation": Result("whole evaluation", {"naive": [10.0], "elmlib": [2.0]}, {}),
    }  # fmt: skip
    about = {"training_rows": 64, "batch_size": 16}
    found = {it.what: it for it in compare(about, results)}
    alone = "short answers, NLL alone: naive / elmlib"
    assert found[alone] == Comparison(alone, 4.25, 4.0, 4.5, 4.0)
    assert found[alone].holds == "yes"
    assert found["short answers, all losses: naive / elmlib"].holds == "no"
    assert found["short answers: all losses / NLL alone"].holds == "no"
    assert found["whole evaluation: naive / elmlib"].holds == ""
    assert evaluation_share(about, results) == pytest.approx(2 / (2 * 4 * 1.5 + 5 * 2))
    assert evaluation_share(about, {}) is None
    assert comparison_frame(list(found.values())).loc[alone, "value"] == 4.25
    assert ">= 4" in to_text(about, results)


def test_no_benchmark_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`elm benchmark` writes it"):
        read_benchmark(tmp_path)


@pytest.mark.heavy
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plan_is_within_15_percent_of_the_step(checkpointing: bool) -> None:
    config = PlanConfig(bf16=False, batch_size=8, answer_tokens=48)
    (measured,) = measure_steps(config, [Point(8, 48, checkpointing)])
    planned = trace_step(load_config(OFFLINE_LLM), config, checkpointing).peak
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.heavy
def test_a_plan_of_the_guides_models_needs_no_weights_and_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    config = PlanConfig(
        llm_model_name="Qwen/Qwen3-4B-Instruct",
        embedding_model_name="Qwen/Qwen3-Embedding-4B",
        bertscore_model="microsoft/deberta-xlarge-mnli",
        embedding_dim=2560,
        batch_size=2,
        gpu_memory=("16GiB", "40GiB"),
    )
    found = plan(config)
    assert found.llm_parameters == 4_022_468_096  # as the hub counts them
    assert found.plain.llm == 2 * found.llm_parameters
    assert found.fits["16GiB"] == (0, 0)  # the LLM and the embedder are 8 GB each
    assert found.fits["40GiB"][0] >= 8
    assert "16GiB    plain: does not fit" in plan_text(found)
    alone = plan(replace(config, evaluation_device="cpu", gpu_memory=("16GiB",)))
    assert alone.fits["16GiB"][0] >= 4 and alone.evaluation == 0


def test_a_larger_batch_takes_more_memory_and_checkpointing_less(tiny_config: SummaryTrainingConfig) -> None:
    llm = load_config(tiny_config.llm_model_name)
    config = PlanConfig(llm_model_name=tiny_config.llm_model_name, hidden_dim=32, bf16=False)
    plain = [trace_step(llm, replace(config, batch_size=size), False) for size in (2, 4, 8)]
    activations = [step.activations for step in plain]
    assert activations[2] - activations[1] == pytest.approx(2 * (activations[1] - activations[0]), rel=0.01)
    flops = [count_flops(llm, replace(config, batch_size=size), False) for size in (2, 8)]
    assert flops[0] * 4 == pytest.approx(flops[1], rel=0.01)
    assert trace_step(llm, replace(config, batch_size=8), True).peak < plain[2].peak


_SMALL = {
    "vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "llm",
    [
        LlamaConfig(num_hidden_layers=5, **_SMALL),
        Gemma3TextConfig(
            num_hidden_layers=7,
            head_dim=8,
            layer_types=["sliding_attention", "full_attention"] * 3 + ["sliding_attention"],
            **_SMALL,
        ),
    ],
    ids=["layers alike", "layers in turn"],
)
def test_a_few_layers_tell_of_all(llm: PretrainedConfig, checkpointing: bool) -> None:
    config = PlanConfig(hidden_dim=32, bf16=False, drift_top_k=8, batch_size=2)
    assert trace_step(llm, config, checkpointing) == trace_layers(llm, config, checkpointing)
    assert count_flops(llm, config, checkpointing) == _count_layers(llm, config, checkpointing)


@pytest.mark.parametrize(("text", "size"), [("16GiB", 16 * GIB), ("40GB", 40e9), ("512MiB", 2**29), ("1000", 1000.0)])
def test_sizes_of_memory(text: str, size: float) -> None:
    assert parse_memory(text) == size


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="memory 'lots'; expected a size such as 16GiB or 40GB"):
        parse_memory("lots")


def test_an_unknown_model_out_of_reach_is_told_and_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FileNotFoundError, match="model 'owner/model' was not found"):
        load_config("owner/model")
    assert math.prod(len(name.split("/")) for name in SHAPES) == 2 ** len(SHAPES)


def test_results_of_another_machine_are_not_mixed_in(
    tiny_config: SummaryTrainingConfig, settings: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_json(out / "benchmark.json", {"about": {"device": "another"}, "results": [Result("old", {}, {})._asdict()]})
    config = BenchmarkConfig(
        tiny_config.summary_data_path, out, config=settings, turns=1, filter_lines=1000, only=("filter",)
    )
    run_benchmark(config)
    assert "old" not in json.loads((out / "benchmark.json").read_text())
