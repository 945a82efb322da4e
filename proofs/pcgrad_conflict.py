"""identity and exhaustive: projecting gradients on each other's planes ends conflicts of two tasks, and not of three

Claim: For two gradients with <a, b> < 0, a' = a - <a, b> / |b|^2 b and b' = b - <a, b> / |a|^2 a have <a' + b', a> and
    <a' + b', b> at least 0: (1 - cos^2) |a|^2 and (1 - cos^2) |b|^2. For three there are gradients whose sum of
    projected ones is against one of them, in every order of the projections.
Function: funcscope.gradients.aggregation.aggregation_weights
Size: two gradients of any inner products, as symbols; three gradients of the Gram matrix below, of fractions, in all orders.
Assumptions: no gradient is 0.
Not covered: how often this happens.
"""

from fractions import Fraction as Q
from itertools import permutations, product

import pytest
import sympy as sp
import torch

import funcscope as fs
from funcscope.gradients import aggregation_weights

ROWS = ((Q(4), Q(0), Q(0)), (Q(-1), Q(1, 4), Q(0)), (Q(-1), Q(-1, 4), Q(1, 8)))
GRAM = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in ROWS] for a in ROWS]


def projected(gram, i, order):
    """Coefficients of gradient i without what is against the others, one after another."""
    weights = [Q(int(k == i)) for k in range(len(gram))]
    for j in order:
        inner = sum(w * row[j] for w, row in zip(weights, gram, strict=True))
        if inner < 0:
            weights[j] -= inner / gram[j][j]
    return weights


def sums(gram):
    """By all orders of every task: the coefficients of the sum."""
    num = len(gram)
    choices = [
        [projected(gram, i, order) for order in permutations([j for j in range(num) if j != i])] for i in range(num)
    ]
    return [[sum(each) for each in zip(*rows, strict=True)] for rows in product(*choices)]


def inner_products(gram, weights):
    return [sum(w * row[k] for w, row in zip(weights, gram, strict=True)) for k in range(len(gram))]


def test_two_tasks_have_no_conflict_left():
    aa, bb = sp.symbols("aa bb", positive=True)
    ab = sp.Symbol("ab", negative=True)
    weights = 1 - ab / aa, 1 - ab / bb
    with_a, with_b = weights[0] * aa + weights[1] * ab, weights[0] * ab + weights[1] * bb
    assert sp.simplify(with_a - aa * (1 - ab**2 / (aa * bb))) == 0
    assert sp.simplify(with_b - bb * (1 - ab**2 / (aa * bb))) == 0
    assert sp.simplify(aa + ab - with_a) != 0  # negative control: the plain sum


def test_three_tasks_may_have_one_left_in_every_order():
    found = [inner_products(GRAM, weights) for weights in sums(GRAM)]
    assert all(min(each) < 0 for each in found)
    two = [row[:2] for row in GRAM[:2]]
    assert all(min(inner_products(two, weights)) >= 0 for weights in sums(two))  # negative control: two of them


def test_the_shipped_weights_are_one_of_these():
    pytest.importorskip("torchjd")
    gram = torch.tensor([[float(x) for x in row] for row in GRAM], dtype=torch.float64)
    weights = aggregation_weights(gram, method="pcgrad", key=fs.key(0))
    every = torch.tensor([[float(x) for x in each] for each in sums(GRAM)], dtype=torch.float64)
    assert float((every - weights).abs().amax(1).min()) < 1e-9
    assert float((weights @ gram).min()) < 0
