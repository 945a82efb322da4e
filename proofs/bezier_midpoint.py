"""identity: a quadratic Bezier curve leaves the straight line in proportion to its control point, and only then

Claim: phi(t) = (1-t)^2 a + 2t(1-t) m + t^2 b has phi(0) = a, phi(1) = b and phi(t) - ((1-t) a + t b) = 2t(1-t) (m - (a+b)/2).
    So with m = (a+b)/2 it is the straight line, point by point, and for every other m it differs at every t in (0, 1):
    a curve can only avoid a barrier if m is trained. Its derivative in m is 2t(1-t), with mean 1/3 over t ~ U(0, 1).
    For L = |theta - c|^2 / 2 the mean of L(phi(t)) has its only minimum at m = 5c/2 - 3(a+b)/4.
Function: funcscope.landscape.bezier.bezier, funcscope.landscape.bezier.connect
Size: one coordinate, all real a, b, c, m, t; the statements are about each coordinate by itself, so that every P is covered.
Assumptions: exact arithmetic.
Not covered: rounding; what training finds for other losses; other curves than quadratic ones.
"""

from fractions import Fraction
from itertools import product

import pytest
import sympy as sp
import torch

from funcscope.core.criterion import custom
from funcscope.core.keys import key
from funcscope.core.model import functional
from funcscope.core.objective import objective
from funcscope.landscape.bezier import bezier, connect

a, b, c, m, t = sp.symbols("a b c m t", real=True)
CURVE = (1 - t) ** 2 * a + 2 * t * (1 - t) * m + t**2 * b
LINE = (1 - t) * a + t * b


def test_the_curve_leaves_the_line_by_2t_1_minus_t_times_the_offset():
    assert sp.expand(CURVE - LINE - 2 * t * (1 - t) * (m - (a + b) / 2)) == 0
    assert sp.expand(CURVE - LINE - t * (1 - t) * (m - (a + b) / 2)) != 0  # negative control
    assert CURVE.subs(t, 0) == a
    assert CURVE.subs(t, 1) == b


def test_the_straight_midpoint_gives_the_straight_line_and_no_other_does():
    assert sp.expand(CURVE.subs(m, (a + b) / 2) - LINE) == 0
    assert sp.expand(CURVE.subs(m, a) - LINE) != 0  # negative control: a trained curve is another one
    u = sp.Symbol("u", positive=True)  # every t in (0, 1) is u / (1 + u)
    assert sp.together((2 * t * (1 - t)).subs(t, u / (1 + u))).is_positive


def test_the_derivative_in_the_midpoint_and_its_mean():
    assert sp.diff(CURVE, m) == 2 * t * (1 - t)
    assert sp.integrate(sp.diff(CURVE, m), (t, 0, 1)) == sp.Rational(1, 3)


def test_the_best_midpoint_of_a_quadratic_loss():
    mean = sp.integrate(sp.expand((CURVE - c) ** 2 / 2), (t, 0, 1))
    best = 5 * c / 2 - 3 * (a + b) / 4
    assert sp.expand(sp.diff(mean, m).subs(m, best)) == 0
    assert sp.diff(mean, m, 2).is_positive
    assert sp.expand(sp.diff(mean, m).subs(m, (a + b) / 2)) != 0  # negative control


# Bridges: in dyadic rationals float64 makes no rounding.


def test_shipped_point_is_the_theorem_in_exact_arithmetic():
    values = (Fraction(-3, 2), Fraction(1), Fraction(5, 8))
    for start, middle, end, at in product(values, values, values, (Fraction(k, 8) for k in range(9))):
        vectors = [torch.tensor([float(x)], dtype=torch.float64) for x in (start, middle, end)]
        offset = Fraction(bezier(*vectors, float(at)).item()) - ((1 - at) * start + at * end)
        assert offset == 2 * at * (1 - at) * (middle - (start + end) / 2)


@pytest.mark.slow
def test_shipped_training_finds_the_best_midpoint_of_a_quadratic_loss():
    net = functional(torch.nn.Linear(2, 1, bias=False).double())
    square = custom(lambda out, y: (out - y) ** 2 / 2)
    centre = torch.tensor([0.25, -0.5], dtype=torch.float64)
    loss = objective(net, [(torch.eye(2).double() * 2**0.5, centre[:, None] * 2**0.5)], square)
    start, end = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, 0.0], [0.0, 2.0]))
    found = connect(loss, start, end, key=key(0), steps=300, points=16, num=3)
    wanted = 2.5 * centre - 0.75 * (start + end)
    assert (found.midpoint - wanted).abs().max() < 0.03
    assert ((start + end) / 2 - wanted).abs().min() > 0.5  # negative control: far from where training starts
