"""The same numbers on a CUDA device as on the CPU, from the same keys."""

import pytest
import torch
from problems import CATALOGUE, cast, problem
from torch.func import grad
from torch.testing import assert_close

import funcscope as fs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

NAMES = ("gpt2", "llama", "bert", "t5", "cnn", "mlp")
TOLERANCE = {"rtol": 1e-6, "atol": 1e-8}
LOOSE = {"rtol": 1e-3, "atol": 1e-5}
"""Of families that compute norms in float32 whatever the dtype."""


def moved(tree, device):
    if isinstance(tree, torch.Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {name: moved(value, device) for name, value in tree.items()}
    return tuple(moved(value, device) for value in tree)


def both(name, dtype=torch.float64, **options):
    """The same loss on both devices."""
    made = []
    for device in ("cpu", "cuda"):
        model, batches, criterion = problem(name, dtype)
        net = fs.functional(model.to(device), **options)
        made.append(fs.objective(net, [moved(cast(batch, dtype), device) for batch in batches], criterion))
    return made


def tolerance(name):
    return LOOSE if name in ("llama", "t5") else TOLERANCE


def same(name, ours, theirs):
    ours, theirs = ours.asdict(), theirs.asdict()
    assert ours.keys() == theirs.keys()
    for field, value in theirs.items():
        if isinstance(value, (int, float)) or hasattr(value, "dtype"):
            assert_close(torch.as_tensor(ours[field]), torch.as_tensor(value), equal_nan=True, **tolerance(name))


@pytest.mark.parametrize("name", CATALOGUE)
def test_losses_and_gradients(name):
    cpu, cuda = both(name)
    assert_close(float(cuda(cuda.net.theta)), float(cpu(cpu.net.theta)), **tolerance(name))
    assert_close(grad(cuda)(cuda.net.theta).cpu(), grad(cpu)(cpu.net.theta), **tolerance(name))


@pytest.mark.parametrize("plan", [{}, {"lazy": True}, {"chunk": 1}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_directional_losses(name, plan):
    options = {"n_samples": 4, "two_sided": True, "compute_gradient": True, "compute_curvature": True, "span": 0.1}
    cpu, cuda = both(name)
    found = [fs.directional_losses(loss, loss.net.theta, key=fs.key(1), **options, **plan) for loss in (cpu, cuda)]
    assert_close(found[1].losses, found[0].losses, **tolerance(name))
    assert_close(
        found[1].slopes, found[0].slopes, **(LOOSE if name in ("llama", "t5") else {"rtol": 1e-5, "atol": 1e-7})
    )


@pytest.mark.parametrize("make", [fs.hessian, fs.ggn, fs.exact_fisher, fs.empirical_fisher])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "mlp"])
def test_products(name, make):
    products = []
    for loss in both(name):
        v = fs.normal(fs.key(3), loss.net.theta)
        products.append(make(loss, loss.net.theta)(v).cpu())
    assert_close(products[1], products[0], **({"rtol": 1e-2, "atol": 1e-4} if name == "llama" else TOLERANCE))


def test_algorithms_on_a_hessian():
    found = []
    for loss in both("mlp"):
        matvec, theta = fs.hessian(loss, loss.net.theta), loss.net.theta
        pairs = fs.eigenpairs(matvec, theta, key=fs.key(0), num=3, vectors=True)
        trace = fs.hutchinson_trace(matvec, theta, key=fs.key(1), num=8)
        xtrace = fs.xtrace(matvec, theta, key=fs.key(1), num=8)
        sam = fs.sam_sharpness(loss, theta)
        average = fs.average_sharpness(loss, theta, key=fs.key(2))
        found.append([*pairs.values.tolist(), *(float(x.value) for x in (trace, xtrace, average.estimate))])
        found[-1].append(float(sam.absolute))
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-8, nan_ok=True)


@pytest.mark.parametrize("name", NAMES)
def test_planes_and_lines(name):
    found = []
    for loss in both(name):
        axes = fs.plane_directions(loss.net, key=fs.key(0))
        assert axes.vectors.device == loss.net.device
        plane = fs.loss_plane(loss, loss.net.theta, axes, num=5)
        found.append((plane, fs.loss_lines(loss, loss.net.theta, axes, num=5)))
    for cpu, cuda in zip(*found, strict=True):
        same(name, cuda, cpu)


@pytest.mark.parametrize("name", ["gpt2", "mlp"])
def test_paths_and_flatness(name):
    found = []
    for loss in both(name):
        end = loss.net.theta + 0.1 * fs.normal(fs.key(5), loss.net.theta)
        path = fs.linear_path(loss, loss.net.theta, end, num=5)
        matrix = fs.barrier_matrix(loss, [loss.net.theta, end], num=5)
        curve = fs.connect(loss, loss.net.theta, end, key=fs.key(6), steps=3).path
        flat = fs.flatness(loss, loss.net.theta, key=fs.key(7), n_directions=4)
        found.append((path, matrix, curve, flat))
    for cpu, cuda in zip(*found, strict=True):
        same(name, cuda, cpu)


def test_a_plane_through_a_trajectory_and_one_of_eigenvectors():
    found = []
    for loss in both("mlp"):
        theta = loss.net.theta
        thetas = [
            theta + t * fs.normal(fs.key(8), theta) + t * t * fs.normal(fs.key(9), theta) for t in (0.0, 0.5, 1.0)
        ]
        run = fs.principal_directions(thetas)
        plane = fs.loss_plane(loss, run.origin, run.axes, num=4, span=0.5)
        found.append((run.coordinates.abs().cpu(), torch.as_tensor(plane.asdict()["grid_losses"])))
    assert_close(found[1][0], found[0][0], rtol=1e-6, atol=1e-8)


def test_devices_are_not_mixed():
    cpu, cuda = both("mlp")
    with pytest.raises(ValueError, match="cuda"):
        fs.loss_plane(cuda, cuda.net.theta, fs.plane_directions(cpu.net, key=fs.key(0)), num=3)
    with pytest.raises(ValueError, match="cuda"):
        fs.linear_path(cuda, cuda.net.theta, cpu.net.theta)
