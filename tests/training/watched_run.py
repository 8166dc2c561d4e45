"""One process of a run on a sharded LLM that is watched; test_processes starts it: a settings file, a file for what
each process finds (`{rank}` in its name), and `disagree` for a second process that draws other tokens than the first.
"""

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch.distributed.distributed_c10d import _get_default_group
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from elmlib.config import SummaryTrainingConfig
from elmlib.models import elm
from elmlib.training import setup, trainer

shard_llm, draw = setup.shard_llm, elm.draw
found: dict[str, Any] = {"during": [], "between": []}


def sharding(llm: PreTrainedModel, accelerator: Accelerator) -> None:
    """Shard, and note what this process holds of the LLM's layers before and after each, forward and backward."""
    layers = llm.get_decoder().layers
    found["layer"] = sum(p.numel() for p in layers[0].parameters())
    shard_llm(llm, accelerator)
    found["share"] = sum(p.to_local().numel() for p in layers.parameters())

    def held() -> int:
        whole = [p.numel() for p in layers.parameters() if not isinstance(p, DTensor)]
        return found["share"] + sum(whole)

    def note(*given: Any) -> None:
        found["during"].append(held())
        output = given[-1] if given else None
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(lambda _: found["during"].append(held()))

    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: note())
        layer.register_forward_hook(note)
    llm.get_decoder().norm.register_forward_hook(lambda *_: found["between"].append(held()))


def disagreeing(logits: torch.Tensor, *given: Any) -> torch.Tensor:
    """`draw`, but every other process ends all its answers at once."""
    tokens = draw(logits, *given)
    if PartialState().is_main_process:
        return tokens
    return torch.full_like(tokens, END)


if __name__ == "__main__":
    setup.shard_llm = sharding
    config = SummaryTrainingConfig.from_json(Path(sys.argv[1]))
    if "disagree" in sys.argv:
        from transformers import AutoTokenizer

        END = AutoTokenizer.from_pretrained(config.llm_model_name).eos_token_id
        elm.draw = disagreeing
        faulthandler.dump_traceback_later(60, exit=True)  # it hangs: end it
    result = trainer.train(config)
    found["timeout"] = _get_default_group()._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    Path(sys.argv[2].format(rank=PartialState().process_index)).write_text(json.dumps(found))
