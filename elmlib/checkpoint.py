"""Adapters and run states on disk: safetensors with one JSON header, never pickle; whole or not at all."""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elmlib.adapter import EmbeddingAdapter
from elmlib.config import SummaryTrainingConfig
from elmlib.records import atomic_path

BEST = "best_summary_model.safetensors"
_HEADER = (
    "elmlib"  # one metadata key only: safetensors writes several in random order, and equal runs must give equal bytes
)
_STEP = re.compile(r"adapter_step_(\d+)\.safetensors")


class AdapterFile(NamedTuple):
    """An adapter as read from disk."""

    weights: dict[str, Tensor]
    config: SummaryTrainingConfig
    """The settings that it was trained with; paths and hardware at their defaults."""
    step: int
    data_fingerprint: str


@dataclass(frozen=True)
class RunState:
    """Where a run stands, besides its weights, its optimizer and its random state."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epoch of the next step, from 0."""
    window: int = 0
    """Optimizer steps done in that epoch."""
    best_composite: float = float("-inf")
    """Best BERTScore composite so far."""
    best_step: int = -1
    best_values: tuple[tuple[str, float], ...] = ()
    """All figures of that evaluation."""
    history: tuple[tuple[float, float], ...] = ()
    """(val_nll, composite) of the last evaluations, oldest first."""
    improved: bool = False
    """Whether this epoch has brought a new best."""
    stale_epochs: int = 0
    """Epochs in a row without a new best."""
    stopped: str = ""
    """Why the run was ended before its time; empty where it was not."""
    loss_mean: float = 0.0
    """Running mean of the training loss, for the spike check; 0 before the first step."""
    train_seconds: float = 0.0
    eval_seconds: float = 0.0


def save_adapter(
    path: Path, adapter: EmbeddingAdapter, config: SummaryTrainingConfig, step: int, data_fingerprint: str
) -> None:
    """Write the adapter's weights and buffers with the settings, the step and the data that they come from."""
    header = {"config": config.identity(), "step": step, "data_fingerprint": data_fingerprint}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.state_dict().items()}
    _save(path, weights, header)


def load_adapter(path: Path) -> AdapterFile:
    """Read an adapter file.

    Raises FileNotFoundError for no such file and ValueError for one that is truncated or not elmlib's.
    """
    weights, header = _load(path)
    config = SummaryTrainingConfig.from_dict(header["config"], origin=str(path))
    return AdapterFile(weights, config, header["step"], header["data_fingerprint"])


def save_run(
    folder: Path,
    adapter: EmbeddingAdapter,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    config: SummaryTrainingConfig,
    data_fingerprint: str,
) -> Path:
    """Write `adapter_step_N.safetensors` and its run state; keep only the newest `keep_checkpoints`.

    The run state goes first: an adapter file that exists has a whole run state beside it.
    """
    path = Path(folder) / f"adapter_step_{state.step}.safetensors"
    tensors = {"random": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random_cuda"] = torch.cuda.get_rng_state()
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": tensor.detach().cpu() for key, tensor in values.items()}
    _save(_state_path(path), tensors, vars(state))
    save_adapter(path, adapter, config, state.step, data_fingerprint)
    # Checkpoints of later steps are of a run that this one branched off from; they are not ours to count or delete.
    own = [found for found in step_checkpoints(folder) if _step_of(found) <= state.step]
    for old in own[: -config.keep_checkpoints]:
        old.unlink()
        _state_path(old).unlink(missing_ok=True)
    return path


def load_run(path: Path, adapter: EmbeddingAdapter, optimizer: torch.optim.Optimizer) -> RunState:
    """Put weights, optimizer and random state of a step checkpoint back, and say where its run stood."""
    tensors, header = _load(_state_path(path))
    adapter.load_state_dict(load_adapter(path).weights)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            moments.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random"])
    if "random_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random_cuda"])
    for pairs in ("best_values", "history"):
        header[pairs] = tuple((first, second) for first, second in header[pairs])
    return RunState(**header)


def step_checkpoints(folder: Path) -> list[Path]:
    """The step checkpoints in `folder`, oldest first."""
    return sorted((p for p in Path(folder).glob("adapter_step_*.safetensors") if _STEP.fullmatch(p.name)), key=_step_of)


def archive_run(folder: Path) -> Path | None:
    """Move a run that lies in `folder` into a folder of its own there, so that a new one neither mixes with nor
    replaces it; None where there is none."""
    names = (
        "adapter_step_*", "run_state_step_*", BEST, "metrics.jsonl", "predictions.jsonl", "result.json", "scorecard_*"
    )  # fmt: skip
    found = [path for name in names for path in Path(folder).glob(name)]
    if not found:
        return None
    number = next(n for n in itertools.count(1) if not (Path(folder) / f"earlier-run-{n}").exists())
    archive = Path(folder) / f"earlier-run-{number}"
    archive.mkdir()
    for path in found:
        path.rename(archive / path.name)
    return archive


def find_checkpoint(config: SummaryTrainingConfig) -> Path | None:
    """The checkpoint that `config.resume_from` means; None to start anew.

    `latest` in a folder without a checkpoint starts anew: a run killed before its first checkpoint lost nothing else.
    Raises FileNotFoundError for a named file that does not exist, ValueError for one that is no step checkpoint.
    """
    if not config.resume_from:
        return None
    if config.resume_from == "latest":
        found = step_checkpoints(Path(config.checkpoint_dir))
        return found[-1] if found else None
    path = Path(config.resume_from)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}; give an adapter_step_N.safetensors, or `latest`")
    if not _STEP.fullmatch(path.name) or not _state_path(path).is_file():
        raise ValueError(
            f"{path} has no run state beside it; resume from an adapter_step_N.safetensors of a run folder"
        )
    return path


def check_same_run(path: Path, config: SummaryTrainingConfig, data_fingerprint: str) -> None:
    """Raise ValueError, naming each difference, unless `config` and data continue the run that wrote `path`."""
    saved = load_adapter(path)
    now = config.identity()
    differences = [f"{k} was {v!r}, is {now[k]!r}" for k, v in saved.config.identity().items() if v != now[k]]
    if saved.data_fingerprint != data_fingerprint:
        differences.append(f"the training data were {saved.data_fingerprint}, are {data_fingerprint}")
    if differences:
        raise ValueError(f"cannot continue {path}: {'; '.join(differences)}. Use the same settings, or start a new run")


def _state_path(adapter_path: Path) -> Path:
    return adapter_path.with_name(adapter_path.name.replace("adapter_", "run_state_"))


def _step_of(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    assert match, path
    return int(match[1])


def _save(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={_HEADER: json.dumps(header)})


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    if header is None:
        raise ValueError(f"{path} was not written by elmlib: its header has no {_HEADER!r} entry")
    return tensors, json.loads(header)
