"""general and identity: for softmax cross-entropy the Gauss-Newton matrix is the Fisher information of the model

Claim: A token with logits z(theta), Jacobian J, p = softmax(z) and scores s_y = grad log p_y = J'(e_y - p) has
    E_{y~p}[s_y s_y'] = J'(diag(p) - p p')J: the weighted mean over tokens of the one (Fisher) is that of the other
    (GGN). Hess(-log p_y) = J'(diag(p) - p p')J + sum_i (p_i - [i = y]) Hess(z_i), where the sum has mean 0 over y ~ p,
    and is 0 for linear z. The empirical Fisher, with labels of the data, is another matrix; its mean over independent
    labels y_t ~ p_t is the Fisher for tokens, and T/n times the Fisher for n sequences of T tokens in all.
Function: funcscope.curvature.hessian.ggn, funcscope.curvature.fisher.exact_fisher, funcscope.curvature.fisher.fisher_mc,
    funcscope.curvature.fisher.empirical_fisher
Size: the covariance diag(p) - p p' of e_y for every number V of classes, as an entry (i, j) tells the labels i, j and
    "another" apart, no more; the rest for V = 2, 3, two parameters and two tokens, all symbols. Parameters and tokens
    enter linearly or two at a time, so that no step depends on how many there are.
Assumptions: z twice differentiable; inputs fixed (teacher forcing); every label drawn from the distribution that it is
    scored by, which for a causal model is that of the position before it (another's: a negative control).
Not covered: other losses; sequences that the model itself continues; the scatter of the Monte Carlo Fisher.
"""

from dataclasses import replace
from itertools import combinations, product
from math import prod

import pytest
import sympy as sp
import torch
from torch import nn
from torch.func import grad, jacfwd, jacrev

from funcscope.core.criterion import causal_lm, classification
from funcscope.core.keys import fold_in, key
from funcscope.core.model import functional
from funcscope.core.objective import objective
from funcscope.curvature.fisher import empirical_fisher, exact_fisher, fisher_mc
from funcscope.curvature.hessian import ggn

SIZES = pytest.mark.parametrize("n", [2, 3])


def token(t, n):
    """(p, J) of one token with n classes and two parameters."""
    p = sp.symbols(f"p{t}_0:{n - 1}", positive=True)
    return sp.Matrix([*p, 1 - sum(p)]), sp.Matrix(n, 2, sp.symbols(f"J{t}_0:{2 * n}", real=True))


def score(y, p, J):
    return J.T * (sp.eye(len(p)).col(y) - p)


def total(matrices):
    return sum(matrices, sp.zeros(2))


def squares(p, J, drawn=None):
    """E[s_y s_y'] over labels with the probabilities `drawn`, which are p where none are given."""
    return total(q * score(y, p, J) * score(y, p, J).T for y, q in enumerate(drawn or p))


def newton(p, J):
    return J.T * (sp.diag(*p) - p * p.T) * J


def same(A, B):
    return all(sp.expand(sp.numer(sp.together(x))) == 0 for x in A - B)


def test_covariance_of_the_label_for_every_number_of_classes():
    p = sp.Matrix(sp.symbols("p_i p_j", positive=True))
    labels = [*zip(p, (sp.eye(2).col(0), sp.eye(2).col(1)), strict=True), (1 - sum(p), sp.zeros(2, 1))]
    assert same(total(q * (e - p) * (e - p).T for q, e in labels), newton(p, sp.eye(2)))
    assert not same(total(q * e * e.T for q, e in labels), newton(p, sp.eye(2)))  # negative control: not centred


@SIZES
def test_fisher_of_weighted_tokens_is_their_gauss_newton_matrix(n):
    w, tokens = sp.symbols("w0:2", positive=True), [token(t, n) for t in range(2)]
    F, G = (total(a * f(*x) for a, x in zip(w, tokens, strict=True)) / sum(w) for f in (squares, newton))
    assert same(F, G)
    neighbour = tokens[1][0]
    assert not same(squares(*tokens[0], drawn=neighbour), newton(*tokens[0]))  # negative controls: another position's
    assert not same(F, G * sum(w) / 2)  # labels, a mean over positions in place of weights


@SIZES
def test_hessian_is_gauss_newton_plus_residuals_times_curvatures_of_the_logits(n):
    theta, (_, J) = sp.Matrix(sp.symbols("a b", real=True)), token(0, n)
    Q = [sp.Matrix([[x, y], [y, z]]) for x, y, z in (sp.symbols(f"Q{i}_0:3", real=True) for i in range(n))]
    e = sp.symbols(f"e0:{n}", positive=True)  # exponentials of the logits at theta = 0
    z = [sp.log(e[i]) + (J * theta)[i] + (theta.T * Q[i] * theta)[0] / 2 for i in range(n)]  # every C^2 model there
    p, mean = sp.Matrix(e) / sum(e), sp.zeros(2)
    for y in range(n):
        H = sp.hessian(sp.log(sum(map(sp.exp, z))) - z[y], list(theta)).subs(dict.fromkeys(theta, 0))
        rest = total((p - sp.eye(n).col(y))[i] * Q[i] for i in range(n))
        mean += p[y] * H
        assert same(H, newton(p, J) + rest)
        assert same(H.subs({x: 0 for q in Q for x in q}), newton(p, J))  # a linear model
        assert not same(H, newton(p, J))  # negative controls
        assert not same(H, newton(p, J) - rest)
    assert same(mean, newton(p, J))


