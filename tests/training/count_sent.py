"""One process of a run that counts the numbers that its backward passes send; test_setup starts it."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import Module

from elmlib.config import SummaryTrainingConfig
from elmlib.models.adapter import EmbeddingAdapter
from elmlib.training import setup, trainer

sent: list[int] = []
share_adapter = setup.share_adapter


def counting(adapter: EmbeddingAdapter, accelerator: Accelerator) -> Module:
    """The shared adapter, what it sends counted."""

    def hook(_: None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    shared = share_adapter(adapter, accelerator)
    shared.register_comm_hook(None, hook)
    return shared


if __name__ == "__main__":
    setup.share_adapter = counting
    result = trainer.train(SummaryTrainingConfig.from_json(Path(sys.argv[1])))
    if PartialState().is_main_process:
        print("sent", sum(sent), result.metrics["steps"] * result.metrics["num_parameters_trained"])
