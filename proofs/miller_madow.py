"""identity: the plug-in entropy of N draws is too low by (K - 1) / 2N to first order

Claim: With n_k the counts of N independent draws of probabilities p_k > 0, k = 1..K, and H(n / N) the plug-in entropy,
    E H(n / N) = H(p) - (K - 1) / 2N + (1 - sum_k 1 / p_k) / 12 N^2 + O(1 / N^3). Taken over sequences of one row, half
    the sum of Var(n_k / N) / (n_k / N) is (K - 1) / 2N with K the labels that occur.
Function: funcscope.information.entropy.discrete_entropy
Size: the terms of Taylor's series up to the sixth central moment of a count, with p and N symbols; the remainder at K = 2, 3
    and N = 20, 40, 80 by the whole sample space, logarithms to 40 digits; the shipped value at K = 2, 3 and N = 6, whole too.
Assumptions: every p_k is positive and does not depend on N: the series is one in 1 / (N p_k), and of no use for labels that
    are expected less than a few times.
Not covered: dependent draws, whose variance over sequences takes the place of p (1 - p) / N by the same second-order term.
"""

import itertools
import math

import mpmath
import pytest
import sympy as sp
import torch

from funcscope.information.entropy import discrete_entropy

p, N = sp.symbols("p N", positive=True)
PROBABILITIES = pytest.mark.parametrize(
    "probabilities",
    [(sp.Rational(1, 2), sp.Rational(1, 2)), (sp.Rational(1, 4), sp.Rational(3, 4)),
     (sp.Rational(1, 2), sp.Rational(1, 3), sp.Rational(1, 6))],
)  # fmt: skip


def central_moments(most):
    """Of a binomial count over N: m(r + 1) = p (1 - p) (dm(r) / dp + N r m(r - 1)), Romanovsky (1923)."""
    made = [sp.Integer(1), sp.Integer(0)]
    for r in range(1, most):
        made.append(sp.expand(p * (1 - p) * (sp.diff(made[r], p) + N * r * made[r - 1])))
    return [sp.expand(m / N**r) for r, m in enumerate(made)]


def test_the_moments_are_those_of_the_whole_sample_space():
    for r, moment in enumerate(central_moments(6)):
        terms = (sp.binomial(3, n) * p**n * (1 - p) ** (3 - n) * (sp.Rational(n, 3) - p) ** r for n in range(4))
        assert sp.expand(sum(terms) - moment.subs(N, 3)) == 0


def test_second_and_third_term_of_the_series_are_millers_and_harriss():
    f = -p * sp.log(p)
    moments = central_moments(6)
    series = sp.expand(sum(sp.diff(f, p, i) / sp.factorial(i) * moments[i] for i in range(1, 7)))
    first, second = (sp.simplify(series.coeff(N, -i)) for i in (1, 2))
    assert sp.simplify(first + (1 - p) / 2) == 0  # summed over k: -(K - 1) / 2
    assert sp.simplify(second - (p - 1 / p) / 12) == 0  # summed over k: (1 - sum 1 / p) / 12
    assert sp.simplify(first + (1 - p)) != 0  # negative control: not (K - 1) / N


def samples(num, probabilities):
    """Every vector of counts with its probability."""
    for counts in itertools.product(range(num + 1), repeat=len(probabilities)):
        if sum(counts) == num:
            ways = math.factorial(num) // math.prod(map(math.factorial, counts))
            yield counts, ways * sp.prod(q**c for q, c in zip(probabilities, counts, strict=True))


def exact(weights):
    """Entropy of rationals, to 40 digits."""
    with mpmath.workdps(40):
        shares = [mpmath.mpf(w.p) / w.q for w in map(sp.Rational, weights) if w]
        return -mpmath.fsum(w * mpmath.log(w) for w in shares)


@PROBABILITIES
def test_remainder_of_the_whole_sample_space_is_that_of_the_next_order(probabilities):
    K, limit = len(probabilities), (1 - sum(1 / q for q in probabilities)) / 12
    beside = []
    for num in (20, 40, 80):
        mean = sum(
            mpmath.mpf(w.p) / w.q * exact([sp.Rational(c, num) for c in counts])
            for counts, w in samples(num, probabilities)
        )
        beside.append(float((mean - exact(probabilities) + mpmath.mpf(K - 1) / (2 * num)) * num**2))
    errors = [abs(each - float(limit)) for each in beside]
    assert errors[2] < errors[0] / 3  # of order 1 / N beside the limit, which is of order 1
    assert errors[2] < 0.1
    assert (
        abs(beside[2] - (K - 1) / 2 * 80) > 10 * errors[2]
    )  # negative control: without the correction it grows with N


# Bridge: the shipped entropy, over the whole sample space.


@PROBABILITIES
def test_shipped_entropy_is_the_plug_in_one_with_that_correction(probabilities):
    num = 6
    for counts, _ in samples(num, probabilities):
        labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        occupied = sum(c > 0 for c in counts)
        plain = float(exact([sp.Rational(c, num) for c in counts]))
        assert float(discrete_entropy(labels, correction="plug-in").entropy) == pytest.approx(plain, abs=1e-12)
        corrected = float(discrete_entropy(labels).entropy)
        assert corrected == pytest.approx(plain + (occupied - 1) / (2 * num), abs=1e-12)
    assert math.isclose(sum(float(w) for _, w in samples(num, probabilities)), 1)
