"""A pretend GPU: tensors that say `gpu:0`, compute on the CPU, refuse to meet CPU tensors where CUDA would refuse, and
count what makes a program wait for the device.

Importing this module installs it for the whole process, and libraries that wrap functions in `torch.inference_mode`
must be imported after it. So tests do not import it; they start a script that does, such as training/pretend_runs.py.
What it cannot show: speed, memory, rounding, and the random states of CUDA, for dropout draws from the CPU's.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "gpu"
DEVICE_NAME = f"{NAME}:0"
waits: Counter[tuple[str, str]] = Counter()
"""(what waited, the line of elmlib or of a library that called it) -> how often."""

_INDEXED = {aten.index.Tensor, aten._unsafe_index.Tensor}
_INDEX_PUT = {aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_WAITING = {
    aten._local_scalar_dense.default: "item",  # also float(), int() and bool() of a tensor
    aten.nonzero.default: "nonzero",
    aten.equal.default: "equal",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten._linalg_check_errors.default: "linalg",
}
_LIBRARIES = ("/elmlib/", "/transformers/", "/accelerate/", "/sentence_transformers/", "/bert_score/", "/torch/optim/")


class DeviceTensor(torch.Tensor):
    """A tensor of the pretend GPU around one of the CPU."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "DeviceTensor":
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "layout": raw.layout}
        device = torch.device(DEVICE_NAME)
        return torch.Tensor._make_wrapper_subclass(cls, raw.size(), dtype=raw.dtype, device=device, **layout)

    def __init__(self, raw: torch.Tensor):
        self.raw = raw

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.raw!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    def tolist(self) -> Any:
        _wait("tolist")
        return self.raw.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE_NAME} device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy


class _Mode(TorchDispatchMode):
    """Sees the calls that have no tensor of the device among their arguments: factories and uploads."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Backend(_DummyBackendModule):
    """What torch asks of `torch.gpu`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Nothing(ContextDecorator):
    """A context, or a decorator, that changes nothing."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _wait(kind: str) -> None:
    frames = (frame for frame in reversed(traceback.extract_stack()) if any(x in frame.filename for x in _LIBRARIES))
    frame = next(frames, None)
    waits[kind, f"{frame.filename.rpartition('/')[2]}: {frame.line}" if frame else ""] += 1


def _refuse_mix(function: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    """Raise RuntimeError where CUDA would: single numbers and indices may lie on the CPU."""
    strangers = [x for x in tensors if not isinstance(x, DeviceTensor) and x.dim()]
    if function in _INDEXED | _INDEX_PUT and isinstance(args[0], DeviceTensor):
        strangers = [
            x for x in args[2:3] if isinstance(x, torch.Tensor) and not isinstance(x, DeviceTensor) and x.dim()
        ]
    if strangers and function not in (aten.copy_.default, aten._copy_from.default):
        shapes = [tuple(x.shape) for x in strangers]
        raise RuntimeError(f"{function}: expected all tensors on {DEVICE_NAME}, but shapes {shapes} are on cpu")


def _count(function: Any, args: Any) -> None:
    if function in _WAITING:
        _wait(_WAITING[function])
    if function in _INDEXED | _INDEX_PUT:
        indices = [x for x in args[1] if x is not None]
        fills = function in _INDEX_PUT and args[2].numel() == 1  # CUDA then masks instead of looking for the places
        if not fills and any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            _wait("boolean index")
        if any(not isinstance(x, DeviceTensor) for x in indices):
            _wait("upload of an index")


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_device = any(isinstance(x, DeviceTensor) for x in tensors)
    if on_device:
        _refuse_mix(function, args, tensors)
        _count(function, args)
    wanted = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else ""
    to_device = wanted == NAME if wanted else on_device
    if function in (aten.copy_.default, aten._copy_from.default):
        source, target = args[:2] if function is aten._copy_from.default else (args[1], args[0])
        non_blocking = len(args) > 2 and args[2]
        _transfer(isinstance(source, DeviceTensor), isinstance(target, DeviceTensor), non_blocking)
        _raw(target).copy_(_raw(source))
        return target
    if not on_device and not to_device:
        return function(*args, **kwargs)
    options = dict(kwargs) | ({"device": torch.device("cpu")} if wanted else {})
    options |= {"pin_memory": False} if "pin_memory" in kwargs else {}
    if function is aten._to_copy.default:
        _transfer(on_device, to_device, kwargs.get("non_blocking", False))
        copied = function(_raw(args[0]), **options)
        return DeviceTensor(copied) if to_device else copied
    result = function(*_raw(args), **_raw(options))
    if not to_device or function is aten._local_scalar_dense.default:
        return result
    wrappers = {id(x.raw): x for x in tensors if isinstance(x, DeviceTensor)}  # an operation in place gives one back
    wrapped = pytree.tree_map_only(
        torch.Tensor, lambda x: wrappers[id(x)] if id(x) in wrappers else DeviceTensor(x), result
    )
    return return_and_correct_aliasing(function, args, kwargs, wrapped) if on_device else wrapped


def _transfer(from_device: bool, to_device: bool, non_blocking: bool) -> None:
    if from_device and not to_device:
        _wait("download")
    if to_device and not from_device and not non_blocking:
        _wait("upload")


def _raw(tree: Any) -> Any:
    return pytree.tree_map_only(DeviceTensor, lambda x: x.raw, tree)


def _install() -> None:
    _setup_privateuseone_for_python_backend(NAME, _Backend())
    tensor, as_tensor, generator = torch.tensor, torch.as_tensor, torch.Generator

    def is_ours(device: Any) -> bool:
        return device is not None and torch.device(device).type == NAME

    def new_tensor(data: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> torch.Tensor:
        if not is_ours(device):
            return tensor(data, dtype=dtype, device=device, **options)
        return tensor(data, dtype=dtype).to(device).requires_grad_(options.get("requires_grad", False))

    def new_as_tensor(data: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
        if isinstance(data, DeviceTensor):
            return data.to(device=device or data.device, dtype=dtype or data.dtype)
        made = as_tensor(data, dtype=dtype)
        return made if device is None else made.to(device)

    class NewGenerator:  # a class, for it stands in annotations
        def __new__(cls, device: Any = "cpu") -> Any:
            return generator("cpu" if is_ours(device) else device)

    def inference_mode(mode: bool | Callable[..., Any] = True) -> Any:  # of which no wrapper can be a view
        return torch.no_grad()(mode) if callable(mode) else torch.no_grad() if mode else _Nothing()

    # `with torch.device(...)` knows factories by identity and gathers them at its first use: before the change, or a
    # `torch.tensor` in it makes CPU tensors. transformers would then not notice the meta device of its loading, and
    # would leave buffers that no file holds, such as a BERT's position_ids, unfilled.
    _device_constructors()
    torch.tensor, torch.as_tensor = new_tensor, new_as_tensor  # the C++ ones make no tensor of a Python device
    torch.Generator, torch.inference_mode = NewGenerator, inference_mode
    _Mode().__enter__()


_install()
