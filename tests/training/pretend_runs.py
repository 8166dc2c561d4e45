"""Whole runs on the pretend GPU; test_pretend_gpu starts this script: LLM, data, other LLM, its embedder, folder.

Prints one JSON: what lies on the device, what it refuses, the waits of steps and of decoding, bytes, texts, scores.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pretend_gpu  # first: it changes what the others import
import torch
from accelerate import Accelerator
from conftest import StopAt, tiny_settings

from elmlib import Elm
from elmlib.evaluation import score_checkpoint
from elmlib.inference.batch import generate_file
from elmlib.models.elm import Sampling, SoftTokenModel
from elmlib.training import setup, trainer
from elmlib.training.loggers import read_metrics

DEVICE = torch.device(pretend_gpu.DEVICE_NAME)
steps: list[tuple[int, int]] = []  # (micro-batches, waits) of each optimizer step
evaluations: list[int] = []  # waits
tokens: list[int] = []  # waits of each decoded token but the first


class OnDevice(Accelerator):
    """accelerate on the pretend GPU."""

    device = DEVICE


def counting(function: Callable[..., Any], note: Callable[[int, tuple[Any, ...]], None]) -> Callable[..., Any]:
    """`function`, the waits of each call noted."""

    def call(*given: Any) -> Any:
        before = pretend_gpu.waits.total()
        result = function(*given)
        note(pretend_gpu.waits.total() - before, given)
        return result

    return call


def counted_answer(model: SoftTokenModel, *given: Any) -> Iterator[list[list[int]]]:
    """`SoftTokenModel._answer`, the waits between its tokens noted."""
    before = -1
    for ids in answer(model, *given):
        if before >= 0:
            tokens.append(pretend_gpu.waits.total() - before)
        before = pretend_gpu.waits.total()
        yield ids


def refusals() -> dict[str, str]:
    """What CUDA would refuse -> the error's type; empty where it is done."""
    here, there = torch.ones(3), torch.ones(3, device=DEVICE)
    mask = torch.ones(3, dtype=torch.bool, device=DEVICE)
    cases: dict[str, Callable[[], object]] = {
        "sum": lambda: here + there,
        "product": lambda: torch.ones(3, 3) @ there,
        "cat": lambda: torch.cat([here, there]),
        "where": lambda: torch.where(mask, here, there),
        "index of a CPU tensor": lambda: here[mask],
        "values on the CPU": lambda: there.index_put_((torch.arange(2),), here[:2]),
        "numpy": there.numpy,
        "single number": lambda: there + torch.tensor(1.0),
        "CPU index": lambda: there[torch.arange(2)],
    }
    found = {}
    for name, case in cases.items():
        try:
            case()
            found[name] = ""
        except (RuntimeError, TypeError) as error:
            found[name] = type(error).__name__
    return found


def single_waits() -> dict[str, int]:
    """Operation -> how often it waits."""
    x = torch.ones(3, device=DEVICE)
    mask = x > 0
    cases: dict[str, Callable[[], object]] = {
        "item": lambda: x[0].item(),
        "float": lambda: float(x.sum()),
        "bool": lambda: bool(mask.all()),
        "tolist": x.tolist,
        "cpu": x.cpu,
        "nonzero": mask.nonzero,
        "boolean index": lambda: x[mask],
        "torch.tensor": lambda: torch.tensor([1.0], device=DEVICE),
        "upload": lambda: torch.ones(3).to(DEVICE),
        "upload, non-blocking": lambda: torch.ones(3).to(DEVICE, non_blocking=True),
        "arithmetic": lambda: torch.cat([x * 2 + 1, x.exp()]).sum(),
        "where": lambda: torch.where(mask, x, 0.0),
        "zeros": lambda: torch.zeros(3, device=DEVICE),
    }
    found: dict[str, int] = {}
    for name, case in cases.items():
        counting(case, lambda waits, _, name=name: found.update({name: waits}))()
    return found


def devices(model: SoftTokenModel, *modules: torch.nn.Module) -> list[str]:
    """Where all weights lie."""
    return sorted({str(p.device) for module in (model.llm, model.adapter, *modules) for p in module.parameters()})


