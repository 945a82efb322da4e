"""exhaustive: what means over pairs of samples vary by, and that its estimate from one sample is unbiased

Claim: With U the mean of h over pairs of different samples of n, e = h - U, r_i its row sums and d its residuals beside an
    effect of each sample, V = V_J - n V_2 / (n - 2) has the mean Var U, and V_2 that part of it that pairs have,
    2 zeta_2 / (n (n - 1)); V_J, the jackknife's, has both, the second 2 (n - 1) / (n - 2) times. With M the mean of h over
    all pairs of n and m samples of two populations, var(row means)/n + var(column means)/m - residual / (nm) has the mean
    Var M.
Function: funcscope.curvature.pair_errors.pair_stderr, funcscope.curvature.pair_errors.crossed_stderr
Size: all samples of n = 4 and 5 from populations of three and two, all of n, m = 2, 3 from two and three, for kernels h
    with and without an effect of single samples, of fractions.
Assumptions: samples are independent and equally distributed; exact arithmetic.
Not covered: other sizes than these; the bound from below, which makes the root of V real; weights that are not equal.
"""

from fractions import Fraction as Q
from itertools import product
from math import prod

import pytest
import torch

from funcscope.curvature.pair_errors import crossed_stderr, pair_stderr

THREE = ((1, Q(1, 2)), (-2, Q(1, 3)), (4, Q(1, 6)))
TWO = ((3, Q(2, 3)), (-1, Q(1, 3)))
NULL = ((2, Q(1, 3)), (-1, Q(2, 3)))  # of mean 0: x y has no effect of single samples
KERNELS = {"product": lambda x, y: Q(x * y), "half the square of the difference": lambda x, y: Q((x - y) ** 2, 2)}


def expected(statistic, *samples):
    """Over all samples of each (population, number)."""
    every = product(*(product(population, repeat=num) for population, num in samples))
    return sum(prod(p for sample in each for _, p in sample) * statistic(*([x for x, _ in s] for s in each))
               for each in every)  # fmt: skip


def variance(statistic, *samples):
    return expected(lambda *x: statistic(*x) ** 2, *samples) - expected(statistic, *samples) ** 2


def off(x):
    n = len(x)
    return [(i, j) for i in range(n) for j in range(n) if i != j]


def pairs_mean(h):
    return lambda x: sum(h(x[i], x[j]) for i, j in off(x)) / (len(x) * (len(x) - 1))


def parts(h, x):
    """V_J and V_2 as the docstring has them."""
    n, U = len(x), pairs_mean(h)(x)
    e = {(i, j): h(x[i], x[j]) - U for i, j in off(x)}
    r = [sum(e[i, j] for j in range(n) if j != i) for i in range(n)]
    d = [e[i, j] - (r[i] + r[j]) / (n - 2) for i, j in off(x)]
    jackknife = 4 * sum(a**2 for a in r) / (n * (n - 1) * (n - 2) ** 2)
    return jackknife, 2 * sum(a**2 for a in d) / (n**2 * (n - 1) * (n - 3))


def zeta(h, population):
    """The variance of h(x, y) beside effects of x and of y."""
    mean = expected(lambda x: h(*x), (population, 2))
    first = {x: sum(p * h(x, y) for y, p in population) - mean for x, _ in population}
    return expected(lambda x: (h(*x) - first[x[0]] - first[x[1]] - mean) ** 2, (population, 2))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("population", "n"), [(THREE, 4), (TWO, 5), (NULL, 4), (NULL, 5)])
def test_the_estimate_has_the_variance_for_its_mean_and_its_second_part_that_of_pairs(name, population, n):
    h = KERNELS[name]
    at = (population, n)
    jackknife, of_pairs = (expected(lambda x, i=i: parts(h, x)[i], at) for i in (0, 1))
    truth = variance(pairs_mean(h), at)
    assert of_pairs == 2 * zeta(h, population) / (n * (n - 1)) > 0
    assert jackknife - Q(n, n - 2) * of_pairs == truth
    assert jackknife > truth  # negative control
    if population is NULL and name == "product":
        assert jackknife == Q(2 * (n - 1), n - 2) * truth


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 2), (3, 3)])
@pytest.mark.parametrize("second", [TWO, NULL])
@pytest.mark.parametrize("name", KERNELS)
def test_the_estimate_of_crossed_pairs_has_the_variance_for_its_mean(name, second, n, m):
    h = KERNELS[name]

    def terms(x, y):
        values = [[h(a, b) for b in y] for a in x]
        rows, columns = [sum(row) / m for row in values], [sum(column) / n for column in zip(*values, strict=True)]
        mean = sum(rows) / n
        residual = sum((values[i][j] - rows[i] - columns[j] + mean) ** 2 for i, j in product(range(n), range(m)))
        by_rows, by_columns = (
            sum((a - mean) ** 2 for a in side) / (len(side) - 1) / len(side) for side in (rows, columns)
        )
        return by_rows + by_columns, residual / ((n - 1) * (m - 1) * n * m), mean

    at = (NULL, n), (second, m)
    jackknife, of_pairs = (expected(lambda x, y, i=i: terms(x, y)[i], *at) for i in (0, 1))
    assert jackknife - of_pairs == variance(lambda x, y: terms(x, y)[2], *at)
    assert jackknife > variance(lambda x, y: terms(x, y)[2], *at)  # negative control


@pytest.mark.parametrize("name", KERNELS)
def test_shipped_errors_are_these_where_the_bound_does_not_hold_them(name):
    x, h = [1, -2, 4, 7, 3], KERNELS[name]
    jackknife, of_pairs = parts(h, x)
    wanted = max(jackknife - Q(5, 3) * of_pairs, of_pairs / 2)
    values = torch.tensor([[float(h(a, b)) for b in x] for a in x], dtype=torch.float64)
    assert float(pair_stderr(values)) ** 2 == pytest.approx(float(wanted))
    assert float(pair_stderr(values)) ** 2 != pytest.approx(float(jackknife), rel=1e-3)  # negative control
    x_axis, y_axis = torch.tensor([1.0, 2.0, 6.0]).double(), torch.tensor([1.0, 3.0]).double()
    additive = crossed_stderr(x_axis[:, None] + y_axis)
    assert float(additive) ** 2 == pytest.approx(float(x_axis.var() / 3 + y_axis.var() / 2))
