"""The training loop, on accelerate: steps, evaluations, checkpoints, early stopping, exact resume."""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object

from elmlib.config import InputError, SummaryTrainingConfig
from elmlib.data.dataset import Batch, load_batches
from elmlib.data.records import write_json
from elmlib.models.adapter import BEST, EmbeddingAdapter, save_adapter
from elmlib.training import checkpoint, setup
from elmlib.training.checkpoint import RunState
from elmlib.training.loggers import MetricsLog, MetricsRow, ProgressBar, RunLogger, WandbLog
from elmlib.training.losses import LOSSES, compute_losses, total_loss
from elmlib.training.validation import drift_warning, validate

logger = logging.getLogger(__name__)

_LOSS_MEMORY = 0.95  # of the running mean that a spike is compared with: about the last 20 steps
_EVALUATION_HOURS = 6  # that the other processes wait for the first; NCCL's own limit is 10 minutes
_SPIKE_WARMUP = 20  # steps before that mean is reliable


class UnstableTrainingError(RuntimeError):
    """The loss is not finite or has jumped; the message names the step, the last checkpoint and what to try."""


class TrainResult(NamedTuple):
    """How a run ended."""

    best: Path  # `best_summary_model.safetensors`, best by BERTScore composite
    last: Path  # The last step checkpoint
    metrics: dict[str, float]  # the best evaluation's figures beside their controls, times, size; also in result.json
    stopped: str  # Why the run was stopped early; empty where it was not


