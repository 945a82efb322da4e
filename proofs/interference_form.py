"""exhaustive: the second order damage of a mean gradient without what its noise adds

Claim: For independent samples a of A and b of B, K_ij = a_i . b_j, the mean over i of
    ((sum_j K_ij)^2 - sum_j K_ij^2) / (m (m - 1)) has the mean mu_B' S_A mu_B, S_A = E[a a'], mu_B = E[b]. With the pairs
    j = j left in, the mean over i of (sum_j K_ij)^2 / m^2 has that plus tr(S_A Cov b) / m.
Function: funcscope.weights.interference.cross_forms
Size: all samples of n = 1, 2 and m = 2, 3 from populations of two and three vectors in two coordinates, of fractions.
Assumptions: samples are independent and equally distributed; exact arithmetic.
Not covered: the mean weights of the sequences, which are taken as they are; how far the Fisher matrix is from the Hessian.
"""

from fractions import Fraction as Q
from itertools import product
from math import prod

import pytest
import torch

from funcscope.weights.interference import cross_forms

FIRST = (((1, 0), Q(1, 2)), ((-2, 3), Q(1, 2)))
SECOND = (((2, -1), Q(1, 3)), ((0, 1), Q(1, 6)), ((-1, 4), Q(1, 2)))


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def expected(statistic, n, m):
    """Over all samples of both."""
    every = product(product(FIRST, repeat=n), product(SECOND, repeat=m))
    return sum(
        prod(p for _, p in a + b) * statistic([x for x, _ in a], [x for x, _ in b]) for a, b in every
    )  # fmt: skip


def without_bias(a, b):
    m = len(b)
    rows = [[dot(x, y) for y in b] for x in a]
    return Q(sum(sum(row) ** 2 - sum(k * k for k in row) for row in rows), len(a) * m * (m - 1))


def of_the_mean(a, b):
    return Q(sum(sum(dot(x, y) for y in b) ** 2 for x in a), len(a) * len(b) ** 2)


def truth():
    mean = [sum(p * y[k] for y, p in SECOND) for k in range(2)]
    return sum(p * dot(x, mean) ** 2 for x, p in FIRST)


def noise():
    """tr(S_A Cov b)"""
    return sum(p * q * dot(x, y) ** 2 for x, p in FIRST for y, q in SECOND) - truth()


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 2), (1, 3), (2, 3)])
def test_pairs_of_different_samples_have_the_form_of_the_mean_and_all_pairs_have_more(n, m):
    assert expected(without_bias, n, m) == truth()
    assert expected(of_the_mean, n, m) == truth() + noise() / m
    assert noise() > 0  # negative control: it is not the same


def test_the_shipped_forms_are_these():
    a, b = [(1, 0), (-2, 3), (5, 1)], [(2, -1), (0, 1), (-1, 4), (3, 3)]
    values = torch.tensor([[[float(dot(x, y)) for y in b] for x in a]], dtype=torch.float64)
    wanted = [float(without_bias(b, a)), float(without_bias(a, b))]
    assert cross_forms(values)[0].tolist() == pytest.approx(wanted)
    assert cross_forms(values, unbiased=False)[0].tolist() == pytest.approx(
        [float(of_the_mean(b, a)), float(of_the_mean(a, b))]
    )
    assert cross_forms(values)[0].tolist() != pytest.approx(
        [float(of_the_mean(b, a)), float(of_the_mean(a, b))], rel=1e-3
    )
