"""The training loop, on accelerate: steps, evaluations, checkpoints, early stopping, exact resume."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from elmlib import checkpoint
from elmlib.adapter import EmbeddingAdapter
from elmlib.checkpoint import BEST, RunState
from elmlib.config import SummaryTrainingConfig
from elmlib.data import Batch, load_batches
from elmlib.objective import loss_parts, total_loss
from elmlib.records import write_json
from elmlib.schedule import epoch_windows, learning_rate
from elmlib.sharding import asks_for_shards, shard_llm, share_adapter, without_travel
from elmlib.tracking import MetricsLog, ProgressBar, Row, Tracker, Trackers, WandbLog
from elmlib.validation import Validation, drift_warning, validate
from elmlib.workbench import Workbench, prepare

logger = logging.getLogger(__name__)

_LOSS_MEMORY = 0.95  # of the running mean that a spike is measured against: about the last 20 steps
_SPIKE_WARMUP = 20  # steps before that mean means something


class UnstableTrainingError(RuntimeError):
    """The loss is not finite or has jumped; the message names the step, the last checkpoint and what to try."""


class TrainResult(NamedTuple):
    """How a run ended."""

    best: Path
    """`best_summary_model.safetensors`, best by BERTScore composite."""
    last: Path
    """The last step checkpoint."""
    metrics: dict[str, float]
    """The best evaluation's figures beside their controls, times and trained parameters; also in result.json."""


def train(
    config: SummaryTrainingConfig,
    trackers: Sequence[Tracker] = (),
    bench: Workbench | None = None,
    stop: Callable[[], str] = str,
) -> TrainResult:
    """Train an adapter, or go on where `config.resume_from` stopped; both end in the same bytes on a CPU.

    `trackers` see every row beside the progress bar, metrics.jsonl and (with `use_wandb`) Weights & Biases. `bench`,
    of an earlier run on the same models and data, lends its frozen parts; its adapter stays as it is. `stop` is asked
    after each evaluation, and in a single process after each step: its reason ends the run there, saved; empty lets
    it go on.
    Raises UnstableTrainingError, and ValueError or FileNotFoundError for data, models or a checkpoint that do not fit.
    """
    return _Run(config, trackers, bench, stop).finish()


