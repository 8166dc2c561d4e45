"""Nucleus sampling, against transformers' own and against its definition."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from elmlib.models.elm import NUCLEUS_TOKENS, Sampling, draw, nucleus


def scores(rows=6, vocab=400, spread=3.0, seed=0):
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def dense(logits, sampling):
    probabilities, ids = nucleus(logits, sampling)
    return torch.zeros_like(logits).scatter(-1, ids, probabilities)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.5])
def test_the_nucleus_is_that_of_transformers(top_p, temperature):
    found = dense(scores(), Sampling(temperature=temperature, top_p=top_p))
    expected = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, scores()))
    assert torch.equal(found > 0, expected.isfinite())
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected.softmax(-1))


def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p():
    given = scores()
    found = dense(given, Sampling(temperature=1.0, top_p=0.8))
    for row, kept in zip(given.softmax(-1), found > 0, strict=True):
        assert row[kept].sum() >= 0.8 > row[kept].sum() - row[kept].min()
        assert row[kept].min() >= row[~kept].max()


def test_the_best_token_stays_however_small_the_nucleus():
    sampling = Sampling(temperature=1.0, top_p=1e-6)
    assert ((dense(scores(), sampling) > 0).sum(-1) == 1).all()
    assert torch.equal(draw(scores(), sampling, torch.Generator()), scores().argmax(-1))


def test_a_flat_distribution_is_cut_to_the_most_tokens_that_a_nucleus_holds():
    found = dense(scores(vocab=NUCLEUS_TOKENS + 100, spread=0.01), Sampling(temperature=1.0, top_p=1.0))
    assert ((found > 0).sum(-1) == NUCLEUS_TOKENS).all()


def test_draws_come_as_often_as_their_probabilities_say():
    given, sampling = scores(rows=1, vocab=8, spread=1.0), Sampling(temperature=0.7, top_p=0.9)
    drawn = draw(given.expand(20_000, -1), sampling, torch.Generator().manual_seed(0))
    expected = dense(given, sampling)[0]
    shares = torch.bincount(drawn, minlength=8) / len(drawn)
    torch.testing.assert_close(shares, expected / expected.sum(), atol=0.015, rtol=0)


def test_temperature_0_takes_the_best_token():
    assert torch.equal(draw(scores(), Sampling(temperature=0.0), torch.Generator()), scores().argmax(-1))
