"""identity and general: SAM's rise is slope, curvature along the gradient and third order, not the largest eigenvalue

Claim: For S(e) = L(theta + e g/||g||) - L(theta), g = grad L(theta) not 0, H and D3 the second and third derivatives:
    S(e) = e ||g|| + e^2/2 ghat'H ghat + e^3/6 D3[ghat, ghat, ghat] + O(e^4), so that S / e tends to ||g|| and
    S / (e^2 lambda_max / 2) to infinity. ghat'H ghat lies between the smallest and the largest eigenvalue, and two losses
    exist whose order by S is opposite to that by lambda_max, for every e below a bound. Where g = 0 and L is quadratic with
    lambda_max > 0, the maximum of L over the ball of radius e is L(theta) + e^2 lambda_max / 2. Where L is quadratic and g
    an eigenvector's multiple, S = e ||g|| + e^2 lambda / 2 exactly.
Function: funcscope.curvature.ascent_sharpness.sam_sharpness, funcscope.curvature.sharpness_comparison.compare_sharpness
Size: the expansion for every polynomial of degree 3 in 2 and in 3 variables, and for every C^4 loss along its line; the rest
    for symmetric matrices of size 2 in their eigenbasis.
Assumptions: L has four derivatives along the line. Not proved here: Taylor's theorem with its remainder, and the spectral
    theorem.
Not covered: losses with kinks (ReLU), several ascent steps, rounding.
"""

from itertools import combinations_with_replacement

import pytest
import sympy as sp
import torch

from funcscope.core.criterion import Criterion, custom
from funcscope.core.model import functional
from funcscope.core.objective import objective
from funcscope.curvature.ascent_sharpness import sam_sharpness
from funcscope.curvature.sharpness_comparison import Eigenvalue, compare_sharpness

e = sp.symbols("e", positive=True)


def cubic(num):
    """The general polynomial of degree 3 in `num` variables around theta, its gradient there and its coefficients."""
    x = sp.symbols(f"x0:{num}", real=True)
    monomials = [sp.prod(c) for d in range(4) for c in combinations_with_replacement(x, d)]
    coefficients = sp.symbols(f"c0:{len(monomials)}", real=True)
    return x, sum(c * m for c, m in zip(coefficients, monomials, strict=True))


def contracted(f, x, v, order):
    """D^order f at 0 applied to `order` copies of v."""
    for _ in range(order):
        f = sum(sp.diff(f, xi) * vi for xi, vi in zip(x, v, strict=True))
    return f.subs(dict.fromkeys(x, 0))


@pytest.mark.parametrize("num", [2, 3])
def test_the_expansion_of_every_cubic_polynomial(num):
    x, f = cubic(num)
    g = [sp.diff(f, xi).subs(dict.fromkeys(x, 0)) for xi in x]
    length = sp.symbols("n", positive=True)  # ||g||: replaced by its square below
    unit = [gi / length for gi in g]
    rise = f.subs(dict(zip(x, [e * u for u in unit], strict=True)), simultaneous=True) - f.subs(dict.fromkeys(x, 0))
    series = e * sum(gi**2 for gi in g) / length
    series += sum(e**k / sp.factorial(k) * contracted(f, x, unit, k) for k in (2, 3))
    assert sp.expand(rise - series) == 0
    assert (
        sp.expand(rise - series + e**3 / 12 * contracted(f, x, unit, 3)) != 0
    )  # negative control: another third order
    assert sp.expand(rise - series + e**2 / 2 * contracted(f, x, unit, 2)) != 0  # and none of second order


def test_every_smooth_loss_has_the_expansion_along_its_line():
    """What the third order leaves is the integral of (e - t)^3 / 6 times the fourth derivative: O(e^4)."""
    phi, t = sp.Function("phi"), sp.symbols("t")

    def taylor(order):
        return sum((e - t) ** k / sp.factorial(k) * sp.diff(phi(t), t, k) for k in range(order))

    assert sp.expand(sp.diff(taylor(4), t) - (e - t) ** 3 / 6 * sp.diff(phi(t), t, 4)) == 0
    assert sp.integrate((e - t) ** 3 / 6, (t, 0, e)) == e**4 / 24
    assert sp.expand(sp.diff(taylor(3), t) - (e - t) ** 3 / 6 * sp.diff(phi(t), t, 4)) != 0  # negative control


def test_the_documented_ratio_diverges_wherever_the_gradient_is_not_0():
    n, curvature, largest = sp.symbols("n kappa lambda", positive=True)
    ratio = (e * n + e**2 / 2 * curvature) / (e**2 / 2 * largest)
    assert sp.limit(ratio, e, 0, "+") == sp.oo
    assert sp.limit(ratio.subs(n, 0), e, 0, "+") == curvature / largest  # only there a constant, and 1 only along v1


