"""general and identity: truncation, rounding and best step of the central second difference

Claim: For c(h) = (L(h) + L(-h) - 2 L(0)) / h^2: c(h) - L''(0) is the integral over [-h, h] of K L'''' with
    K(t) = (h - |t|)^3 / (6 h^2) >= 0 and mass h^2/12, so |c(h) - L''(0)| <= h^2 M4 / 12, and this is sharp; up to
    degree 7, c(h) = L'' + h^2 L''''/12 + h^4 L^(6)/360. Relative errors u in three losses of size at most B move c(h)
    by at most 4 u B / h^2, and this is sharp. The sum of both bounds has its only minimum, 2 sqrt(u B M4 / 3), at
    h = (48 u B / M4)^(1/4). The slope (L(h) - L(-h)) / (2h) is off by at most h^2 M3 / 6, and this is sharp.
Function: funcscope.landscape.truncation.central_second_difference, funcscope.landscape.truncation.rounding_bound,
    funcscope.landscape.directional.directional_losses, funcscope.curvature.directional.difference_step
Size: every C^4 loss (for the slope C^3) and every h > 0; the series for every polynomial of degree 7.
Assumptions: L is the loss along the direction, M4 (M3) the maximum of |L''''| (|L'''|) on [-h, h]. Not proved here: the
    fundamental theorem of calculus, |int K f| <= max |f| int K for K >= 0, and that a function of degree 1 in each of
    its variables has its extremes over a box at the corners.
Not covered: losses with kinks (ReLU), where c(h) may grow as 1/h; rounding of theta + h d and of the float64
    arithmetic of the difference; how large u is for a given network.
"""

from fractions import Fraction
from itertools import product

import pytest
import sympy as sp
import torch

from funcscope.core.criterion import custom
from funcscope.core.directions import directions
from funcscope.core.keys import key
from funcscope.core.model import functional
from funcscope.core.objective import objective
from funcscope.curvature.directional import difference_step
from funcscope.landscape.directional import directional_losses
from funcscope.landscape.truncation import central_second_difference, rounding_bound

h, t, r, u, B, M = sp.symbols("h t r u B M", positive=True)
L, g = sp.Function("L"), sp.Function("g")
TOTAL = h**2 * M / 12 + 4 * u * B / h**2


def taylor(f, order, start):
    """The terms of f(h) at `start` below the given order."""
    return sum((h - start) ** k / sp.factorial(k) * sp.diff(f, t, k).subs(t, start).doit() for k in range(order))


def second_difference(f):
    return (f(h) + f(-h) - 2 * f(0)) / h**2


def test_error_series_of_every_polynomial_of_degree_7():
    c = sp.symbols("c0:8")
    f = sp.Lambda(t, sum(c[k] * t**k for k in range(8)))
    second, fourth, sixth = (sp.diff(f(t), t, k).subs(t, 0) for k in (2, 4, 6))
    assert sp.expand(second_difference(f) - (second + h**2 * fourth / 12 + h**4 * sixth / 360)) == 0
    assert sp.expand(second_difference(f) - (second + h**2 * fourth / 12)) != 0  # negative control


@pytest.mark.parametrize("order", range(1, 7))
def test_taylor_remainder_of_every_smooth_function_is_an_integral(order):
    kernel = (h - t) ** (order - 1) / sp.factorial(order - 1)
    assert sp.expand(sp.diff(taylor(g(t), order, t), t) - kernel * sp.diff(g(t), t, order)) == 0
    assert sp.expand(sp.diff(taylor(g(t), order, t), t) - 2 * kernel * sp.diff(g(t), t, order)) != 0  # negative control


def test_second_difference_of_every_c4_loss_is_off_by_at_most_h2_m4_over_12():
    even = L(t) + L(-t)  # its fourth derivative is at most 2 M4
    assert sp.expand(taylor(even, 4, 0) - 2 * L(0) - h**2 * sp.diff(L(t), t, 2).subs(t, 0)) == 0
    kernel = (h - t) ** 3 / 6 / h**2
    assert kernel.subs(t, h - r).is_nonnegative
    assert sp.integrate(2 * kernel, (t, 0, h)) == h**2 / 12
    assert second_difference(lambda a: a**4) == h**2 * 24 / 12  # sharp: M4 = 24, L'' = 0
    assert second_difference(sp.Abs) == 2 / h  # negative control: a kink has L'' = L'''' = 0 on both sides


def test_slope_of_every_c3_loss_is_off_by_at_most_h2_m3_over_6():
    odd = L(t) - L(-t)  # its third derivative is at most 2 M3
    assert sp.expand(taylor(odd, 3, 0) - 2 * h * sp.diff(L(t), t).subs(t, 0)) == 0
    kernel = (h - t) ** 2 / 2 / (2 * h)
    assert kernel.subs(t, h - r).is_nonnegative
    assert sp.integrate(2 * kernel, (t, 0, h)) == h**2 / 6
    assert sp.simplify((h**3 - (-h) ** 3) / (2 * h)) == h**2 * 6 / 6  # sharp: M3 = 6, L' = 0


