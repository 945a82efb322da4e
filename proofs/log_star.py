"""general: the lengths of Rissanen's code of the integers have a Kraft sum of 1 with 2.8651085, and above 1 as published

Claim: Let g(x) = 1 for x <= 1 and g(x) = g(log2 x) / x above, so that 2^-(log2 n + log2 log2 n + ...) = g(n), positive
    terms only. The integral of g from a > 1 to b is ln 2 times that from log2 a to log2 b, so that between 1, 2, 4, 16,
    65536, ... it is ln 2, (ln 2)^2, ..., and from the k-th of these on (ln 2)^k / (1 - ln 2). g does not rise, so that the
    sum over all n >= 1 lies between the sum to N plus the integral from N + 1, and the sum to N plus that from N. With
    N = 65536 these are 2.86510835 and 2.86510848: 2.8651085 makes the Kraft sum at most 1, and 2.865064 makes it 1.0000155.
Function: funcscope.information.description_length.universal_integer_bits
Size: every integer: the first 65,536 one by one, the rest by the integral.
Assumptions: float64 for the sum, whose rounding, below 1e-10, is far below the distance of 2e-8 that decides.
Not covered: rounding lengths up to whole bits, which only makes the sum smaller.
"""

import math
from itertools import pairwise

import sympy as sp

from funcscope.information.description_length import universal_integer_bits

LAST = 2**16
LN2 = math.log(2)


def g(x):
    value = 1.0
    while x > 1:
        value, x = value / x, math.log2(x)
    return value


def test_integral_of_a_level_is_ln_2_times_that_of_the_level_below():
    """By x = 2^y, dx = ln 2 2^y dy, for any g: the factor before g(log2 x) is 1 / x."""
    y = sp.Symbol("y", positive=True)
    x, below = 2**y, sp.Function("g")(y)
    assert sp.simplify(below / x * sp.diff(x, y) - sp.log(2) * below) == 0
    levels = [sp.Integer(1)]
    for k in range(3):  # from 1 to 2, from 2 to 4, from 4 to 16, by antiderivatives that sympy differentiates
        t = sp.Symbol("t", positive=True)
        inner, density = t, sp.Integer(1)
        for _ in range(k + 1):
            density, inner = density / inner, sp.log(inner, 2)
        antiderivative = sp.log(2) ** (k + 1) * inner
        assert sp.simplify(sp.diff(antiderivative, t) - density) == 0
        levels.append(antiderivative.subs(t, (2, 4, 16)[k]) - antiderivative.subs(t, (1, 2, 4)[k]))
        assert sp.simplify(levels[-1] - sp.log(2) ** (k + 1)) == 0


def test_g_does_not_rise():
    """A product of non-increasing factors on every level, and equal at its ends from both sides."""
    for end in (1, 2, 4, 16, LAST):
        assert abs(g(end * (1 + 1e-12)) - g(end)) < 1e-9
    values = [g(1 + i / 64) for i in range(64 * 300)]
    assert all(a >= b for a, b in pairwise(values))


def test_kraft_sum_is_at_most_1_with_the_constant_and_above_with_the_published_one():
    first, beyond = math.fsum(g(n) for n in range(1, LAST + 1)), LN2**5 / (1 - LN2)
    low, high = first + beyond - g(LAST), first + beyond  # the integral from N to N + 1 is at most g(N)
    assert 2.865108 < low < high < 2.8651085 - 2e-8
    assert low / 2.865064 > 1 + 1.5e-5  # negative control: what is published
    assert math.fsum(g(n) for n in range(1, 100)) > 2  # negative control: no constant


# Bridge: the shipped lengths are these.


def test_shipped_lengths_have_a_kraft_sum_of_at_most_1():
    for n in (1, 2, 3, 4, 5, 16, 17, 1000, LAST, LAST + 1, 10**9):
        assert abs(2.0 ** -universal_integer_bits(n) * 2.8651085 / g(n) - 1) < 1e-12
    shipped = math.fsum(2.0 ** -universal_integer_bits(n) for n in range(1, 5000))
    rest = (math.fsum(g(n) for n in range(5000, LAST + 1)) + LN2**5 / (1 - LN2)) / 2.8651085
    assert 1 - 1e-7 < shipped + rest <= 1
