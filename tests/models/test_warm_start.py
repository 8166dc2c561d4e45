"""The closed forms are the textbook's, whatever the chunks; and what the soft tokens start from tells rows apart."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils import _pytree

from elmlib.config import InputError, SummaryTrainingConfig
from elmlib.data.dataset import load_split
from elmlib.models import warm_start
from elmlib.models.pretrained import load_llm
from elmlib.models.warm_start import (
    MEAN_SHARE,
    NormalEquations,
    WarmStart,
    fit_ridge,
    fit_warm_start,
    load_warm_start,
    mean_token_embedding,
    token_idf,
    whitened_maps,
)

DIM, LLM_DIM = 6, 10


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noisy_rows(rows, noise, seed):
    """x and a y that is linear in it but for noise; neither is centred."""
    x = normal(rows, DIM, seed=seed) + 2
    y = x @ normal(DIM, 4, seed=99) + 5 + noise * normal(rows, 4, seed=seed + 1)
    return x, y


def in_chunks(sizes, *tensors):
    return zip(*(tensor.split(sizes) for tensor in tensors), strict=True)


def textbook_ridge(x, y, strength):
    """Centre, shrink the slope alone, and let the bias make up for the means."""
    x, y = x.double(), y.double()
    centred = x - x.mean(0)
    gram = centred.T @ centred + strength * torch.eye(DIM, dtype=torch.float64)
    slope = torch.linalg.inv(gram) @ centred.T @ (y - y.mean(0))
    return slope, y.mean(0) - x.mean(0) @ slope


def error_over_rows(x, y, slope, bias):
    return sum((row @ slope + bias - goal).square().sum().item() for row, goal in zip(x, y, strict=True)) / len(x)


@pytest.mark.parametrize("strength", [1e-3, 1.0, 300.0])
def test_ridge_equals_the_textbook(strength):
    x, y = noisy_rows(40, 0.5, seed=1)
    solution = NormalEquations([(x, y)]).solve(strength)
    slope, bias = textbook_ridge(x, y, strength)
    torch.testing.assert_close(solution[:-1], slope)
    torch.testing.assert_close(solution[-1], bias)


def test_the_bias_is_not_shrunk():
    x, y = noisy_rows(40, 0.5, seed=1)
    solution = NormalEquations([(x, y)]).solve(1e12)
    assert solution[:-1].abs().max() < 1e-6
    torch.testing.assert_close(solution[-1].float(), y.mean(0))


def test_least_squares_does_not_depend_on_the_chunks():
    x, y = noisy_rows(40, 0.5, seed=1)
    whole = NormalEquations([(x, y)])
    for sizes in ([1] * 40, [7, 30, 3]):
        pieces = NormalEquations(in_chunks(sizes, x, y))
        assert pieces.rows == 40
        torch.testing.assert_close(pieces.solve(2.0), whole.solve(2.0))
        assert pieces.mean_error(whole.solve(2.0)) == pytest.approx(whole.mean_error(whole.solve(2.0)))


def test_the_error_from_moments_is_the_error_over_rows():
    x, y = noisy_rows(40, 0.5, seed=1)
    solution = NormalEquations([(x, y)]).solve(3.0)
    held_x, held_y = noisy_rows(15, 0.5, seed=20)
    expected = error_over_rows(held_x.double(), held_y.double(), solution[:-1], solution[-1])
    assert NormalEquations([(held_x, held_y)]).mean_error(solution) == pytest.approx(expected)


@pytest.mark.parametrize("noise", [0.0, 3.0, 100.0])
def test_the_strength_with_the_least_validation_error_is_chosen(noise):
    train, val = noisy_rows(12, noise, seed=1), noisy_rows(30, noise, seed=20)
    fit, strength, inputs, outputs = fit_ridge(NormalEquations([train]), NormalEquations([val]))
    scale = train[0].double().square().sum(0).mean().item()
    strengths = [scale * factor * 10**exponent for exponent in range(-4, 2) for factor in (1, math.sqrt(10))]
    errors = [error_over_rows(*(t.double() for t in val), *textbook_ridge(*train, s)) for s in strengths]
    assert strength == pytest.approx(strengths[errors.index(min(errors))])
    slope, bias = textbook_ridge(*train, strength)
    torch.testing.assert_close(fit.weight, slope.T.float())
    torch.testing.assert_close(fit.bias, bias.float())
    assert fit.weight.dtype == fit.bias.dtype == torch.float32
    for moments, rows in zip((inputs, outputs), train, strict=True):
        torch.testing.assert_close(moments.mean, rows.double().mean(0))


def test_noise_is_shrunk_more_than_signal():
    def chosen(noise):
        return fit_ridge(*(NormalEquations([noisy_rows(12, noise, seed=seed)]) for seed in (1, 20))).strength

    assert chosen(0.0) < chosen(100.0)


def test_no_rows_are_an_error():
    with pytest.raises(InputError, match="no rows"):
        NormalEquations([])


def test_the_moments_are_those_of_the_rows():
    x, y = noisy_rows(40, 0.5, seed=1)
    moments = NormalEquations(in_chunks([7, 33], x, y))
    for (mean, covariance), rows in ((moments.input_moments(), x), (moments.output_moments(), y)):
        torch.testing.assert_close(mean, rows.double().mean(0))
        torch.testing.assert_close(covariance, torch.cov(rows.double().T, correction=0))


def fitted(rows=400, noise=3.0):
    """Targets of 4 numbers, of which one varies 10 times as much as the others."""
    x, y = noisy_rows(rows, noise, seed=1)
    y = y * torch.tensor([10.0, 1.0, 1.0, 1.0])
    return x, y, fit_ridge(NormalEquations([(x, y)]), NormalEquations([(x, y)]))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_views_equal_their_naive_twin(count):
    x, y, ridge = fitted()
    mean, covariance = y.double().mean(0), torch.cov(y.double().T, correction=0)
    floored = covariance + 0.1 * covariance.trace() / 4 * torch.eye(4)
    values, vectors = torch.linalg.eigh(floored)
    for number, view in enumerate(whitened_maps(ridge, count)):
        power = vectors @ torch.diag(values ** -(number / count)) @ vectors.T
        own = (ridge.map(x).double() - mean) @ power
        own = own / own.square().mean().sqrt()
        expected = own + MEAN_SHARE * mean / mean.square().mean().sqrt()
        expected = expected / math.sqrt(1 + MEAN_SHARE**2)
        torch.testing.assert_close(view(x).double(), expected, rtol=1e-3, atol=1e-3)


def test_views_have_size_one():
    x, _, ridge = fitted()
    for view in whitened_maps(ridge, 4):
        assert view(x).square().mean().sqrt().item() == pytest.approx(1.0, abs=0.05)


def test_rows_are_less_alike_from_view_to_view():
    x, _, ridge = fitted()

    def likeness(view):
        own = F.normalize(view(x) - view(x).mean(0))
        return (own @ own.T).abs().mean().item()

    alike = [likeness(view) for view in whitened_maps(ridge, 4)]
    assert alike == sorted(alike, reverse=True)
    assert alike[0] > alike[3] + 0.1


def test_views_of_targets_that_never_vary_are_finite():
    x = normal(9, DIM)
    moments = NormalEquations([(x, torch.ones(9, 4))])
    for view in whitened_maps(fit_ridge(moments, moments), 3):
        assert view(x).isfinite().all()


def test_token_idf_equals_its_naive_twin():
    answers = [[1, 2, 2, 9], [2, 3, 9], [1, 9], [9]]
    idf = token_idf(answers, 10)
    for token in range(10):
        found = sum(token in answer for answer in answers)
        assert idf[token].item() == pytest.approx(math.log(5 / (found + 1)), abs=1e-6)
    assert idf[9] == 0  # what stands in every answer, such as the end of turn, tells nothing
    assert (idf >= 0).all()


def test_mean_token_embedding_equals_its_naive_twin():
    table, weights = normal(10, LLM_DIM), normal(10, seed=1).abs()
    weights[0] = 0.0
    answers = [[1, 2, 2, 9], [3], [0, 0], [0, 7, 0]]  # the third weighs nothing: its plain mean
    labels = torch.full((4, 5), -100)
    for row, answer in enumerate(answers):
        labels[row, : len(answer)] = torch.tensor(answer)
    means = mean_token_embedding(labels, table, weights)
    for row, answer in enumerate(answers):
        total, weight = torch.zeros(LLM_DIM), 0.0
        for token in answer:
            share = 1.0 if row == 2 else weights[token].item()
            total, weight = total + share * table[token], weight + share
        torch.testing.assert_close(means[row], total / weight)


def test_mean_token_embedding_is_float32_of_any_table():
    table = normal(10, LLM_DIM).bfloat16()
    means = mean_token_embedding(torch.tensor([[1, 2]]), table, torch.ones(10))
    torch.testing.assert_close(means[0], table[1:3].float().mean(0))


def flat(found: WarmStart) -> list:
    return _pytree.tree_leaves([found.mean, found.std, found.idf, found.to_tokens, found.to_embedding])


@pytest.fixture
def given(tiny_config: SummaryTrainingConfig) -> tuple:
    """Both splits, the token embeddings, the config."""
    llm, tokenizer = load_llm(tiny_config.llm_model_name, torch.float32, "cpu")
    table = llm.get_input_embeddings().weight.detach()
    return (
        *(load_split(tiny_config, name, tokenizer) for name in ("train", "val")),
        table,
        tiny_config,
    )


def test_fits_come_back_from_the_cache_as_they_were_computed(given, tmp_path, monkeypatch):
    monkeypatch.setenv("ELMLIB_CACHE", str(tmp_path))
    computed = fit_warm_start(*given)
    for found in (load_warm_start(*given), load_warm_start(*given)):
        for one, other in zip(flat(computed), flat(found), strict=True):
            assert torch.equal(one, other) if torch.is_tensor(one) else one == other
    (path,) = tmp_path.rglob("fits.safetensors")
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-9] + bytes([whole[-9] ^ 255]) + whole[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"remove {path.parent}"):
            load_warm_start(*given)


def test_they_are_computed_once_for_each_data_and_llm(given, tmp_path, monkeypatch):
    monkeypatch.setenv("ELMLIB_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(warm_start, "fit_warm_start", lambda *args: calls.append(args) or fit_warm_start(*args))
    train, val, table, config = given
    other_answers = replace(val, answers=[[*answer, 5] for answer in val.answers])
    for number, changed in enumerate(
        [
            (train, val, table),
            (train.take(range(50)), val, table),
            (train, other_answers, table),
            (train, val, 2 * table),
        ]
    ):
        for _ in range(2):
            load_warm_start(*changed, config)
        assert len(calls) == number + 1
