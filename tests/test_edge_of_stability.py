"""Edge of stability: quadratics with their matrix, optimisers run to see what they bear, counted passes, and training."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import loss_of, seeded
from test_sam import parabola
from torch import nn
from torch.func import grad
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.objective import Loss
from funcscope.curvature import critical_sharpness, edge_of_stability, stability_threshold
from funcscope.curvature.crossing import doubling

half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)


def drawn(seed, *shape):
    return fs.normal(fs.key(seed), torch.zeros(shape, dtype=torch.float64))


def regression(seed, rows=8, size=4):
    """A quadratic loss, its Hessian X'X / n, a point and its gradient."""
    x, y, theta = drawn(seed, rows, size), drawn(seed + 1, rows, 1), drawn(seed + 2, size)
    net = fs.functional(seeded(0, lambda: nn.Linear(size, 1, bias=False, dtype=torch.float64)))
    loss = fs.objective(net, [(x, y)], half_square)
    return loss, x, x.T @ x / rows, theta, x.T @ (x @ theta - y[:, 0]) / rows


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("adaptive", [False, True])
def test_on_a_quadratic_it_is_the_largest_eigenvalue_of_the_matrix(seed, adaptive):
    loss, x, H, theta, g = regression(10 * seed)
    D = 0.1 + drawn(seed + 5, 4).square() if adaptive else torch.ones(4, dtype=torch.float64)
    root = D.sqrt()
    values, vectors = torch.linalg.eigh(H / root / root[:, None])
    edge = edge_of_stability(
        loss, theta, key=fs.key(0), learning_rate=0.3, preconditioner=D if adaptive else None, threshold=3.0, tol=1e-9
    )
    assert edge.sharpness == pytest.approx(float(values[-1]), rel=1e-8)
    assert edge.sharpness == pytest.approx(float(torch.linalg.eigvals(H / D[:, None]).real.max()))  # of D^-1 H
    assert edge.residual < 1e-6 * edge.sharpness
    assert edge.product == pytest.approx(0.3 * edge.sharpness)
    assert edge.share == pytest.approx(0.1 * edge.sharpness)
    along = x @ (vectors[:, -1] / root)
    assert edge.sharpness_stderr == pytest.approx(float(along.square().std() / 8**0.5))
    assert edge.product_stderr == pytest.approx(0.3 * edge.sharpness_stderr)
    u = g / D
    assert edge.critical_sharpness == pytest.approx(float(u @ H @ u / (g @ u)))  # the secant is exact for a parabola
    assert edge.critical_sharpness <= edge.sharpness * (1 + 1e-6)
    assert edge.critical_share == pytest.approx(0.3 * edge.critical_sharpness / 2)
    assert edge.is_converged
    assert edge.preconditioned == adaptive
    assert {"sharpness", "product", "share", "critical_sharpness", "num_forwards"} <= edge.asdict().keys()


@pytest.mark.parametrize("adaptive", [False, True])
def test_above_the_threshold_steps_grow_and_below_they_shrink(adaptive):
    loss, _, H, theta, _ = regression(3)
    D = torch.tensor([0.2, 1.0, 5.0, 1.0], dtype=torch.float64) if adaptive else torch.ones(4, dtype=torch.float64)
    edge = edge_of_stability(loss, theta, key=fs.key(0), preconditioner=D)
    best = torch.linalg.solve(H, H @ theta - grad(loss)(theta))
    for factor, grows in ((0.97, False), (1.03, True)):
        at, rate = theta, factor * 2 / edge.sharpness
        start = float((D * (at - best).square()).sum())
        for _ in range(300):
            at = at - rate * H @ (at - best) / D
        assert (float((D * (at - best).square()).sum()) > start) == grows


def run(kind, beta, rate):
    """The size of x after many steps on x^2 / 2: torch's own optimiser, or the average of Adam."""
    x = torch.ones((), dtype=torch.float64, requires_grad=True)
    if kind == "average":
        mean = 0.0
        for _ in range(400):
            mean = beta * mean + (1 - beta) * x.detach()
            x.data -= rate * mean
        return float(x.detach().abs())
    optimiser = torch.optim.SGD([x], lr=rate, momentum=beta, nesterov=kind == "nesterov")
    for _ in range(400):
        optimiser.zero_grad()
        (x * x / 2).backward()
        optimiser.step()
    return float(x.detach().abs())


@pytest.mark.parametrize("kind", ["heavy ball", "nesterov", "average"])
@pytest.mark.parametrize("beta", [0.3, 0.9])
def test_thresholds_are_where_optimisers_lose_their_hold_on_a_parabola(kind, beta):
    bound = stability_threshold(beta, kind)
    assert run(kind, beta, 0.96 * bound) < 1 < run(kind, beta, 1.04 * bound)
    assert stability_threshold(0.0, kind) == 2


def test_thresholds_of_the_papers_and_doors():
    assert stability_threshold(0.9, "average") == pytest.approx(38)  # of Adam with its usual beta_1
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match="`momentum`"):
            stability_threshold(wrong)


