"""elmlib beside its naive twin and beside the bare frozen LLM, in one process: what is it worth on this machine?"""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from elmlib.attempts import AS_IT_IS, attempts, first_call
from elmlib.benchmark_commands import BenchmarkConfig, PlanConfig
from elmlib.benchmark_plots import draw_benchmark
from elmlib.benchmark_tables import LONG, MEMORY, RESULTS, SHORT, Result, read_benchmark, to_text
from elmlib.config import OFFLINE_LLM, SummaryTrainingConfig
from elmlib.contests import (
    Steps,
    evaluation_contest,
    generation_contest,
    long_steps,
    scoring_contest,
    short_steps,
    step_contest,
)
from elmlib.files_contests import FilterJob, loading_jobs, make_corpus, peak_memory, trial_seconds
from elmlib.memory import Point, measure_steps
from elmlib.pretrained import default_device
from elmlib.racing import Job, race
from elmlib.records import write_json
from elmlib.settings import base_config
from elmlib.shapes import load_config
from elmlib.tracing import trace_step
from elmlib.workbench import Workbench, prepare

_FILTER_SIZES = (100, 10, 1)  # parts of the largest corpus


def run_benchmark(config: BenchmarkConfig) -> Path:
    """Run all contests, or `config.only`, and write benchmark.json after each; returns its path.

    Contests that are not run keep their results of an earlier run on the same machine with the same versions.
    Raises FileNotFoundError or ValueError for data or models that do not fit.
    """
    device = default_device()
    settings = _settings(config)
    bench = prepare(settings, device)
    contests: dict[str, Callable[[], Iterator[Result]]] = {
        "steps": lambda: _steps(bench, settings, config),
        "tried": lambda: _tried(bench, settings, config),
        "evaluation": lambda: _evaluation(bench, settings, config),
        "filter": lambda: _filter(config),
        "loading": lambda: _loading(config, device),
        "trials": lambda: _trials(config),
        "memory": lambda: _memory(bench, settings),
    }
    path = config.output_dir / RESULTS
    config.output_dir.mkdir(parents=True, exist_ok=True)
    about = describe_machine(bench, settings) | {"seed": config.seed}
    known = read_benchmark(config.output_dir) if path.is_file() else ({}, {})
    results = known[1] if known[0] == about else {}
    for name in config.only or contests:
        for result in contests[name]():
            results[result.name] = result
            write_json(path, {"about": about, "results": [it._asdict() for it in results.values()]})
    (config.output_dir / "benchmark.txt").write_text(to_text(about, results) + "\n", encoding="utf-8")
    draw_benchmark(about, results).savefig(config.output_dir / "benchmark.png", dpi=120)
    return path


def describe_machine(bench: Workbench, settings: SummaryTrainingConfig) -> dict[str, Any]:
    """What the figures depend on: processor, versions, models, width of numbers."""
    device = bench.elm.table.device
    processor = torch.cuda.get_device_name() if device.type == "cuda" else torch.cpu.get_capabilities()["cpu_name"]
    return {
        "device": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "bert-score")},
        "llm": settings.llm_model_name,
        "dtype": str(bench.elm.llm.dtype).removeprefix("torch."),
        "batch_size": settings.batch_size,
        "training_rows": len(bench.train),
    }


def _settings(config: BenchmarkConfig) -> SummaryTrainingConfig:
    base = base_config(config.preset, config.config)
    return replace(base, summary_data_path=config.data_dir, eval_samples=config.eval_samples, seed=config.seed)


def _race(
    name: str,
    jobs: Mapping[str, Sequence[Job]],
    turns: int,
    facts: dict[str, Any] | None = None,
    warm_up: bool = True,
    prepare: Job = lambda: None,
) -> Result:
    settle = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    timings = race(jobs, turns, settle, warm_up, progress=name, prepare=prepare)
    return Result(name, {job: list(timing.seconds) for job, timing in timings.items()}, facts or {})


def _whole(jobs: Mapping[str, Job]) -> dict[str, list[Job]]:
    """Each job in one part."""
    return {name: [job] for name, job in jobs.items()}


