"""general and exhaustive: uniform attention looks at the induction key of repeated text with weight ln 2 / P

Claim: On BOS and two copies of P tokens, uniform causal attention of query q = P + 1, ..., 2P to the key q - P + 1 is
    1 / (q + 1): its mean is u_P = (H_(2P+1) - H_(P+1)) / P, with H harmonic numbers. P u_P lies below ln 2 for every P,
    above ln 2 - 1 / P, and tends to ln 2: u_P is ln 2 / P to first order in 1 / P. The same is the mean for the duplicate key
    q - P.
Function: funcscope.mechanistic.induction.induction_heads
Size: the bounds for every P, by their integrals; the means in exact rationals for P = 2, ..., 40.
Assumptions: every query sees all tokens up to itself; BOS. Without BOS, 1 / (q + 1) for q = P, ..., 2P - 1.
Not covered: windows; what a head does that is not uniform.
"""

from fractions import Fraction

import pytest
import sympy as sp
import torch

from funcscope.core.trace import Kernel, Trace
from funcscope.mechanistic.induction import copy_scores

P = sp.Symbol("P", integer=True, positive=True)


def baseline(period):
    return sum(Fraction(1, q + 1) for q in range(period + 1, 2 * period + 1)) / period


@pytest.mark.parametrize("period", range(2, 41))
def test_means_are_harmonic_numbers(period):
    exact = (sp.harmonic(2 * period + 1) - sp.harmonic(period + 1)) / period
    assert sp.Rational(baseline(period).numerator, baseline(period).denominator) == exact
    assert (
        sp.Rational(*sum(Fraction(1, q) for q in range(period + 1, 2 * period + 1)).as_integer_ratio())
        != exact * period
    )


def test_the_limit_is_ln_2_and_the_bounds_hold_for_every_period():
    x = sp.Symbol("x", positive=True)
    below = sp.integrate(1 / x, (x, P + 2, 2 * P + 2))  # each 1 / n is above the integral from n to n + 1
    above = sp.integrate(1 / x, (x, P + 1, 2 * P + 1))  # and below that from n - 1 to n
    # above = ln((2P + 1) / (P + 1)) < ln 2, as (2P + 1) < 2 (P + 1)
    assert sp.simplify(sp.exp(above) - (2 * P + 1) / (P + 1)) == 0
    assert sp.expand(2 * (P + 1) - (2 * P + 1)) == 1
    # below = ln 2 - ln((P + 2) / (P + 1)) > ln 2 - 1 / (P + 1), by ln(1 + y) < y
    assert sp.simplify(sp.exp(below) - 2 * (P + 1) / (P + 2)) == 0
    assert sp.simplify((P + 2) / (P + 1) - 1 - 1 / (P + 1)) == 0
    assert sp.limit(above, P, sp.oo) == sp.limit(below, P, sp.oo) == sp.log(2)
    for period in (2, 10, 40):
        value = float(baseline(period)) * period
        assert float(sp.log(2)) - 1 / period < value < float(sp.log(2))
        assert not float(sp.log(2)) - 1 / (2 * period + 2) < value  # negative control: half the bound


@pytest.mark.parametrize("period", [2, 5, 30])
def test_shipped_baseline_and_a_uniform_head_are_the_exact_one(period):
    length = 2 * period + 1
    hidden = ~torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, length, length).double().masked_fill(hidden, torch.finfo(torch.float32).min)
    zeros = torch.zeros(1, length, 1, 2, dtype=torch.float64)
    real = torch.ones(1, length, dtype=torch.bool)
    seen = Trace({"q.0": zeros, "k.0": zeros}, real, {0: Kernel(1.0, None, mask)}, 1)
    sums, num, even = copy_scores(seen, 0, period)
    for i in (0, 1):
        assert float(even[i]) == pytest.approx(float(baseline(period)), rel=1e-14)
        assert float(sums[i, 0, 0] / num[i]) == pytest.approx(float(baseline(period)), rel=1e-14)
