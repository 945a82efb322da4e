"""Trained curves between two models."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import loss_of, seeded
from torch import nn
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.keys import uniform
from funcscope.landscape.bezier import bezier, bezier_path, connect
from funcscope.landscape.path import linear_path


def drawn(seed, size):
    return fs.normal(fs.fold_in(fs.key(seed), "theta"), torch.empty(size, dtype=torch.float64))


def quadrants(seed, n=120):
    """Two classes, the sign of x1 x2: no linear model does it."""
    x = fs.normal(fs.fold_in(fs.key(seed), "x"), torch.empty(n, 2, dtype=torch.float64))
    return x, (x.prod(1) > 0).long()


def trained(seed, steps=120):
    def make():
        return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    model, (x, y) = seeded(seed, make), quadrants(5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return fs.functional(model)


@pytest.fixture(scope="module")
def pair():
    """Two nets of different seeds, their loss, and that on other data."""
    nets = trained(1), trained(2)
    train, test = (fs.objective(nets[0], [quadrants(seed)], fs.classification) for seed in (5, 6))
    return nets[0].theta, nets[1].theta, train, test


def permuted(net, seed=3):
    """The same function with its hidden units in another order."""
    order = seeded(seed, lambda: torch.randperm(16))
    weight, bias, out, last = net.layout.unravel(net.theta).values()
    return torch.cat([weight[order].flatten(), bias[order], out[:, order].flatten(), last])


# The curve.


def test_the_documented_bezier_is_the_straight_line_and_any_other_midpoint_is_not():
    """The original's third control point is (a + b) / 2: its curve cannot pass around anything."""
    loss = loss_of("mlp")
    a, b = loss.net.theta, loss.net.theta + drawn(1, loss.layout.num)
    line = linear_path(loss, a, b, num=9)
    original = bezier_path(loss, a, (a + b) / 2, b, num=9)
    assert_close(original.sums, line.sums, rtol=1e-12, atol=1e-12)
    other = bezier_path(loss, a, (a + b) / 2 + 0.1 * drawn(2, loss.layout.num), b, num=9)
    assert (other.losses - line.losses)[1:-1].abs().min() > 1e-4  # negative control
    assert torch.equal(other.sums[[0, -1]], line.sums[[0, -1]])
    assert (other.kind, other.distance, line.kind) == ("bezier", line.distance, "line")
    assert math.isnan(other.curvature_per_distance)


@given(seed=st.integers(0, 2**32), t=st.floats(0, 1))
def test_the_curve_is_a_line_between_points_of_two_lines(seed, t):
    """Oracle: de Casteljau's construction."""
    a, m, b = (drawn(seed + i, 4) for i in range(3))
    assert_close(bezier(a, m, b, t), torch.lerp(torch.lerp(a, m, t), torch.lerp(m, b, t), t), rtol=1e-12, atol=1e-12)
    assert torch.equal(bezier(a, m, b, 0.0), a)
    assert torch.equal(bezier(a, m, b, 1.0), b)


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_a_path_on_a_curve_is_direct_evaluation(chunk):
    loss = loss_of("gpt2")
    a, m, b = (loss.net.theta + 0.2 * drawn(i, loss.layout.num) for i in range(3))
    path = bezier_path(loss, loss.layout.unravel(a), loss.layout.unravel(m), b, num=5, chunk=chunk)
    for i in range(5):
        point = (1 - i / 4) ** 2 * a + 2 * i / 4 * (1 - i / 4) * m + (i / 4) ** 2 * b
        assert_close(path.sums[i], loss.terms(point)[0].detach(), rtol=1e-9, atol=1e-9)
    assert path.num_forwards == 5


# Training.


