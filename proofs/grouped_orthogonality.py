"""identity: orthogonalising within groups keeps orthogonality and group norms; rescaling after a global one does not

Claim: For x, y in R^n, a partition of the coordinates into groups G, norms t_G, and s_G = sum of x_i y_i, q_G = sum of
    x_i^2 over G: with r_G = y_G - (s_G / q_G) x_G, every <r_G, x_G> is 0, so that d1_G = t_G x_G / |x_G| and
    d2_G = t_G r_G / |r_G| are orthogonal in each group and as a whole, and have the norms t_G. After the global projection
    r = y - (sum s_G / sum q_G) x the sum of <r_G, x_G> is 0, yet rescaled groups give
    <d1, d2> = sum of t_G^2 <r_G, x_G> / (|x_G| |r_G|), not 0 in general; projecting once more breaks the norms. In a group of
    one coordinate r_G is always 0.
Function: funcscope.landscape.axes.plane_directions, funcscope.landscape.orthogonal.orthogonalise
Size: groups of 2 and 3 coordinates, and of 2 and 2; the sum over groups follows for every partition.
Assumptions: no x_G is 0 and no y_G a multiple of x_G. Groups enter the whole inner product by their sum.
Not covered: rounding; more than two directions, where r_G is orthogonal to each earlier part by the same identity in
    turn; which group the pooled coordinates make (a choice).
"""

import pytest
import sympy as sp
import torch

from funcscope.core.directions import directions
from funcscope.core.keys import fold_in, key
from funcscope.core.model import functional
from funcscope.landscape.axes import plane_directions
from funcscope.landscape.orthogonal import orthogonalise

GROUPS = [((0, 1), (2, 3, 4)), ((0, 1), (2, 3))]


def inner(x, y, group):
    return sum(x[i] * y[i] for i in group)


def within(x, y, groups):
    """y less its part along x, group by group."""
    left = list(y)
    for group in groups:
        share = inner(x, y, group) / inner(x, x, group)
        for i in group:
            left[i] = y[i] - share * x[i]
    return left


def overall(x, y, groups):
    every = [i for group in groups for i in group]
    share = inner(x, y, every) / inner(x, x, every)
    return [b - share * a for a, b in zip(x, y, strict=True)]


def scaled(x, groups, norms):
    """Each group with its norm."""
    found = list(x)
    for group, norm in zip(groups, norms, strict=True):
        for i in group:
            found[i] = norm * x[i] / sp.sqrt(inner(x, x, group))
    return found


@pytest.mark.parametrize("groups", GROUPS)
def test_orthogonalising_within_groups_is_orthogonal_in_every_group_whatever_the_norms(groups):
    n = sum(map(len, groups))
    x, y, norms = sp.symbols(f"x:{n}", real=True), sp.symbols(f"y:{n}", real=True), sp.symbols("s t", positive=True)
    left = within(x, y, groups)
    for group, norm in zip(groups, norms, strict=True):
        assert sp.cancel(inner(x, left, group)) == 0
        factor = norm**2 / (sp.sqrt(inner(x, x, group)) * sp.sqrt(inner(left, left, group)))
        first, second = scaled(x, groups, norms), scaled(left, groups, norms)
        assert sp.cancel((inner(first, second, group) - factor * inner(x, left, group)).subs(_numbers(x, y))) == 0
        assert sp.cancel(inner(second, second, group) - norm**2) == 0
    assert any(sp.cancel(inner(x, overall(x, y, groups), group)) != 0 for group in groups)  # negative control


@pytest.mark.parametrize("groups", GROUPS)
def test_rescaling_groups_after_a_global_projection_loses_orthogonality(groups):
    n = sum(map(len, groups))
    every = range(n)
    x, y = [sp.Integer(i + 1) for i in every], [sp.Integer((i * i + 2) % 5 - 2) for i in every]
    left, norms = overall(x, y, groups), (sp.Integer(1), sp.Integer(3))
    assert inner(x, left, every) == 0  # orthogonal as a whole before the norms are set
    assert sp.nsimplify(inner(scaled(x, groups, norms), scaled(left, groups, norms), every)).equals(0) is False
    first, second = scaled(x, groups, norms), scaled(left, groups, norms)
    again = overall(first, second, groups)  # the other order: orthogonal once more, and the norms are lost
    assert sp.simplify(inner(first, again, every)) == 0
    lost = [sp.simplify(inner(again, again, group) - norm**2) for group, norm in zip(groups, norms, strict=True)]
    assert any(gap.equals(0) is False for gap in lost)
    kept = within(x, y, groups)
    assert sp.simplify(inner(scaled(x, groups, norms), scaled(kept, groups, norms), every)) == 0


def test_a_group_of_one_coordinate_has_no_room_for_a_second_direction():
    x, y = sp.symbols("x y", real=True)
    assert sp.cancel(within([x], [y], [(0,)])[0]) == 0
    pair = within([x, sp.Integer(1)], [y, sp.Integer(2)], [(0, 1)])  # negative control: two coordinates have
    assert sp.cancel(pair[0]) != 0


def _numbers(x, y):
    return {symbol: sp.Rational(k + 1, 3 + k % 2) * (-1) ** (k // 2) for k, symbol in enumerate((*x, *y))}


# Bridges: the shipped directions are those of the identity, in float64.


def model():
    line = torch.nn.Linear(3, 2, dtype=torch.float64)
    with torch.no_grad():
        for i, p in enumerate(line.parameters()):
            p.copy_(torch.arange(1.0, 1 + p.numel()).view(p.shape) * (i + 1) / 8)
    return functional(line)


def test_shipped_second_direction_is_the_remainder_within_each_group():
    net, groups = model(), [(0, 1, 2), (3, 4, 5), (6, 7)]
    x, y = (d.dense().tolist() for d in directions(net, key=key(3), num=2))
    axes = plane_directions(net, key=key(3))
    norms = [float(net.theta[list(group)].norm()) for group in groups]
    for shipped, wanted in zip(axes.vectors, (x, within(x, y, groups)), strict=True):
        wanted = torch.tensor([float(v) for v in scaled(wanted, groups, norms)], dtype=torch.float64)
        assert (shipped - wanted).abs().max() < 1e-14
    one, two = axes.vectors
    assert all(abs(float(one[list(group)] @ two[list(group)])) < 1e-15 for group in groups)
    lost = torch.tensor([float(v) for v in scaled(overall(x, y, groups), groups, norms)], dtype=torch.float64)
    assert abs(float(one @ lost)) > 1e-3  # negative control


def test_shipped_orthogonalise_works_in_place_on_the_draws():
    net = model()
    dirs = directions(net, key=key(0), num=2, normalize="layer")
    rows = torch.stack([d.dense() for d in dirs])
    before = rows.clone()
    assert orthogonalise(rows, dirs[0].scales, fold_in(key(0), "again")) == 0
    assert abs(float(rows[0] @ rows[1])) < 1e-15 < abs(float(before[0] @ before[1]))
    assert (rows.norm(dim=1) - net.theta.norm()).abs().max() < 1e-14