@given(start=st.floats(1e-3, 1e3), bend=st.floats(1e-2, 1e2), steps=st.integers(0, 4))
def test_doubling_and_middles_cost_what_is_said_and_end_around_the_crossing(start, bend, steps):
    """A parabola that crosses at 1 / bend."""
    trials = []

    def rise(eta):
        trials.append(eta)
        return bend * eta**2 - eta

    ratio = 2 ** (0.5**steps)
    ends = doubling(rise, 1.0, start, ratio=ratio, max_trials=99)
    away = abs(math.log2(start * bend))
    assert ends.num == len(trials) <= 2 + math.floor(away) + steps
    assert ends.low.eta <= (1 / bend) * (1 + 1e-9)
    assert ends.high.eta >= (1 / bend) * (1 - 1e-9)
    assert ends.high.eta / ends.low.eta == pytest.approx(ratio)
    assert ends.crossing == pytest.approx(1 / bend, rel=1e-6)
    few = doubling(rise, 1.0, start, ratio=ratio, max_trials=1)
    assert few.num == 1
    assert not few.closed


@pytest.fixture
def passes(monkeypatch):
    """Counts evaluations of the per-sequence terms of losses."""
    seen = []
    original = Loss.terms
    monkeypatch.setattr(Loss, "terms", lambda self, theta: seen.append(len(self.batches)) or original(self, theta))
    return seen


@pytest.mark.parametrize("name", ["mlp", *(pytest.param(each, marks=pytest.mark.slow) for each in ("gpt2", "cnn"))])
def test_the_coarse_search_takes_at_most_six_counted_passes_within_a_factor_of_four(name, passes):
    loss = loss_of(name)
    theta = loss.net.theta
    fine = critical_sharpness(loss, theta, tolerance=1e-3)
    for factor in (0.26, 0.55, 1.3, 3.9):
        passes.clear()
        coarse = critical_sharpness(
            loss, theta, start=factor * fine.learning_rate, tolerance=2**0.5 - 1, search="double"
        )
        num_batches = len(loss.batches)
        assert sum(passes) == (coarse.num_forwards + 1) * num_batches  # and the gradient's own pass
        assert coarse.num_forwards <= 6
        assert coarse.status == "found"
        assert coarse.interval[0] < fine.value < coarse.interval[1] <= 2**0.5 * coarse.interval[0] * (1 + 1e-9)
        assert coarse.value == pytest.approx(fine.value, rel=0.1)


def test_the_end_of_the_interval_is_the_documented_criterion():
    """A parabola of curvature 1 in one dimension, from a rate of 1 up: 1, 2, 4 and the middle of 2 and 4."""
    loss = parabola(torch.eye(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    made = critical_sharpness(loss, torch.ones(1, dtype=torch.float64), start=1.0, tolerance=0.5, search="double")
    assert made.num_forwards == 4
    assert made.learning_rate_interval == pytest.approx((2.0, 8**0.5))
    assert made.value == pytest.approx(1.0)


def test_doors_and_notes():
    loss, _, _, theta, _ = regression(7)
    key = fs.key(0)
    with pytest.raises(ValueError, match="`preconditioner` must hold finite numbers above 0"):
        edge_of_stability(loss, theta, key=key, preconditioner=torch.zeros_like(theta))
    with pytest.raises(ValueError, match="`preconditioner`"):
        edge_of_stability(loss, theta, key=key, preconditioner=theta[:-1])
    for name in ("learning_rate", "threshold"):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            edge_of_stability(loss, theta, key=key, **{name: 0.0})
    flat = 2 + theta.square()
    as_dict = edge_of_stability(loss, theta, key=key, preconditioner=loss.layout.unravel(flat))
    assert as_dict == edge_of_stability(loss, theta, key=key, preconditioner=flat)
    one, _, _, theta, _ = regression(7, rows=1)
    assert any("one sequence" in note for note in edge_of_stability(one, theta, key=key).notes)
    wide, _, _, theta, _ = regression(8, rows=80, size=40)
    short = edge_of_stability(wide, theta, key=key, max_matvecs=2)
    assert not short.is_converged
    assert "not converged" in short.notes[0]


@pytest.mark.slow
def test_gradient_descent_on_a_small_network_rises_to_two_and_stays():
    """Cohen et al. (2021), figure 1, on a network of 337 parameters."""
    model = seeded(0, lambda: nn.Sequential(
        nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)
    ).double())  # fmt: skip
    net, x = fs.functional(model), drawn(1, 20, 2)
    loss = fs.objective(net, [(x, (2 * x[:, :1]).sin() * x[:, 1:] * 2)], half_square)
    theta, gradient, products, losses = net.theta, grad(loss), [], []
    for step in range(1501):
        if step % 500 == 0:
            edge = edge_of_stability(loss, theta, key=fs.key(0), learning_rate=0.2)
            products.append(edge.product)
            losses.append(float(loss(theta)))
        theta = theta - 0.2 * gradient(theta)
    assert products[0] < 0.9
    assert products[1:] == pytest.approx([2.0] * 3, abs=0.1)
    assert edge.critical_share == pytest.approx(1, abs=0.1)  # the gradient lies along the first eigenvector by then
    assert losses == sorted(losses, reverse=True)
    assert_close(edge.share, edge.product / 2)
