"""exhaustive and identity: debiased HSIC has the squared norm of the covariance for its mean, and 0 over all pairings

Claim: Let K, L be kernels x_i'x_j, y_i'y_j of n pairs, K~ and L~ the same with diagonals 0, and h = [tr K~L~ + 1'K~1 1'L~1 /
    ((n-1)(n-2)) - 2/(n-2) 1'K~L~1] / (n (n-3)). Its mean over independent pairs is ||Cov(x, y)||_F^2, and its mean over all
    n! pairings of the same samples is 0. With kernels of centred rows, and a, b their diagonals, h = [tr KL + tr K tr L /
    ((n-1)(n-2)) - n/(n-2) a'b] / (n (n-3)). tr KL of centred rows over (n-1)^2, which biased CKA takes, is larger on average.
Function: funcscope.representation.similarity.cka, funcscope.representation.spectrum.activation_spectra
Size: all samples of n = 4 and 5 pairs from populations of three in one and two dimensions; all 24 and 120 pairings; the
    second form for kernels of n = 4 with all entries symbols.
Assumptions: pairs are independent and equally distributed; exact arithmetic.
Not covered: other sizes; the ratio of three such numbers (CKA), which is not unbiased; rows that depend on each other.
"""

from fractions import Fraction as Q
from itertools import permutations, product
from math import prod

import pytest
import sympy as sp
import torch

import funcscope as fs
from funcscope.representation import activation_spectra, cka

POPULATIONS = {
    "one dimension": (((1,), (2,), Q(1, 2)), ((-2,), (0,), Q(1, 3)), ((3,), (-1,), Q(1, 6))),
    "two and one": (((1, 0), (2,), Q(1, 4)), ((-2, 1), (1,), Q(1, 4)), ((0, 3), (-1,), Q(1, 2))),
}


def gram(rows):
    return [[sum(Q(a) * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]


def centred(rows):
    means = [Q(sum(column), len(rows)) for column in zip(*rows, strict=True)]
    return [[a - m for a, m in zip(row, means, strict=True)] for row in rows]


def by_definition(K, L):
    n = len(K)
    off = [(i, j) for i in range(n) for j in range(n) if i != j]
    rows = [[sum(M[i][j] for j in range(n) if j != i) for i in range(n)] for M in (K, L)]
    both = sum(K[i][j] * L[i][j] for i, j in off)
    sums = sum(rows[0]) * sum(rows[1])
    middle = sum(a * b for a, b in zip(*rows, strict=True))
    return (both + sums / ((n - 1) * (n - 2)) - Q(2, n - 2) * middle) / (n * (n - 3))


def by_centred(K, L):
    n = len(K)
    both = sum(K[i][j] * L[i][j] for i in range(n) for j in range(n))
    traces = sum(K[i][i] for i in range(n)) * sum(L[i][i] for i in range(n))
    diagonals = sum(K[i][i] * L[i][i] for i in range(n))
    return (both + traces / ((n - 1) * (n - 2)) - Q(n, n - 2) * diagonals) / (n * (n - 3))


def covariance_norm(population):
    def mean(f):
        return sum(p * f(x, y) for x, y, p in population)

    (x, y, _), *_ = population
    return sum(
        (mean(lambda x, y, i=i, j=j: x[i] * y[j]) - mean(lambda x, _, i=i: x[i]) * mean(lambda _, y, j=j: y[j])) ** 2
        for i, j in product(range(len(x)), range(len(y)))
    )


@pytest.mark.parametrize("n", [4, 5])
@pytest.mark.parametrize("name", POPULATIONS)
def test_its_mean_over_all_samples_is_the_squared_norm_of_the_covariance(name, n):
    population = POPULATIONS[name]
    total = biased = Q(0)
    for sample in product(population, repeat=n):
        share = prod(p for _, _, p in sample)
        xs, ys = (centred([pair[i] for pair in sample]) for i in (0, 1))
        K, L = gram(xs), gram(ys)
        total += share * by_centred(K, L)
        biased += (
            share * sum(a * b for r, s in zip(K, L, strict=True) for a, b in zip(r, s, strict=True)) / (n - 1) ** 2
        )
    assert total == covariance_norm(population) > 0
    assert biased > total  # negative control


@pytest.mark.parametrize("n", [4, 5])
def test_its_mean_over_all_pairings_of_a_sample_is_0(n):
    xs, ys = [(i * i, 3 - i) for i in range(n)], [(2**i,) for i in range(n)]
    K = gram(xs)
    values = [by_definition(K, gram([ys[i] for i in order])) for order in permutations(range(n))]
    assert sum(values) == 0
    assert max(values) > 0  # negative control: single pairings are not
    assert sum(by_definition(K, gram([ys[i] for i in order])) + 1 for order in permutations(range(n))) != 0


def test_the_form_of_centred_kernels_is_the_definition():
    n = 4
    K, L = (sp.Matrix(n, n, lambda i, j, c=c: sp.Symbol(f"{c}{min(i, j)}{max(i, j)}")) for c in "kl")
    H = sp.eye(n) - sp.ones(n, n) / n
    one = by_definition(K.tolist(), L.tolist())
    other = by_centred((H * K * H).tolist(), (H * L * H).tolist())
    assert sp.expand(one - other) == 0
    assert sp.expand(one - by_centred(K.tolist(), L.tolist())) != 0  # negative control: not centred


# Bridge: the shipped functions in float64, against exact rationals.


def test_shipped_numbers_are_the_exact_ones():
    xs, ys = [(1, 0), (2, 5), (-3, 1), (0, 4), (7, -2), (1, 1)], [(3,), (1,), (0,), (-2,), (4,), (9,)]
    K, L = gram(xs), gram(ys)
    exact = by_definition(K, L) / sp.sqrt(sp.Rational(by_definition(K, K)) * sp.Rational(by_definition(L, L)))
    x, y = (torch.tensor(rows, dtype=torch.float64) for rows in (xs, ys))
    assert float(cka(x, y, key=fs.key(0)).similarity.value) == pytest.approx(float(exact), rel=1e-12)
    trace = sum(K[i][i] for i in range(6)) - Q(sum(map(sum, K)), 6)
    ratio = (trace / 5) ** 2 / by_definition(K, K)
    found = activation_spectra({"x": x})
    assert float(found.debiased_participation_ratio) == pytest.approx(float(ratio), rel=1e-12)
    assert float(found.debiased_participation_ratio) != pytest.approx(float(found.participation_ratio), rel=1e-2)
