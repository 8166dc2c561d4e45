"""The objective is the weighted sum that its settings name."""

from dataclasses import replace

import pytest
import torch

from elmlib.config import SummaryTrainingConfig
from elmlib.losses import LossParts
from elmlib.objective import loss_parts, total_loss
from elmlib.workbench import Workbench, prepare

WEIGHTS = {"contrastive_weight": 0.5, "text_drift_weight": 0.25, "teacher_kl_weight": 2.0}


def test_the_total_is_the_weighted_sum_of_means() -> None:
    parts = LossParts(*(torch.tensor(float(x)) for x in (12, 6, 8, 99, 3)), tokens=4, rows=2)
    config = SummaryTrainingConfig(**WEIGHTS)
    assert total_loss(parts, 4, 2, config).item() == pytest.approx(12 / 4 + 0.5 * 6 / 2 + 0.25 * 8 / 2 + 2.0 * 3 / 4)


def values(bench: Workbench, rows: list[int], config: SummaryTrainingConfig) -> list[float]:
    """All parts of the loss of these rows."""
    with torch.no_grad():
        return [float(x) for x in loss_parts(bench, bench.train.collate(rows), config)]


def test_a_batch_cut_in_two_has_the_same_loss_but_for_its_negatives(tiny_config: SummaryTrainingConfig) -> None:
    config = replace(tiny_config, use_contrastive_loss=False, dropout_rate=0.0)
    bench = prepare(config, torch.device("cpu"))
    rows = bench.train.bucket(range(96), 8)[0]
    halves = [values(bench, half, config) for half in (rows[:3], rows[3:])]
    for total, *pieces in zip(values(bench, rows, config), *halves, strict=True):
        assert total == pytest.approx(sum(pieces), rel=1e-4, abs=1e-4)


def test_permuting_a_batch_changes_no_loss(tiny_config: SummaryTrainingConfig) -> None:
    config = replace(tiny_config, dropout_rate=0.0)
    bench = prepare(config, torch.device("cpu"))
    rows = bench.train.bucket(range(96), 8)[0]
    assert values(bench, rows, config) == pytest.approx(values(bench, rows[::-1], config), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("switch", "name"), [("use_contrastive_loss", "contrastive"), ("use_text_drift_loss", "drift"), ("", "teacher")]
)
def test_a_loss_that_is_off_is_zero(tiny_config: SummaryTrainingConfig, switch: str, name: str) -> None:
    config = replace(tiny_config, **({switch: False} if switch else {}))
    bench = prepare(config, torch.device("cpu"))
    parts = loss_parts(bench, bench.train.collate([0, 1]), config)
    assert getattr(parts, name) == 0
    others = {"contrastive", "drift"} - {name}
    assert all(getattr(parts, other) > 0 for other in others)


@pytest.mark.parametrize("views", [True, False])
def test_soft_tokens_start_at_views_of_their_own_or_all_alike(tiny_config: SummaryTrainingConfig, views: bool) -> None:
    config = replace(tiny_config, warm_start_views=views, num_soft_tokens=3, dropout_rate=0.0)
    bench = prepare(config, torch.device("cpu"))
    with torch.no_grad():
        first, *others = bench.elm.adapter(bench.train.vectors([0, 1])).unbind(1)
    assert all(torch.allclose(first, other, atol=1e-5) is not views for other in others)
