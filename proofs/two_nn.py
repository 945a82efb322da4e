"""general and identity: the ratio of the two nearest distances has P(mu > r) = r^-d, and what its likelihood gives

Claim: Where points are uniform around one, the volumes V1 < V2 up to the nearest two have V1 / V2 uniform on (0, 1), for any
    number of points in a ball and for a Poisson process; with V = c r^d, P(mu > r) = r^-d, mu = r2 / r1. The likelihood of
    N independent ratios has its one maximum at N / sum log mu, and (N - 1) / sum log mu has the mean d. With the N - m
    largest known to be above the m-th only, T = sum_{i <= m} log mu_(i) + (N - m) log mu_(m) = sum_{i <= m} (N - i + 1)
    (log mu_(i) - log mu_(i-1)), a sum of m independent exponentials of mean 1 / d: (m - 1) / T has the mean d. Without the
    second term, m over the sum is too large.
Function: funcscope.representation.dimension.two_nn
Size: every d, every r; every N for the likelihood and the mean of its maximum; n = 2 to 5 points in the ball; the sum over
    spacings for N = 5, m = 1 to 5.
Assumptions: the density is even over the two neighbours; ratios are independent; exact arithmetic. Not proved here: that
    spacings of exponentials are independent exponentials of means 1 / (d (N - i + 1)) (Renyi 1953).
Not covered: neighbours that points share, boundaries and curvature.
"""

import pytest
import sympy as sp
import torch

from funcscope.representation import two_nn

d, r, v, u, w, t = sp.symbols("d r v u w t", positive=True)


def test_the_tail_is_a_power_for_a_poisson_process():
    beyond = sp.integrate(sp.exp(-v) * sp.exp(-(r**d - 1) * v), (v, 0, sp.oo), conds="none")
    assert sp.simplify(beyond - r**-d) == 0
    assert sp.simplify(beyond - r ** (-d - 1)) != 0  # negative control


def test_the_tail_is_the_same_for_any_number_of_points_in_a_ball():
    for n in (2, 3, 4, 5):  # the density of the two smallest of n volumes, of a ball of volume 1
        density = n * (n - 1) * (1 - w) ** (n - 2)
        share = sp.integrate(sp.integrate(density, (u, 0, t * w)), (w, 0, 1))
        assert sp.simplify(share - t) == 0  # P(V1 / V2 < t) = t, and t = r^-d


def test_the_likelihood_has_its_one_maximum_there_and_its_mean_is_d():
    N, total = sp.symbols("N s", positive=True)
    density = sp.diff(1 - r**-d, r)
    assert sp.simplify(density - d * r ** (-d - 1)) == 0
    log_likelihood = N * sp.log(d) - (d + 1) * total
    assert sp.solve(sp.diff(log_likelihood, d), d) == [N / total]
    assert sp.simplify(sp.diff(log_likelihood, d, 2)) == -N / d**2  # below 0 everywhere
    m = sp.Symbol("m", integer=True, positive=True) + 1  # the sum of m exponentials: a gamma distribution, m > 1
    gamma = d**m * total ** (m - 1) * sp.exp(-d * total) / sp.gamma(m)
    mean = sp.integrate((m - 1) / total * gamma, (total, 0, sp.oo))
    assert sp.simplify(sp.gammasimp(mean) - d) == 0
    assert sp.simplify(sp.gammasimp(mean * m / (m - 1)) - d) != 0  # negative control: the maximum itself


def test_the_censored_sum_is_one_of_m_spacings_and_trimming_is_too_large():
    N = 5
    logs = (sp.Integer(0), *sp.symbols("l1:6", positive=True))
    for m in range(1, N + 1):
        censored = sum(logs[1 : m + 1]) + (N - m) * logs[m]
        spacings = sum((N - i + 1) * (logs[i] - logs[i - 1]) for i in range(1, m + 1))
        assert sp.expand(censored - spacings) == 0
        means = [sum(1 / (d * (N - j + 1)) for j in range(1, i + 1)) for i in range(N + 1)]  # of logs, by spacings
        at = dict(zip(logs[1:], means[1:], strict=True))
        assert sp.simplify(censored.subs(at) - m / d) == 0
        if m < N:
            assert sp.simplify((sum(logs[1 : m + 1]).subs(at) - m / d) * d) < 0  # negative control: without the rest


# Bridge: the shipped function in float64, against exact integers.


def test_shipped_estimates_are_these_of_exact_distances():
    places = [i**2 for i in range(30)]
    logs = []
    for x in places:
        first, second = sorted(abs(x - y) for y in places if y != x)[:2]
        logs.append(sp.log(sp.Rational(second, first)))
    ordered = sorted(logs, key=float)
    found = two_nn(torch.tensor(places, dtype=torch.float64)[:, None], discard=0.2)
    assert float(found.mle.value) == pytest.approx(float(29 / sum(logs)), rel=1e-12)
    censored = 23 / (sum(ordered[:24]) + 6 * ordered[23])
    assert float(found.censored.value) == pytest.approx(float(censored), rel=1e-12)
    assert float(23 / sum(ordered[:24])) > 1.1 * float(found.censored.value)  # negative control
