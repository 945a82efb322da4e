"""exhaustive: squared mean and variance of a gradient from pairs of samples, and from batches of two sizes, are unbiased

Claim: Let g_1 .. g_n be independent draws of a vector with mean mu and covariance S. Then the mean of <g_i, g_j> over i != j
    has the mean |mu|^2, the mean of |g_i - g_j|^2 / 2 has the mean tr S, and |gbar|^2 the mean |mu|^2 + tr S / n. Of the
    squared lengths s and l of the means of b and B samples, (B l - b s) / (B - b) has the mean |mu|^2 and
    (s - l) / (1/b - 1/B) the mean tr S. tr S is also sum |g_i - gbar|^2 / (n - 1), and |mu|^2 also |gbar|^2 - tr S / n, on
    every sample.
Function: funcscope.gradients.noise.gram_noise, funcscope.gradients.noise.two_batch_noise
Size: all samples of n = 2, 3, 4 from a population of three points of the plane with unequal probabilities, of fractions;
    batches of (1, 2), (1, 3) and (2, 3).
Assumptions: samples are independent and equally distributed, of equal weight; exact arithmetic.
Not covered: unequal weights, for which both are ratios and right to first order; the ratio of the two, which is biased.
"""

from fractions import Fraction as Q
from itertools import product
from math import prod

import pytest
import torch

from funcscope.curvature.gram import Grams
from funcscope.gradients.noise import gram_noise, two_batch_noise

POPULATION = (((2, 1), Q(1, 2)), ((-1, 3), Q(1, 3)), ((0, -4), Q(1, 6)))


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def minus(x, y):
    return [a - b for a, b in zip(x, y, strict=True)]


def mean(sample):
    return [Q(sum(each), len(sample)) for each in zip(*sample, strict=True)]


MU = [sum(p * x[i] for x, p in POPULATION) for i in (0, 1)]
SQUARE = dot(MU, MU)
TRACE = sum(p * dot(minus(x, MU), minus(x, MU)) for x, p in POPULATION)


def samples(n):
    for each in product(POPULATION, repeat=n):
        yield [x for x, _ in each], prod(p for _, p in each)


def expected(statistic, n):
    return sum(p * statistic(sample) for sample, p in samples(n))


def pairs(kernel):
    def average(sample):
        n = len(sample)
        values = [kernel(sample[i], sample[j]) for i in range(n) for j in range(n) if i != j]
        return Q(sum(values), n * (n - 1))

    return average


square = pairs(dot)
trace = pairs(lambda x, y: Q(dot(minus(x, y), minus(x, y)), 2))


def plain(sample):
    return dot(mean(sample), mean(sample))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_both_are_unbiased_and_the_square_of_the_mean_is_not(n):
    assert expected(square, n) == SQUARE
    assert expected(trace, n) == TRACE > 0
    assert expected(plain, n) == SQUARE + TRACE / n != SQUARE  # negative control


@pytest.mark.parametrize("n", [2, 3, 4])
def test_on_every_sample_they_are_the_textbook_forms(n):
    for sample, _ in samples(n):
        deviations = [minus(x, mean(sample)) for x in sample]
        assert trace(sample) == Q(sum(dot(d, d) for d in deviations), n - 1)
        assert square(sample) == plain(sample) - trace(sample) / n


@pytest.mark.parametrize(("small", "large"), [(1, 2), (1, 3), (2, 3)])
def test_two_batches_are_unbiased(small, large):
    s, big = expected(plain, small), expected(plain, large)
    assert (large * big - small * s) / (large - small) == SQUARE
    assert (s - big) / (Q(1, small) - Q(1, large)) == TRACE
    made = two_batch_noise(float(s), float(big), small=small, large=large)
    assert made.square == pytest.approx(float(SQUARE))
    assert made.trace == pytest.approx(float(TRACE))


def test_the_shipped_function_is_that_on_every_sample_of_three():
    for sample, _ in samples(3):
        g = torch.tensor(sample, dtype=torch.float64)
        noise = gram_noise(Grams((g @ g.T)[None], "sequence", 0, [], ["all"]), torch.ones(3))
        assert float(noise.square) == pytest.approx(float(square(sample)), abs=1e-12)
        assert float(noise.trace) == pytest.approx(float(trace(sample)), abs=1e-12)