@pytest.mark.parametrize("chunk", [1, 2, None])
def test_training_is_adam_on_the_gradient_through_the_curve(pair, chunk):
    """Oracle: autograd through the whole curve, with the t, the rate and its decay as documented."""
    a, b, loss, _ = pair
    found = connect(loss, a, b, key=fs.key(4), steps=6, points=3, num=3, chunk=chunk)
    m = ((a + b) / 2).requires_grad_()
    rate = 0.1 * float((b - a).norm()) / len(a) ** 0.5
    optimizer, history = torch.optim.Adam([m], lr=rate), []
    for step in range(6):
        u = uniform(fs.fold_in(fs.key(4), step), torch.zeros(3, dtype=torch.float64))
        t = (torch.arange(3) + u) / 3
        values = [loss((1 - x) ** 2 * a + 2 * x * (1 - x) * m + x**2 * b) for x in t]
        optimizer.zero_grad()
        (sum(values) / 3).backward()
        history.append(float(sum(values).detach()) / 3)
        optimizer.param_groups[0]["lr"] = rate * (1 - step / 6)
        optimizer.step()
    m = m.detach()
    assert found.learning_rate == pytest.approx(rate)
    assert found.history.tolist() == pytest.approx(history, rel=1e-9)
    assert_close(found.midpoint, m, rtol=1e-7, atol=1e-9)
    assert found.displacement == pytest.approx(float((m - (a + b) / 2).norm()), rel=1e-6)
    assert (found.num_gradients, found.num_forwards) == (18, 4)
    assert_close(found.path.sums, bezier_path(loss, a, m, b, num=3).sums, rtol=1e-7, atol=1e-8)
    assert_close(found.line.sums, linear_path(loss, a, b, num=3).sums, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_trained_curve_lowers_a_real_barrier_between_two_trainings(pair):
    a, b, loss, other = pair
    found = connect(loss, a, b, key=fs.key(0))
    assert found.line.is_connected is False
    assert float(found.line.barrier_max.value) > 0.3
    assert float(found.path.barrier_max.value) < 0.1 * float(found.line.barrier_max.value)
    assert float(found.reduction.value) > 5 * float(found.reduction.stderr)
    assert found.history[-20:].mean() < 0.3 * found.history[:20].mean()
    blocked, around = linear_path(other, a, b), bezier_path(other, a, found.midpoint, b)
    assert float(around.barrier_max.value) < 0.5 * float(blocked.barrier_max.value)  # also on data not trained on


@pytest.mark.slow
def test_a_trained_curve_connects_permuted_copies_of_one_net(pair):
    """One function in two places: the barrier between them is of the permutation only."""
    a, _, loss, _ = pair
    b = permuted(trained(1))
    found = connect(loss, a, b, key=fs.key(1))
    assert_close(found.line.losses[0], found.line.losses[-1], rtol=1e-9, atol=1e-9)
    assert float(found.line.barrier_max.value) > 0.2
    assert float(found.path.barrier_max.value) < 0.1 * float(found.line.barrier_max.value)


def test_the_reduction_is_paired():
    loss = loss_of("mlp")
    a = loss.net.theta
    found = connect(loss, a, a + drawn(1, len(a)), key=fs.key(0), steps=30)
    line, path = found.line, found.path
    d = line.sums[line.argmax_loss] - path.sums[path.argmax_loss]
    assert_close(found.reduction.value, d.mean())
    assert_close(found.reduction.stderr, d.std() / len(d) ** 0.5)
    assert float(found.reduction.value) == pytest.approx(float(line.losses.max() - path.losses.max()))


def test_training_works_where_gradients_are_off_and_where_attention_is_kept():
    loss = loss_of("gpt2", torch.float32, attention="keep")
    a = loss.net.theta
    b = a + 0.2 * drawn(1, len(a)).float()
    with torch.no_grad():
        found = connect(loss, a, b, key=fs.key(0), steps=3, num=3)
    assert found.displacement > 0
    assert found.midpoint.dtype == torch.float32
    assert found.path.chunk == 1
    eager = connect(loss_of("gpt2", torch.float32), a, b, key=fs.key(0), steps=3, num=3)
    assert_close(found.history, eager.history, rtol=1e-5, atol=1e-5)


# What comes out, and what may go in.


def wells():
    net = fs.functional(nn.Linear(1, 1, bias=False, device="meta").to_empty(device="cpu").double())
    data = [(torch.ones(2, 1).double(), torch.zeros(2, 1).double())]
    return fs.objective(net, data, fs.custom(lambda out, y: (out**2 - 1) ** 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "`steps` must be an integer of at least 1, got 0"),
        ({"points": 0}, "`points` must be an integer of at least 1, got 0"),
        ({"num": 2}, "`num` must be an integer of at least 3, got 2"),
        ({"chunk": 0}, "`chunk` must be an integer of at least 1, got 0"),
        ({"learning_rate": 0.0}, "`learning_rate` must be a finite number above 0, got 0.0"),
        ({"learning_rate": math.nan}, "`learning_rate` must be a finite number above 0"),
        ({"end": torch.tensor([-1.0]).double()}, "`start` and `end` are equal"),
        ({"end": torch.ones(2).double()}, r"`end` must be a flat vector of shape \(1,\)"),
        ({"start": torch.tensor([math.nan]).double()}, "`start` must hold finite numbers"),
        ({"learning_rate": 1e200, "steps": 3}, "at step 1 of 3 .* Pass a `learning_rate` below 1e[+]200"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"start": torch.tensor([-1.0]).double(), "end": torch.tensor([0.5]).double(), "key": fs.key(0)} | change
    with pytest.raises(ValueError, match=message):
        connect(wells(), **given)


def test_a_seed_is_no_key_and_a_midpoint_is_a_model():
    ends = torch.tensor([-1.0]).double(), torch.tensor([1.0]).double()
    with pytest.raises(TypeError, match="key"):
        connect(wells(), *ends, key=0)
    for midpoint, message in ((torch.zeros(2).double(), "`midpoint` must be a flat vector"),
                              (torch.tensor([math.inf]).double(), "`midpoint` must hold finite numbers")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            bezier_path(wells(), ends[0], midpoint, ends[1])
    with pytest.raises((ValueError, TypeError), match="end"):  # of the type check in tests, of ours outside
        bezier(ends[0], ends[0], torch.zeros(2).double(), 0.5)