class _Run:
    """One run: what changes while it trains, in one place, so that all of it goes into a checkpoint."""

    def __init__(
        self,
        config: SummaryTrainingConfig,
        trackers: Sequence[Tracker],
        bench: Workbench | None,
        stop: Callable[[], str],
    ):
        self.config, self.extra, self.stop = config, trackers, stop
        self.accelerator = Accelerator()
        self.device, self.world = self.accelerator.device, self.accelerator.num_processes
        self.folder = Path(config.checkpoint_dir)
        found = checkpoint.find_checkpoint(config)  # before anything is loaded: a wrong path fails at once
        self.bench = bench.fresh(config) if bench else prepare(config, self.device)
        self.adapter = self.bench.elm.adapter
        self.fingerprint = self.bench.train.fingerprint
        optimizer = torch.optim.AdamW(
            self.adapter.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,  # else one pass over all weights for each term of the update, a tenth as fast on a CPU
        )
        torch.manual_seed(config.seed + self.accelerator.process_index)
        self.told_of_lone_row = False
        self.state = RunState()
        if found:
            checkpoint.check_same_run(found, config, self.fingerprint)
            self.state = replace(checkpoint.load_run(found, self.adapter, optimizer), stopped="")
            logger.info("resumed from %s", found)
        elif self.accelerator.is_main_process and (archive := checkpoint.archive_run(self.folder)):
            logger.warning("%s held a run; it was moved to %s", self.folder, archive)
        shared = cast(EmbeddingAdapter, share_adapter(self.adapter, self.accelerator))  # or what wraps it, called alike
        self.bench = self.bench.with_adapter(shared)
        self.optimizer = optimizer
        self.opening = self.bench.opening(config) if config.pretrain_epochs else None
        self.sharded = asks_for_shards(self.accelerator)
        if self.sharded:  # last: all that is computed once needs the whole LLM
            shard_llm(self.bench.elm.llm, self.accelerator)
        self.epochs = config.pretrain_epochs + config.max_epochs
        self.windows_per_epoch = [len(self._windows(epoch)) for epoch in range(self.epochs)]
        self.total_steps = sum(self.windows_per_epoch)
        if not self.total_steps:
            raise ValueError(f"{len(self.bench.train)} training rows are too few for {self.world} processes")

    def finish(self) -> TrainResult:
        """Train to the end and write result.json."""
        with self._trackers() as self.trackers:
            if self.state.step == 0 and self.config.eval_first:
                self._evaluate(epoch_ends=False)
            while self.state.epoch < self.epochs and not self._is_over():
                self._epoch()
        if self.state.stopped:
            logger.warning("step %d: stopped: %s", self.state.step, self.state.stopped)
        metrics = dict(self.state.best_values) | {
            "train_seconds": self.state.train_seconds,
            "eval_seconds": self.state.eval_seconds,
            "num_parameters_trained": sum(p.numel() for p in self.adapter.parameters()),
            "best_step": self.state.best_step,
            "steps": self.state.step,
            "too_long": self.bench.train.too_long + self.bench.val.too_long,
        }
        if self.accelerator.is_main_process:
            told = {"bertscore_hash": self.bench.evaluator.hash, "stopped": self.state.stopped}
            write_json(self.folder / "result.json", metrics | told)
        last = self.folder / f"adapter_step_{self.state.step}.safetensors"
        return TrainResult(self.folder / BEST, last, metrics)

    def _trackers(self) -> Trackers:
        if not self.accelerator.is_main_process:
            return Trackers()
        built: list[Tracker] = [MetricsLog(self.folder / "metrics.jsonl", self.state.step)]
        if self.config.use_wandb:
            built.append(WandbLog(self.config))
        return Trackers(*built, ProgressBar(self.total_steps, self.state.step), *self.extra)

    def _stage(self, epoch: int) -> Workbench:
        """The paraphrase stage's workbench in its epochs, then the summary's."""
        return self.opening if self.opening and epoch < self.config.pretrain_epochs else self.bench

    def _windows(self, epoch: int) -> list[list[list[int]]]:
        split = self._stage(epoch).train
        return epoch_windows(split, self.config, epoch, self.accelerator.process_index, self.world)

    def _epoch(self) -> None:
        windows = self._windows(self.state.epoch)[self.state.window :]
        stage = self._stage(self.state.epoch)
        loader = load_batches(stage.train, [batch for window in windows for batch in window], self.config)
        self.adapter.train()
        for window in windows:
            started = time.perf_counter()
            values = self._step(stage, [next(loader).to(self.device) for _ in window])
            seconds = self.state.train_seconds + self._shared(time.perf_counter() - started)
            self.state = replace(
                self.state, step=self.state.step + 1, window=self.state.window + 1, train_seconds=seconds
            )
            self.trackers.log(Row("step", self.state.step, self._epochs_done(), values))
            if self.world == 1:  # several would have to agree, at a price, and do so after evaluations
                self.state = replace(self.state, stopped=self.stop())
            epoch_ends = self.state.window == self.windows_per_epoch[self.state.epoch]
            ends = epoch_ends or self._is_out_of_time()
            if ends or self._is_eval_due():  # of a stopped run too: a resumed one does not come back to this step
                self._evaluate(epoch_ends)
            if ends or self.state.stopped or self.state.step % self.config.save_interval == 0:
                self._save()
            if ends or self.state.stopped:
                break

    def _is_eval_due(self) -> bool:
        if not (count := self.config.evals_per_epoch):
            return self.state.step % self.config.eval_interval == 0
        done, all_windows = self.state.window, self.windows_per_epoch[self.state.epoch]
        return done * count // all_windows > (done - 1) * count // all_windows

    def _step(self, stage: Workbench, batches: list[Batch]) -> dict[str, float]:
        """One optimizer step over all batches of a window, each loss a sum over the window divided by its count."""
        config, accelerator = self.config, self.accelerator
        rate = learning_rate(self._place_in_schedule(), self.total_steps, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        counts = torch.tensor([[b.num_tokens, len(b.labels)] for b in batches], device=self.device).sum(0)
        tokens, rows = accelerator.reduce(counts, reduction="sum").tolist()
        sums = torch.zeros(6, device=self.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else without_travel(self.bench.elm.adapter):
                self._tell_of_lone_row(batch)
                parts = loss_parts(stage, batch, config)
                loss = total_loss(parts, tokens, rows, config)
                # DistributedDataParallel averages gradients over processes; the counts above are of all of them.
                accelerator.backward(loss * self.world)
            sums += torch.stack([x.detach() for x in (loss, *parts[:5])])
        loss_sum, nll, contrastive, drift, similarity, teacher = accelerator.reduce(sums, reduction="sum").tolist()
        self._check_stable(loss_sum)
        norm = torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        values = {"loss": loss_sum, "nll": nll / tokens, "learning_rate": rate, "grad_norm": float(norm)}
        if config.use_contrastive_loss:
            values["contrastive"] = contrastive / rows
        if config.use_text_drift_loss:
            values |= {"drift": drift / rows, "drift_similarity": similarity / rows}
        if config.use_teacher_kl:
            values["teacher_kl"] = teacher / tokens
        return values

    def _tell_of_lone_row(self, batch: Batch) -> None:
        if self.config.use_contrastive_loss and len(batch.labels) == 1 and not self.told_of_lone_row:
            self.told_of_lone_row = True
            logger.warning("a batch of one row has no negatives: its contrastive loss is 0; raise --batch-size")

    def _place_in_schedule(self) -> float:
        """Optimizer steps done or, with a time limit that comes sooner, the same share of the time."""
        limit = self.config.max_train_seconds
        clock = self.total_steps * self.state.train_seconds / limit if limit else 0.0
        return min(max(self.state.step, clock), self.total_steps)

    def _shared(self, seconds: float) -> float:
        """The mean over all processes, which must agree on when to stop."""
        if self.world == 1:
            return seconds
        return float(self.accelerator.reduce(torch.tensor(seconds, device=self.device), reduction="mean"))

    def _check_stable(self, loss: float) -> None:
        mean = self.state.loss_mean
        spike = self.state.step >= _SPIKE_WARMUP and loss > self.config.spike_factor * mean
        if not math.isfinite(loss) or spike:
            saved = [str(path) for path in checkpoint.step_checkpoints(self.folder)]
            raise UnstableTrainingError(
                f"step {self.state.step + 1}: the loss is {loss:.4g}, its running mean {mean:.4g}. "
                f"Last good checkpoint: {saved[-1] if saved else 'none yet'}. Try a lower --learning-rate (now "
                f"{self.config.learning_rate:g}), a lower --max-grad-norm (now {self.config.max_grad_norm:g}), or look "
                "for bad rows with `elm filter`"
            )
        kept = _LOSS_MEMORY if self.state.step else 0.0
        self.state = replace(self.state, loss_mean=kept * mean + (1 - kept) * loss)

    def _evaluate(self, epoch_ends: bool) -> None:
        """Evaluate on the main process, keep the best adapter, and count the epochs without a better one."""
        started = time.perf_counter()
        state = self.state
        pretraining = state.epoch < self.config.pretrain_epochs
        # Where the LLM is dealt out all processes must run it, though one is enough to look at what comes out.
        if self.accelerator.is_main_process or self.sharded:
            result = validate(self.bench.with_adapter(self.adapter), self.config, self.device)
        if self.accelerator.is_main_process:
            values = result.values()
            state = replace(state, history=(*state.history[-2:], (result.val_nll, values["bertscore_composite"])))
            if told := drift_warning(state.history):
                logger.warning("step %d: %s; the best adapter is that of step %d", state.step, told, state.best_step)
            self.trackers.log(Row("eval", state.step, self._epochs_done(), values))
            state = replace(state, stopped=self.stop())
            if values["bertscore_composite"] > state.best_composite:
                self._keep_best(result)
                state = replace(
                    state, best_composite=values["bertscore_composite"], best_step=state.step,
                    improved=state.step > 0,  # the evaluation before the first step is of no epoch
                    best_values=tuple(values.items()),
                )  # fmt: skip
        if epoch_ends:
            stale = 0 if state.improved or pretraining else state.stale_epochs + 1
            state = replace(state, epoch=state.epoch + 1, window=0, improved=False, stale_epochs=stale)
        state = replace(state, eval_seconds=state.eval_seconds + time.perf_counter() - started)
        self.state = broadcast_object_list([state])[0]
        self.adapter.train()
        if epoch_ends and self._is_stale():
            logger.warning("stopped early: no better BERTScore composite in %d epochs", self.state.stale_epochs)

    def _keep_best(self, result: Validation) -> None:
        checkpoint.save_adapter(self.folder / BEST, self.adapter, self.config, self.state.step, self.fingerprint)
        result.write_predictions(self.folder / "predictions.jsonl", self.bench.val)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            checkpoint.save_run(self.folder, self.adapter, self.optimizer, self.state, self.config, self.fingerprint)
        self.accelerator.wait_for_everyone()

    def _is_over(self) -> bool:
        return self._is_stale() or self._is_out_of_time() or bool(self.state.stopped)

    def _is_stale(self) -> bool:
        return self.state.stale_epochs >= self.config.early_stopping_patience

    def _is_out_of_time(self) -> bool:
        return 0 < self.config.max_train_seconds <= self.state.train_seconds

    def _epochs_done(self) -> float:
        if self.state.epoch == self.epochs:
            return float(self.state.epoch)
        return self.state.epoch + self.state.window / self.windows_per_epoch[self.state.epoch]