def train(
    config: SummaryTrainingConfig, loggers: Sequence[RunLogger] = (), stop: Callable[[], str] = str
) -> TrainResult:
    """Train an adapter, or resume a run from `config.resume_from`; both end in the same bytes on a CPU.

    `loggers` get every row, as do the progress bar, metrics.jsonl and (with `use_wandb`) Weights & Biases. `stop` is
    called after each evaluation and, in a single process, after each step: a reason ends the run there, saved; empty
    lets it continue. Ctrl-C and Jupyter's stop button do the same; a second one stops at once and saves nothing.
    Raises UnstableTrainingError, and InputError for data, models or a checkpoint that do not fit.
    """
    with _interrupts() as interrupted:
        return _Run(config, loggers, lambda: "interrupted" if interrupted.is_set() else stop()).finish()


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first SIGINT sets. The second one raises KeyboardInterrupt, as usual."""
    interrupted = threading.Event()

    def note(*_: object) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        logger.warning("interrupted: the run stops after this step and is saved; interrupt again to stop at once")

    if threading.current_thread() is not threading.main_thread():  # only a main thread takes signals
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


class _Run:
    """One run: all that changes while it trains is in `state`, so that a checkpoint holds all of it."""

    def __init__(self, config: SummaryTrainingConfig, loggers: Sequence[RunLogger], stop: Callable[[], str]):
        self.config, self.extra, self.stop = config, loggers, stop
        waiting = InitProcessGroupKwargs(timeout=timedelta(hours=_EVALUATION_HOURS))
        try:
            self.accelerator = Accelerator(kwargs_handlers=[waiting])
        except (ImportError, ValueError) as error:
            raise InputError(f"accelerate's settings in the environment (ACCELERATE_...): {error}") from error
        self.device, self.world = self.accelerator.device, self.accelerator.num_processes
        self.folder = Path(config.checkpoint_dir)
        resumed = checkpoint.find_checkpoint(config)  # before anything is loaded: a wrong path fails at once
        self.sharded = setup.is_sharded(self.accelerator)
        shard = (lambda llm: setup.shard_llm(llm, self.accelerator)) if self.sharded else None
        self.components = setup.build_components(config, self.device, shard)
        self.adapter = self.components.model.adapter
        self.fingerprint = self.components.train.fingerprint
        # Not fused, AdamW makes one pass over all weights for each term of the update: ten times as slow on a CPU.
        self.optimizer = torch.optim.AdamW(
            self.adapter.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        torch.manual_seed(config.seed + self.accelerator.process_index)
        self.warned_of_single_row = False
        self.state = RunState(processes=self.world)
        if self.accelerator.is_main_process:
            checkpoint.remove_torn(self.folder)
        if resumed:
            checkpoint.check_same_run(resumed, config, self.fingerprint)
            self.state = checkpoint.load_run(
                resumed, self.adapter, self.optimizer, self.world, self.accelerator.process_index
            )
            self.state.stopped = ""
            logger.info("resumed from %s", resumed)
        elif self.accelerator.is_main_process and (archive := checkpoint.archive_run(self.folder)):
            logger.warning("%s held a run; it was moved to %s", self.folder, archive)
        shared = cast(EmbeddingAdapter, setup.share_adapter(self.adapter, self.accelerator))  # or its wrapper
        self.components = self.components.with_adapter(shared)
        self.steps_per_epoch = [len(self._groups(epoch)) for epoch in range(config.max_epochs)]
        self.total_steps = sum(self.steps_per_epoch)
        self.batches: list[list[int]] = []  # of the epoch
        self.loader = load_batches(self.components.train, self.batches, config)
        if not self.total_steps:
            raise InputError(f"{len(self.components.train)} rows are too few for {self.world} processes; use fewer")

    def finish(self) -> TrainResult:
        """Train to the end and write result.json."""
        with ExitStack() as stack:  # closes them also when the run fails
            self.loggers = [stack.enter_context(closing(logger)) for logger in self._loggers()]
            if self.state.step == 0 and self.config.eval_first:
                self._evaluate(epoch_ends=False)
            while self.state.epoch < self.config.max_epochs and not (self.state.stopped or self._is_stale()):
                self._epoch()
        if self.state.stopped:
            logger.warning("step %d: stopped: %s", self.state.step, self.state.stopped)
        metrics = dict(self.state.best_values) | {
            "train_seconds": self.state.train_seconds,
            "eval_seconds": self.state.eval_seconds,
            "num_parameters_trained": sum(p.numel() for p in self.adapter.parameters()),
            "best_step": self.state.best_step,
            "steps": self.state.step,
            "too_long": self.components.train.too_long + self.components.val.too_long,
        }
        if self.accelerator.is_main_process:
            about = {"bertscore_hash": self.components.evaluator.hash, "stopped": self.state.stopped}
            write_json(self.folder / "result.json", metrics | about)
        last = self.folder / f"adapter_step_{self.state.step}.safetensors"
        return TrainResult(self.folder / BEST, last, metrics, self.state.stopped)

    def _loggers(self) -> Iterator[RunLogger]:
        if self.accelerator.is_main_process:
            yield MetricsLog(self.folder / "metrics.jsonl", self.state.step)
            if self.config.use_wandb:
                yield WandbLog(self.config)
            yield ProgressBar(self.total_steps, self.state.step)
            yield from self.extra

    def _log(self, kind: str, values: dict[str, float]) -> None:
        state = self.state
        epochs = state.epoch + (state.group / self.steps_per_epoch[state.epoch] if state.group else 0.0)
        for each in self.loggers:
            each.log(MetricsRow(kind, state.step, epochs, values))

    def _groups(self, epoch: int) -> list[list[list[int]]]:
        process = self.accelerator.process_index
        return setup.accumulation_groups(self.components.train, self.config, epoch, process, self.world)

    def _epoch(self) -> None:
        groups = self._groups(self.state.epoch)[self.state.group :]
        self.batches[:] = [batch for group in groups for batch in group]
        loader = iter(self.loader)
        self.adapter.train()
        for group in groups:
            started = time.perf_counter()
            values = self._step([next(loader).to(self.device) for _ in group])
            self.state.train_seconds += time.perf_counter() - started
            self.state.step += 1
            self.state.group += 1
            self._log("step", values)
            if self.world == 1:  # several processes would have to agree; they do so after evaluations
                self.state.stopped = self.stop()
            epoch_ends = self.state.group == self.steps_per_epoch[self.state.epoch]
            if epoch_ends or self._is_eval_due():  # of a stopped run too: a resumed one does not come back to this step
                self._evaluate(epoch_ends)
            if epoch_ends or self.state.stopped or self.state.step % self.config.save_interval == 0:
                self._save()
            if self.state.stopped:
                break

    def _is_eval_due(self) -> bool:
        if not (count := self.config.evals_per_epoch):
            return self.state.step % self.config.eval_interval == 0
        done, steps = self.state.group, self.steps_per_epoch[self.state.epoch]
        return done * count // steps > (done - 1) * count // steps

    def _step(self, batches: list[Batch]) -> dict[str, float]:
        """One optimizer step over an accumulation group: each loss is its sum over the group divided by its count."""
        config, accelerator = self.config, self.accelerator
        rate = setup.learning_rate(self.state.step, self.total_steps, config)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        sizes = torch.tensor([[b.num_tokens, len(b.labels)] for b in batches], device=self.device).sum(0)
        counts = dict(zip(("token", "row"), accelerator.reduce(sizes, reduction="sum").tolist(), strict=True))
        losses = [loss for loss in LOSSES if loss.is_on(config)]
        totals = torch.zeros(1 + len(losses), device=self.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else setup.without_communication(self.components.model.adapter):
                if config.use_contrastive_loss and len(batch.labels) == 1 and not self.warned_of_single_row:
                    self.warned_of_single_row = True
                    logger.warning("a batch of one row has no negatives: its contrastive loss is 0; raise --batch-size")
                sums = compute_losses(self.components, batch, config)
                loss = total_loss(sums, counts, config)
                # DistributedDataParallel averages gradients over processes; the counts above are sums over them.
                (loss * self.world).backward()  # accelerate's backward would divide by a setting of its own
            totals += torch.stack([loss.detach(), *(sums[each.name].detach() for each in losses)])
        loss_sum, *sums_of_all = accelerator.reduce(totals, reduction="sum").tolist()
        norm = float(torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), config.max_grad_norm))
        self._check_stable(loss_sum, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        values = {"loss": loss_sum, "learning_rate": rate, "grad_norm": norm}
        return values | {each.name: x / counts[each.per] for each, x in zip(losses, sums_of_all, strict=True)}

    def _check_stable(self, loss: float, norm: float) -> None:
        mean = self.state.loss_mean
        spike = self.state.step >= _SPIKE_WARMUP and loss > self.config.spike_factor * mean
        if not math.isfinite(loss + norm) or spike:
            saved = [str(path) for path in checkpoint.step_checkpoints(self.folder)]
            raise UnstableTrainingError(
                f"step {self.state.step + 1}: the loss is {loss:.4g}, its running mean {mean:.4g}, the "
                f"norm of its gradient {norm:.4g}. "
                f"Last good checkpoint: {saved[-1] if saved else 'none yet'}. Try a lower --learning-rate (now "
                f"{self.config.learning_rate:g}), a lower --max-grad-norm (now {self.config.max_grad_norm:g}), or look "
                "for bad rows with `elm filter`"
            )
        kept = _LOSS_MEMORY if self.state.step else 0.0
        self.state.loss_mean = kept * mean + (1 - kept) * loss

    def _evaluate(self, epoch_ends: bool) -> None:
        """Evaluate on the main process, keep the best adapter, and count the epochs without a better one."""
        started = time.perf_counter()
        state = self.state
        # With a sharded LLM all processes must run it, though only the main process uses the result.
        if self.accelerator.is_main_process or self.sharded:
            result = validate(self.components.with_adapter(self.adapter), self.config, self.device)
        if self.accelerator.is_main_process:
            values = result.values()
            composite = values["bertscore_composite"]
            state.history = (*state.history[-2:], (result.val_nll, composite))
            if warning := drift_warning(state.history):
                logger.warning("step %d: %s; the best adapter is that of step %d", state.step, warning, state.best_step)
            self._log("eval", values)
            state.stopped = self.stop()
            if composite > state.best_composite:
                save_adapter(self.folder / BEST, self.adapter, self.config, state.step, self.fingerprint)
                result.write_predictions(self.folder / "predictions.jsonl", self.components.val)
                state.best_composite, state.best_step, state.best_values = composite, state.step, tuple(values.items())
                state.improved = state.step > 0  # the evaluation before the first step belongs to no epoch
        if epoch_ends:
            state.stale_epochs = 0 if state.improved else state.stale_epochs + 1
            state.epoch, state.group, state.improved = state.epoch + 1, 0, False
        state.eval_seconds += time.perf_counter() - started
        self.state = broadcast_object_list([state])[0]
        self.adapter.train()
        if epoch_ends and self._is_stale():
            logger.warning("stopped early: no better BERTScore composite in %d epochs", self.state.stale_epochs)

    def _save(self) -> None:
        random = gather_object([checkpoint.random_state()])
        if self.accelerator.is_main_process:
            about = self.config, self.fingerprint
            checkpoint.save_run(self.folder, self.adapter, self.optimizer, self.state, *about, random)
        self.accelerator.wait_for_everyone()

    def _is_stale(self) -> bool:
        return self.state.stale_epochs >= self.config.early_stopping_patience
