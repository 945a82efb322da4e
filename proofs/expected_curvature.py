"""identity and exhaustive: the mean curvature along random directions is a trace, group by group

Claim: E[d'Hd] = tr(H)/P for every random unit vector d whose distribution does not change when coordinates flip their
    signs or are permuted, such as z/||z|| with normal z or random signs. With groups f of n_f coordinates, d_f = z_f
    ||theta_f|| / ||z_f||, z_f independent: E[d'Hd] = sum_f (||theta_f||^2 / n_f) tr(H_ff) and ||d|| = ||theta||. For
    random signs and a diagonal H both hold for every single draw.
Function: funcscope.core.directions.directions, funcscope.landscape.directional.directional_losses
Size: every symmetric H and every vector of n = 2, 3, 4 coordinates, averaged over all 2^n n! signed permutations;
    groups of sizes (1, 2) and (2, 2). The argument uses two coordinates at a time (a flip gives E[d_i d_j] = 0, a swap
    E[d_i^2] = E[d_j^2]), so that no step depends on n.
Assumptions: H symmetric; no group with theta_f = 0 (such a group has d_f = 0 and drops out of the sum). By invariance
    the mean over draws is the mean over draws of the average over the group of signed permutations.
Not covered: the variance of d'Hd; finite steps (central_difference.py); the quality of the random numbers.
"""

from itertools import accumulate, pairwise, permutations, product
from math import prod

import pytest
import sympy as sp
import torch
from torch import nn

from funcscope.core.criterion import custom
from funcscope.core.directions import directions, stack
from funcscope.core.keys import key
from funcscope.core.model import functional
from funcscope.core.objective import objective
from funcscope.landscape.directional import directional_losses


def symmetric(n):
    return sp.Matrix(n, n, lambda i, j: sp.Symbol(f"H{min(i, j)}{max(i, j)}", real=True))


def vector(name, n):
    return sp.Matrix(sp.symbols(f"{name}0:{n}", real=True))


def orbit(x):
    """The images of x under all flips of signs and all permutations of its coordinates."""
    signs, orders = product((-1, 1), repeat=len(x)), permutations(range(len(x)))
    return [sp.Matrix([s * x[i] for s, i in zip(*g, strict=True)]) for g in product(signs, orders)]


def mean_form(H, draws):
    return sp.expand(sum((d.T * H * d)[0] for d in draws) / len(draws))


@pytest.mark.parametrize("n", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_mean_over_all_signed_permutations_is_the_trace(n):
    H, x = symmetric(n), vector("x", n)
    claim = x.dot(x) * H.trace() / n  # ||x|| = 1 on the sphere
    assert sp.expand(mean_form(H, orbit(x)) - claim) == 0
    flips = [sp.Matrix([s * a for s, a in zip(signs, x, strict=True)]) for signs in product((-1, 1), repeat=n)]
    swaps = [sp.Matrix(order) for order in permutations(x)]
    assert sp.expand(mean_form(H, flips) - claim) != 0  # negative controls: both kinds of symmetry are needed
    assert sp.expand(mean_form(H, swaps) - claim) != 0


@pytest.mark.parametrize("n", [2, 3, 4])
def test_normal_and_random_sign_vectors_are_invariant(n):
    z = vector("z", n)
    normal, skewed = (lambda v: prod(sp.exp(-(a**2) / 2) for a in v)), (lambda v: prod(sp.exp(-a) for a in v))
    assert all(normal(image) == normal(z) and image.dot(image) == z.dot(z) for image in orbit(z))
    assert not all(skewed(image) == skewed(z) for image in orbit(z))  # negative control
    corners = set(product((-1, 1), repeat=n))
    images = zip(*(map(tuple, orbit(sp.Matrix(corner))) for corner in sorted(corners)), strict=True)
    assert all(set(image) == corners for image in images)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)])
