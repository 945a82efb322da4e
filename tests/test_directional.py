"""`directional_losses`: against dense oracles, against what the document does, and with bad input."""

import inspect
import math
import warnings
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import EVERY, IN_FLOAT32, dense_hessian, loss_of, problem, seeded, tokens
from torch import nn
from torch.func import grad
from torch.testing import assert_close

import funcscope as fs
from funcscope.landscape.truncation import central_second_difference

FULL = {"two_sided": True, "compute_gradient": True, "compute_curvature": True}


def bowl(diagonal, dtype=torch.float64, slope=0.0) -> fs.Loss:
    """L(theta) = sum_i diagonal_i theta_i^2 / 2 + slope sum_i theta_i, of one parameter vector."""
    weights = torch.tensor(diagonal, dtype=dtype)
    criterion = fs.custom(lambda out, _: (weights * out**2 / 2 + slope * out).sum(-1))
    net = fs.functional(Vector(len(diagonal), dtype))
    return fs.objective(net, [(torch.ones(1, 1, dtype=dtype), torch.zeros(1))], criterion)


class Vector(nn.Module):
    """theta itself as the output, one row."""

    def __init__(self, size, dtype=torch.float64):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(size, 1, dtype=dtype))

    def forward(self, x):
        return x * self.theta[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("normalize", ["filter", "layer", "global"])
def test_losses_slopes_and_curvatures_are_those_of_the_dense_directions(name, normalize):
    """Oracle: theta + h d built by hand, the dense gradient, H d by forward over reverse."""
    loss = loss_of(name)
    theta, key = loss.net.theta, fs.key(7)
    result = fs.directional_losses(
        loss, theta, key=key, n_samples=3, span=0.2, normalize=normalize, curvature="exact", **FULL
    )
    rows = fs.stack(fs.directions(loss.net, key=key, num=3, normalize=normalize))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if name in IN_FLOAT32 else {"rtol": 1e-9, "atol": 1e-11}
    assert_close(result.baseline_loss, float(loss(theta)))
    assert_close(result.losses, torch.stack([loss(theta + 0.2 * d) for d in rows]), **tolerance)
    assert_close(result.losses_negative, torch.stack([loss(theta - 0.2 * d) for d in rows]), **tolerance)
    assert_close(result.slopes, rows @ grad(loss)(theta), **tolerance)
    products = [torch.func.jvp(grad(loss), (theta,), (d,))[1] @ d for d in rows]
    assert_close(result.curvatures, torch.stack(products), rtol=1e-4, atol=1e-6)
    assert_close(result.direction_norms, rows.norm(dim=1))
    assert_close(result.rayleigh_quotients, result.curvatures / rows.square().sum(1))
    assert_close(result.param_norm, float(theta.norm()))


@pytest.mark.parametrize(
    "name", [pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("bert", marks=pytest.mark.slow), "mlp", "cnn"]
)
def test_every_plan_gives_the_same_samples(name):
    loss = loss_of(name)
    make = {"key": fs.key(1), "n_samples": 5, "span": 0.3, **FULL}
    first = fs.directional_losses(loss, loss.net.theta, **make)
    for plan in (
        {"chunk": 1},
        {"chunk": 2},
        {"lazy": True},
        {"slope": "jvp"},
        {"slope": "jvp", "lazy": True},
        {"slope": "gradient", "chunk": 5},
    ):
        other = fs.directional_losses(loss, loss.net.params, **make, **plan)
        for part in ("losses", "losses_negative", "slopes", "curvatures", "direction_norms"):
            assert_close(getattr(first, part), getattr(other, part), rtol=1e-9, atol=1e-10)
    again = fs.directional_losses(loss, loss.net.theta, **make)
    assert all(torch.equal(getattr(first, p), getattr(again, p)) for p in ("losses", "slopes", "curvatures"))
    assert first.plan == again.plan
    more = fs.directional_losses(loss, loss.net.theta, **{**make, "n_samples": 7})
    assert_close(more.losses[:5], first.losses)


@pytest.mark.slow
def test_float32_plans_agree_to_the_stated_tolerance():
    loss = loss_of("gpt2", torch.float32)
    make = {"key": fs.key(1), "n_samples": 9, "span": 0.3}
    plans = [{"chunk": 8}, {"chunk": 1}, {"lazy": True}]
    found = [fs.directional_losses(loss, loss.net.theta, **make, **plan).losses for plan in plans]
    assert_close(found[0], found[1], rtol=1e-6, atol=0)
    assert_close(found[0], found[2], rtol=1e-6, atol=0)


@pytest.mark.slow
@given(seed=st.integers(0, 99), h=st.floats(0.01, 0.2))
def test_the_difference_curvature_converges_with_the_square_of_the_step(seed, h):
    loss = loss_of("mlp")
    theta = loss.net.theta

    def errors(span):
        make = {"key": fs.key(seed), "n_samples": 2, "span": span, "two_sided": True, "compute_curvature": True}
        exact = fs.directional_losses(loss, theta, curvature="exact", **make)
        return (fs.directional_losses(loss, theta, **make).curvatures - exact.curvatures).abs().max()

    coarse, fine = errors(h), errors(h / 2)
    assert fine <= coarse / 2 or coarse < 1e-6
    if coarse > 1e-5 and h <= 0.05:
        assert 3.5 < coarse / fine < 4.5


@pytest.mark.slow
def test_mean_curvature_estimates_what_theory_says():
    """E[c] = tr(H) / P for unit directions, sum_f |theta_f|^2 tr(H_ff) / n_f for filters; one look, 4 standard errors."""
    loss = loss_of("mlp")
    theta = loss.net.theta
    hessian = dense_hessian(loss, theta)
    make = {"key": fs.key(11), "n_samples": 3000, "span": 0.01, "chunk": 500, "compute_curvature": True}
    unit = fs.directional_losses(loss, theta, normalize="global", curvature="exact", **make).estimates["curvature_mean"]
    assert abs(unit.value - hessian.trace() / len(theta)) < 4 * unit.stderr
    filters = fs.directional_losses(loss, theta, curvature="exact", **make).estimates["curvature_mean"]
    diagonal, wanted = loss.layout.unravel(hessian.diagonal().contiguous()), 0.0
    for leaf, value in loss.layout.unravel(theta).items():
        rows = [slice(None)] if value.ndim == 1 else list(range(len(value)))
        wanted += sum(float(value[r].square().sum() * diagonal[leaf][r].mean()) for r in rows)
    assert abs(filters.value - wanted) < 4 * filters.stderr
    assert abs(filters.value - unit.value) > 10 * filters.stderr  # the two are different quantities


def test_a_bowl_in_closed_form():
    loss = bowl([1.0, 2.0, 3.0], slope=0.5)
    theta = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    result = fs.directional_losses(loss, theta, key=fs.key(0), n_samples=6, span=0.25, **FULL)
    rows = fs.stack(fs.directions(loss.net, key=fs.key(0), num=6, base={"theta": theta[:, None]}))
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert_close(result.curvatures, (weights * rows**2).sum(1))
    assert_close(result.slopes, rows @ (weights * theta + 0.5))
    assert_close(result.deltas, 0.25 * result.slopes + 0.25**2 / 2 * result.curvatures)


# What the document's version got wrong


def test_sharp_directions_are_neither_zeroed_nor_dropped():
    """The documented code sets |curvature| > 1e6 to 0 and drops losses beyond 10 median deviations."""
    loss = bowl([1e9, *[1e-3] * 20])
    theta = torch.full((21,), 0.1, dtype=torch.float64)
    result = fs.directional_losses(loss, theta, key=fs.key(0), n_samples=40, two_sided=True, compute_curvature=True)
    assert result.curvatures.abs().max() > 1e6
    assert result.n_samples == 40
    far = (result.losses - result.losses.median()).abs() / (result.losses - result.losses.median()).abs().median()
    assert far.max() > 3
    assert float(result.estimates["loss_mean"].value) == float(result.losses.mean())


def test_global_renorm_changes_the_unit_of_the_step_only():
    loss = loss_of("mlp")
    theta = loss.net.theta
    make = {"key": fs.key(0), "n_samples": 4, **FULL}
    plain = fs.directional_losses(loss, theta, span=0.1, **make)
    with pytest.warns(UserWarning, match=r"divides every direction by \|\|theta\|\| = .*changes nothing else"):
        renormed = fs.directional_losses(loss, theta, span=0.1 * plain.param_norm, global_renorm=True, **make)
    assert_close(renormed.losses, plain.losses)
    assert_close(renormed.rayleigh_quotients, plain.rayleigh_quotients)
    assert_close(renormed.curvatures, plain.curvatures / plain.param_norm**2)
    assert_close(renormed.displacement, plain.displacement)


@pytest.mark.slow
@given(normalize=st.sampled_from(["filter", "layer", "global"]), span=st.floats(0.05, 1))
def test_relative_span_is_a_displacement_of_span_times_the_norm_in_every_mode(normalize, span):
    """The documented one moved by span x ||theta||^2 under filter normalisation."""
    loss = loss_of("mlp")
    make = {"key": fs.key(0), "n_samples": 1, "normalize": normalize, "span": span}
    result = fs.directional_losses(loss, loss.net.theta, relative_span=True, **make)
    assert_close(result.displacement, span * result.param_norm)
    assert_close(result.relative_step, span)
    absolute = fs.directional_losses(loss, loss.net.theta, **make)
    assert_close(absolute.relative_step, span / absolute.param_norm if normalize == "global" else span)


def test_the_directions_do_not_depend_on_the_step():
    """E3: the documented loop read filter norms from weights that the last draw had moved."""
    loss = loss_of("mlp")
    for span in (0.1, 1.0, 10.0):
        result = fs.directional_losses(loss, loss.net.theta, key=fs.key(0), n_samples=30, span=span)
        assert_close(result.direction_norms, torch.full((30,), result.param_norm, dtype=torch.float64))


# Non-finite samples


def half_finite() -> fs.Loss:
    """sqrt(theta_0) + theta_1^2: nan where theta_0 < 0."""
    criterion = fs.custom(lambda out, _: out[:, 0].sqrt() + out[:, 1] ** 2)
    return fs.objective(fs.functional(Vector(2)), [(torch.ones(1, 1).double(), torch.zeros(1))], criterion)


def test_non_finite_samples_are_counted_and_left_out_pair_by_pair():
    loss, theta = half_finite(), torch.tensor([0.5, 1.0], dtype=torch.float64)
    make = {"key": fs.key(0), "n_samples": 40, "span": 1.0, "normalize": "global"}
    result = fs.directional_losses(loss, theta, **make, **FULL)
    bad, bad_negative = (~side.isfinite() for side in (result.losses, result.losses_negative))
    assert 0 < bad.sum() < 40
    assert 0 < bad_negative.sum() < 40
    assert result.n_nonfinite_pos == bad.sum()
    assert result.n_nonfinite_neg == bad_negative.sum()
    assert result.n_samples == 40 - bad.sum() == result.n_samples_for_corr
    assert_close(result.estimates["loss_mean"].value, result.losses[~bad].mean())
    corr = np.corrcoef(result.slopes[~bad], result.deltas[~bad])[0, 1]
    assert_close(float(result.estimates["dir_grad_delta_corr"].value), float(corr))
    assert result.estimates["curvature_mean"].num == int((~bad & ~bad_negative).sum())
    assert "non-finite losses" in str(result)
    assert math.isfinite(result.asdict()["loss_max"])


def test_where_no_sample_is_finite_the_statistics_are_undefined():
    criterion = fs.custom(lambda out, _: (1e-9 - (out - 1).square().sum(-1)).sqrt())  # a number at theta = 1 only
    loss = fs.objective(fs.functional(Vector(2)), [(torch.ones(1, 1).double(), torch.zeros(1))], criterion)
    result = fs.directional_losses(
        loss, loss.net.theta, key=fs.key(3), n_samples=4, two_sided=True, compute_curvature=True
    )
    assert (result.n_samples, result.n_nonfinite_pos, result.n_nonfinite_neg) == (0, 4, 4)
    found = result.asdict()
    for name in (
        "loss_mean",
        "loss_std",
        "loss_max",
        "delta_mean",
        "landscape_roughness",
        "curvature_mean",
        "curvature_p50",
    ):
        assert math.isnan(found[name])


def test_a_loss_that_is_nan_at_theta_is_refused():
    with pytest.raises(ValueError, match=r"the loss at theta is nan: nothing around it can be measured") as caught:
        fs.directional_losses(half_finite(), torch.tensor([-1.0, 1.0]).double(), key=fs.key(0))
    assert "\n" not in str(caught.value)


# Notes, noise and warnings


def test_the_note_says_why_the_correlation_is_low():
    flat = bowl([1.0, 5.0, 10.0, 20.0], slope=1e-3)
    at_minimum = torch.tensor([1e-3, -1e-3, 1e-3, 1e-3], dtype=torch.float64)
    result = fs.directional_losses(
        flat, at_minimum, key=fs.key(1), n_samples=40, span=1.0, normalize="global", compute_gradient=True
    )
    assert result.estimates["dir_grad_delta_corr"].value < 0.3
    assert "the slope is not what moves the loss" in result.note
    below = float(result.note.split("a span below ")[1].split(" makes")[0])
    closer = fs.directional_losses(
        flat, at_minimum, key=fs.key(1), n_samples=40, span=below / 3, normalize="global", compute_gradient=True
    )
    assert closer.estimates["dir_grad_delta_corr"].value > 0.9
    assert closer.note is None
    few = fs.directional_losses(flat, at_minimum, key=fs.key(1), n_samples=2, compute_gradient=True)
    assert "undefined: directions with a finite slope and loss: 2, without: 0" in few.note
    assert fs.directional_losses(flat, at_minimum, key=fs.key(1), n_samples=2).note is None
    assert result.note in " ".join(str(result).split())


@pytest.mark.slow
def test_rounding_moves_a_float32_curvature_by_the_order_of_its_noise_floor():
    """Oracle: the same model and directions in float64."""
    narrow, wide = loss_of("gpt2", torch.float32), loss_of("gpt2", torch.float64)
    for span in (1e-3, 1e-2):
        make = {"key": fs.key(1), "n_samples": 20, "span": span, "two_sided": True, "compute_curvature": True}
        a = fs.directional_losses(narrow, narrow.net.theta, **make)
        b = fs.directional_losses(wide, narrow.net.theta.double(), **make)
        error = (a.curvatures - b.curvatures).square().mean().sqrt()
        assert a.curvature_noise_floor / 30 < error < 3 * a.curvature_noise_floor
    assert b.curvature_noise_floor < 1e-6 * a.curvature_noise_floor
    exact = fs.directional_losses(narrow, narrow.net.theta, curvature="exact", **make)
    assert exact.curvature_noise_floor == 0
    assert (exact.num_matvecs, exact.num_second_jvps) == (20, 20)


def test_a_small_step_in_half_precision_warns_with_what_it_costs():
    model = seeded(0, lambda: nn.Linear(50, 10)).to(torch.bfloat16)
    batch = seeded(1, lambda: (torch.randn(4, 50).bfloat16(), torch.randint(0, 10, (4,))))
    loss = fs.objective(fs.functional(model), [batch], fs.classification)
    assert loss.net.theta.dtype == torch.float32
    with pytest.warns(UserWarning, match=r"span 0.001 in half precision: \d\d% of the weights do not move at all"):
        fs.directional_losses(loss, loss.net.theta, key=fs.key(0), n_samples=1, span=1e-3)
    with pytest.warns(UserWarning, match="do not move at all"):  # a large span of a small direction
        fs.directional_losses(loss, loss.net.theta, key=fs.key(0), n_samples=1, span=0.015, normalize="global")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fs.directional_losses(loss, loss.net.theta, key=fs.key(0), n_samples=1, span=0.5)


def test_costs_are_counted():
    loss = loss_of("mlp")
    cost = namedtuple("cost", "forwards gradients jvps products")

    def counted(**options):
        r = fs.directional_losses(loss, loss.net.theta, key=fs.key(0), n_samples=options.pop("n_samples", 5), **options)
        return cost(r.num_forwards, r.num_gradients, r.num_jvps, r.num_matvecs)

    assert counted() == (
        11,
        0,
        0,
        0,
    )  # the baseline mapped as losses are, and once more
    assert counted(**FULL) == (28, 1, 0, 0)  # three directions at four shorter steps
    assert counted(**FULL, n_samples=50) == (129, 1, 0, 0)
    assert counted(compute_gradient=True, slope="jvp") == (11, 0, 5, 0)
    assert counted(compute_gradient=True, n_samples=1) == (3, 0, 1, 0)  # one jvp is cheaper than one gradient
    assert counted(compute_curvature=True, curvature="exact") == (11, 0, 0, 5)


def test_bad_requests_get_one_clear_line():
    loss = loss_of("mlp")
    raw = inspect.unwrap(fs.directional_losses)
    theta, key = loss.net.theta, fs.key(0)
    cases = [
        ({"n_samples": 0}, r"`n_samples` must be an integer of at least 1, got 0"),
        ({"span": 0.0}, r"`span` must be a finite number above 0, got 0.0"),
        ({"span": -0.5}, r"`span` must be a finite number above 0, got -0.5"),
        ({"span": math.nan}, r"`span` must be a finite number above 0, got nan"),
        ({"normalize": "spectral"}, r"`normalize` must be one of 'filter', 'layer', 'global', got 'spectral'"),
        ({"chunk": 0}, r"`chunk` must be an integer of at least 1, got 0"),
        ({"chunk": 4, "lazy": True}, r"`lazy` makes one direction at a time; leave `chunk` out"),
        ({"compute_curvature": True}, r"needs losses on both sides: pass `two_sided=True`, or `curvature=\"exact\"`"),
        ({"key": 42}, r"`key` must be a key, made of an integer seed, got 42: write `key=fs.key\(42\)`"),
        ({"curvature": "forward"}, r"`curvature` must be one of 'difference', 'exact', got 'forward'"),
    ]
    for options, message in cases:
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            raw(loss, theta, **({"key": key} | options))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"`theta` must be a flat vector of shape \(51,\), got \(3,\)"):
        raw(loss, torch.zeros(3), key=key)
    with pytest.raises(ValueError, match="theta is on meta, the model on cpu"):
        raw(loss, theta.to("meta"), key=key)
    with pytest.raises(TypeError, match="`theta` must hold floating-point numbers"):
        raw(loss, torch.zeros(51, dtype=torch.long), key=key)


