"""Ridge regression from second moments, so that memory does not grow with the rows; and the views of what it predicts
that the soft tokens start from."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MEAN_SHARE = 1.0
"""Size of the targets' common mean beside a view of what is the row's own, which has size 1. In the regression itself
the mean was 5 times the own part (7,200 docstrings); left out altogether, training ended at a higher NLL."""

_FLOOR = 0.1  # of the mean eigenvalue, added to each: the least common directions are mostly noise


class LinearMap(NamedTuple):
    """y = weight x + bias; weight (outputs, inputs), bias (outputs,), float32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Moments(NamedTuple):
    """Mean (dim,) and covariance (dim, dim), float64."""

    mean: Tensor
    covariance: Tensor


class NormalEquations:
    """What least squares needs of any number of (x, y) rows: their second moments, in float64."""

    def __init__(self, chunks: Iterable[tuple[Tensor, Tensor]]):
        """chunks of x (rows, inputs) and y (rows, outputs); memory does not grow with the number of rows."""
        self.gram, self.cross, self.power = torch.zeros(()), torch.zeros(()), torch.zeros(())
        self.rows = 0
        for x, y in chunks:
            x, y = _double(torch.cat([x, torch.ones_like(x[:, :1])], dim=1)), _double(y)  # the last input is the bias
            self.gram = self.gram + x.T @ x
            self.cross = self.cross + x.T @ y
            self.power = self.power + y.T @ y
            self.rows += len(x)
        if not self.rows:
            raise ValueError("least squares got no rows")

    def solve(self, strength: float) -> Tensor:
        """Ridge regression (Hoerl and Kennard, 1970), (inputs + 1, outputs): argmin |xW - y|^2 + strength |W|^2.

        The bias, the last row, is not shrunk.
        """
        penalty = torch.full_like(self.gram[0], strength)
        penalty[-1] = 0.0
        return torch.linalg.solve(self.gram + torch.diag(penalty), self.cross)

    def mean_error(self, solution: Tensor) -> float:
        """Mean of |xW - y|^2 over these rows, from their moments alone."""
        error = self.power.trace() - 2 * (solution * self.cross).sum() + (solution * (self.gram @ solution)).sum()
        return error.item() / self.rows

    def input_moments(self) -> Moments:
        """Of x."""
        mean = self.gram[-1, :-1] / self.rows
        return Moments(mean, self.gram[:-1, :-1] / self.rows - torch.outer(mean, mean))

    def output_moments(self) -> Moments:
        """Of y."""
        mean = self.cross[-1] / self.rows
        return Moments(mean, self.power / self.rows - torch.outer(mean, mean))


class Ridge(NamedTuple):
    """A ridge regression."""

    map: LinearMap
    strength: float
    """Of the penalty."""
    inputs: Moments
    """Of the training rows, as are `outputs`."""
    outputs: Moments


def fit_ridge(train: NormalEquations, val: NormalEquations) -> Ridge:
    """The ridge regression on `train` whose strength has the least error on `val`.

    Strengths are tried from 1e-4 to 30 times the mean second moment of an input, in half decades.
    """
    scale = train.gram.diagonal()[:-1].mean().item()
    strengths = [scale * 10 ** (exponent / 2) for exponent in range(-8, 4)]
    solutions = [train.solve(strength) for strength in strengths]
    errors = [val.mean_error(solution) for solution in solutions]
    best = errors.index(min(errors))
    weight, bias = solutions[best][:-1].T, solutions[best][-1]
    fitted = LinearMap(weight.float().contiguous(), bias.float())
    return Ridge(fitted, strengths[best], train.input_moments(), train.output_moments())


def views(ridge: Ridge, count: int) -> list[LinearMap]:
    """`count` views of what `ridge` predicts, each with outputs of root mean square 1 over its training rows.

    View j is C^-p (y(x) - m) for p = j / count, with m and C the targets' mean and covariance, and MEAN_SHARE of m's
    direction. p = 0 is the regression, which mostly says what all targets share; p = 1/2 whitens the targets; p = 1
    would be Fisher's linear discriminant (Fisher, 1936): what tells this target from the others.
    """
    (center, spread), (mean, covariance) = ridge.inputs, ridge.outputs
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0) + _FLOOR * values.mean().clamp_min(1e-12)
    slope = ridge.map.weight.to(covariance)  # (outputs, inputs)
    common = MEAN_SHARE * mean / mean.square().mean().sqrt()
    found = []
    for number in range(count):
        sharper = (vectors * values ** (-number / count)) @ vectors.T @ slope
        size = ((sharper @ spread) * sharper).sum(1).mean().sqrt()
        own = sharper / size.clamp_min(1e-12)  # embeddings or targets that are all the same have no own part
        weight, bias = (x / (1 + MEAN_SHARE**2) ** 0.5 for x in (own, common - own @ center))
        found.append(LinearMap(weight.float(), bias.float()))
    return found


def mean_and_std(chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation over the rows of all chunks, each (dim,), summed in float64."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for x in chunks:
        x = _double(x)
        count, total, squares = count + len(x), total + x.sum(0), squares + x.square().sum(0)
    if count == 0:
        raise ValueError("mean_and_std got no rows")
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp_min(0).sqrt().float()


def _double(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()  # Apple's GPUs have no float64
