"""identity: where a task weighs its own gradients, the mean interference with another one does not depend on it

Claim: M_ij = sum_k g_ik^2 / (I_k + lambda) |g_jk| for sequences i of task A and j of task B. With I_k = mean_i g_ik^2 over
    the same sequences i, mean_i M_ij = sum_k |g_jk| I_k / (I_k + lambda): for lambda = 0 it is |g_j|_1, whatever task A
    is, and below that, by no more than lambda / (min_k I_k + lambda) of it, for lambda > 0. It is linear in
    g_ik^2 / (I_k + lambda), so that no order of the rows of g_ik^2, all permuted together, changes it. With I of other
    sequences it is sum_k |g_jk| (mean_i g_ik^2) / (I_k + lambda), which depends on A.
Function: funcscope.fisher.interference.interference_of, funcscope.fisher.interference.head_interference
Size: one coordinate k, of which M is a sum, and n = 1, 2, 3, 4 sequences of A, all entries symbols; the order of the
    rows in two coordinates.
Assumptions: every I_k > 0; |g_jk| enters as a symbol, as j is one sequence.
Not covered: the signed and symmetric forms, whose means do depend on A; tests of significance.
"""

from itertools import permutations

import pytest
import sympy as sp
import torch

from funcscope.fisher.interference import interference_of

SEQUENCES = pytest.mark.parametrize("n", [1, 2, 3, 4])
b, damping, other = sp.symbols("b lambda other", positive=True)


def task(n, name="g"):
    return sp.symbols(f"{name}0:{n}", positive=True)


def mean(values):
    return sum(values) / len(values)


def interference(g, weight):
    """mean_i M_ij in one coordinate."""
    return mean([x**2 / weight * b for x in g])


@SEQUENCES
def test_the_mean_with_a_weight_of_its_own_is_the_length_of_the_other_gradient(n):
    g = task(n)
    own = mean([x**2 for x in g])
    assert sp.simplify(interference(g, own) - b) == 0
    assert sp.simplify(interference(g, own + damping) - b * own / (own + damping)) == 0
    assert sp.simplify(b - interference(g, own + damping) - b * damping / (own + damping)) == 0
    held_out = interference(g, other)
    assert sp.diff(held_out, g[0]) != 0  # negative control: with the weight of other sequences it depends on A
    assert n == 1 or sp.diff(g[0] * b / sp.sqrt(own), g[0]) != 0  # and so does a single sequence of A


@pytest.mark.parametrize("n", [2, 3])
def test_no_order_of_the_rows_changes_the_mean(n):
    first, second, weights, lengths = task(n, "x"), task(n, "y"), sp.symbols("I0:2"), sp.symbols("b0:2")

    def average(order):
        rows = [first[i] ** 2 / weights[0] * lengths[0] + second[i] ** 2 / weights[1] * lengths[1] for i in order]
        return mean(rows)

    assert all(sp.expand(average(order) - average(range(n))) == 0 for order in permutations(range(n)))
    assert sp.expand(mean([first[0] ** 2 / weights[0] * lengths[0]]) - average(range(n))) != 0  # negative control


# Bridge: the shipped pairs in float64.


def pairs(a, b, weights):
    return interference_of(a, b, weights).directed[: len(a), len(a) :]


def test_shipped_interference_averages_to_a_length_with_its_own_weights_alone():
    grid = torch.arange(15, dtype=torch.float64).view(3, 5)
    tasks, rows = (
        (torch.cos(grid**2), 3 + torch.sin(grid) * torch.tensor([1.0, 9.0, 0.1, 1.0, 4.0])),
        torch.sin(grid[:2]),
    )
    own = [pairs(a, rows, a.square().mean(0)).mean(0) for a in tasks]
    for found in own:
        torch.testing.assert_close(found, rows.abs().sum(1))
    held_out = torch.cat(tasks).square().mean(0)
    apart = [pairs(a, rows, held_out).mean(0) for a in tasks]
    assert bool(((apart[0] - apart[1]).abs() > 0.1 * rows.abs().sum(1)).all())  # negative control
