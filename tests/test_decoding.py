"""Nucleus sampling, against transformers' own and against its definition."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from elmlib.decoding import NUCLEUS_TOKENS, Nucleus, Sampling


def scores(rows=6, vocab=400, spread=3.0, seed=0):
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.5])
def test_the_nucleus_is_that_of_transformers(top_p, temperature):
    found = Nucleus(Sampling(temperature=temperature, top_p=top_p))(None, scores())
    expected = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, scores()))
    kept = expected.isfinite()
    assert torch.equal(found.isfinite(), kept)
    torch.testing.assert_close(found[kept], expected[kept])


def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p():
    given = scores()
    found = Nucleus(Sampling(temperature=1.0, top_p=0.8))(None, given)
    for row, kept in zip(given.softmax(-1), found.isfinite(), strict=True):
        assert row[kept].sum() >= 0.8 > row[kept].sum() - row[kept].min()
        assert row[kept].min() >= row[~kept].max()


def test_the_best_token_stays_however_small_the_nucleus():
    found = Nucleus(Sampling(temperature=1.0, top_p=1e-6))(None, scores())
    assert torch.equal(found.argmax(-1), scores().argmax(-1))
    assert (found.isfinite().sum(-1) == 1).all()


def test_a_flat_distribution_is_cut_to_the_most_tokens_that_a_nucleus_holds():
    found = Nucleus(Sampling(temperature=1.0, top_p=1.0))(None, scores(vocab=NUCLEUS_TOKENS + 100, spread=0.01))
    assert (found.isfinite().sum(-1) == NUCLEUS_TOKENS).all()
