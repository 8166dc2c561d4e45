"""The adapter keeps the scale it is given, starts where it is told, and its first steps refine that start."""

import math

import pytest
import torch
from torch.nn import functional as F

from elmlib.config import SummaryTrainingConfig
from elmlib.models.adapter import PRE_ACTIVATION_RMS, START_RMS, EmbeddingAdapter, LinearMap, make_adapter
from elmlib.models.warm_start import NormalEquations, fit_ridge, whitened_maps

DIM, LLM_DIM, TOKENS, HIDDEN = 6, 10, 3, 8


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(dim=DIM, llm_dim=LLM_DIM, tokens=TOKENS, dropout=0.0, scale=0.1, rms=1.0):
    torch.manual_seed(0)
    return EmbeddingAdapter(dim, llm_dim, tokens, HIDDEN, dropout, scale, rms)


def randomised(**shape):
    """An adapter as training might leave it: no weight at zero, no statistic at its default."""
    adapter = make(**shape)
    with torch.no_grad():
        for seed, parameter in enumerate(adapter.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed))
    adapter.standardise(normal(DIM, seed=50), normal(DIM, seed=51).abs() + 0.5)
    return adapter


@pytest.mark.parametrize("tokens", [1, 4])
def test_an_embedding_becomes_soft_tokens(tokens):
    out = make(tokens=tokens)(normal(5, DIM))
    assert out.shape == (5, tokens, LLM_DIM)
    assert out.dtype == torch.float32


def test_each_soft_token_has_the_rms_of_the_token_embeddings():
    table = normal(30, LLM_DIM, seed=3) * 0.07
    rms = make_adapter(SummaryTrainingConfig(hidden_dim=8), table).norm.weight[0].item()
    assert rms == pytest.approx(math.sqrt(sum(v * v for v in table.flatten().tolist()) / table.numel()), rel=1e-6)
    out = make(rms=rms)(normal(5, DIM))
    torch.testing.assert_close(out.square().mean(-1).sqrt(), torch.full((5, TOKENS), rms))


def test_the_rms_over_the_gain_is_one_whatever_the_weights():
    adapter = randomised()
    over_gain = adapter(normal(5, DIM)) / adapter.norm.weight
    torch.testing.assert_close(over_gain.square().mean(-1).sqrt(), torch.ones(5, TOKENS))


def test_forward_equals_its_naive_twin():
    adapter = randomised(scale=0.3)
    weights = {name: value.detach() for name, value in adapter.named_parameters()}
    embeddings = normal(4, DIM, seed=7)
    out = adapter(embeddings)
    for row in range(4):
        x = (embeddings[row] - adapter.mean) / adapter.std
        hidden = weights["up.weight"] @ x + weights["up.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))  # GELU
        mlp = weights["down.weight"] @ hidden + weights["down.bias"]
        z = 0.3 * (weights["linear.weight"] @ x + weights["linear.bias"]) + mlp
        for token in range(TOKENS):
            piece = z[token * LLM_DIM : (token + 1) * LLM_DIM]
            expected = weights["norm.weight"] * piece / piece.square().mean().sqrt()
            torch.testing.assert_close(out[row, token], expected, rtol=1e-4, atol=1e-5)


def test_dropout_does_not_matter_before_the_mlp_has_learned():
    adapter, x = make(dropout=0.5), normal(5, DIM)
    assert not adapter.down.weight.any()
    assert not adapter.down.bias.any()
    assert torch.equal(adapter.train()(x), adapter.eval()(x))


def test_dropout_acts_in_training_only():
    adapter, x = randomised(dropout=0.5), normal(5, DIM)
    assert not torch.equal(adapter.train()(x), adapter(x))
    assert torch.equal(adapter.eval()(x), adapter(x))


def test_the_warm_start_puts_each_soft_token_at_its_own_map():
    adapter, x = make(rms=0.2), normal(5, DIM, seed=4)
    adapter.standardise(normal(DIM, seed=5), normal(DIM, seed=6).abs() + 0.5)
    maps = [
        LinearMap(normal(LLM_DIM, DIM, seed=7 + token), normal(LLM_DIM, seed=17 + token)) for token in range(TOKENS)
    ]
    adapter.warm_start(maps)
    for token, fit in enumerate(maps):
        goal = fit(adapter.standardised(x))
        expected = 0.2 * goal / goal.square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(adapter(x)[:, token], expected)


def test_the_first_steps_refine_the_warm_start_and_do_not_replace_it():
    adapter, x = make(), normal(200, DIM, seed=4)
    y = x @ normal(DIM, LLM_DIM, seed=7) + normal(200, LLM_DIM, seed=9)
    ridge = fit_ridge(NormalEquations([(x, y)]), NormalEquations([(x, y)]))
    adapter.warm_start(whitened_maps(ridge, TOKENS))
    size = (adapter.residual_scale * adapter.linear(x)).square().mean().sqrt().item()
    assert size == pytest.approx(START_RMS, rel=1e-4)
    start = adapter(x)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-3)
    (adapter(x) * normal(200, TOKENS, LLM_DIM, seed=3)).sum().backward()
    optimizer.step()
    assert F.cosine_similarity(start, adapter(x), dim=-1).min() > 0.9


@pytest.mark.parametrize(("count", "rows"), [(TOKENS, LLM_DIM + 1), (TOKENS - 1, LLM_DIM)])
def test_a_warm_start_of_the_wrong_size_is_refused(count, rows):
    with pytest.raises(AssertionError):
        make().warm_start([LinearMap(torch.zeros(rows, DIM), torch.zeros(rows))] * count)


def test_the_mlp_starts_beyond_the_linear_part_of_its_activation():
    adapter = EmbeddingAdapter(64, LLM_DIM, TOKENS, 512, dropout_rate=0.0, residual_scale=0.1)
    assert adapter.up(normal(100, 64)).std().item() == pytest.approx(PRE_ACTIVATION_RMS, rel=0.05)


def test_one_soft_token_of_equal_size_starts_as_the_identity():
    x = normal(5, LLM_DIM)
    out = make(dim=LLM_DIM, tokens=1)(x)
    torch.testing.assert_close(out[:, 0], x / x.square().mean(-1, keepdim=True).sqrt())


@pytest.mark.parametrize(("dim", "tokens"), [(LLM_DIM, 2), (DIM, 1)])
def test_any_other_shape_does_not(dim, tokens):
    x = normal(5, dim)
    assert F.cosine_similarity(make(dim=dim, tokens=tokens)(x).flatten(1)[:, :dim], x).abs().max() < 0.99


def standardise(adapter, x):
    """As `fit_warm_start` does."""
    mean, covariance = NormalEquations([(x, x[:, :0])]).input_moments()
    adapter.standardise(mean.float(), covariance.diagonal().clamp_min(0).sqrt().float())


def test_standardised_rows_have_mean_zero_and_deviation_one():
    adapter, x = make(), normal(50, DIM) * 3 + 7
    standardise(adapter, x)
    standard = adapter.standardised(x)
    torch.testing.assert_close(standard.mean(0), torch.zeros(DIM), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.std(0, correction=0), torch.ones(DIM))


def test_a_dimension_that_never_varies_does_not_divide_by_zero():
    x = normal(20, DIM)
    x[:, 2] = 0.1  # not exact in binary, so that a careless mean would leave a remainder
    adapter = make()
    standardise(adapter, x)
    assert not adapter.standardised(x)[:, 2].any()
    assert adapter(x).isfinite().all()
