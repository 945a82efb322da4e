"""Critical sharpness: closed forms of parabolas, dense scans of the line, few forward passes, and every status."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import loss_of, problem, seeded
from scipy.optimize import brentq
from test_sam import drawn, parabola
from torch import nn
from torch.func import grad
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.objective import Loss
from funcscope.curvature.critical import critical_sharpness, relative_critical_sharpness
from funcscope.curvature.crossing import bracket


@pytest.fixture
def passes(monkeypatch):
    """Counts evaluations of the per-sequence terms of whole losses."""
    seen = []
    original = Loss.terms
    monkeypatch.setattr(Loss, "terms", lambda self, theta: seen.append(len(self.batches)) or original(self, theta))
    return seen


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("far", [0.003, 0.7, 1.3, 300])
def test_a_parabola_has_the_closed_form_in_three_passes(seed, far):
    size = 1 + seed % 5
    A, b, x = drawn(seed, size)
    A = A @ A + 0.1 * torch.eye(size, dtype=torch.float64)
    loss, g = parabola(A, b), A @ x + b
    curvature = float(g @ A @ g / (g @ g))
    c = critical_sharpness(loss, x, start=far * 2 / curvature)
    assert (c.status, c.num_forwards) == ("found", 3)
    assert_close(c.value, curvature, rtol=1e-6, atol=0)
    assert c.interval[0] < curvature < c.interval[1] <= 1.05 * c.interval[0]
    assert_close(c.slope, float(g @ g))
    assert c.value <= float(torch.linalg.eigvalsh(A)[-1]) * (1 + 1e-6)
    assert_close(c.learning_rate * c.value, 2.0)
    assert_close(c.learning_rate_interval, (2 / c.interval[1], 2 / c.interval[0]))
    u = A @ g + g  # another direction of descent: A is positive definite
    along = critical_sharpness(loss, x, u)
    assert_close(along.value, float(u @ A @ u / (g @ u)), rtol=1e-6, atol=0)
    assert along.num_forwards <= 6  # the loss at theta is one of them


def first_crossing(loss, theta, u, last):
    """Oracle: the first sign change on a scan of the line, refined by brentq."""
    start = float(loss(theta))

    def rise(eta):
        return float(loss(theta - eta * u)) - start

    scan = [last * i / 20 for i in range(1, 21)]
    above = next(i for i, eta in enumerate(scan) if rise(eta) > 0)
    assert above > 0
    return brentq(rise, scan[above - 1], scan[above], xtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("gpt2", torch.float64), ("llama", torch.float32), ("mlp", torch.float32), ("cnn", torch.float64)],
)
def test_it_is_the_first_crossing_of_a_scan_in_at_most_ten_passes(name, dtype, passes):
    loss = loss_of(name, dtype)
    theta = loss.net.theta
    for u in (None, grad(loss)(theta).sign()):
        passes.clear()
        c = critical_sharpness(loss, theta, u)
        extra = 1 if u is None else len(loss.batches)  # the gradient; the jvp of the slope
        assert sum(passes) <= (c.num_forwards + 1) * len(loss.batches) + extra
        assert c.num_forwards <= 10
        wide = loss_of(name)
        at = theta.double()
        truth = first_crossing(wide, at, grad(wide)(at) if u is None else u.double(), 1.5 * c.learning_rate)
        low, high = c.learning_rate_interval
        assert low * 0.999 < truth < high * 1.001
        assert abs(c.learning_rate / truth - 1) < 5e-3
        assert c.rounding < (1e-13 if dtype == torch.float64 and name != "llama" else 1e-5)


def test_the_range_narrows_with_the_tolerance_and_flat_and_dict_are_one():
    loss = loss_of("mlp")
    theta = loss.net.theta
    wide, fine = (critical_sharpness(loss, theta, tolerance=t) for t in (0.2, 1e-3))
    assert fine.interval[1] / fine.interval[0] <= 1.001
    assert wide.interval[0] < fine.value < wide.interval[1]
    assert critical_sharpness(loss, loss.net.params).value == pytest.approx(critical_sharpness(loss, theta).value)
    g = grad(loss)(theta)
    dict_u = critical_sharpness(loss, theta, loss.layout.unravel(g))
    assert dict_u.value == pytest.approx(critical_sharpness(loss, theta, g).value)
    scaled = critical_sharpness(loss, theta, 10 * g)
    assert scaled.value == pytest.approx(10 * critical_sharpness(loss, theta).value, rel=1e-2)  # a rate is per update
    x, y = problem("mlp").batches[0]
    whole, split = (
        fs.objective(loss.net, batches, fs.classification) for batches in ([(x, y)], [(x[:1], y[:1]), (x[1:], y[1:])])
    )
    assert critical_sharpness(whole, theta).value == pytest.approx(critical_sharpness(split, theta).value)
    assert torch.equal(theta, loss.net.theta)


def test_the_standard_error_is_that_of_the_crossing_over_sequences():
    """Oracle: a jackknife with the search run anew, the update fixed."""
    x = fs.normal(fs.key(1), torch.zeros(30, 4, dtype=torch.float64))
    y = seeded(1, lambda: torch.randint(0, 3, (30,)))
    net = fs.functional(problem("mlp").model)
    whole = fs.objective(net, (x, y), fs.classification)
    theta = net.theta
    u = grad(whole)(theta)
    c = critical_sharpness(whole, theta, u, tolerance=1e-3)
    keep = [torch.arange(30) != i for i in range(30)]
    left = torch.tensor([
        critical_sharpness(fs.objective(net, (x[k], y[k]), fs.classification), theta, u, tolerance=1e-4,
                           start=c.learning_rate).value for k in keep
    ])  # fmt: skip
    assert_close(c.stderr, float((29 / 30 * (left - left.mean()).square().sum()).sqrt()), rtol=0.1, atol=0)


def one_number(function):
    """The loss function(x) of a model whose parameter is x."""
    net = fs.functional(seeded(0, lambda: nn.Linear(1, 1, bias=False, dtype=torch.float64)))
    ones = torch.ones(1, 1, dtype=torch.float64)
    return fs.objective(net, [(ones, ones)], fs.custom(lambda out, _: function(out[:, 0])))


def test_every_status():
    at = torch.tensor([1.0], dtype=torch.float64)
    square, line, bump = one_number(torch.square), one_number(lambda x: x), one_number(lambda x: x**4 - x**3)
    up = critical_sharpness(square, at, -at)
    assert (up.status, math.isnan(up.value), up.num_forwards) == ("ascent direction", True, 1)
    flat = critical_sharpness(square, 0 * at, at)
    assert (flat.status, flat.slope) == ("flat direction", 0.0)
    falls = critical_sharpness(line, at, max_forwards=8)
    assert (falls.status, falls.num_forwards, math.isnan(falls.value)) == ("never rises", 8, True)
    assert falls.learning_rate_interval[0] > 1e3
    assert falls.learning_rate_interval[1] == math.inf
    rises = critical_sharpness(one_number(lambda x: 1e12 * (x - 1) ** 2 + 1e-9 * x), at, start=1e20, max_forwards=3)
    assert (rises.status, rises.learning_rate_interval[0]) == ("always rises", 0.0)
    wide = critical_sharpness(bump, 0.9 * at, tolerance=1e-9, max_forwards=6)
    assert wide.status == "not narrowed"
    assert wide.interval[0] < wide.value < wide.interval[1]
    assert math.isnan(critical_sharpness(square, at).stderr)


def test_a_crossing_that_rounding_decides_is_not_resolved():
    result = critical_sharpness(one_number(torch.square), torch.tensor([1.0], dtype=torch.float64))
    assert not result.unresolved
    lost = replace(result, rounding=1.5)
    assert "value" in lost.unresolved
    assert "not resolved" in str(lost)


def test_an_infinite_loss_counts_as_a_rise():
    wall = one_number(lambda x: torch.where(x < 0, math.inf, x))  # 0 is at a rate of 1
    c = critical_sharpness(wall, torch.tensor([1.0], dtype=torch.float64), start=7.0)
    assert c.status == "found"
    assert c.interval[0] < 2.0 < c.interval[1]


def test_relative_sharpness_is_that_of_loss_2_along_the_gradient_of_loss_1():
    (A, a, x), (B, b, _) = drawn(1, 4), drawn(2, 4)
    B = B @ B + torch.eye(4, dtype=torch.float64)
    one, two = parabola(A, a), parabola(B, b)
    g1, g2 = A @ x + a, B @ x + b
    sign = 1.0 if g1 @ g2 > 0 else -1.0
    u = sign * g1
    found = relative_critical_sharpness(one, two, x, u)
    assert_close(found.value, float(u @ B @ u / (g2 @ u)), rtol=1e-6, atol=0)
    plain = relative_critical_sharpness(one, two, x)
    assert plain.status == ("found" if sign > 0 else "ascent direction")
    assert_close(plain.slope, float(g1 @ g2))
    same = relative_critical_sharpness(two, two, x)
    assert_close(same.value, critical_sharpness(two, x).value, rtol=1e-6, atol=0)
    assert_close(same.value, float(g2 @ B @ g2 / (g2 @ g2)), rtol=1e-6, atol=0)
    assert abs(found.value / float(u @ A @ u / (g1 @ u)) - 1) > 0.1  # negative control: not the curvature of loss 1


def test_a_model_with_its_own_kernels_has_the_same_number():
    plain, kept = (loss_of("mlp", attention=a) for a in ("eager", "keep"))
    u = grad(plain)(plain.net.theta).sign()
    a, b = (critical_sharpness(loss, loss.net.theta, u) for loss in (plain, kept))
    assert_close(a.value, b.value)


def log_cosh(x):
    return abs(x) + math.log1p(math.exp(-2 * abs(x))) - math.log(2)


CURVES = {
    "parabola": (lambda x: x * x - 3 * x, 3.0, 3.0),
    "quartic": (lambda x: x**4 - 8 * x, 8.0, 2.0),
    "log cosh": (lambda x: log_cosh(x - 2) - log_cosh(2), math.tanh(2), 4.0),
    "kink": (lambda x: 5 * max(x - 1, 0) - x, 1.0, 1.25),
    "exponential": (lambda x: math.exp(min(x, 700.0)) - 1 - 2 * x, 1.0, 1.2564312086261695),
}


@given(name=st.sampled_from(sorted(CURVES)), far=st.floats(-4, 4), ratio=st.sampled_from([1.2, 1.05, 1.001]))
def test_the_search_closes_around_the_crossing_from_any_start(name, far, ratio):
    curve, slope, truth = CURVES[name]
    seen = []
    found = bracket(lambda x: seen.append(x) or curve(x), slope, 10**far * truth, ratio=ratio, max_trials=60)
    assert found.num == len(seen) <= 16
    assert found.low.eta <= truth * (1 + 1e-12)
    assert truth * (1 - 1e-12) <= found.high.eta <= ratio * found.low.eta
    assert abs(found.crossing / truth - 1) < (ratio - 1) / 10
    assert found.low.rate <= 0 < found.high.rate
