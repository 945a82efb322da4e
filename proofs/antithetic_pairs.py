"""general and identity: what pairs of steps +d and -d cancel, what their mean is, and when they pay

Claim: For D(h) = L(theta + h d) - L(theta), the even part e = (D(h) + D(-h)) / 2 has no odd order, exactly, and the same
    mean as D(h) over every distribution with d and -d alike. For L of degree 5 and d uniform on the unit sphere,
    E[e] = h^2 tr(H) / 2P + h^4 B / (8 P (P+2)), B = sum_ij L_iijj; for every distribution of unit vectors that flips of
    signs and permutations leave alone, the first term is the same. For L of degree 2 and d uniform, Var(e) = h^4 V / 4 and
    Var(D) = h^2 ||g||^2 / P + h^4 V / 4, V = 2 (||H||_F^2 - tr(H)^2/P) / (P (P+2)); so that m pairs have a smaller variance
    than 2m single steps exactly where ||g||^2 > h^2 (||H||_F^2 - tr(H)^2/P) / (2 (P+2)). At a kink, L = |x|, e = |h| is of
    first order while L'' = 0 on both sides.
Function: funcscope.landscape.flatness.flatness, funcscope.landscape.flatness.flatness_profile,
    funcscope.landscape.flatness_result.Flatness.pair_mean,
    funcscope.landscape.flatness_result.Flatness.pair_variance_ratio
Size: the cancellation for every function; the series for every polynomial of degree 7 on a line; means for every
    polynomial of degree 5 in P = 2, 3 variables, variances for every polynomial of degree 2 in P = 2, 3, 4.
Assumptions: steps of one length h. The moments of the sphere are those of a normal vector over those of its length,
    which is independent of its direction.
Not covered: losses with kinks in P variables; quantiles; variances of losses of degree above 2; the random numbers.
"""

import math
from itertools import combinations_with_replacement, permutations, product

import pytest
import sympy as sp
import torch
from torch import nn

from funcscope.core.criterion import custom
from funcscope.core.keys import key
from funcscope.core.model import functional
from funcscope.core.objective import objective
from funcscope.landscape.flatness import flatness, flatness_profile
from funcscope.landscape.sampling import CommonDirections, common_directions

h = sp.Symbol("h", positive=True)


def variables(n):
    return sp.symbols(f"d0:{n}", real=True)


def polynomial(d, degree):
    """Every polynomial of this degree without a constant: one symbol per monomial."""
    orders = range(1, degree + 1)
    monomials = [sp.prod(c) for k in orders for c in combinations_with_replacement(d, k)]
    return sum(sp.Symbol(f"c{i}", real=True) * m for i, m in enumerate(monomials))


