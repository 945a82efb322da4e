"""Average-case sharpness: the moments of its steps, exact second orders, and what is reported of bad samples."""

import math
import sys

import pytest
import torch
from problems import dense_hessian, loss_of, problem
from test_sam import drawn, parabola, relu_net, rescaled
from torch.testing import assert_close

import funcscope as fs
from funcscope.curvature.average_sharpness import average_sharpness
from funcscope.curvature.rows import micro_batches

DISTRIBUTIONS = ["sphere", "normal", "relative"]


@pytest.mark.slow
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_on_a_quadratic_the_mean_is_the_second_order_within_its_error(distribution):
    """z scores of 60 independent runs, each against the exact expectation: mean 0, variance 1."""
    A, b, x = drawn(1, 5)
    loss = parabola(A, 100 * b)
    trace = float((A.diagonal() * (x**2 if distribution == "relative" else 1)).sum())
    z, runs = [], [fs.fold_in(fs.key(7), i) for i in range(30)]
    for i in range(30):
        s = average_sharpness(loss, x, key=runs[i], num=12, epsilon=0.4, distribution=distribution, trace=trace)
        exact = 0.16 / 2 * trace / (1 if distribution == "relative" else 5)
        assert_close(float(s.predicted.value), exact)
        z.append(float((s.estimate.value - exact) / s.estimate.stderr))
    z = torch.tensor(z)
    assert abs(float(z.mean())) < 3.5 / 30**0.5
    assert 0.5 < float(z.square().mean()) < 2.3


def test_pairs_cancel_the_gradient_exactly():
    loss = parabola(torch.zeros(3, 3), torch.ones(3) * 1e3)
    s = average_sharpness(loss, torch.zeros(3, dtype=torch.float64), key=fs.key(0), num=5, epsilon=0.5)
    assert s.positive.abs().min() > 1  # negative control: one side alone is noise of the slope
    assert s.values.abs().max() < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", ["gpt2", "cnn"])
def test_dense_and_leaf_by_leaf_flat_and_dict_are_one(name, distribution, monkeypatch):
    loss = loss_of(name)
    theta = loss.net.theta
    options = {"key": fs.key(3), "num": 3, "epsilon": 0.1, "distribution": distribution}
    dense = average_sharpness(loss, theta, **options)
    leaves = average_sharpness(loss, loss.net.params, **options)
    monkeypatch.setattr(sys.modules[average_sharpness.__module__], "LAZY_ABOVE", 0)
    lazy = average_sharpness(loss, theta, **options)
    for other in (leaves, lazy):
        assert_close(other.positive, dense.positive, rtol=1e-11, atol=0)
        assert_close(other.negative, dense.negative, rtol=1e-11, atol=0)
    assert torch.equal(theta, loss.net.theta)
    more = average_sharpness(loss, theta, **{**options, "num": 5})
    assert_close(more.positive[:3], dense.positive, rtol=1e-11, atol=0)
    assert not torch.equal(average_sharpness(loss, theta, **{**options, "key": fs.key(4)}).positive, dense.positive)


