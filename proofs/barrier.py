"""general, identity and exhaustive: the order of the two barriers, and what leaves them unchanged

Claim: For losses at 0 = t_0 < ... < t_n = 1, B_max = max_i L_i - max(L_0, L_n) and
    B_lin = max_i [L_i - ((1-t_i) L_0 + t_i L_n)] satisfy 0 <= B_max <= B_lin <= B_max + |L_0 - L_n|. An affine function of
    t added to the losses changes no excess over the chord, so not B_lin; a constant changes neither. For a quadratic loss
    the excess at t is -t(1-t) d'Hd / 2, d the difference of the end points, so that B_lin is max(0, -d'Hd) / 8 where 1/2 is
    among the t_i; where the loss is convex along the path both barriers are 0. max - min(L_0, L_n) is not a barrier: it is
    |L_0 - L_n| for a path that only falls.
Function: funcscope.landscape.path.linear_path, funcscope.landscape.barriers.LossPath
Size: every number of points and all real losses, as the statements hold point by point; all losses in {0, 1, 3} at five
    points once more, by the shipped function. The quadratic: every one, as it is one of t along the line.
Assumptions: finite losses; t in [0, 1] with both ends among them. Not proved here: that a maximum keeps the order that
    holds point by point.
Not covered: the barrier between the points; standard errors and the bias of a maximum of noisy losses.
"""

from fractions import Fraction
from itertools import pairwise, product

import sympy as sp
import torch

from funcscope.core.criterion import custom
from funcscope.core.model import functional
from funcscope.core.objective import objective
from funcscope.landscape.barriers import LossPath
from funcscope.landscape.path import linear_path

t, high, low, p, c, g = sp.symbols("t H low p c g", real=True)
gap, r = sp.symbols("gap r", nonnegative=True)


def chord(left, right, at=t):
    return (1 - at) * left + at * right


def test_the_chord_is_below_the_higher_end_and_above_the_lower_one():
    inside = r / (1 + r)  # every t in [0, 1)
    for left, right in ((high, high - gap), (high - gap, high)):
        assert sp.factor(
            high - chord(left, right, inside)
        ).is_nonnegative  # so that excess >= L - max, and B_max <= B_lin
        assert sp.factor(chord(left, right, inside) - (high - gap)).is_nonnegative  # excess <= L - max + gap
        assert high - chord(left, right, 1) in (0, gap)
    outside = sp.expand(high - chord(high, high - gap, -1))
    assert outside.is_nonpositive  # negative control: it fails for t outside of [0, 1]
    # at an end the excess is 0, and the loss less the higher end 0 at the higher one: neither maximum is below 0
    assert sp.expand(high - chord(high, low, 0)) == 0
    assert sp.expand(low - chord(high, low, 1)) == 0


def test_an_affine_function_of_t_changes_no_excess():
    def excess(at_t, left, right):
        return at_t - chord(left, right)

    moved = excess(p + c + g * t, high + c, low + c + g)
    assert sp.expand(moved - excess(p, high, low)) == 0
    bent = excess(p + g * t**2, high, low + g)
    assert sp.expand(bent - excess(p, high, low)) != 0  # negative control


def test_the_excess_of_every_quadratic():
    loss = sp.Lambda(t, p + g * t + c * t**2 / 2)  # along the line, c = d'Hd
    excess = loss(t) - chord(loss(0), loss(1))
    assert sp.expand(excess + t * (1 - t) * c / 2) == 0
    assert excess.subs(t, sp.Rational(1, 2)).expand() == -c / 8
    assert sp.expand(sp.Rational(1, 4) - t * (1 - t) - (t - sp.Rational(1, 2)) ** 2) == 0  # t(1-t) <= 1/4, only there
    cubic = loss(t) + t**3
    assert sp.expand(cubic - chord(loss(0), loss(1) + 1) + t * (1 - t) * c / 2) != 0  # negative control


# Bridges: integers and quarters are exact in float64.


def test_shipped_barriers_of_all_losses_in_0_1_3_at_five_points():
    ever = set()
    for losses in product((0, 1, 3), repeat=5):
        sums = torch.tensor(losses, dtype=torch.float64)[:, None]
        path = LossPath("line", sums, torch.ones(1, dtype=torch.float64), 1.0, 2.0**-53, 1, 5)
        found = [Fraction(float(e.value)) for e in (path.barrier_max, path.barrier_linear)]
        chords = [chord(losses[0], losses[4], Fraction(k, 4)) for k in range(5)]
        assert found == [
            max(losses) - max(losses[0], losses[4]),
            max(x - y for x, y in zip(losses, chords, strict=True)),
        ]
        assert 0 <= found[0] <= found[1] <= found[0] + abs(losses[0] - losses[4])
        if all(x >= y for x, y in pairwise(losses)):
            assert found[0] == 0
        ever.add((found[0] < found[1], max(losses) - min(losses[0], losses[4]) != found[0]))
    assert ever == {(False, False), (False, True), (True, True)}  # neither order nor definitions coincide


def test_shipped_barrier_of_a_quadratic_is_an_eighth_of_the_negative_curvature():
    net = functional(torch.nn.Linear(1, 1, bias=False).double())
    parabola = custom(lambda out, y: y * out**2 / 2)
    start, end = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    for curvature in (-3.0, 0.0, 5.0):
        inputs = (torch.ones(1, 1).double(), torch.full((1, 1), curvature).double())
        path = linear_path(objective(net, [inputs], parabola), start, end, num=5)
        assert float(path.barrier_linear.value) == max(0.0, -curvature * 16 / 8)
