"""`make gpu-check OUT=FOLDER`: is a training step on this GPU as fast and as large as expected? At most 8 minutes.

It needs no weights and no network: a random LLM of Qwen3-4B's shape is made on the card. Measured are the card's
ceilings, optimizer steps of six kinds beside the memory that `elm plan` estimates, decoding, and a step too large for
the card. FOLDER/gpu_check.json holds all figures; the table is printed. `--tiny` runs it anywhere, on a tiny shape.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from elmlib.config import PlanConfig
from elmlib.data import Batch, PromptBatch, PromptIds
from elmlib.models.adapter import LinearMap, make_adapter
from elmlib.models.elm import Sampling, SoftTokenModel
from elmlib.models.plan import GIB, SHAPES, Shape, plan_step
from elmlib.models.pretrained import fuse_norms
from elmlib.study.trial import is_out_of_memory
from elmlib.training.drift import DriftReadout
from elmlib.training.losses import compute_losses, total_loss

LLM = "Qwen/Qwen3-4B-Instruct-2507"
SECONDS = 7 * 60  # after which no part is started any more
PART_SECONDS = 20.0  # after which a step is not repeated any more
Figures = dict[str, Any]


class Check:
    """All parts on one device; each writes its figures or its error into `results`."""

    def __init__(self, out: Path, tiny: bool):
        self.tiny, self.started, self.is_gpu = tiny, time.perf_counter(), torch.cuda.is_available() and not tiny
        self.device = torch.device("cuda" if self.is_gpu else "cpu")
        self.file = out / "gpu_check.json"
        out.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Figures] = {"machine": self.machine()}

    def machine(self) -> Figures:
        """Card and versions."""
        figures: Figures = {"torch": torch.__version__, "transformers": transformers.__version__, "device": "cpu"}
        if self.is_gpu:
            card = torch.cuda.get_device_properties(0)
            figures |= {"device": card.name, "memory_gib": card.total_memory / GIB, "cuda": torch.version.cuda}
            figures |= {"bf16": torch.cuda.is_bf16_supported(including_emulation=False)}
        return figures

    def part(self, name: str, job: Callable[[], Figures]) -> None:
        """Run one part; an error, such as too little memory, does not stop the others."""
        begun = time.perf_counter()
        try:
            late = begun - self.started > SECONDS
            figures: Figures = {"error": f"not started: {SECONDS} s are over"} if late else job()
        except RuntimeError as error:
            figures = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        self.results[name] = figures | {"part_seconds": time.perf_counter() - begun}
        self.file.write_text(json.dumps(self.results, indent=1))
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def settle(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def median(self, job: Callable[[], object], turns: int = 10, warm: int = 3) -> float:
        """Median seconds of `job`."""
        if self.tiny:
            turns, warm = 2, 1
        seconds: list[float] = []
        while len(seconds) < warm + turns and (len(seconds) <= warm or sum(seconds) < PART_SECONDS):
            self.settle()
            begun = time.perf_counter()
            job()
            self.settle()
            seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds[warm:])

    def ceilings(self) -> Figures:
        """What the card can do at most: matrix products in bfloat16, and copies in its memory."""
        size, length = (256, 1 << 20) if self.tiny else (8192, 1 << 31)
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        x = torch.zeros(length, dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        work, copied = 2 * size**3, 2 * length  # each byte is read and written
        return {
            "matmul_tflop_s": work / self.median(lambda: a @ b) / 1e12,
            "copy_gb_s": copied / self.median(lambda: y.copy_(x)) / 1e9,
        }

    def load(self) -> Figures:
        """Make the random LLM and the adapter on the device."""
        self.shape, self.config = SHAPES[LLM], PlanConfig(llm_model_name=LLM, embedding_dim=2560)
        if self.tiny:
            self.shape = Shape("qwen3", 64, 128, 3, 4, 2000, 2, 16, tie_word_embeddings=True)
            self.config = replace(self.config, embedding_dim=32, hidden_dim=64)
        sizes = self.shape._asdict()
        begun = time.perf_counter()
        with torch.device(self.device):
            llm = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(sizes.pop("model_type"), **sizes), dtype=torch.bfloat16, attn_implementation="sdpa"
            )
        llm = llm.requires_grad_(False).eval()
        fuse_norms(llm)  # as `load_llm` does
        adapter = make_adapter(self.config, llm.get_input_embeddings().weight).to(self.device)
        tokenizer: Any = SimpleNamespace(eos_token_id=0)
        self.model = SoftTokenModel(llm, tokenizer, adapter)
        self.recomputing = SoftTokenModel(llm, tokenizer, adapter, use_gradient_checkpointing=True)
        idf, dim = torch.ones(self.shape.vocab_size, device=self.device), self.config.embedding_dim
        to_embedding = LinearMap(
            torch.randn(dim, self.shape.hidden_size, device=self.device), torch.zeros(dim, device=self.device)
        )
        self.parts: Figures = {  # all that the losses read but the model, with random maps in the place of fitted ones
            "warm_start": SimpleNamespace(idf=idf),
            "drift_head": DriftReadout(self.model.table, idf, to_embedding),
        }
        self.optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-5, fused=True)
        return {"seconds": time.perf_counter() - begun, "parameters": sum(p.numel() for p in llm.parameters())}

    def prompt(self) -> PromptIds:
        """As long as `elm plan` takes it to be."""
        return PromptIds(list(range(1, self.config.prompt_tokens + 1)), [], 0)

    def take_step(self, rows: int, tokens: int, checkpointing: bool = False) -> Callable[[], None]:
        """An optimizer step of `rows` answers of `tokens` tokens, with all losses."""
        labels = torch.randint(1, self.shape.vocab_size, (rows, tokens))
        vectors = torch.randn(rows, self.config.embedding_dim)
        batch = Batch(vectors, labels, torch.arange(rows), self.prompt(), []).to(self.device)
        counts = {"token": batch.num_tokens, "row": rows}
        parts: Any = SimpleNamespace(model=self.recomputing if checkpointing else self.model, **self.parts)

        def job() -> None:
            self.optimizer.zero_grad()
            total_loss(compute_losses(parts, batch, self.config), counts, self.config).backward()
            torch.nn.utils.clip_grad_norm_(self.model.adapter.parameters(), self.config.max_grad_norm)
            self.optimizer.step()

        return job

    def step(self, rows: int, tokens: int, checkpointing: bool = False) -> Figures:
        """Time, peak memory and utilisation of a step beside what `elm plan` says of it."""
        plan = plan_step(replace(self.config, answer_tokens=tokens), self.shape, rows, checkpointing)
        job = self.take_step(rows, tokens, checkpointing)
        job()
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = self.median(job)
        figures: Figures = {"ms": 1e3 * seconds, "rows_s": rows / seconds, "planned_gib": plan.memory / GIB}
        figures |= {"tflop_s": plan.operations / seconds / 1e12}
        if "matmul_tflop_s" in self.results["ceilings"]:
            figures |= {"utilisation": figures["tflop_s"] / self.results["ceilings"]["matmul_tflop_s"]}
        if self.is_gpu:
            figures |= {"peak_gib": torch.cuda.max_memory_allocated() / GIB}
            figures |= {"peak/plan": figures["peak_gib"] / figures["planned_gib"]} | self.kernels(job, seconds)
        return figures

    def kernels(self, job: Callable[[], None], seconds: float) -> Figures:
        """How many kernels a step launches, and in which share of its time the card computes."""
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            job()
            self.settle()
        events = [event for event in profiled.key_averages() if event.self_device_time_total]
        busy = sum(event.self_device_time_total for event in events) / 1e6
        return {"kernels": sum(event.count for event in events), "busy": busy / seconds}

    def decoding(self, rows: int, tokens: int) -> Figures:
        """Time of a token of all rows, none of which ends."""
        batch = PromptBatch(torch.randn(rows, self.config.embedding_dim), self.prompt()).to(self.device)
        self.model._ends = lambda _: [self.shape.vocab_size + 1]  # type: ignore[method-assign]
        self.model.adapter.eval()
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()

        @torch.no_grad()
        def job() -> None:
            for _ in self.model._answer(batch, tokens, Sampling(1, 0.0)):
                pass

        seconds = self.median(job, turns=2, warm=1)
        self.model.adapter.train()
        figures: Figures = {"ms": 1e3 * seconds / tokens, "rows_s": rows / seconds, "tokens_s": rows * tokens / seconds}
        return figures | ({"peak_gib": torch.cuda.max_memory_allocated() / GIB} if self.is_gpu else {})

    def out_of_memory(self) -> Figures:
        """A step that no card can hold is told as such, leaves no memory behind, and the next step runs."""
        if not self.is_gpu:
            return {}
        before, told, named = torch.cuda.memory_allocated(), "nothing: it fitted", False
        try:
            self.take_step(8192, 160)()
        except RuntimeError as error:  # no import here: optuna's deferred ones would keep the error and its tensors
            told, named = type(error).__name__, is_out_of_memory(error)
        self.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        left = (torch.cuda.memory_allocated() - before) / GIB
        return {
            "told": told,
            "is_out_of_memory": named,
            "left_gib": left,
            "ms": 1e3 * self.median(self.take_step(8, 24)),
        }


def main() -> None:
    """Run all parts, write the JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of gpu_check.json")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU: it runs, and measures nothing")
    options = parser.parse_args()
    if not (options.tiny or torch.cuda.is_available()):
        parser.error("this machine has no GPU that torch can use; --tiny runs on a CPU")
    torch.manual_seed(0)
    check = Check(options.out, options.tiny)
    check.part("ceilings", check.ceilings)
    check.part("load", check.load)
    tiny = ((2, 4), (4, 4), (8, 4), (2, 8), (4, 8))
    for rows, tokens in tiny if options.tiny else ((8, 24), (32, 24), (128, 24), (8, 128), (32, 128)):
        check.part(f"step {rows} x {tokens}", lambda rows=rows, tokens=tokens: check.step(rows, tokens))
    check.part(f"step {rows} x {tokens}, checkpointing", lambda: check.step(rows, tokens, checkpointing=True))
    for rows in (2, 4) if options.tiny else (100, 400):
        check.part(f"decode {rows}", lambda rows=rows: check.decoding(rows, 4 if options.tiny else 48))
    check.part("out of memory", check.out_of_memory)
    machine = check.results.pop("machine")
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(pandas.DataFrame(check.results).T.to_string(float_format="{:.3g}".format, na_rep=""))


if __name__ == "__main__":
    main()
