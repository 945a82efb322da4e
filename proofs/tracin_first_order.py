"""identity: the fall of a test loss by steps of gradient descent is the sum of TracIn to first order

Claim: With losses s_z of N samples of degree 2, a test loss l of degree 3, all such polynomials, and K steps
    w -> w - eta (1/N) sum_z grad s_z(w), l(w_0) - l(w_K) = sum_z sum_k eta <grad s_z(w_k)/N, grad l(w_k)> + O(eta^2), and the
    second order is -1/2 sum_k G_k' (Hess l) G_k with G_k the mean gradient. Without the division by N it is N times as large.
Function: funcscope.gradients.tracin.tracin
Size: two parameters, two training samples, two steps.
Assumptions: full batches; exact arithmetic.
Not covered: other numbers of parameters, samples and steps; momentum and Adam; checkpoints that stand for several steps.
"""

from itertools import combinations_with_replacement

import pytest
import sympy as sp
import torch

import funcscope as fs
from funcscope.gradients import tracin

eta = sp.symbols("eta")
W = sp.symbols("w0:2", real=True)


def polynomial(name, degree):
    monomials = [sp.prod(c) for d in range(1, degree + 1) for c in combinations_with_replacement(W, d)]
    return sum(c * m for c, m in zip(sp.symbols(f"{name}0:{len(monomials)}", real=True), monomials, strict=True))


def gradient(f):
    return [sp.diff(f, w) for w in W]


def at(f, point):
    return f.subs(dict(zip(W, point, strict=True)), simultaneous=True)


def orders(expression):
    """Coefficients of eta^0, eta^1, eta^2."""
    return [sp.expand(sp.diff(expression, eta, k).subs(eta, 0) / sp.factorial(k)) for k in range(3)]


def test_the_fall_is_the_sum_to_first_order_and_what_the_second_order_is():
    train, test = [polynomial("a", 2), polynomial("b", 2)], polynomial("c", 3)
    mean = [sp.Add(*(sp.diff(f, w) for f in train)) / 2 for w in W]
    points = [[sp.Integer(0), sp.Integer(0)]]
    for _ in range(2):
        points.append([p - eta * at(g, points[-1]) for p, g in zip(points[-1], mean, strict=True)])
    fall = at(test, points[0]) - at(test, points[-1])
    owed = [
        sum(
            eta * at(g / 2, w) * at(h, w) for w in points[:-1] for g, h in zip(gradient(f), gradient(test), strict=True)
        )
        for f in train
    ]
    found, claimed = orders(fall), orders(sum(owed))
    assert found[:2] == claimed[:2]
    assert found[1] != 0
    assert sp.expand(found[1] - 2 * claimed[1]) != 0  # negative control: without the division by N
    step = [at(g, points[0]) for g in mean]
    hessian = [[at(sp.diff(test, u, v), points[0]) for u in W] for v in W]
    form = sum(hessian[i][j] * step[i] * step[j] for i in range(2) for j in range(2))
    assert sp.expand(found[2] - claimed[2] + 2 * form / 2) == 0
    assert form != 0


@pytest.mark.parametrize("rate", [2.0**-6, 2.0**-10])
def test_shipped_scores_are_off_by_the_second_order(rate):
    """A quadratic: the fall is TracIn less rate^2 G' H G / 2, exactly."""
    half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    with torch.random.fork_rng(devices=[]):
        net = fs.functional(torch.nn.Linear(2, 1, bias=False, dtype=torch.float64))
    x = torch.tensor([[1.0, 2.0], [2.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    loss, test = (
        fs.objective(net, [(each, torch.zeros(len(each), 1).double())], half_square) for each in (x[:2], x[2:])
    )
    start = torch.tensor([3.0, 1.0], dtype=torch.float64)
    step = torch.func.grad(loss)(start)
    made = tracin(loss, test, [start, start - rate * step], learning_rates=[rate, 0.0])
    second = rate**2 / 2 * float(x[2] @ step) ** 2
    assert float(made.predicted_drop[0] - made.loss_drop[0]) == pytest.approx(second, rel=1e-6)
    assert float(2 * made.predicted_drop[0]) != pytest.approx(float(made.loss_drop[0]), rel=0.5)  # negative control
