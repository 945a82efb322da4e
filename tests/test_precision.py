"""Half precision: what is realised of a step, what rounding does to a curvature, and when the result says so."""

import copy
import math
import warnings

import pytest
import torch
from problems import LANGUAGE, gpt2, problem, qwen2, seeded, tokens
from torch import nn
from torch.func import grad
from torch.testing import assert_close

import funcscope as fs
from funcscope.landscape import directional
from funcscope.landscape.precision import loss_error, realised


def trained(make):
    """A small model that has learned its batch: losses and curvatures are those of a network, not of noise."""

    def fit():
        model = make()
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(60):
            optimiser.zero_grad()
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimiser.step()
        return model

    batch = {"input_ids": tokens(3, 4, 12)["input_ids"]}
    return seeded(0, fit).eval(), batch


@pytest.fixture(scope="module", params=[gpt2, qwen2], ids=["gpt2", "qwen2"])
def pair(request):
    """One model with bfloat16 weights, as a loss in bfloat16 and as the same function in float32."""
    model, batch = trained(request.param)
    model = model.to(torch.bfloat16)
    nets = fs.functional(model), fs.functional(model, dtype=torch.float32)
    return [fs.objective(net, batch, fs.causal_lm) for net in nets]


def sampled(loss, span, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fs.directional_losses(
            loss, loss.net.params, key=fs.key(0), n_samples=16, span=span, two_sided=True, compute_curvature=True, **options
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LANGUAGE)
def test_a_compute_dtype_is_the_model_with_its_weights_cast(name):
    model, batches, criterion = problem(name, torch.bfloat16)
    net = fs.functional(model, dtype=torch.float32)
    loss = fs.objective(net, batches, criterion)
    wide = copy.deepcopy(model).float()
    other = fs.objective(fs.functional(wide), batches, criterion)
    assert all(net.params[key].data_ptr() == param.data_ptr() for key, param in model.named_parameters())
    assert {leaf.dtype for leaf in net.layout.leaves} == {torch.float32}
    tolerance = {"rtol": 1e-6, "atol": 1e-7}
    with torch.no_grad():
        for value in (loss(net.params), loss(net.theta), loss.at_leaves(lambda _, value: value)):
            assert_close(value, other(other.net.theta), **tolerance)
    assert_close(grad(loss)(net.theta), grad(other)(other.net.theta), rtol=1e-4, atol=1e-6)
    again = fs.objective(fs.functional(model).in_dtype(torch.float32), batches, criterion)
    assert_close(again(net.theta), loss(net.theta), **tolerance)
    assert float(fs.objective(fs.functional(model), batches, criterion)(net.params)) != float(loss(net.params))


def test_a_compute_dtype_casts_frozen_parameters_and_buffers_too():
    model = seeded(0, lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 2)))
    model = model.to(torch.bfloat16).eval()
    model[0].requires_grad_(False)
    x = seeded(1, lambda: torch.randn(5, 2, 4))
    net = fs.functional(model, dtype=torch.float32)
    wanted = copy.deepcopy(model).float()(x)
    assert_close(net.apply(net.params, x), wanted)
    assert_close(net.apply_leaves(lambda _, value: value, x), wanted)
    with pytest.raises(TypeError, match=r"`dtype` must be a floating-point dtype, got torch.int8"):
        fs.functional(model, dtype=torch.int8)


def test_the_realised_step_is_that_of_the_rounded_parameters(pair):
    loss = pair[0]
    base, direction = loss.net.params, fs.directions(loss.net, key=fs.key(0), num=1)[0]
    for step in (0.3, 1e-3):
        found = realised(loss.layout, base, direction, step)
        theta, d = loss.net.theta, direction.dense()
        plus, minus = ((theta + sign * step * d).bfloat16().float() - theta for sign in (1, -1))
        wanted = (plus.norm(), (plus - step * d).norm() / (step * d).norm(), (plus + minus).norm() / (step * d).norm())
        assert_close(torch.tensor(found[:3]), torch.stack(wanted), rtol=1e-4, atol=1e-6)
        assert found.unmoved == pytest.approx(float((plus == 0)[d != 0].double().mean()))
        assert step < 0.1 or found.unmoved < 0.01  # zero biases are not asked to move
    assert found.unmoved > 0.2
    assert found.error > 0.1


def test_full_precision_has_nothing_to_report(pair):
    result = sampled(pair[1], 0.1)
    assert result.realised is None
    assert "realised_error" not in result.asdict()
    assert "half precision" not in str(result)


@pytest.mark.slow
def test_the_noise_floor_is_the_size_of_the_error_that_bfloat16_makes(pair):
    """Oracle: the same weights and directions in float32."""
    half, full = pair
    for span in (0.3, 0.1, 0.03, 0.01, 0.003):
        ours, exact = sampled(half, span), sampled(full, span)
        error = float((ours.curvatures - exact.curvatures).square().mean().sqrt())
        assert error / 5 < ours.curvature_noise_floor < 20 * error


