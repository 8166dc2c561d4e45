"""Every row is seen once an epoch, however many processes share it; the learning rate follows its course."""

import itertools
from dataclasses import replace

import pytest
import torch

from elmlib.config import SummaryTrainingConfig
from elmlib.data import Split
from elmlib.schedule import epoch_windows, learning_rate
from elmlib.workbench import prepare


@pytest.fixture
def split(tiny_config: SummaryTrainingConfig) -> Split:
    return prepare(tiny_config, torch.device("cpu")).train


def test_each_row_is_seen_once_an_epoch(split: Split, tiny_config: SummaryTrainingConfig) -> None:
    for accumulation in (1, 3, 5):
        windows = epoch_windows(split, replace(tiny_config, gradient_accumulation_steps=accumulation), 0)
        rows = [row for window in windows for batch in window for row in batch]
        assert sorted(rows) == list(range(96))
        assert all(len(window) == accumulation for window in windows[:-1])


def test_processes_share_what_one_would_accumulate(split: Split, tiny_config: SummaryTrainingConfig) -> None:
    alone = epoch_windows(split, replace(tiny_config, gradient_accumulation_steps=3), 1)
    shared = [epoch_windows(split, tiny_config, 1, process, 3) for process in range(3)]
    assert [[batch for (batch,) in window] for window in zip(*shared, strict=True)] == alone
    assert epoch_windows(split, tiny_config, 1) != epoch_windows(split, tiny_config, 2)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = SummaryTrainingConfig(learning_rate=1.0, warmup_fraction=0.1)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[100] == pytest.approx(0.0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