def mean_on_sphere(f, d):
    """E[f] for d uniform on the unit sphere: E[z^a] / E[|z|^|a|], z normal."""
    n, total = len(d), 0
    for powers, c in sp.Poly(sp.expand(f), *d).terms():
        if all(k % 2 == 0 for k in powers):
            normal = sp.prod(sp.factorial2(k - 1) for k in powers if k)
            total += c * normal / sp.prod(n + 2 * j for j in range(sum(powers) // 2))
    return sp.expand(total)


def derivatives(f, d):
    """Gradient, Hessian and the contracted fourth derivative at 0."""
    at = dict.fromkeys(d, 0)
    hessian = sp.hessian(f, d)
    contracted = sum(sp.diff(f, a, 2, b, 2) for a in d for b in d)
    return [sp.diff(f, a).subs(at) for a in d], hessian.subs(at), contracted.subs(at)


def even(f, d):
    return (f + f.subs({a: -a for a in d}, simultaneous=True)) / 2


def test_sphere_moments_are_those_of_the_sphere():
    t = sp.Symbol("t")
    circle = (sp.cos(t), sp.sin(t))
    d = variables(2)
    for a, b in ((2, 0), (4, 0), (2, 2), (3, 1), (6, 0)):
        integral = sp.integrate(circle[0] ** a * circle[1] ** b, (t, 0, 2 * sp.pi))
        assert integral / (2 * sp.pi) == mean_on_sphere(d[0] ** a * d[1] ** b, d)
    d = variables(3)
    assert mean_on_sphere(sum(a**2 for a in d) ** 3, d) == 1
    assert mean_on_sphere(d[0] ** 4, d) != sp.Rational(3, 9)  # negative control: 3 / n^2 in place of 3 / (n (n + 2))


def test_the_even_part_of_every_function_has_no_odd_part_and_the_same_mean():
    g = sp.Function("g")
    part = lambda a: (g(a) + g(-a)) / 2  # noqa: E731
    assert sp.expand(part(h) - part(-h)) == 0
    assert sp.expand((part(h) + part(-h)) / 2 - (g(h) + g(-h)) / 2) == 0  # over d and -d alike
    assert sp.expand(g(h) - g(-h)) != 0  # negative control


def test_even_part_of_every_polynomial_of_degree_7_is_its_even_orders():
    c = sp.symbols("c0:8")
    f = sp.Lambda(h, sum(c[k] * h**k for k in range(8)))
    part = sp.expand((f(h) + f(-h)) / 2 - f(0))
    assert part == sp.expand(sum(c[k] * h**k for k in (2, 4, 6)))
    assert sp.expand(f(h) - f(0) - part) == sp.expand(
        sum(c[k] * h**k for k in (1, 3, 5, 7))
    )  # control: one side keeps them


@pytest.mark.parametrize("n", [2, 3])
def test_mean_over_the_sphere_of_every_polynomial_of_degree_5(n):
    d = variables(n)
    f = polynomial(d, 5)
    _, hessian, contracted = derivatives(f, d)
    delta = f.subs({a: h * a for a in d}, simultaneous=True)
    claim = h**2 * hessian.trace() / (2 * n) + h**4 * contracted / (8 * n * (n + 2))
    assert sp.expand(mean_on_sphere(delta, d) - claim) == 0
    assert sp.expand(mean_on_sphere(even(delta, d), d) - claim) == 0
    assert sp.expand(mean_on_sphere(delta, d) - h**2 * hessian.trace() / (2 * n)) != 0  # negative control


@pytest.mark.parametrize("n", [2, 3])
def test_mean_over_signed_permutations_has_the_same_first_term(n):
    d, x = variables(n), sp.symbols(f"x0:{n}", real=True)
    f = polynomial(d, 3)
    _, hessian, _ = derivatives(f, d)
    images = [
        [s * x[i] for s, i in zip(*g, strict=True)] for g in product(product((-1, 1), repeat=n), permutations(range(n)))
    ]
    mean = sum(f.subs(dict(zip(d, image, strict=True)), simultaneous=True) for image in images) / len(images)
    assert sp.expand(mean - sum(a**2 for a in x) * hessian.trace() / (2 * n)) == 0
    positive = [image for image in images if all(a.as_coeff_Mul()[0] == 1 for a in image)]  # negative control: no flips
    mean = sum(f.subs(dict(zip(d, image, strict=True)), simultaneous=True) for image in positive) / len(positive)
    assert sp.expand(mean - sum(a**2 for a in x) * hessian.trace() / (2 * n)) != 0


@pytest.mark.parametrize("n", [2, 3, 4])
def test_variances_of_every_polynomial_of_degree_2_and_where_pairs_win(n):
    d = variables(n)
    f = polynomial(d, 2)
    gradient, hessian, _ = derivatives(f, d)
    delta = f.subs({a: h * a for a in d}, simultaneous=True)
    one, pair = (mean_on_sphere(sp.expand(x**2), d) - mean_on_sphere(x, d) ** 2 for x in (delta, even(delta, d)))
    square = sum(g**2 for g in gradient)
    spread = sum(a**2 for a in hessian) - hessian.trace() ** 2 / n
    second = h**4 * spread / (2 * n * (n + 2))
    assert sp.expand(pair - second) == 0
    assert sp.expand(one - second - h**2 * square / n) == 0
    excess = sp.expand((one / 2 - pair) * n / h**2 * 2)  # 2m single steps against m pairs: > 0 where pairs win
    assert sp.expand(excess - 2 * (square / 2 - h**2 * spread / (4 * (n + 2)))) == 0
    assert sp.expand(excess - (square - h**2 * spread / (n + 2))) != 0  # negative control: without the 2


def test_a_kink_is_of_first_order():
    x = sp.Symbol("x", positive=True)
    assert (sp.Abs(h) + sp.Abs(-h)) / 2 == h
    assert sp.diff(sp.Abs(x), x, 2) == 0
    assert (sp.Abs(x + h) + sp.Abs(x - h)).subs(
        {x: 2, h: 1}
    ) / 2 - 2 == 0  # negative control: a step that does not reach it


# Bridges: the shipped numbers, along directions for which the mean over the sphere is a finite sum.


class Vector(nn.Module):
    """theta itself as the output, one row."""

    def __init__(self, size):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1, size, dtype=torch.float64))

    def forward(self, x):
        return x * self.theta