def _steps(bench: Workbench, settings: SummaryTrainingConfig, config: BenchmarkConfig) -> Iterator[Result]:
    for name, make, count in ((SHORT, short_steps, config.steps), (LONG, long_steps, config.steps // 4)):
        steps = make(bench, settings, count)
        jobs = step_contest(bench, settings, steps)
        yield _race(name, jobs, config.turns, _work(bench, steps, jobs["elmlib, NLL"]))


def _work(bench: Workbench, steps: Steps, jobs: Sequence[Job]) -> dict[str, float]:
    """What a turn of elmlib's steps does, and what this device could do."""
    counter = FlopCounterMode(display=False)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with counter:
        for job in jobs:
            job()
    rows = sum(len(batch.labels) for batch in steps.bucketed)
    memory = {"peak_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}
    return {
        "batches": len(steps.bucketed),
        "rows": rows,
        "answer_tokens": steps.answer_tokens,
        "flops": counter.get_total_flops(),
        "matmul_flops_per_second": _matmul_rate(bench.elm.table),
        **memory,
    }


def _matmul_rate(like: torch.Tensor, size: int = 2048) -> float:
    """Floating-point operations a second of a large matrix product of the same type: what utilisation is a share of."""
    x = torch.randn(size, size, device=like.device).to(like.dtype)
    settle = torch.cuda.synchronize if like.is_cuda else lambda: None
    timing = race({"product": [lambda: x @ x]}, 5, settle)["product"]
    return 2 * size**3 / timing.median


def _tried(bench: Workbench, settings: SummaryTrainingConfig, config: BenchmarkConfig) -> Iterator[Result]:
    for length, make, count in (("short", short_steps, config.steps // 4), ("long", long_steps, config.steps // 8)):
        steps = make(bench, settings, count)
        seconds: dict[str, list[float]] = {}
        notes: dict[str, dict[str, Any]] = {}
        usual, *others = attempts(bench, settings, steps, config.compile)
        assert usual.make is not None, usual  # the step as it is can always be made
        for attempt in others:
            notes[attempt.name] = {"about": attempt.about, "kept": attempt.kept}
            if attempt.make is None:
                continue
            # One at a time beside the usual step, which so is timed again for each: no two attempts' models at once.
            jobs, notes[attempt.name]["first_seconds"] = first_call(attempt.make)
            timings = race({AS_IT_IS: usual.make(), attempt.name: jobs}, config.turns, progress=attempt.name)
            seconds[attempt.name] = list(timings[attempt.name].seconds)
            notes[attempt.name]["as_it_is"] = list(timings[AS_IT_IS].seconds)
        yield Result(f"tried, {length} answers", seconds, notes)


def _evaluation(bench: Workbench, settings: SummaryTrainingConfig, config: BenchmarkConfig) -> Iterator[Result]:
    rows = bench.val.subset(config.eval_samples, settings.eval_seed)
    turns = max(1, config.turns // 2)
    yield _race("generation", _whole(generation_contest(bench, settings, rows)), turns, {"rows": len(rows)})
    references = [bench.val.records[row].target_text for row in rows]
    # Texts like those that are scored: other summaries of the same corpus.
    predictions = [bench.train.records[row].target_text for row in bench.train.subset(len(rows), settings.eval_seed)]
    contest = scoring_contest(bench, predictions, references)
    facts = {"pairs": len(rows), "hash": bench.evaluator.hash, "difference": contest.difference()}
    yield _race("BERTScore", _whole(contest.jobs), config.turns, facts)
    # The two contests before have warmed all that a whole evaluation calls, and its naive twin takes minutes.
    jobs = _whole(evaluation_contest(bench, settings))
    yield _race("whole evaluation", jobs, turns, {"rows": len(rows)}, warm_up=False)


def _filter(config: BenchmarkConfig) -> Iterator[Result]:
    with tempfile.TemporaryDirectory(prefix="elm-filter-") as folder:
        for part in _FILTER_SIZES:
            yield _filter_lines(Path(folder), config, config.filter_lines // part)


def _filter_lines(folder: Path, config: BenchmarkConfig, lines: int) -> Result:
    job = FilterJob(folder / f"corpus-{lines}", folder / f"ours-{lines}")
    twin = job._replace(out=folder / f"naive-{lines}")
    make_corpus(job.corpus, lines, config.seed)
    peaks = {"naive": peak_memory(twin.naive), "elmlib": peak_memory(job.ours)}

    def clear() -> None:  # to be rid of old output is no part of the job
        for made in (job.out, twin.out):
            shutil.rmtree(made, ignore_errors=True)

    jobs = _whole({"naive": twin.naive, "elmlib": job.ours})
    facts = {"lines": lines, "peak_bytes": peaks}
    # The disk makes a turn of some seconds uneven: twice as many as of the other contests.
    return _race(f"filter, {lines} lines", jobs, 2 * config.turns, facts, prepare=clear)


def _loading(config: BenchmarkConfig, device: torch.device) -> Iterator[Result]:
    yield _race("loading the LLM", _whole(loading_jobs(OFFLINE_LLM, device)), max(1, config.turns // 2))


def _trials(config: BenchmarkConfig) -> Iterator[Result]:
    settings = {"train_rows": 64, "max_epochs": 1, "eval_samples": 16, "eval_nll_samples": 32}
    if config.config:
        settings = json.loads(config.config.read_text(encoding="utf-8")) | settings
    with tempfile.TemporaryDirectory(prefix="elm-trials-") as folder:
        first, second = trial_seconds(Path(folder, "study"), config.data_dir, config.notebook, settings)
    yield Result("trials of a study", {"first": [first], "second": [second]}, {})


def _memory(bench: Workbench, settings: SummaryTrainingConfig) -> Iterator[Result]:
    plan = PlanConfig(
        llm_model_name=settings.llm_model_name,
        embedding_dim=settings.embedding_dim,
        hidden_dim=settings.hidden_dim,
        num_soft_tokens=settings.num_soft_tokens,
        bf16=bench.elm.llm.dtype == torch.bfloat16,
        fused_attention=bench.elm.llm.config._attn_implementation == "sdpa",
        gpu_memory=(),
    )
    sizes = [(4, 32), (8, 32), (16, 32), (32, 32), (16, 16), (16, 64), (16, 128)]
    points = [Point(*size, checkpointing) for size in sizes for checkpointing in (False, True)]
    measured = measure_steps(plan, points)
    llm = load_config(settings.llm_model_name)
    table = []
    for point, peak in zip(points, measured, strict=True):
        asked = replace(plan, batch_size=point.batch_size, answer_tokens=point.answer_tokens)
        planned = trace_step(llm, asked, point.checkpointing).peak
        table.append(point._asdict() | {"peak_bytes": peak, "planned_bytes": planned})
    yield Result(MEMORY, {}, {"points": table})