def test_the_curvature_along_the_gradient_is_a_mean_of_the_eigenvalues():
    low, gap, w = sp.symbols("low gap w", real=True)
    quotient = (1 - w) * low + w * (low + gap)  # w: the share of g's square along the top eigenvector
    assert sp.expand(quotient - low) == w * gap  # >= 0 for w in [0, 1], gap >= 0
    assert sp.expand(low + gap - quotient - (1 - w) * gap) == 0
    assert quotient.subs({w: 0}) != (low + gap)  # counter-example: g parallel to the bottom eigenvector


def test_the_ball_at_a_stationary_point_of_a_quadratic_has_the_documented_maximum():
    angle, r = sp.symbols("angle r", real=True)
    gap, top = sp.symbols("gap top", nonnegative=True)
    low = top - gap
    rise = (top * (r * sp.cos(angle)) ** 2 + low * (r * sp.sin(angle)) ** 2) / 2
    assert sp.simplify(r**2 * top / 2 - rise - r**2 * gap * sp.sin(angle) ** 2 / 2) == 0  # the deficit is a square
    assert sp.expand(e**2 * top / 2 - r**2 * top / 2 - top * (e - r) * (e + r) / 2) == 0  # and the radius is best at e
    assert sp.simplify(rise.subs({angle: 0, r: e}) - e**2 * top / 2) == 0  # attained
    slope = sp.symbols("slope", positive=True)  # negative control: a gradient along v1 adds e * slope
    assert sp.simplify((rise + slope * r * sp.cos(angle)).subs({angle: 0, r: e}) - e**2 * top / 2) == e * slope


def test_opposite_orders_for_every_small_step():
    steep, level = 5 * e + e**2 / 2, e / 10 + 3 * e**2 / 2  # lambda_max is 1 and 3
    assert sp.solve(steep - level, e) == [sp.Rational(49, 10)]
    assert (steep - level).subs(e, 1) > 0 > (steep - level).subs(e, 5)


# Bridges: dyadic numbers, so that float64 makes no rounding.


def polynomial(f, size):
    """The loss f(x) of a model whose only parameter is x."""
    net = functional(torch.nn.Linear(size, 1, bias=False, dtype=torch.float64))
    whole = custom(lambda out, _: f(out[:, 0])[None])
    data = torch.eye(size, dtype=torch.float64), torch.zeros(1)
    return objective(net, [data], Criterion("polynomial", whole.prepare, whole.token_loss))


def test_shipped_sharpness_has_the_third_order_coefficient():
    loss = polynomial(lambda x: 3 * x[0] + 4 * x[1] + x[0] ** 2 - x[0] * x[1] + 2 * x[0] ** 3 + x[0] * x[1] ** 2, 2)
    zero, unit = torch.zeros(2, dtype=torch.float64), sp.Matrix([sp.Rational(3, 5), sp.Rational(4, 5)])
    bent = 2 * unit[0] ** 2 - 2 * unit[0] * unit[1]
    third = 12 * unit[0] ** 3 + 6 * unit[0] * unit[1] ** 2
    for step in (0.5, 0.125):
        s = sam_sharpness(loss, zero, epsilon=step)
        exact = (5 * step, float(bent), step**2 / 2 * float(bent), step**3 / 6 * float(third))
        for found, wanted in zip((s.first_order, s.curvature, s.second_order, s.remainder), exact, strict=True):
            assert abs(found - wanted) < 1e-14
        assert abs(s.remainder - step**3 / 3 * float(third)) > 1e-4  # negative control


def test_shipped_sharpness_is_the_slope_and_not_the_documented_relation():
    loss = polynomial(lambda x: (x[0] ** 2 + 16 * x[1] ** 2) / 2, 2)  # lambda_max = 16, and g along the other axis
    at = torch.tensor([4.0, 0.0], dtype=torch.float64)
    s = sam_sharpness(loss, at, epsilon=0.25)
    assert (s.absolute, s.first_order, s.second_order, s.remainder) == (1.03125, 1.0, 0.03125, 0.0)
    assert s.absolute != 0.25**2 * 16 / 2
    assert s.curvature == 1.0 < 16.0
    along = sam_sharpness(loss, at.flip(0), epsilon=0.25)
    assert along.absolute == 0.25 * 64 + 0.25**2 * 16 / 2


def test_shipped_comparison_has_opposite_orders():
    a, b = (polynomial(lambda x, c=c: c * x[0] ** 2 / 2, 1) for c in (1.0, 3.0))
    at = [torch.tensor([x], dtype=torch.float64) for x in (5.0, 1 / 30)]
    known = Eigenvalue(1.0, 0.0), Eigenvalue(3.0, 0.0)
    found = compare_sharpness(a, at[0], b, at[1], epsilon=1.0, eigenvalues=known)
    assert (found.sharper_by_sam, found.sharper_by_eigenvalue, found.agree) == ("A", "B", False)
    beyond = compare_sharpness(a, at[0], b, at[1], epsilon=5.0, eigenvalues=known)
    assert beyond.agree  # negative control: beyond the crossing of the two curves