class Drifting(nn.Linear):
    """Counts its calls in a buffer, and uses the count."""

    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + 0.01 * self.calls)


@pytest.mark.parametrize("make", [Drifting, lambda: nn.Sequential(nn.Linear(2, 2), AlwaysDropping())])
def test_a_forward_pass_that_is_no_function_of_theta_is_refused(make):
    model = seeded(0, make)
    loss = fs.objective(fs.functional(model), [(torch.ones(8, 2), torch.zeros(8).long())], fs.classification)
    with pytest.raises(ValueError, match="is no function of theta"):
        seeded(1, lambda: fs.directional_losses(loss, loss.net.theta, key=fs.key(0), n_samples=2))


class AlwaysDropping(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x)


def test_a_parameter_that_the_model_never_uses_counts_in_every_plan():
    loss = fs.objective(
        fs.functional(seeded(0, Unused)), [(torch.ones(1, 2), torch.zeros(1).long())], fs.classification
    )
    dense, lazy = (
        fs.directional_losses(loss, loss.net.params, key=fs.key(0), n_samples=3, lazy=lazy, **FULL)
        for lazy in (False, True)
    )
    assert_close(dense.direction_norms, lazy.direction_norms)
    assert_close(dense.rayleigh_quotients, lazy.rayleigh_quotients, rtol=1e-3, atol=1e-4)