@pytest.mark.slow
def test_the_result_says_where_rounding_decides_the_sign(pair):
    half, full = pair
    calm, rough = sampled(half, 0.2), sampled(half, 1e-3)
    assert calm.precision_note is None
    assert calm.n_curvatures_undecided == 0
    assert bool((calm.curvatures * sampled(full, 0.2).curvatures > 0).all())
    exact = sampled(full, 1e-3).curvatures
    wrong = (rough.curvatures - exact).abs() > exact.abs()
    assert wrong.any(), "bfloat16 was expected to be wrong by more than the curvature here"
    assert rough.n_curvatures_undecided >= int((rough.curvatures * exact < 0).sum())
    assert f"sign of {rough.n_curvatures_undecided} of 16 curvatures" in str(rough).replace("\n", " ")
    assert "dtype=torch.float32" in rough.asdict()["precision_note"]
    assert "do not move" in str(rough)
    derived = sampled(half, 1e-3, curvature="exact")
    assert derived.precision_note is None
    assert math.isnan(derived.curvature_noise_floor)  # rounding inside the model is there, and not measured
    assert sampled(full, 0.1, curvature="exact").curvature_noise_floor == 0


def test_the_error_of_the_loss_is_measured_against_the_same_weights(pair):
    half, full = pair
    base = half.net.params
    with torch.no_grad():
        mean = abs(float(half(base)) - float(full(base)))
        measured = loss_error(half, base)
    assert mean <= measured * (1 + 1e-6) < 1e-2
    assert measured > 1e-6


def test_half_precision_weights_in_float32_take_small_steps(pair):
    """A step of 1e-3 in float32: the curvature is that of 1e-1."""
    full = pair[1]
    small, large = sampled(full, 3e-3), sampled(full, 3e-2)
    assert_close(small.curvatures, large.curvatures, rtol=0.2, atol=0.3)


def test_large_models_take_slopes_without_a_second_set_of_weights(monkeypatch):
    model, batches, criterion = problem("gpt2", torch.float32)
    loss = fs.objective(fs.functional(model), batches[:1], criterion)

    def costs(**options):
        result = fs.directional_losses(
            loss, loss.net.params, key=fs.key(0), n_samples=3, compute_gradient=True, **options
        )
        return result.num_gradients, result.num_jvps

    assert costs(lazy=True) == (1, 0)
    monkeypatch.setattr(directional, "GRADIENT_UP_TO", loss.layout.num - 1)
    assert costs(lazy=True) == (0, 3)
    assert costs(lazy=False) == (1, 0)
    assert costs(lazy=True, slope="gradient") == (1, 0)


@pytest.mark.slow
def test_slopes_in_a_wider_dtype_are_not_rounded_to_the_stored_one(pair):
    """The gradient is taken for float32 leaves, whatever the plan."""
    full = pair[1]
    asked = {"key": fs.key(0), "n_samples": 4, "compute_gradient": True}
    dense, lazy, by_jvp = (
        fs.directional_losses(full, full.net.params, **asked, **plan).slopes
        for plan in ({"lazy": False}, {"lazy": True}, {"lazy": True, "slope": "jvp"})
    )
    assert_close(lazy, dense, rtol=1e-5, atol=1e-6)
    assert_close(by_jvp, dense, rtol=1e-5, atol=1e-6)


def test_a_float32_theta_of_a_bfloat16_model_is_moved_before_it_is_rounded(pair):
    half = pair[0]
    theta = half.net.theta + 1e-3 * fs.normal(fs.key(1), half.net.theta)
    asked = {"key": fs.key(0), "n_samples": 4, "span": 0.05}
    dense, lazy = (
        fs.directional_losses(half, theta, **asked, **plan).losses for plan in ({"chunk": 1}, {"lazy": True})
    )
    first = half.layout.leaves[0]
    assert torch.equal(half.leaves(theta)[first.name].flatten(), theta[first.slice])  # not rounded yet
    assert_close(lazy, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "dtype", "wanted"), [
    ("gpt2", torch.float64, 2.0**-53), ("llama", torch.float64, 2.0**-24), ("t5", torch.float64, 2.0**-24),
    ("gpt2", torch.bfloat16, 2.0**-8), ("llama", torch.bfloat16, 2.0**-8), ("mlp", torch.float64, 2.0**-53),
])  # fmt: skip
def test_the_roundoff_is_that_of_what_the_model_computes_in(name, dtype, wanted):
    assert fs.functional(problem(name, dtype).model).unit_roundoff == wanted
