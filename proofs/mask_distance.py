"""exhaustive and general: how far apart random masks of one density are, and where a limit on the distance says nothing

Claim: For two masks that keep k of n parameters each, all pairs equally likely, the mean share of parameters in which they
    differ is 2 rho (1 - rho) with rho = k / n, exactly, and whatever the first mask is. It is below a limit l < 1/2 exactly
    for rho below (1 - sqrt(1 - 2 l)) / 2 and above one minus that: for l = .1 below 5.28 % and above 94.72 %. The largest
    distance that is possible is 2 min(rho, 1 - rho): where that is below l, every pair passes.
Function: funcscope.weights.early_bird.early_bird
Size: the mean over all masks for n = 1 to 7 and every k, in fractions; for every n and k by its formula: the expected number
    in common is k^2 / n, as each of k is in the other mask with probability k / n. The bounds for every l.
Assumptions: one density for both masks, compared over all parameters together.
Not covered: masks of real checkpoints, which are not random; masks of tensors of unequal densities.
"""

from fractions import Fraction
from itertools import combinations

import pytest
import sympy as sp
import torch
from torch import nn

from funcscope.core.layout import Layout
from funcscope.weights import early_bird


@pytest.mark.parametrize("n", range(1, 8))
def test_the_mean_over_all_masks_is_twice_the_density_times_the_rest(n):
    for k in range(n + 1):
        masks = [set(each) for each in combinations(range(n), k)]
        rho = Fraction(k, n)
        for first in (masks[0], masks[-1]):
            distances = [Fraction(len(first ^ second), n) for second in masks]
            assert sum(distances) / len(distances) == 2 * rho * (1 - rho)
            assert max(distances) == 2 * min(rho, 1 - rho)
            if 0 < k < n:
                assert sum(distances) / len(distances) != rho * (1 - rho)  # negative control


def test_a_limit_is_above_chance_outside_of_two_densities():
    rho, limit = sp.symbols("rho limit", positive=True)
    low, high = sp.solve(2 * rho * (1 - rho) - limit, rho)
    assert sp.simplify(low - (1 - sp.sqrt(1 - 2 * limit)) / 2) == 0
    assert sp.simplify(low + high - 1) == 0
    at = float(low.subs(limit, sp.Rational(1, 10)))
    assert round(at, 4) == 0.0528
    assert 2 * (at - 0.001) * (1 - at + 0.001) < 0.1 < 2 * (at + 0.001) * (1 - at - 0.001)  # below, and not above


# Bridge: the shipped chance, and the step that is not said where random masks would pass.


@pytest.mark.parametrize(("k", "says"), [(1, False), (2, True), (19, False), (10, True)])
def test_shipped_chance_is_the_mean_distance_and_decides_whether_a_step_is_said(k, says):
    layout = Layout.of(nn.Linear(20, 1, bias=False))
    still = [torch.arange(20.0).roll(1)] * 3
    made = early_bird(layout, still, [0, 1, 2], density=k / 20, window=2)
    assert made.chance_distance == pytest.approx(2 * k / 20 * (1 - k / 20), abs=1e-12)
    assert (made.emergence_step == 2) == says
    assert any("says nothing" in note for note in made.notes) != says