def test_at_theta_zero_shares_of_its_norm_are_undefined():
    loss = loss_of("mlp")
    result = fs.directional_losses(loss, 0 * loss.net.theta, key=fs.key(0), n_samples=3, normalize="global")
    assert math.isnan(result.relative_step)
    assert "nan" in str(result)
    with pytest.raises(ValueError, match="which is 0 here"):
        fs.directional_losses(
            loss, 0 * loss.net.theta, key=fs.key(0), n_samples=3, normalize="global", relative_span=True
        )


@given(seed=st.integers(0, 50))
def test_central_second_difference_of_a_parabola_is_exact(seed):
    a, b, c = (float(x) for x in fs.normal(fs.key(seed), torch.zeros(3)))
    f = lambda t: torch.tensor([a * t * t + b * t + c], dtype=torch.float64)  # noqa: E731
    assert_close(central_second_difference(f(0.5), f(-0.5), c, 0.5), torch.tensor([2 * a], dtype=torch.float64))


def test_batch_split_and_padding_change_nothing():
    loss = loss_of("gpt2")
    net = loss.net
    whole = tokens(9, 4, 6, pad=2)
    wider = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in whole.items()}
    halves = [{name: value[part] for name, value in whole.items()} for part in (slice(0, 1), slice(1, 4))]
    found = [
        fs.directional_losses(fs.objective(net, batches, fs.causal_lm), net.theta, key=fs.key(0), n_samples=4, **FULL)
        for batches in ([whole], halves, [wider])
    ]
    for other in found[1:]:
        for part in ("losses", "losses_negative", "slopes", "curvatures"):
            assert_close(getattr(found[0], part), getattr(other, part), rtol=1e-7, atol=1e-9)