def test_relative_errors_u_move_the_second_difference_by_at_most_4_u_b_over_h2():
    losses, errors = sp.symbols("L_p L_m L_0"), sp.symbols("e_p e_m e_0")
    exact, rounded = dict(zip((h, -h, 0), losses, strict=True)), {}
    for at, error in zip(exact, errors, strict=True):
        rounded[at] = exact[at] * (1 + error)
    moved = sp.expand(second_difference(rounded.get) - second_difference(exact.get))
    assert all(sp.degree(moved * h**2, x) == 1 for x in losses + errors)
    corners = product(*[(-B, B)] * 3, *[(-u, u)] * 3)
    worst = {moved.subs(dict(zip(losses + errors, corner, strict=True))) for corner in corners}
    assert all((4 * u * B / h**2 - abs(x)).is_nonnegative for x in worst)
    assert 4 * u * B / h**2 in worst  # sharp; so that 3 in place of 4 would be too small


def test_total_bound_has_one_minimum():
    step, least = (48 * u * B / M) ** sp.Rational(1, 4), 2 * sp.sqrt(u * B * M / 3)
    gap = h * sp.sqrt(M / 12) - 2 * sp.sqrt(u * B) / h
    assert sp.simplify(TOTAL - least - gap**2) == 0
    assert sp.diff(gap, h).is_positive  # so that the square is 0 once
    assert sp.simplify(gap.subs(h, step)) == 0
    assert sp.simplify(gap.subs(h, (12 * u * B / M) ** sp.Rational(1, 4))) != 0  # negative control


# Bridges: in dyadic rationals float64 makes no rounding, so that the shipped numbers are the theorem to the last bit.


def shipped(f, step, dtype=torch.float64):
    """The shipped difference, of losses rounded to `dtype`."""
    positive, negative, centre = (torch.tensor([float(f(a))], dtype=dtype) for a in (step, -step, 0 * step))
    return Fraction(central_second_difference(positive, negative, float(centre), float(step)).item())


def test_shipped_difference_has_the_error_series():
    step = Fraction(1, 8)
    for c in product((Fraction(-3, 2), Fraction(5, 8)), repeat=6):
        value = shipped(lambda a, c=c: 1 + sum(c[k - 1] * a**k for k in range(1, 7)), step)
        assert value == 2 * c[1] + step**2 * 24 * c[3] / 12 + step**4 * 720 * c[5] / 360


def test_shipped_difference_of_float32_losses_keeps_the_total_bound():
    def loss(a):
        return 2 + a - a**2 / 2 + a**4 / 8  # L'' = -1, M4 = 3, B = 3 where |a| < 1

    truncations, roundings, errors = [], [], []
    for step in (Fraction(1, 2**k) for k in range(1, 13)):
        errors.append(abs(shipped(loss, step, torch.float32) + 1))
        truncations.append(step**2 * 3 / 12)
        roundings.append(Fraction(rounding_bound(3.0, float(step), 2.0**-24)))
    assert all(e <= a + b for e, a, b in zip(errors, truncations, roundings, strict=True))
    assert any(e > a for e, a in zip(errors, truncations, strict=True))  # negative controls: neither bound alone holds
    assert any(e > b for e, b in zip(errors, roundings, strict=True))


def test_shipped_rounding_bound_is_attained_and_gives_the_best_step():
    u, step = 2.0**-24, 2.0**-5  # 48 u B / M4 = 2^-20 for B = 1, M4 = 3
    up, down = torch.tensor([1 + u], dtype=torch.float64), 1 - u
    assert central_second_difference(up, up, down, step).item() == rounding_bound(1.0, step, u)
    total = [a**2 * 3 / 12 + rounding_bound(1.0, a, u) for a in (step / 2, step, step * 2)]
    assert total[1] == 2 * (u * 3 / 3) ** 0.5 == min(total)
    assert total[0] > total[1] < total[2]


def test_shipped_directional_losses_are_off_by_h2_m4_over_12_on_a_quartic():
    line = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    ones = torch.ones(1, 1, dtype=torch.float64)
    loss = objective(functional(line), [(ones, ones)], custom(lambda out, _: out.square().square()))
    theta, step = torch.ones(1, dtype=torch.float64), 0.125  # along d = +-1 the loss is (1 +- a)^4
    found = directional_losses(loss, theta, key=key(0), n_samples=2, span=step, two_sided=True, compute_curvature=True)
    assert found.curvatures.tolist() == [12 + step**2 * 24 / 12] * 2


def test_shipped_step_is_the_minimum_of_the_bound_on_a_quartic():
    line = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    ones = torch.ones(1, 1, dtype=torch.float64)
    loss = objective(functional(line), [(ones, 0 * ones)], custom(lambda out, _: 1 + out.square().square() / 8))
    direction = directions(loss.net, key=key(0), num=1, normalize="global")[0]
    found = difference_step(loss, torch.zeros(1, dtype=torch.float64), direction)  # L'''' = 3, B = 1 up to h^4 / 8
    assert abs(found.step / (48 * 2.0**-53 / 3) ** 0.25 - 1) < 1e-2
    assert abs(found.error / (2 * 2.0**-26.5) - 1) < 2e-2
