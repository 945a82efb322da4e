"""identity: influence is the derivative by a sample's weight, and leaving it out is that over W (1 - h) for one square

Claim: With L = (1/W) sum_z (x_z' w - y_z)^2 / 2 + lambda |w|^2 / 2, A its Hessian and g_z the gradient of one square at the
    minimum w: d/d eps of the minimum of L + eps (x_z' w - y_z)^2 / 2 at 0 is -A^-1 g_z, and the minimum of L without z (the
    sum over the others still divided by W) is w + A^-1 g_z / (W (1 - h)), h = x_z' A^-1 x_z / W.
Function: funcscope.gradients.influence.influence
Size: two parameters, three samples of fixed x and every y, lambda = 1/4.
Assumptions: A is regular; exact arithmetic.
Not covered: other sizes; other losses, for which both are of first order; several outputs per sample.
"""

import sympy as sp
import torch

import funcscope as fs
from funcscope.gradients import influence

X, Y = sp.Matrix([[1, 2], [-1, 3], [2, 1]]), sp.Matrix(sp.symbols("y0:3", real=True))
STRENGTH, EPS = sp.Rational(1, 4), sp.symbols("epsilon")


def minimum(weights):
    """Of sum_z weights_z (x_z' w - y_z)^2 / 2 + lambda |w|^2 / 2."""
    d = sp.diag(*weights)
    return (X.T * d * X + STRENGTH * sp.eye(2)).inv() * (X.T * d * Y)


def parts(z):
    third = sp.Rational(1, 3)
    w, inverse = minimum([third] * 3), (X.T * X / 3 + STRENGTH * sp.eye(2)).inv()
    return w, inverse, X.row(z).T * ((X.row(z) * w)[0] - Y[z]), third


def same(one, other):
    return all(sp.simplify(x) == 0 for x in one - other)


def test_influence_is_the_derivative_by_the_weight():
    _, inverse, g, third = parts(0)
    moved = minimum([third + EPS, third, third]).diff(EPS).subs(EPS, 0)
    assert same(moved, -inverse * g)
    assert not same(moved, -inverse * g / 3)  # negative control: another scale


def test_the_move_by_leaving_out_is_that_over_the_rest_of_the_leverage():
    w, inverse, g, third = parts(1)
    h = (X.row(1) * inverse * X.row(1).T)[0] / 3
    left_out = minimum([third, 0, third])
    assert same(left_out - w, inverse * g / 3 / (1 - h))
    assert not same(left_out - w, inverse * g / 3)  # negative control: first order alone


def test_shipped_influence_has_these_numbers():
    y = [1.0, -2.0, 0.5]
    values = dict(zip(Y, y, strict=True))
    half_square = fs.custom(lambda out, target: (out - target)[:, 0] ** 2 / 2)
    with torch.random.fork_rng(devices=[]):
        net = fs.functional(torch.nn.Linear(2, 1, bias=False, dtype=torch.float64))
    x = torch.tensor(X.tolist(), dtype=torch.float64)
    train = fs.objective(net, [(x, torch.tensor(y, dtype=torch.float64)[:, None])], half_square)
    probe = torch.tensor([[1.0, 1.0]], dtype=torch.float64), torch.tensor([[7.0]], dtype=torch.float64)
    test = fs.objective(net, [probe], half_square)
    w = sp.Matrix(parts(0)[0]).subs(values)
    theta = torch.tensor([float(each) for each in w], dtype=torch.float64)
    found = influence(train, test, theta, damping=0.25, tol=1e-12)
    slope = float(theta.sum()) - 7
    for z in range(3):
        _, inverse, g, _ = parts(z)
        expected = -slope * float((sp.Matrix([[1, 1]]) * inverse * g)[0].subs(values))
        assert abs(float(found.values[z, 0]) - expected) < 1e-9
        assert abs(float(found.left_out[z, 0]) + expected / 3) < 1e-9