@pytest.mark.slow
@SIZES
def test_empirical_fisher_is_another_matrix_whose_mean_over_all_labels_is_the_fisher(n):
    tokens = [token(t, n) for t in range(2)]
    F, by_token, by_sequence = total(squares(*x) for x in tokens) / 2, sp.zeros(2), sp.zeros(2)
    for labels in product(range(n), repeat=2):
        chance = prod(p[y] for y, (p, _) in zip(labels, tokens, strict=True))
        s = sp.Matrix.hstack(*(score(y, *x) for y, x in zip(labels, tokens, strict=True)))
        each, summed = s * s.T / 2, s * sp.ones(2) * s.T  # T = 2 tokens in n = 1 sequence
        by_token, by_sequence = by_token + chance * each, by_sequence + chance * summed
        assert not any(map(same, (each, summed, 2 * each), (F, 2 * F, summed)))  # for no labels of the data
    assert same(by_token, F)
    assert same(by_sequence, 2 * F)


# Bridges: columns of the shipped operators in float64, against sums over all labels with jacobians of the logits.


def dense(matvec, n):
    return torch.stack([matvec(column) for column in torch.eye(n).double()], dim=1)


def causal():
    """The loss of a model of 15 parameters on sequences of 4, 4 and 3 tokens, 8 scored, with weights; parameters."""
    net = functional(nn.Sequential(nn.Embedding(3, 2), nn.Tanh(), nn.Linear(2, 3)).double())
    loss = objective(net, [torch.tensor([[0, 2, 1, 1], [1, 1, 0, 2]]), torch.tensor([[2, 2, 0]])], causal_lm)
    weighted = [(ids, labels._replace(weight=labels.weight * (1 + ids))) for ids, labels in loss.batches]
    return replace(loss, batches=tuple(weighted)), 1.5 * torch.cos(torch.arange(15).double() ** 2)


def test_shipped_operators_are_the_sums_over_labels_and_the_hessian_has_more():
    loss, theta = causal()
    inputs = torch.cat([ids[:, :-1].flatten() for ids, _ in loss.batches])  # scored tokens, one after the other
    labels = torch.cat([ids[:, 1:].flatten() for ids, _ in loss.batches])

    def logits(x):
        return loss.net.apply(loss.params(x), inputs)

    p, J, w = logits(theta).softmax(1), jacrev(logits)(theta), 1 + inputs.double()
    scores = J - torch.einsum("ty,tyi->ti", p, J)[:, None]
    data = scores[range(8), labels]
    summed = torch.stack([rows.sum(0) for rows in (w[:, None] * data).split([3, 3, 2])])
    model = torch.einsum("t,ty,tyi,tyj->ij", w, p, scores, scores) / w.sum()
    rest = torch.einsum("t,ty,tyij->ij", w, p - torch.eye(3)[labels], jacfwd(jacrev(logits))(theta)) / w.sum()
    wanted = model, model, (w * data.T) @ data / w.sum(), summed.T @ summed / 3
    empirical = [empirical_fisher(loss, theta, unit=unit) for unit in ("token", "sequence")]
    for matvec, matrix in zip([ggn(loss, theta), exact_fisher(loss, theta), *empirical], wanted, strict=True):
        torch.testing.assert_close(dense(matvec, 15), matrix, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(jacfwd(grad(loss))(theta), model + rest, rtol=1e-12, atol=1e-14)
    assert min((a - b).abs().max() for a, b in combinations((*wanted[1:], model + rest), 2)) > 0.01  # negative control


def test_shipped_ggn_of_a_linear_model_is_its_hessian_in_closed_form():
    x, theta = torch.tensor([[1.0, 2.0], [3.0, -1.0]]).double(), torch.arange(6).double() / 4
    loss = objective(functional(nn.Linear(2, 3, bias=False).double()), [(x, torch.tensor([0, 2]))], classification)
    p = (x @ theta.view(3, 2).T).softmax(1)
    closed = sum(torch.kron(a.diag() - a.outer(a), b.outer(b)) for a, b in zip(p, x, strict=True)) / 2
    for found in (dense(ggn(loss, theta), 6), jacfwd(grad(loss))(theta)):
        torch.testing.assert_close(found, closed, rtol=1e-12, atol=1e-14)


def test_shipped_monte_carlo_fisher_has_the_fisher_as_its_mean():
    loss, theta = causal()
    v = torch.cos(torch.arange(15.0, dtype=torch.float64))
    draws = torch.stack([fisher_mc(loss, theta, key=fold_in(key(0), i), num=4)(v) for i in range(60)])
    stderr, exact = draws.std(0) / len(draws) ** 0.5, exact_fisher(loss, theta)(v)
    assert ((draws.mean(0) - exact).abs() < 4 * stderr).all()
    wrong = empirical_fisher(loss, theta, unit="token")(v), 1.2 * exact  # negative controls
    assert all(((x - exact).abs() > 4 * stderr).any() for x in wrong)