@pytest.mark.slow
def test_the_steps_have_the_lengths_and_the_coordinates_of_their_distributions():
    """Seen through L = ||x||^2 and L = sum of x_i^4 at 0, whose values are the moments."""
    size = 6
    zero = torch.zeros(size, dtype=torch.float64)
    square = parabola(2 * torch.eye(size), zero)
    sphere, normal = (
        average_sharpness(square, zero, key=fs.key(1), num=250, epsilon=0.7, distribution=d)
        for d in ("sphere", "normal")
    )
    assert_close(sphere.values, torch.full((250,), 0.49, dtype=torch.float64))
    r2 = normal.values / 0.49 * size  # chi squared: mean P, variance 2 P
    assert abs(float(r2.mean()) - size) < 4 * (2 * size / 250) ** 0.5
    assert abs(float(r2.var()) / (2 * size) - 1) < 0.5
    one = torch.eye(size, dtype=torch.float64)[:, :1]
    first = parabola(2 * one @ one.T, zero)  # the square of the first coordinate
    x = torch.arange(1.0, 7.0, dtype=torch.float64)
    relative = average_sharpness(first, 3 * x, key=fs.key(1), num=250, epsilon=0.7, distribution="relative")
    square_step = (
        relative.values / (0.7 * 3) ** 2
    )  # a squared standard normal number: mean 1, variance 2, fourth moment 3
    assert abs(float(square_step.mean()) - 1) < 4 * (2 / 250) ** 0.5
    assert abs(float(square_step.square().mean()) - 3) < 4 * (96 / 250) ** 0.5


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_smooth_networks_follow_their_trace(name):
    loss = loss_of(name)
    theta = loss.net.theta
    trace = float(dense_hessian(loss, theta).trace())
    known = fs.Estimate(*torch.tensor([trace, 0.5]), 9)
    s = average_sharpness(loss, theta, key=fs.key(2), num=100, epsilon=0.02, trace=known)
    assert abs(float(s.estimate.value - s.predicted.value)) < 3.5 * float(s.estimate.stderr)
    assert_close(float(s.predicted.stderr), 0.5 * 0.02**2 / 2 / loss.layout.num, rtol=1e-5, atol=0)
    assert s.num_forwards == 201
    assert average_sharpness(loss, theta, key=fs.key(2), num=1).predicted is None


def test_relative_steps_do_not_see_rescaled_relu_layers():
    x, y = problem("mlp").batches[0]
    loss = fs.objective(fs.functional(relu_net()), (x, y), fs.classification)
    other = rescaled(loss.net, torch.tensor([0.2, 0.5, 1.0, 2.0, 3.0, 8.0], dtype=torch.float64))
    for distribution, same in (("relative", True), ("sphere", False)):
        a, b = (
            average_sharpness(loss, at, key=fs.key(0), num=4, epsilon=0.3, distribution=distribution)
            for at in (loss.net.params, other)
        )
        assert torch.allclose(a.positive, b.positive, rtol=1e-9) == same


def test_samples_that_are_not_finite_are_counted_and_kept():
    line, zero = parabola(torch.zeros(1, 1), torch.ones(1)), torch.zeros(1, dtype=torch.float64)
    walled = fs.custom(lambda out, _: torch.where(out[:, 0].abs() > 0.5, math.inf, 1.0).sum()[None])
    wall = fs.objective(line.net, line.batches[0], walled)
    s = average_sharpness(wall, zero, key=fs.key(0), num=40, epsilon=0.5, distribution="normal")
    assert 0 < s.num_nonfinite < 40
    assert len(s.values) == 40
    assert s.estimate.num == 40 - s.num_nonfinite


def test_float32_is_off_by_its_rounding():
    wide, narrow = loss_of("mlp"), loss_of("mlp", torch.float32)
    a, b = (average_sharpness(loss, loss.net.theta, key=fs.key(0), num=6, epsilon=0.05) for loss in (wide, narrow))
    assert (a.values - b.values).abs().max() < 5 * b.rounding
    assert b.rounding > 1e8 * a.rounding


def test_more_pairs_leave_the_error_over_sequences_where_it_is():
    """The oracle: the rise of each sequence from losses of its own."""
    loss = loss_of("mlp")
    theta = loss.net.theta
    few, some, many = (average_sharpness(loss, theta, key=fs.key(0), num=num, epsilon=0.5) for num in (3, 40, 160))
    rises = []
    for part in micro_batches(loss, 1):
        one = average_sharpness(part, theta, key=fs.key(0), num=3, epsilon=0.5)
        rises.append(float(one.estimate.value))
    rises = torch.tensor(rises, dtype=torch.float64)
    assert_close(float(few.errors.value), float(rises.mean()))
    assert_close(float(few.errors.value), float(few.estimate.value))
    assert_close(float(few.errors.stderr_data), float(rises.std() / len(rises) ** 0.5))
    assert_close(float(few.errors.stderr), float(few.estimate.stderr))
    assert many.errors.stderr < 0.6 * some.errors.stderr
    assert many.errors.stderr_data > 0.8 * some.errors.stderr_data
    assert many.errors.stderr_total >= many.errors.stderr_data