def layers_at_sharding(config: Any) -> list[str]:
    """Where the LLM's layers lie when they are about to be sharded over several processes."""
    found: list[str] = []

    class Reached(Exception):  # noqa: N818 (no error)
        pass

    def shard(llm: Any, *_: Any) -> None:
        found.extend(sorted({p.device.type for p in llm.get_decoder().layers.parameters()}))
        raise Reached

    is_sharded, shard_llm = setup.is_sharded, setup.shard_llm
    setup.is_sharded, setup.shard_llm = (lambda _: True), shard
    try:
        trainer.train(config)
    except Reached:
        return found
    finally:
        setup.is_sharded, setup.shard_llm = is_sharded, shard_llm
    return found


answer = SoftTokenModel._answer
if __name__ == "__main__":
    llm, data, other_llm, other_embedder, out = map(Path, sys.argv[1:])
    trainer.Accelerator = OnDevice
    results: dict[str, Any] = {"refused": refusals(), "single_waits": single_waits()}
    trainer._Run._step = counting(trainer._Run._step, lambda waits, given: steps.append((len(given[1]), waits)))
    trainer.validate = counting(trainer.validate, lambda waits, _: evaluations.append(waits))
    SoftTokenModel._answer = counted_answer

    # 88 rows are 11 batches: the last optimizer step of an epoch has one micro-batch, all others have two.
    config = replace(tiny_settings(llm, data, out / "whole"), gradient_accumulation_steps=2, train_rows=88)
    whole = trainer.train(config)
    results["steps"], results["evaluations"] = sorted(set(steps[1:])), sorted(set(evaluations[1:]))
    results["places"] = {" | ".join(place): count for place, count in pretend_gpu.waits.most_common()}
    results["losses"] = [row.values["loss"] for row in read_metrics(out / "whole/metrics.jsonl") if row.kind == "step"]
    results["metrics"] = whole.metrics

    stopped = replace(config, checkpoint_dir=str(out / "stopped"))
    try:
        trainer.train(stopped, [StopAt(7)])
    except KeyboardInterrupt:
        results["stopped"] = True
    resumed = trainer.train(replace(stopped, resume_from="latest"))
    results["same_bytes"] = [a.read_bytes() == b.read_bytes() for a, b in zip(whole[:2], resumed[:2], strict=True)]

    changes = {"llm_model_name": str(other_llm), "embedding_model_name": str(other_embedder), "max_epochs": 1}
    changes |= {"text_drift_head": "re_embed", "use_gradient_checkpointing": True, "soft_token_position": "in_prompt"}
    other = replace(config, checkpoint_dir=str(out / "other"), **changes)
    results["other"] = trainer.train(other).metrics["val_nll"]

    elm = Elm.from_pretrained(out / "whole", device=DEVICE)
    vectors = elm.embed(["Each day the parser opens the file.", "The garden sorts two keys."])
    results["devices"] = devices(elm.model, elm.embedder)
    results["summaries"] = [elm.summarize(vectors), elm.summarize(torch.tensor(vectors, device=DEVICE))]
    half = torch.tensor(vectors, device=DEVICE, dtype=torch.bfloat16)
    results["sampled"] = elm.summarize(half, sampling=Sampling(count=3))
    tokens.clear()
    elm.summarize(vectors, 6)
    results["token_waits"] = sorted(set(tokens))
    records, written = data / "synthesis/test_synthesis.jsonl", out / "generated.jsonl"
    generate_file(out / "whole", records, written, device=DEVICE, sampling=Sampling(count=3), progress=False)
    results["generated"] = [json.loads(line) for line in written.read_text().splitlines()]
    report = score_checkpoint(whole.best, str(data), "test", 8, Sampling(count=3), DEVICE)
    results["report"] = report.frame.bertscore_f1.to_dict()
    results["layers_at_sharding"] = layers_at_sharding(replace(config, checkpoint_dir=str(out / "sharded")))
    (out / "results.json").write_text(json.dumps(results))
