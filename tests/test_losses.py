"""Criteria of regression and classification. Oracles: torch.nn.functional, dense derivatives, sums over all labels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import dense_hessian, seeded
from torch import nn
from torch.func import grad, jacrev
from torch.nn import functional as F
from torch.testing import assert_close

import funcscope as fs

WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


def net_of(outputs=3):
    return fs.functional(seeded(0, lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))).double())


def points(seed=1, rows=7):
    return seeded(seed, lambda: (torch.randn(rows, 4).double(), torch.randint(0, 3, (rows,))))


X, Y = points()
REAL, SHARE = seeded(2, lambda: (torch.randn(7, 3).double(), torch.rand(7, 3).double()))
CASES = {
    "mse": (fs.mse, REAL, lambda out, y: F.mse_loss(out, y)),
    "binary": (fs.binary_cross_entropy, SHARE, lambda out, y: F.binary_cross_entropy_with_logits(out, y)),
    "binary of booleans": (
        fs.binary_cross_entropy,
        SHARE > 0.5,
        lambda out, y: F.binary_cross_entropy_with_logits(out, y.double()),
    ),
    "plain": (fs.cross_entropy(), Y, F.cross_entropy),
    "weighted": (fs.cross_entropy(weight=WEIGHT), Y, lambda out, y: F.cross_entropy(out, y, WEIGHT)),
    "smoothed": (fs.cross_entropy(label_smoothing=0.2), Y, lambda out, y: F.cross_entropy(out, y, label_smoothing=0.2)),
    "both": (
        fs.cross_entropy(weight=WEIGHT, label_smoothing=0.2),
        Y,
        lambda out, y: F.cross_entropy(out, y, WEIGHT, label_smoothing=0.2),
    ),
    "not all scored": (
        fs.cross_entropy(weight=WEIGHT, label_smoothing=0.2),
        torch.where(torch.arange(7) == 2, -100, Y),
        lambda out, y: F.cross_entropy(out, y, WEIGHT, label_smoothing=0.2),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives_are_those_of_torchs_loss(case):
    criterion, targets, theirs = CASES[case]
    net = net_of()
    parts = [(X[:4], targets[:4]), (X[4:], targets[4:])]
    loss = fs.objective(net, parts, criterion)
    theta, v = net.theta, fs.normal(fs.key(0), net.theta)

    def whole(t):
        return theirs(net.apply(net.layout.unravel(t), X), targets)

    assert_close(loss(theta), whole(theta))
    assert_close(grad(loss)(theta), grad(whole)(theta))
    hessian = jacrev(grad(whole))(theta)  # forward over reverse fails in torch's own `mse_loss`
    for keep in (True, False):
        assert_close(fs.hessian(loss, theta, keep=keep)(v), hessian @ v)
    out = net.apply(net.params, X).detach()
    jacobian = jacrev(lambda t: net.apply(net.layout.unravel(t), X).flatten())(theta)
    middle = jacrev(grad(lambda z: theirs(z.view(7, 3), targets)))(out.flatten())
    assert_close(fs.ggn(loss, theta)(v), jacobian.T @ (middle @ (jacobian @ v)))
    rows, total = fs.per_sample_gradients(loss, theta), float(loss.terms(theta)[1].sum())
    assert_close(rows.sum(0), total * grad(whole)(theta))


@settings(max_examples=8)
@given(seed=st.integers(0, 99), rows=st.integers(1, 4))
def test_output_hessians_are_second_derivatives_of_weighted_sums(seed, rows):
    out, v = (fs.normal(fs.fold_in(fs.key(seed), i), torch.zeros(rows, 3).double()) for i in range(2))
    for criterion, targets, _ in CASES.values():
        _, prepared = criterion.prepare((X[:rows], targets[:rows]))

        def total(z, criterion=criterion, prepared=prepared):
            loss, weight = criterion.token_loss(z.view(rows, 3), prepared)
            return (loss * weight).sum()

        right = dense_hessian(total, out.flatten()) @ v.flatten()
        assert_close(criterion.output_hessian(out, prepared, v).flatten(), right)


@pytest.mark.parametrize("case", ["mse", "binary", "plain", "weighted"])
def test_the_fisher_information_is_the_expected_square_of_the_score(case):
    """Oracle: the sum over all labels; for the normal distribution, Gauss-Hermite points, exact for squares."""
    criterion, targets, _ = CASES[case]
    net = net_of()
    theta, v = net.theta, fs.normal(fs.key(0), net.theta)
    out = net.apply(net.params, X).detach()
    weight = WEIGHT[Y] if case == "weighted" else torch.ones(7).double()
    jacobian = jacrev(lambda t: net.apply(net.layout.unravel(t), X))(theta)  # (n, 3, p)
    right, total = torch.zeros(len(theta)).double(), 0.0
    for z, J, w in zip(out, jacobian, weight, strict=True):
        if case in ("plain", "weighted"):
            for y, p in enumerate(z.softmax(0)):
                score = grad(lambda z, y=y: z.log_softmax(0)[y])(z) @ J
                right += w * p * (score @ v) * score
            total += float(w)
            continue
        for k in range(3):  # every entry is a position of its own
            if case == "mse":  # density proportional to exp(-(y - z)^2)
                labels = [(float(z[k]) + x, q) for x, q in ((-(1.5**0.5), 1 / 6), (0.0, 2 / 3), (1.5**0.5, 1 / 6))]
                slopes = [(-2 * (float(z[k]) - y), q) for y, q in labels]
            else:
                p = float(z[k].sigmoid())
                slopes = [(1 - p, p), (-p, 1 - p)]
            right += sum(q * s * s for s, q in slopes) * (J[k] @ v) * J[k]
            total += 1
    loss = fs.objective(net, [(X, targets)], criterion)
    assert_close(fs.exact_fisher(loss, theta)(v), right / total)


@pytest.mark.parametrize("case", ["mse", "binary", "weighted"])
def test_drawn_targets_estimate_the_fisher_information(case):
    """A mean of products over keys within 5 of its own standard errors of the exact one; a biased draw is far off."""
    criterion, targets, _ = CASES[case]
    net = net_of()
    loss = fs.objective(net, [(X, targets)], criterion)
    theta, v = net.theta, fs.normal(fs.key(0), net.theta)
    draws = torch.stack([v @ fs.fisher_mc(loss, theta, key=fs.key(seed))(v) for seed in range(25)])
    exact = v @ fs.exact_fisher(loss, theta)(v)
    stderr = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - exact) < 5 * stderr
    assert stderr < 0.25 * exact


def test_drawn_targets_have_the_right_moments():
    out = torch.full((40_000, 1), 0.7)
    y = fs.mse.sample(out, out, fs.key(0)).double()
    assert abs(float(y.mean()) - 0.7) < 5 * math.sqrt(0.5 / 40_000)
    assert abs(float(y.var()) - 0.5) < 5 * 0.5 * math.sqrt(2 / 40_000)
    share = fs.binary_cross_entropy.sample(out, out, fs.key(0)).double()
    p = float(out[0].double().sigmoid())
    assert abs(float(share.mean()) - p) < 5 * math.sqrt(p * (1 - p) / 40_000)


def test_a_smoothed_loss_is_no_likelihood():
    loss = fs.objective(net_of(), [(X, Y)], fs.cross_entropy(label_smoothing=0.1))
    with pytest.raises(ValueError, match="no `sample`"):
        fs.exact_fisher(loss, loss.net.theta)


def test_a_class_of_weight_zero_is_not_scored():
    weight = torch.tensor([0.0, 2.0, 1.0]).double()
    loss = fs.objective(net_of(), [(X, Y)], fs.cross_entropy(weight=weight))
    out = loss.net.apply(loss.net.params, X)
    assert_close(loss(loss.net.theta), F.cross_entropy(out, Y, weight))
    with pytest.raises(ValueError, match="above 0 where labels are smoothed"):
        fs.cross_entropy(weight=weight, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_scored_in_float32(dtype):
    for criterion, targets, theirs in CASES.values():
        out = seeded(5, lambda: torch.randn(7, 3)).to(dtype)
        _, prepared = criterion.prepare((X, targets))
        loss, weight = criterion.token_loss(out, prepared)
        assert loss.dtype in (torch.float32, torch.float64)
        assert_close(
            float((loss * weight).sum() / weight.sum()), float(theirs(out.double(), targets)), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("criterion", [fs.mse, fs.binary_cross_entropy])
def test_a_column_is_not_compared_with_a_row(criterion):
    net = net_of(1)
    column, row = SHARE[:, :1], SHARE[:, 0]
    loss = fs.objective(net, [(X, column)], criterion)
    assert loss(net.theta).isfinite()
    for wrong in (row, SHARE):
        with pytest.raises(ValueError, match="must have one shape"):
            fs.objective(net, [(X, wrong)], criterion)(net.theta)
    flat = fs.functional(seeded(0, lambda: nn.Linear(4, 1)).double(), output=lambda out: out[:, 0])
    assert fs.objective(flat, [(X, row)], criterion)(flat.theta).isfinite()


def test_a_custom_loss_may_be_larger_than_either_where_it_is_no_table():
    """Negative control: two losses per row are no broadcast of (7, 1) with (7, 1)."""
    net = net_of(1)
    two = fs.custom(lambda out, y: torch.cat([(out - y).abs(), (out - y) ** 2], dim=1))
    assert fs.objective(net, [(X, SHARE[:, :1])], two)(net.theta).isfinite()