def loss_of(function, size):
    ones = torch.ones(1, 1, dtype=torch.float64)
    return objective(functional(Vector(size)), [(ones, ones)], custom(lambda out, _: function(out[0])[None]))


def circle(loss, num):
    """Directions at equal angles: their mean is that over the circle for every polynomial of degree below num."""
    angles = torch.arange(num, dtype=torch.float64) * 2 * math.pi / num
    drawn = common_directions(loss.net, key=key(0), num=num)
    return CommonDirections(drawn.key, drawn.dirs, torch.stack([angles.cos(), angles.sin()], dim=1))


def test_shipped_pairs_are_the_even_orders_to_the_last_bit():
    loss = loss_of(lambda t: sum((t**k).sum() * 2.0**-k for k in range(1, 8)), 1)  # d = +-1, dyadic: no rounding
    for result in flatness_profile(loss, torch.zeros(1).double(), key=key(0), epsilons=(0.25, 0.5), n_directions=2):
        a = result.epsilon / 2
        assert result.even.tolist() == [a**2 + a**4 + a**6] * 2
        assert all(delta != a**2 + a**4 + a**6 for delta in result.delta_losses.tolist())  # negative control
        assert float(result.pair_mean.value) == a**2 + a**4 + a**6


def test_shipped_means_are_the_two_orders_of_a_quartic():
    def quartic(t):
        x, y = t
        return (
            1 + x - 3 * y + 2 * x**2 - x * y + y**2 / 2 + x**3 - x * y**2 + x**4 + 5 * x**2 * y**2 - y**4 / 3 + x * y**3
        )

    loss, trace, contracted = loss_of(quartic, 2), 4 + 1, 24 + 2 * 20 - 8
    result = flatness(
        loss, torch.zeros(2).double(), key=key(0), n_directions=8, epsilon=0.5, directions=circle(loss, 8)
    )
    claim = 0.5**2 * trace / 4 + 0.5**4 * contracted / (8 * 2 * 4)
    assert abs(float(result.pair_mean.value) - claim) < 1e-14
    assert abs(float(result.estimates["mean_delta_loss"].value) - claim) < 1e-14
    assert abs(0.5**2 * trace / 4 - claim) > 1e-2  # negative control: the second order alone


@pytest.mark.parametrize("share", [0.5, 0.99, 1.01, 4.0])
def test_shipped_variance_ratio_says_where_pairs_win(share):
    hessian, epsilon = torch.tensor([[2.0, 1.0], [1.0, -1.0]], dtype=torch.float64), 0.5
    border = epsilon**2 * (hessian.square().sum() - hessian.trace() ** 2 / 2) / (2 * 4)
    gradient = (share * border / 2).sqrt() * torch.ones(2).double()
    loss = loss_of(lambda t: gradient @ t + t @ hessian @ t / 2, 2)
    run = {"key": key(0), "n_directions": 8, "epsilon": epsilon, "directions": circle(loss, 8)}
    result = flatness(loss, torch.zeros(2).double(), **run)
    assert abs(float(result.pair_variance_ratio.value) - (1 + share) / 2) < 1e-12
    assert (float(result.pair_variance_ratio.value) > 1) == (share > 1)


def test_shipped_pairs_see_a_kink_that_the_hessian_of_autodiff_does_not_have():
    loss = loss_of(lambda t: t.abs().sum(), 1)
    for at, rise in ((0.0, 0.5), (0.25, 0.25), (1.0, 0.0)):
        theta = torch.tensor([at], dtype=torch.float64)
        result = flatness(loss, theta, key=key(0), n_directions=2, epsilon=0.5)
        assert float(result.pair_mean.value) == rise
        assert float(result.second_order.value) == 2 * rise / 0.5**2
        assert float(torch.func.hessian(loss)(theta)) == 0.0