def test_mean_over_independent_groups_is_the_scaled_sum_of_block_traces(sizes):
    a, b = sizes
    H, x, y = symmetric(a + b), vector("x", a), vector("y", b)
    s, t = sp.symbols("s t", positive=True)  # ||theta_f||
    draws = [sp.Matrix([s * u, t * v]) for u in orbit(x) for v in orbit(y)]
    claim = s**2 / a * x.dot(x) * H[:a, :a].trace() + t**2 / b * y.dot(y) * H[a:, a:].trace()
    assert sp.expand(mean_form(H, draws) - claim) == 0
    assert sp.expand(mean_form(H, draws) - (s**2 + t**2) / (a + b) * H.trace()) != 0  # negative control


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)])
def test_cross_terms_vanish_by_the_sign_of_one_group_alone(sizes):
    a, b = sizes
    H, x, y = symmetric(a + b), vector("x", a), vector("y", b)
    within = (x.T * H[:a, :a] * x)[0] + (y.T * H[a:, a:] * y)[0]
    own = [sp.Matrix([sign * x, y]) for sign in (-1, 1)]
    common = [sign * sp.Matrix([x, y]) for sign in (-1, 1)]
    assert sp.expand(mean_form(H, own) - within) == 0
    assert sp.expand(mean_form(H, common) - within - 2 * (x.T * H[:a, a:] * y)[0]) == 0  # negative control: they stay
    assert sp.expand(mean_form(H, common) - within) != 0


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2), (1, 2, 3)])
def test_directions_have_the_norm_of_the_parameters(sizes):
    square = total = 0
    for f, n in enumerate(sizes):
        theta, z = vector(f"theta{f}_", n), vector(f"z{f}_", n)
        d = z * theta.norm() / z.norm()
        square, total = square + d.dot(d), total + theta.dot(theta)
    assert sp.simplify(square - total) == 0
    assert sp.simplify(square - 2 * total) != 0  # negative control


@pytest.mark.parametrize("n", [2, 3, 4])
def test_random_signs_on_a_diagonal_have_no_scatter(n):
    H = sp.diag(*sp.symbols(f"h0:{n}"))
    forms = {(sp.Matrix(s).T * H * sp.Matrix(s))[0] / n for s in product((-1, 1), repeat=n)}
    assert {sp.expand(form - H.trace() / n) for form in forms} == {0}


# Bridges: the shipped directions of a network of 13 parameters in float64.

GROUPS = {"filter": (2, 2, 2, 3, 3, 1), "layer": (9, 4), "global": (13,)}  # in the order of theta


def network():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).double()
    with torch.no_grad():
        nn.utils.vector_to_parameters(torch.arange(-4.0, 9.0, dtype=torch.float64) + 0.5, model.parameters())
    return functional(model)


def blocks(normalize):
    return [slice(i, j) for i, j in pairwise(accumulate(GROUPS[normalize], initial=0))]


def formula(H, theta, normalize):
    if normalize == "global":
        return H.trace() / len(theta)
    return sum(theta[f].square().sum() / len(theta[f]) * H[f, f].trace() for f in blocks(normalize))


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("normalize", GROUPS)
def test_shipped_directions_have_the_norms_and_the_mean_curvature(normalize, distribution):
    net = network()
    drawn = stack(directions(net, key=key(1), num=1000, normalize=normalize, distribution=distribution))
    for f in blocks(normalize):
        norms, wanted = drawn[:, f].norm(dim=1), 1.0 if normalize == "global" else float(net.theta[f].norm())
        torch.testing.assert_close(norms, torch.full_like(norms, wanted), rtol=1e-14, atol=0)
    i = torch.arange(13.0, dtype=torch.float64)
    H = torch.cos(i[:, None] * i) + torch.diag(i)
    forms = ((drawn @ H) * drawn).sum(1)
    stderr = forms.std() / len(forms) ** 0.5
    assert abs(forms.mean() - formula(H, net.theta, normalize)) < 4 * stderr
    wrong = net.theta.square().mean() * H.trace() if normalize != "global" else 1.1 * H.trace() / 13
    assert abs(forms.mean() - wrong) > 4 * stderr  # negative control
    exact = ((drawn @ H.diag().diag()) * drawn).sum(1)
    if distribution == "rademacher":
        torch.testing.assert_close(exact, formula(H, net.theta, normalize).expand_as(exact), rtol=1e-13, atol=0)
    else:
        assert exact.std() > 0.01 * exact.mean()  # negative control: normal draws scatter


@pytest.mark.slow
@pytest.mark.parametrize("normalize", ["filter", "global"])
def test_shipped_mean_curvature_is_the_formula_on_a_linear_model(normalize):
    net = functional(nn.Linear(2, 1).double())
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 1.0]], dtype=torch.float64)
    loss = objective(net, [(x, x[:, :1])], custom(lambda out, y: (out - y).square() / 2))
    bordered = torch.cat([x, torch.ones(3, 1, dtype=torch.float64)], dim=1)
    H, theta = bordered.T @ bordered / 3, torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    found = directional_losses(
        loss, theta, key=key(2), n_samples=1000, normalize=normalize, two_sided=True, compute_curvature=True
    ).estimates["curvature_mean"]
    claim = H.trace() / 3 if normalize == "global" else 5 / 2 * H[:2, :2].trace() + 9 * H[2, 2]
    assert abs(found.value - claim) < 4 * found.stderr < 0.2 * claim