def test_kernels_that_sum_in_another_order_are_no_reason_to_refuse(monkeypatch):
    """bfloat16 losses may differ between two calls by less than a rounding; more than that is another function."""
    model, batches, criterion = problem("gpt2", torch.bfloat16)
    loss = fs.objective(fs.functional(model), batches[:1], criterion)
    calls, shift, once = [], [1e-3], type(loss).__call__

    def drifting(self, theta):
        calls.append(1)
        return once(self, theta) * (1 + shift[0] * (len(calls) % 2))

    monkeypatch.setattr(type(loss), "__call__", drifting)
    fs.directional_losses(loss, loss.net.theta, key=fs.key(0), n_samples=1)
    shift[0] = 1e-2
    calls.clear()
    with pytest.raises(ValueError, match="is no function of theta"):
        fs.directional_losses(loss, loss.net.theta, key=fs.key(0), n_samples=1)


@pytest.mark.parametrize("plan", [{"chunk": 1, "lazy": False}, {"lazy": True}])
def test_the_model_is_checked_once_and_then_called_as_often_as_is_said(plan):
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    net = fs.functional(seeded(0, lambda: Counted(2, 2)))
    loss = fs.objective(net, [(torch.ones(1, 2), torch.tensor([0]))], fs.classification)
    spent = []
    for num in (2, 2, 12):
        calls.clear()
        result = fs.directional_losses(loss, net.params, key=fs.key(0), n_samples=num, compute_gradient=False, **plan)
        spent.append(len(calls))
    assert spent[2] - spent[1] == 10 * (result.num_forwards - 2) // 12  # a direction costs its own passes alone
    assert spent[1] <= spent[0]
