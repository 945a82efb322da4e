"""identity: Fisher merging is the mode of a product of normal densities, RegMean the least squares of all models' outputs

Claim: The log of prod_k N(theta; theta_k, diag(F_k)^-1)^(w_k) is, up to a constant, -1/2 sum_k w_k sum_i F_ki (theta_i -
    theta_ki)^2. Its only stationary point is theta_i = sum_k w_k F_ki theta_ki / sum_k w_k F_ki, a maximum where that sum is
    positive; with F_ki + eps_k for F_ki it tends to the mean with weights w_k eps_k as F_ki goes to 0, where an eps in the
    denominator alone gives 0. sum_k ||X_k W - X_k W_k||^2 has the gradient 2 (sum_k G_k W - sum_k G_k W_k), G_k = X_k' X_k:
    with sum_k G_k regular, W = (sum_k G_k)^-1 sum_k G_k W_k is its only minimum, for as many outputs as there are.
Function: funcscope.weights.merge_rules.fisher, funcscope.weights.regmean.regmean
Size: Fisher: one coordinate (they are independent) of K = 2, 3 models, all symbols. RegMean: K = 2 models of 2 inputs, 1 and
    2 outputs, 2 rows of data each, all symbols.
Assumptions: exact arithmetic; positive F or floors.
Not covered: that the posterior of a network is normal; that errors of layers add up to that of the whole; off-diagonals that
    are shrunk, which is least squares with independent noise on the inputs added.
"""

import pytest
import sympy as sp
import torch

from funcscope.weights.merge_rules import fisher, regmean


def merged(w, F, t):
    return sum(a * b * x for a, b, x in zip(w, F, t, strict=True)) / sum(a * b for a, b in zip(w, F, strict=True))


@pytest.mark.parametrize("K", [2, 3])
def test_fisher_merging_is_the_mode_of_the_product(K):
    w, F, eps = (sp.symbols(f"{name}0:{K}", positive=True) for name in "wFe")
    t, theta = sp.symbols(f"t0:{K}", real=True), sp.Symbol("theta", real=True)
    log = sum(a * (sp.log(b) - b * (theta - x) ** 2) / 2 for a, b, x in zip(w, F, t, strict=True))
    (mode,) = sp.solve(sp.diff(log, theta), theta)
    assert sp.simplify(mode - merged(w, F, t)) == 0
    assert sp.simplify(sp.diff(log, theta, 2) + sum(a * b for a, b in zip(w, F, strict=True))) == 0
    assert sp.simplify(mode - merged([1] * K, F, t)) != 0  # negative control: the weights are in it
    floored = merged(w, [b + e for b, e in zip(F, eps, strict=True)], t)
    nothing = dict.fromkeys(F, 0)
    assert sp.simplify(floored.subs(nothing) - merged(w, eps, t)) == 0
    alone = sum(a * b * x for a, b, x in zip(w, F, t, strict=True)) / (
        sum(a * b for a, b in zip(w, F, strict=True)) + eps[0]
    )
    assert alone.subs(nothing) == 0  # negative control: an epsilon below alone


@pytest.mark.parametrize("outputs", [1, 2])
def test_regmean_is_the_least_squares_of_all(outputs):
    X = [sp.Matrix(2, 2, sp.symbols(f"x{k}_0:4", real=True)) for k in range(2)]
    W = [sp.Matrix(2, outputs, sp.symbols(f"w{k}_0:{2 * outputs}", real=True)) for k in range(2)]
    V = sp.Matrix(2, outputs, sp.symbols(f"v0:{2 * outputs}", real=True))
    error = sum(sum(e**2 for e in x * V - x * w) for x, w in zip(X, W, strict=True))
    G = [x.T * x for x in X]
    slope = 2 * (sum(G, sp.zeros(2)) * V - sum((g * w for g, w in zip(G, W, strict=True)), sp.zeros(2, outputs)))
    gradient = sp.Matrix(2, outputs, lambda i, j: sp.diff(error, V[i, j]))
    assert (gradient - slope).expand() == sp.zeros(2, outputs)
    assert (gradient - slope / 2).expand() != sp.zeros(2, outputs)  # negative control
    assert (sp.hessian(error, list(V[:, 0])) - 2 * sum(G, sp.zeros(2))).expand() == sp.zeros(
        2
    )  # convex: a sum of squares
    mean = (W[0] + W[1]) / 2
    assert slope.subs(dict(zip(V, mean, strict=True))).expand() != sp.zeros(
        2, outputs
    )  # negative control: the mean is not


# Bridge: the shipped rules in float64.


def test_shipped_rules_are_the_stationary_points():
    numbers = {"w": [1.0, 3.0], "F": [2.0, 0.5], "t": [1.0, -3.0]}
    exact = merged(*([sp.Rational(x) for x in each] for each in numbers.values()))
    leaves, diagonals = ([torch.tensor([x]).double() for x in numbers[name]] for name in "tF")
    found = fisher(leaves, diagonals, numbers["w"], floor=0.0)
    assert abs(float(found) - float(exact)) < 1e-14
    X = [torch.tensor([[1.0, 2.0], [0.0, 1.0]]).double(), torch.tensor([[3.0, 0.0], [1.0, 1.0]]).double()]
    W = [torch.tensor([[1.0], [0.0]]).double(), torch.tensor([[0.0], [2.0]]).double()]
    V = regmean(W, [x.T @ x for x in X], shrink=1.0).requires_grad_()
    sum((x @ V - x @ w).square().sum() for x, w in zip(X, W, strict=True)).backward()
    assert float(V.grad.abs().max()) < 1e-13
    assert float((V.detach() - (W[0] + W[1]) / 2).abs().max()) > 0.1  # negative control
