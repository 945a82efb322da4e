"""identity and exhaustive: one pass gives the weighted mean and scatter of two, and parts merge in any order

Claim: The updates mu + (w/W)(x - mu) and M + w (x - mu_old)(x - mu_new) give mu = sum w x / W and M = sum w (x - mu)^2;
    parts (W, mu, M) merge by mu_a + (W_b/W) d, M_a + M_b + d^2 W_a W_b / W, d = mu_b - mu_a, which is associative and
    commutative, and an update is the merge with a part of one value. M / (W - sum w^2 / W) has the variance of a single value
    as its mean where all values have the same; M / (W - 1), with tokens for W, has not. sum w^2 (x - mu)^2 =
    M' + S (mu' - mu)^2, with S, mu', M' the same three with weights w^2.
Function: funcscope.fisher.accumulators.Welford
Size: n = 2, 3, 4 values and weights, all symbols, as an update sees one value and the part before it; merges of three
    parts, all nine numbers symbols; the mean over all 2^n samples of n = 2, 3 from two values, with unequal weights.
Assumptions: positive weights; exact arithmetic.
Not covered: rounding; standard errors beyond the identity that they are computed from.
"""

from itertools import product
from math import prod

import pytest
import sympy as sp
import torch

from funcscope.fisher.accumulators import Welford

SIZES = pytest.mark.parametrize("n", [2, 3, 4])


def zero(x):
    return sp.cancel(sp.together(x)) == 0


def data(n):
    return sp.symbols(f"x0:{n}", real=True), sp.symbols(f"w0:{n}", positive=True)


def two_passes(x, w):
    mean = sum(a * b for a, b in zip(w, x, strict=True)) / sum(w)
    return sum(w), mean, sum(a * (b - mean) ** 2 for a, b in zip(w, x, strict=True))


def update(part, x, w):
    W, mu, M = part
    new = mu + w / (W + w) * (x - mu)
    return W + w, new, M + w * (x - mu) * (x - new)


def merge(one, two):
    (Wa, a, Ma), (Wb, b, Mb) = one, two
    return Wa + Wb, a + Wb / (Wa + Wb) * (b - a), Ma + Mb + (b - a) ** 2 * Wa * Wb / (Wa + Wb)


def equal(one, two):
    return all(map(zero, (a - b for a, b in zip(one, two, strict=True))))


@SIZES
def test_one_pass_is_two_passes(n):
    x, w = data(n)
    part = (w[0], x[0], sp.Integer(0))
    for i in range(1, n):
        assert equal(update(part, x[i], w[i]), merge(part, (w[i], x[i], 0)))
        wrong = part[2] + w[i] * (x[i] - part[1]) ** 2  # negative control: the old mean twice
        part = update(part, x[i], w[i])
        assert not zero(wrong - part[2])
    assert equal(part, two_passes(x, w))


def test_merging_is_associative_and_commutative():
    a, b, c = ((sp.Symbol(f"W{i}", positive=True), *sp.symbols(f"m{i} M{i}", real=True)) for i in range(3))
    assert equal(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert equal(merge(a, b), merge(b, a))

    def plain(one, two):  # negative control: means of means
        return one[0] + two[0], (one[1] + two[1]) / 2, one[2] + two[2]

    assert not equal(plain(plain(a, b), c), plain(a, plain(b, c)))


@pytest.mark.parametrize("n", [2, 3])
def test_the_variance_of_unequal_weights_is_unbiased(n):
    points, chances, w = (0, 5), (sp.Rational(1, 3), sp.Rational(2, 3)), sp.sympify((1, 4, 2)[:n])
    truth = sp.Rational(2, 9) * 25
    scatter = sum(
        prod(chances[i] for i in drawn) * two_passes([points[i] for i in drawn], w)[2]
        for drawn in product(range(2), repeat=n)
    )
    W = sum(w)
    assert scatter / (W - sum(a**2 for a in w) / W) == truth
    assert scatter / (W - 1) != truth  # negative control: weights that count values


@pytest.mark.slow
@SIZES
def test_squares_with_squared_weights_around_another_mean(n):
    x, w = data(n)
    S, mean, M = two_passes(x, [a**2 for a in w])
    mu = two_passes(x, w)[1]
    wanted = sum(a**2 * (b - mu) ** 2 for a, b in zip(w, x, strict=True))
    assert zero(M + S * (mean - mu) ** 2 - wanted)
    assert not zero(M - wanted)  # negative control


# Bridge: the shipped accumulator in float64, against exact rationals.


def test_shipped_accumulator_is_the_exact_one_however_it_is_merged():
    x, w = [sp.Rational(a, 3) for a in (1, 7, -2, 5, 11)], [sp.Integer(a) for a in (1, 4, 2, 8, 3)]
    total, mean, scatter = two_passes(x, w)
    parts = [
        Welford.start(torch.zeros(1).double()).update(torch.tensor([float(a)], dtype=torch.float64), float(b))
        for a, b in zip(x, w, strict=True)
    ]
    one, two = parts[0], parts[-1]
    for part in parts[1:]:
        one = one.merge(part)
    for part in parts[-2::-1]:
        two = part.merge(two)
    for made in (one, two):
        assert made.weight == float(total)
        assert float(made.mean) == pytest.approx(float(mean), rel=1e-14)
        assert float(made.scatter) == pytest.approx(float(scatter), rel=1e-13)
        exact = sp.Rational(5, 4) * sum(a**2 * (b - mean) ** 2 for a, b in zip(w, x, strict=True)) / total**2
        assert float(made.stderr) ** 2 == pytest.approx(float(exact), rel=1e-13)
