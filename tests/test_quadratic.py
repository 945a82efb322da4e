"""Second derivatives along directions, and the step of a difference: against dense matrices and polynomials."""

import pytest
import torch
from problems import dense_hessian, loss_of, seeded
from torch import nn

import funcscope as fs
from funcscope.core.directions import stack
from funcscope.curvature import hessian_block_traces
from funcscope.curvature.directional import STENCIL


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_curvatures_are_the_dense_forms(name):
    loss = loss_of(name)
    theta = loss.net.theta
    dirs = fs.directions(loss.net, key=fs.key(0), num=5)
    found = fs.directional_curvatures(loss, theta, dirs)
    rows, dense = stack(dirs), dense_hessian(loss, theta)
    torch.testing.assert_close(found.hessian, ((rows @ dense) * rows).sum(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.norms, rows.norm(dim=1))
    assert (found.gauss_newton >= 0).all()
    assert found.num_matvecs == 10
    torch.testing.assert_close(found.rayleigh_quotients, found.hessian / rows.square().sum(1))
    alone = fs.directional_curvatures(loss, theta, dirs, gauss_newton=False, keep=False)
    assert alone.gauss_newton is None
    torch.testing.assert_close(alone.hessian, found.hessian)


@pytest.mark.slow
def test_curvatures_are_those_of_directional_losses():
    loss = loss_of("gpt2")
    options = {"key": fs.key(3), "normalize": "filter"}
    exact = fs.directional_losses(
        loss, loss.net.theta, n_samples=3, compute_curvature=True, curvature="exact", chunk=1, **options
    )
    found = fs.directional_curvatures(loss, loss.net.theta, fs.directions(loss.net, num=3, **options))
    torch.testing.assert_close(found.hessian, exact.curvatures, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_mean_of_unit_directions_is_the_trace_over_the_number_of_parameters():
    loss = loss_of("mlp")
    theta, num = loss.net.theta, loss.layout.num
    dirs = fs.directions(loss.net, key=fs.key(1), num=300, normalize="global")
    mean = fs.directional_curvatures(loss, theta, dirs, gauss_newton=False).mean
    trace = float(dense_hessian(loss, theta).trace())
    assert abs(num * float(mean.value) - trace) < 4 * num * float(mean.stderr) < 0.5 * abs(trace)
    signs = hessian_block_traces(loss, theta, key=fs.key(2), num=300).total
    assert abs(num * float(mean.value) - float(signs.value)) < 4 * (num * float(mean.stderr) + float(signs.stderr))


def test_stencils_are_exact_to_their_degree():
    points = range(-3, 4)
    for order, wanted in ((2, 2), (4, 24)):
        for degree in range(8):
            total = sum(c * k**degree for c, k in zip(STENCIL[order], points, strict=True))
            assert total == pytest.approx(wanted if degree == order else 0, abs=1e-12)
    assert sum(c * k**8 for c, k in zip(STENCIL[2], points, strict=True)) / 40320 != pytest.approx(0, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recommended_step_is_near_the_best_of_many(dtype):
    loss = loss_of("gpt2", dtype)
    direction = fs.directions(loss.net, key=fs.key(5), num=1)[0]
    found = fs.difference_step(loss, loss.net.theta, direction)
    assert found.status == "resolved"
    assert found.num_forwards <= 19
    # at the best step truncation and rounding are equal
    assert found.error == pytest.approx(found.step**2 * abs(found.fourth_derivative) / 6, rel=1e-9)
    exact = float(fs.directional_curvatures(loss_of("gpt2"), loss_of("gpt2").net.theta, [direction64()]).hessian)
    phi = fs.restrict(loss, loss.net.theta, direction)

    def error(h):
        return abs(float((phi(h) + phi(-h) - 2 * phi(0.0)) / h**2) - exact)

    assert error(found.step) <= found.error * (10 if dtype == torch.float32 else 3)
    coarse, fine = error(min(0.5, found.step * 8)), error(found.step / 30)
    assert error(found.step) < max(coarse, fine)
    assert abs(found.curvature - exact) < max(20 * found.error, 1e-3 * abs(exact))


def direction64():
    return fs.directions(loss_of("gpt2").net, key=fs.key(5), num=1)[0]


def test_a_parabola_is_flat_and_takes_the_largest_step():
    net = fs.functional(seeded(0, lambda: nn.Linear(1, 1, bias=False)).double())
    square = fs.custom(lambda out, y: (out - y) ** 2 + 1)
    one = torch.ones(1, 1, dtype=torch.float64)
    loss = fs.objective(net, [(one, 0 * one)], square)
    d = fs.directions(net, key=fs.key(0), num=1, normalize="global")[0]
    found = fs.difference_step(loss, torch.ones(1, dtype=torch.float64), d, largest=0.3)
    assert (found.status, found.step, found.num_forwards) == ("flat", 0.3, 19)
    assert found.curvature == pytest.approx(2)
    hot = fs.objective(net, [(one, 0 * one)], fs.custom(lambda out, y: torch.log(out)))
    assert fs.difference_step(hot, torch.full((1,), 0.01, dtype=torch.float64), d).status == "non-finite"
    with pytest.raises(ValueError, match="`largest` must be"):
        fs.difference_step(loss, torch.ones(1, dtype=torch.float64), d, largest=0.0)
