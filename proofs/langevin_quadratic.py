"""identity: what Langevin steps of a finite size make of the learning coefficient of a quadratic loss

Claim: For L = h w^2 / 2, strength s = n beta, p = s h + gamma and u' = (1 - eps p / 2) u + sqrt(eps) xi with independent
    xi of mean 0 and variance 1, from u = 0: after t steps Var u_t = v (1 - a^(2t)) with a = 1 - eps p / 2 and
    v = 1 / (p (1 - eps p / 4)), which converges to v exactly for 0 < eps p < 4, so that s E[L] -> s h v / 2; for
    eps -> 0 that is s h / (2 p), what the exact distribution has, and it is larger by the factor 1 / (1 - eps p / 4),
    which is by eps / 8 times the mean of s L'(w) (s L'(w) + gamma w) over the chain.
    A gradient of mean h w with curvature h_b drawn anew in each step has v = eps / (1 - E a_b^2), which is larger where
    h_b varies.
Function: funcscope.landscape.learning_coefficient.learning_coefficient
Size: one coordinate, of which the loss and the chain are sums; all symbols, every t by induction.
Assumptions: exact arithmetic; the loss is quadratic.
Not covered: other losses; rounding.
"""

import math

import sympy as sp
import torch
from torch import nn

from funcscope.core.criterion import custom
from funcscope.core.keys import key
from funcscope.core.model import functional
from funcscope.core.objective import objective
from funcscope.landscape.learning_coefficient import learning_coefficient

h, s, gamma, eps = sp.symbols("h s gamma epsilon", positive=True)
p = s * h + gamma
a = 1 - eps * p / 2
v = 1 / (p * (1 - eps * p / 4))


def step(variance):
    """Of a u + sqrt(eps) xi, xi independent of u with variance 1."""
    return a**2 * variance + eps


def test_variance_is_that_after_every_number_of_steps():
    q = sp.Symbol("q")  # a^(2t): 1 at the start, and a^2 times itself after a step
    after = v * (1 - q)
    assert after.subs(q, 1) == 0
    assert sp.simplify(step(after) - after.subs(q, a**2 * q)) == 0
    assert sp.simplify(step(after) - after.subs(q, a * q)) != 0  # negative control
    assert sp.simplify(step(v) - v) == 0
    assert sp.simplify(step(1 / p) - 1 / p) != 0  # negative control: the exact distribution is not that of the chain


def test_it_converges_below_a_step_of_4_over_p_and_only_there():
    x = sp.Symbol("x", positive=True)  # eps p
    assert sp.solveset((1 - x / 2) ** 2 < 1, x, sp.S.Reals) == sp.Interval.open(0, 4)


def test_small_steps_give_the_integral_over_the_exact_distribution():
    found, w = s * h * v / 2, sp.Symbol("w", real=True)
    density = sp.exp(-p * w**2 / 2)
    exact = sp.integrate(s * h * w**2 / 2 * density, (w, -sp.oo, sp.oo)) / sp.integrate(density, (w, -sp.oo, sp.oo))
    assert sp.simplify(sp.limit(found, eps, 0) - exact) == 0
    assert sp.simplify(found / exact - 1 / (1 - eps * p / 4)) == 0


def test_what_the_size_of_the_steps_adds_is_a_mean_over_the_chain():
    found, exact = s * h * v / 2, s * h / (2 * p)
    assert sp.simplify(eps / 8 * s * h * p * v - (found - exact)) == 0  # E w^2 = v
    assert sp.simplify(eps / 8 * (s * h) ** 2 * v - (found - exact)) != 0  # negative control: without the localisation


def test_curvatures_that_are_drawn_in_every_step_spread_the_chain():
    d = sp.Symbol("d", positive=True)  # h_b = h - d or h + d, equally likely
    squares = [(1 - eps / 2 * (s * (h + sign * d) + gamma)) ** 2 for sign in (-1, 1)]
    noisy = eps / (1 - sum(squares) / 2)
    assert sp.simplify(noisy.subs(d, 0) - v) == 0
    gain = sp.simplify(1 / v - 1 / noisy)
    assert sp.simplify(gain - eps * s**2 * d**2 / 4) == 0  # above 0: 1 / v falls, v rises


# Bridge: the shipped estimate within its own error of the exact mean over the steps that are kept.


class Scaled(nn.Module):
    """x * w, so that half its square is a quadratic loss of curvatures x^2."""

    def __init__(self, num):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(num, dtype=torch.float64))

    def forward(self, x):
        return x * self.w


def test_shipped_estimate_is_the_exact_one_within_its_error():
    curvatures, n, size, local, burn_in, steps = [60.0, 20.0], 50, 4e-3, 20.0, 30, 130
    net = functional(Scaled(2))
    x = torch.tensor(curvatures, dtype=torch.float64).sqrt().expand(n, 2)
    loss = objective(net, [(x, torch.zeros(n))], custom(lambda out, _: out.square().sum(-1) / 2))
    found = learning_coefficient(
        loss, net.theta, key=key(3), num_chains=48, num_steps=steps, burn_in=burn_in, step_size=size,
        localization=local, chunk_size=48,
    )  # fmt: skip
    values = {s: n / math.log(n), gamma: local, eps: size}
    exact = perfect = 0.0
    for curvature in curvatures:
        at = {**values, h: curvature}
        limit, factor = (float(each.subs(at)) for each in (s * h * v / 2, a))
        exact += sum(limit * (1 - factor ** (2 * i)) for i in range(burn_in, steps)) / (steps - burn_in)
        perfect += float((s * h / (2 * p)).subs(at))
    value, stderr = (float(each) for each in (found.learning_coefficient.value, found.learning_coefficient.stderr))
    assert stderr < 0.1 * exact
    assert abs(value - exact) < 4 * stderr
    assert abs(value - perfect) > 4 * stderr  # negative control
    added = found.step_excess
    assert abs(float(added.value) - (exact - perfect)) < 4 * float(added.stderr) < 0.5 * (exact - perfect)
