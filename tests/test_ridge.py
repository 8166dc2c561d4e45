"""The closed forms are the textbook's, whatever the chunks; and what the soft tokens start from tells rows apart."""

import math

import pytest
import torch
from torch.nn import functional as F

from elmlib.ridge import MEAN_SHARE, NormalEquations, fit_ridge, mean_and_std, views

DIM = 6


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


@pytest.mark.parametrize("sizes", [[30], [1] * 30, [29, 1]])
def test_mean_and_std_equal_torch_whatever_the_chunks(sizes):
    x = normal(30, DIM) * 0.01 + 5
    mean, std = mean_and_std(x.split(sizes))
    torch.testing.assert_close(mean, x.double().mean(0).float())
    torch.testing.assert_close(std, x.double().std(0, correction=0).float())


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match="no rows"):
        mean_and_std([])
    with pytest.raises(ValueError, match="no rows"):
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
    for number, view in enumerate(views(ridge, count)):
        power = vectors @ torch.diag(values ** -(number / count)) @ vectors.T
        own = (ridge.map(x).double() - mean) @ power
        own = own / own.square().mean().sqrt()
        expected = own + MEAN_SHARE * mean / mean.square().mean().sqrt()
        expected = expected / math.sqrt(1 + MEAN_SHARE**2)
        torch.testing.assert_close(view(x).double(), expected, rtol=1e-3, atol=1e-3)


def test_views_have_size_one():
    x, _, ridge = fitted()
    for view in views(ridge, 4):
        assert view(x).square().mean().sqrt().item() == pytest.approx(1.0, abs=0.05)


def test_rows_are_less_alike_from_view_to_view():
    x, _, ridge = fitted()

    def likeness(view):
        own = F.normalize(view(x) - view(x).mean(0))
        return (own @ own.T).abs().mean().item()

    alike = [likeness(view) for view in views(ridge, 4)]
    assert alike == sorted(alike, reverse=True)
    assert alike[0] > alike[3] + 0.1


def test_views_of_targets_that_never_vary_are_finite():
    x = normal(9, DIM)
    moments = NormalEquations([(x, torch.ones(9, 4))])
    for view in views(fit_ridge(moments, moments), 3):
        assert view(x).isfinite().all()
