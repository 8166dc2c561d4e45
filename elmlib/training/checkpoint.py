"""Run states on disk: step checkpoints from which a run resumes to the same bytes; written whole or not at all."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from elmlib.config import InputError, SummaryTrainingConfig
from elmlib.models.adapter import BEST, EmbeddingAdapter, load_adapter, load_tensors, save_adapter, save_tensors

_FILES = ("*_step_*", BEST, "metrics.jsonl", "predictions.jsonl", "result.json")  # that a run writes
_STEP = re.compile(r"adapter_step_\d+\.safetensors")


@dataclass
class RunState:
    """The state of a run besides its weights, its optimizer and its random state."""

    step: int = 0  # Optimizer steps done
    epoch: int = 0  # Epoch of the next step, from 0
    group: int = 0  # Optimizer steps done in that epoch
    best_composite: float = float("-inf")  # Best BERTScore composite so far
    best_step: int = -1
    best_values: tuple[tuple[str, float], ...] = ()  # All figures of that evaluation
    history: tuple[tuple[float, float], ...] = ()  # (val_nll, composite) of the last evaluations, oldest first
    improved: bool = False  # Whether this epoch has brought a new best
    stale_epochs: int = 0  # Epochs in a row without a new best
    stopped: str = ""  # Why the run was stopped early; empty where it was not
    loss_mean: float = 0.0  # Running mean of the training loss, for the spike check; 0 before the first step
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    processes: int = 1  # that share each step's batches


def save_run(
    folder: Path,
    adapter: EmbeddingAdapter,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    config: SummaryTrainingConfig,
    data_fingerprint: str,
    random: Sequence[dict[str, Tensor]],
) -> Path:
    """Write `adapter_step_N.safetensors` and its run state; keep only the newest `keep_checkpoints`. The run state goes
    first: an adapter file that exists has a whole run state beside it. `random`: `random_state` of each process."""
    path = Path(folder) / f"adapter_step_{state.step}.safetensors"
    tensors = {f"{name}{rank or ''}": x for rank, states in enumerate(random) for name, x in states.items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": tensor.detach().cpu() for key, tensor in values.items()}
    save_tensors(_state_path(path), tensors, vars(state))
    save_adapter(path, adapter, config, state.step, data_fingerprint)
    # Checkpoints of later steps belong to the run that this one was resumed from; they are not counted or deleted.
    own = [found for found in step_checkpoints(folder) if _step_of(found) <= state.step]
    for old in own[: -config.keep_checkpoints]:
        _state_path(old).unlink(missing_ok=True)
        old.unlink()  # last: while it is there, the next save finds both
    return path


def random_state() -> dict[str, Tensor]:
    """The random state of this process."""
    on_gpu = {"random_cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"random": torch.get_rng_state()} | on_gpu


def load_run(
    path: Path, adapter: EmbeddingAdapter, optimizer: torch.optim.Optimizer, processes: int, rank: int
) -> RunState:
    """Restore weights, optimizer and the random state of process `rank`, and return the run state. Raises InputError
    where the run had another number of processes: it would repeat rows, or never end."""
    tensors, header = load_tensors(_state_path(path))
    if missing := {"step", "epoch"} - header.keys():
        raise InputError(f"{_state_path(path)} holds no run state: its header has no {', '.join(sorted(missing))}")
    if (saved := header.get("processes", 1)) != processes:
        raise InputError(f"cannot continue {path}: {saved} processes wrote it, now there are {processes}; use as many")
    adapter.load_state_dict(load_adapter(path).weights)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            moments.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors[f"random{rank or ''}"])
    if torch.cuda.is_available() and (on_gpu := tensors.get(f"random_cuda{rank or ''}")) is not None:
        torch.cuda.set_rng_state(on_gpu)
    if "window" in header:  # the name in earlier versions
        header["group"] = header.pop("window")
    return msgspec.convert(header, RunState)


def step_checkpoints(folder: Path) -> list[Path]:
    """The step checkpoints in `folder`, oldest first."""
    return sorted((p for p in Path(folder).glob("adapter_step_*.safetensors") if _STEP.fullmatch(p.name)), key=_step_of)


def remove_torn(folder: Path) -> None:
    """Remove the unfinished files of a run that was killed while it wrote them."""
    for path in [path for name in _FILES for path in Path(folder).glob(f".{name}.*.tmp")]:
        path.unlink()


def archive_run(folder: Path) -> Path | None:
    """Move an earlier run in `folder` into a subfolder, so that a new one neither mixes with nor replaces it; returns
    the subfolder, or None where there is no run."""
    found = [path for name in (*_FILES, "scorecard_*") for path in Path(folder).glob(name)]
    if not found:
        return None
    number = next(n for n in itertools.count(1) if not (Path(folder) / f"earlier-run-{n}").exists())
    archive = Path(folder) / f"earlier-run-{number}"
    archive.mkdir()
    for path in found:
        path.rename(archive / path.name)
    return archive


def find_checkpoint(config: SummaryTrainingConfig) -> Path | None:
    """The checkpoint that `config.resume_from` names; None to start a new run. `latest` in a folder without a
    checkpoint starts a new run. Raises InputError for a file that does not exist or is none."""
    if not config.resume_from:
        return None
    if config.resume_from == "latest":
        found = step_checkpoints(Path(config.checkpoint_dir))
        return found[-1] if found else None
    path = Path(config.resume_from)
    if not path.is_file():
        raise InputError(f"no checkpoint {path}; give an adapter_step_N.safetensors, or `latest`")
    if not _STEP.fullmatch(path.name) or not _state_path(path).is_file():
        raise InputError(
            f"{path} has no run state beside it; resume from an adapter_step_N.safetensors of a run folder"
        )
    return path


def check_same_run(path: Path, config: SummaryTrainingConfig, data_fingerprint: str) -> None:
    """Raise InputError, naming each difference, unless `config` and data continue the run that wrote `path`."""
    saved = load_adapter(path)
    now = config.identity()
    differences = [f"{k} was {v!r}, is {now[k]!r}" for k, v in saved.config.identity().items() if v != now[k]]
    if saved.data_fingerprint != data_fingerprint:
        differences.append(f"the training data were {saved.data_fingerprint}, are {data_fingerprint}")
    if differences:
        raise InputError(f"cannot continue {path}: {'; '.join(differences)}. Use the same settings, or start a new run")


def _state_path(adapter_path: Path) -> Path:
    return adapter_path.with_name(adapter_path.name.replace("adapter_", "run_state_"))


def _step_of(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])
