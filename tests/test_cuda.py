"""The same numbers on a CUDA device as on the CPU, from the same keys; draws on the device, too."""

from dataclasses import replace

import pytest
import torch
from problems import CATALOGUE, cast, problem, relative, seeded, tokens
from torch.func import grad
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

import funcscope as fs
from funcscope.core import philox
from funcscope.core.keys import BLOCK, CPU, draw, fill, uniform
from funcscope.core.vectors import PART
from funcscope.curvature.leafwise_trace import leafwise_trace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DEVICE = "cuda"
ON_DEVICE = fs.key(5, stream="device")
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
    for device in ("cpu", DEVICE):
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


@pytest.mark.parametrize("options", [{"keep": False}, {"head_chunk": 4}], ids=str)
@pytest.mark.parametrize("make", [fs.hessian, fs.ggn])
def test_products_rebuilt_and_with_the_head_by_chunks(make, options):
    products = []
    for loss in both("gpt2"):
        v = fs.normal(fs.key(3), loss.net.theta)
        products.append(make(loss, loss.net.theta, **options)(v).cpu())
    assert_close(products[1], products[0], **TOLERANCE)


@pytest.mark.parametrize("options", [{"attention": "blocks"}, {"remat": "layer"}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_attention_by_blocks_and_layers_computed_again(name, options):
    found = []
    for loss in (both(name)[0], *both(name, **options)):
        theta, v = loss.net.theta, fs.normal(fs.key(3), loss.net.theta)
        found.append([loss(theta), grad(loss)(theta), fs.hessian(loss, theta)(v), fs.ggn(loss, theta)(v)])
    for plain, cpu, cuda in zip(*found, strict=True):
        limit = LOOSE if name == "llama" else TOLERANCE
        assert_close(cpu, plain, **limit)
        assert_close(cuda.cpu(), cpu, **({"rtol": 1e-2, "atol": 1e-4} if name == "llama" else TOLERANCE))


def test_attention_by_blocks_where_there_are_several():
    """Of 300 tokens, against all scores at once."""
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=300)
    model, inputs = seeded(0, lambda: GPT2LMHeadModel(config)), moved(tokens(1, 2, 300, pad=9), DEVICE)
    model = model.double().to(DEVICE)
    nets = [fs.functional(model, attention=attention) for attention in ("eager", "blocks")]
    one, other = (fs.objective(net, inputs, fs.causal_lm) for net in nets)
    assert_close(grad(other)(other.net.theta), grad(one)(one.net.theta), **TOLERANCE)
    v = fs.normal(ON_DEVICE, one.net.theta)
    assert_close(fs.hessian(other, other.net.theta)(v), fs.hessian(one, one.net.theta)(v), **TOLERANCE)


@pytest.mark.parametrize("unit", ["sequence", "token"])
@pytest.mark.parametrize("name", ["gpt2", "mlp"])
def test_grams_and_their_spectra(name, unit):
    if (name, unit) == ("mlp", "token"):
        pytest.skip("one output for every input")
    found = []
    for loss in both(name):
        grams = fs.gram(loss, loss.net.theta, by="layer", unit=unit)
        spectrum = fs.fisher_spectrum(loss, loss.net.theta, key=fs.key(0), unit=unit).eigenvalues
        norms = fs.gradient_norms(loss, loss.net.theta).values
        found.append([grams.values.cpu(), spectrum.cpu(), norms.cpu()])
    for cpu, cuda in zip(*found, strict=True):
        assert_close(cuda, cpu, **TOLERANCE)


def test_forms_and_traces_of_sequences():
    found = []
    for loss in both("gpt2"):
        theta = loss.net.theta
        rows = torch.stack([fs.normal(fs.key(i), theta) for i in range(2)])
        forms = fs.sequence_forms(loss, theta, rows)
        found.append([forms.values, fs.trace_errors(loss, theta, key=fs.key(3), num=4).forms.values])
        found[-1].append(leafwise_trace(loss, loss.net.params, key=fs.key(3), num=4).forms.values)
        found[-1].append(fs.per_sample_gradients(loss, theta).cpu())
    for cpu, cuda in zip(*found, strict=True):
        assert_close(cuda.cpu(), cpu.cpu(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [fs.hessian, fs.ggn, fs.empirical_fisher])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bfloat16_weights_take_float32_vectors(name, make):
    """On the device, against the same rounded weights in float32 on the CPU."""
    wide, half = both(name, torch.bfloat16)
    losses = half, replace(wide, net=wide.net.in_dtype(torch.float32))
    products = [make(loss, loss.net.theta)(fs.normal(fs.key(1), loss.net.theta)).cpu() for loss in losses]
    assert products[0].dtype == torch.float32
    assert relative(*products) < 3e-2


@pytest.mark.parametrize("num", [1, 65, BLOCK, BLOCK + 1, 64 * BLOCK, 67 * BLOCK + 77])
def test_draws_on_the_device(num):
    """Signs and uniform numbers to the bit, normal numbers up to the rounding of a logarithm and a cosine."""
    here, there = torch.empty(num), torch.empty(num, device=DEVICE)
    assert torch.equal(fs.rademacher(ON_DEVICE, there).cpu(), fs.rademacher(fs.key(5), here))
    assert torch.equal(uniform(ON_DEVICE, there).cpu(), uniform(fs.key(5), here))
    wanted, found = fs.normal(ON_DEVICE, here), fs.normal(ON_DEVICE, there)
    assert found.device == there.device
    assert_close(found.cpu(), wanted, rtol=1e-5, atol=5e-6)
    assert torch.equal(fs.normal(ON_DEVICE, there), found)
    fill(ON_DEVICE, there, "normal")
    assert torch.equal(there, found)
    start, stop = num // 3, num - num // 5
    assert torch.equal(draw(ON_DEVICE, num, "normal", start, stop, device=there.device), found[start:stop])
    assert torch.equal(fs.normal(fs.key(5), there).cpu(), fs.normal(fs.key(5), here))


def test_words_on_the_device():
    here, there = (philox.words(ON_DEVICE.bits, [0, 2**40], 1001, torch.device(x), after=2**35) for x in (CPU, DEVICE))
    assert torch.equal(there.cpu(), here)


def test_a_draw_on_the_device_inside_a_transform_is_a_constant():
    like = torch.zeros(3, device=DEVICE)

    def scaled(a):
        return a * fs.normal(ON_DEVICE, like)

    outside, one = fs.normal(ON_DEVICE, like), torch.ones((), device=DEVICE)
    mapped = torch.func.vmap(scaled)(torch.stack([one, 2 * one]))
    assert torch.equal(mapped, torch.stack([outside, 2 * outside]))
    assert torch.equal(torch.func.jvp(scaled, (one,), (one,))[1], outside)
    with torch.inference_mode():
        assert torch.equal(fs.normal(ON_DEVICE, like), outside)


@pytest.mark.parametrize("normalize", ["filter", "layer", "global"])
def test_directions_drawn_on_the_device(normalize):
    model = seeded(0, lambda: torch.nn.Sequential(torch.nn.Linear(700, 4000), torch.nn.Linear(3, 1)))
    assert 2 * PART < 700 * 4000
    made = []
    for device in ("cpu", DEVICE):
        net = fs.functional(model.to(device))
        dirs = fs.directions(net, key=ON_DEVICE, num=2, normalize=normalize)
        rows = fs.stack(dirs)
        assert_close(rows[1], net.layout.ravel({name: dirs[1].leaf(name) for name in net.layout.names}))
        made.append(rows.cpu())
    assert_close(made[1], made[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("plan", [{}, {"lazy": True}], ids=str)
def test_what_is_measured_with_draws_on_the_device(plan):
    found = []
    for loss in both("gpt2"):
        options = {"n_samples": 4, "compute_gradient": True, "span": 0.1}
        losses = fs.directional_losses(loss, loss.net.theta, key=ON_DEVICE, **options, **plan)
        flat = fs.flatness(loss, loss.net.theta, key=ON_DEVICE, n_directions=4)
        assert losses.asdict()["draws"] == "device"
        axes = fs.plane_directions(loss.net, key=ON_DEVICE).vectors.cpu()
        trace = fs.hutchinson_trace(fs.hessian(loss, loss.net.theta), loss.net.theta, key=ON_DEVICE, num=4).value
        found.append([losses.losses, losses.slopes, flat.delta_losses, axes, torch.as_tensor(trace).cpu()])
    for cpu, cuda in zip(*found, strict=True):
        assert_close(cuda.cpu(), cpu.cpu(), rtol=1e-4, atol=1e-6)


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
