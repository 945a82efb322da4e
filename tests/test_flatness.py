"""`flatness` and `flatness_profile`: closed forms on quadratics, dense Hessians, numpy's statistics, and bad input."""

import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import dense_hessian, loss_of, seeded
from torch import nn
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.estimate import Estimate
from funcscope.landscape import directional
from funcscope.landscape.evaluator import MAPPED_POSITIONS
from funcscope.landscape.flatness import flatness, flatness_profile
from funcscope.landscape.sampling import common_directions

module = importlib.import_module("funcscope.landscape.flatness")  # `landscape.flatness` is the function


class Vector(nn.Module):
    """theta itself as the output, one row."""

    def __init__(self, size, dtype=torch.float64):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1, size, dtype=dtype))

    def forward(self, x):
        return x * self.theta


def of_theta(function, size, dtype=torch.float64) -> fs.Loss:
    """The loss that is `function(theta)`."""
    ones = torch.ones(1, 1, dtype=dtype)
    return fs.objective(
        fs.functional(Vector(size, dtype)), [(ones, ones)], fs.custom(lambda x, _: function(x[0])[None])
    )


def symmetric(size, seed=0):
    a = fs.normal(fs.key(seed), torch.zeros(size, size, dtype=torch.float64))
    return (a + a.T) / 2


def quadratic(hessian, gradient, level=0.0) -> fs.Loss:
    return of_theta(lambda t: level + gradient @ t + t @ hessian @ t / 2, len(gradient))


def zeros(size):
    return torch.zeros(size, dtype=torch.float64)


def relu_net() -> tuple[fs.Loss, float]:
    """Mean squares of an 8-unit ReLU network, and the length of a step that cannot reach one of its kinks."""
    model = seeded(2, lambda: nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)).double())
    x = seeded(3, lambda: torch.randn(64, 2, dtype=torch.float64))
    y = torch.sin(3 * x[:, :1]) * x[:, 1:]
    with torch.no_grad():  # |w x + b| falls by at most the step times the norm of (x, 1)
        reach = (model[0](x).abs() / (x.square().sum(1, keepdim=True) + 1).sqrt()).min()
    loss = fs.objective(fs.functional(model), [(x, y)], fs.custom(lambda out, y: (out - y).square().mean(1)))
    return loss, 0.99 * float(reach)


def z(estimate, wanted):
    return abs(float(estimate.value) - float(wanted)) / float(estimate.stderr)


# What the numbers are


@pytest.mark.parametrize("normalize", ["global", "filter", "layer"])
@pytest.mark.parametrize("relative", [False, True])
def test_deltas_are_those_of_dense_directions(normalize, relative):
    """Oracle: theta +- epsilon d built by hand."""
    loss = loss_of("mlp")
    theta, key = loss.net.theta * torch.linspace(0.5, 2, 51, dtype=torch.float64), fs.key(3)  # not the model's own
    result = flatness(loss, theta, key=key, n_directions=5, epsilon=0.2, normalize=normalize, relative=relative)
    rows = fs.stack(fs.directions(loss.net, key=key, num=5, normalize=normalize, base=loss.layout.unravel(theta)))
    length = 0.2 * float(theta.norm()) if relative or normalize != "global" else 0.2
    rows = rows / rows.norm(dim=1, keepdim=True) * length
    assert_close(result.delta_losses, torch.stack([loss(theta + d) - loss(theta) for d in rows]), rtol=1e-9, atol=1e-13)
    negative = torch.stack([loss(theta - d) - loss(theta) for d in rows])
    assert_close(result.delta_losses_negative, negative, rtol=1e-9, atol=1e-13)
    assert_close(result.displacement, length)
    assert_close(result.epsilon_relative, length / float(theta.norm()))
    assert_close(result.param_norm, float(theta.norm()))
    assert result.epsilon == 0.2


def test_a_quadratic_in_closed_form_per_direction():
    hessian, gradient = symmetric(6), torch.arange(6.0, dtype=torch.float64)
    result = flatness(quadratic(hessian, gradient), zeros(6), key=fs.key(1), epsilon=0.3)
    rows = fs.stack(fs.directions(quadratic(hessian, gradient).net, key=fs.key(1), num=50, normalize="global"))
    forms = 0.3**2 / 2 * torch.einsum("ni,ij,nj->n", rows, hessian, rows)
    assert_close(result.delta_losses, 0.3 * rows @ gradient + forms)
    assert_close(result.delta_losses_negative, -0.3 * rows @ gradient + forms)
    assert_close(result.even, forms)


def test_the_mean_is_the_trace_on_a_quadratic():
    hessian = symmetric(12) + 2 * torch.eye(12)
    result = flatness(
        quadratic(hessian, torch.ones(12).double()), zeros(12), key=fs.key(2), n_directions=400, chunk=400
    )
    expected = result.expected_from_trace(Estimate(hessian.trace(), zeros(1)[0], 1))
    assert_close(expected.value, 0.1**2 * hessian.trace() / 24)
    assert z(result.pair_mean, expected.value) < 3.5
    assert z(result.estimates["mean_delta_loss"], expected.value) < 3.5
    assert z(result.second_order, hessian.trace()) < 3.5
    assert float(result.second_order.stderr) < 0.05 * float(hessian.trace())  # the check has power


def test_the_error_of_a_trace_is_carried():
    result = flatness(quadratic(torch.eye(4).double(), zeros(4)), zeros(4), key=fs.key(2), n_directions=2, epsilon=0.2)
    expected = result.expected_from_trace(Estimate(torch.tensor(8.0), torch.tensor(0.5), 7))
    assert (round(float(expected.value), 6), round(float(expected.stderr), 6), expected.num) == (0.04, 0.0025, 7)


@pytest.mark.slow
def test_standard_errors_cover():
    """The mean's and the pair mean's 2-sigma intervals hold the truth in about 95 % of the draws."""
    hessian, gradient = symmetric(8) + torch.eye(8), torch.ones(8).double() / 8
    loss, wanted = quadratic(hessian, gradient), 0.1**2 * (symmetric(8) + torch.eye(8)).trace() / 16
    results = [flatness(loss, zeros(8), key=fs.key(seed), n_directions=30, chunk=30) for seed in range(100)]
    for name in ("mean_delta_loss", "pair_mean"):
        inside = sum(z(result.estimates[name], wanted) < 2 for result in results)
        assert 87 <= inside <= 99, name


def test_a_smooth_network_at_a_small_step_has_its_dense_trace():
    loss = loss_of("mlp")
    theta = loss.net.theta
    trace = dense_hessian(loss, theta).trace()
    near, far = flatness_profile(loss, theta, key=fs.key(4), epsilons=(0.02, 4.0), n_directions=600, chunk=100)
    assert z(near.second_order, trace) < 3.5
    assert float(near.second_order.stderr) < 0.1 * float(trace)
    assert z(far.second_order, trace) > 5  # negative control: at epsilon 4 other orders are seen


@pytest.mark.slow
def test_a_relu_network_parts_from_the_trace_of_autodiff_once_steps_reach_kinks():
    loss, reach = relu_net()
    theta = loss.net.theta
    trace = Estimate(dense_hessian(loss, theta).trace(), torch.zeros(()), 1)
    profile = flatness_profile(loss, theta, key=fs.key(5), epsilons=(reach, 0.2), n_directions=1200, chunk=200)
    near, far = (float(result.expected_from_trace(trace).value / result.pair_mean.value) for result in profile)
    assert z(profile[0].second_order, trace.value) < 3.5
    assert 0.9 < near < 1.1
    assert 0.5 < far < 0.8
    assert z(profile[1].second_order, trace.value) > 10


def test_losses_in_float64_resolve_what_float32_cannot():
    """A classifier sure to 1e-9: in float32 its losses are multiples of 6e-8."""
    model = seeded(0, lambda: nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[10.0, 0.0], [-10.0, 0.0]]))
    batch = [(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))]
    net = fs.functional(model)
    wide, narrow = (
        flatness(fs.objective(net, batch, criterion), net.theta, key=fs.key(1), n_directions=20)
        for criterion in (fs.classification.in_dtype(torch.float64), fs.classification)
    )
    rows = fs.stack(fs.directions(net, key=fs.key(1), num=20, normalize="global")).double()
    margins = 20 + 0.1 * (rows[:, 0] - rows[:, 2])
    assert_close(wide.delta_losses, torch.log1p((-margins).exp()) - math.log1p(math.exp(-20)), rtol=1e-4, atol=1e-15)
    assert 1e-11 < float(wide.delta_losses.abs().median()) < 1e-9
    assert not narrow.delta_losses.any()


# What pairs and common directions save


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.25, 4.0])
def test_pairs_win_exactly_where_the_gradient_is_large(share):
    """Both sides of ||g||^2 = eps^2 (||H||_F^2 - tr(H)^2/P) / (2 (P+2)), by the scatter over repeated draws."""
    size, epsilon, hessian = 6, 0.5, symmetric(6)
    border = epsilon**2 * (hessian.square().sum() - hessian.trace() ** 2 / size) / (2 * (size + 2))
    gradient = (share * border / size).sqrt() * torch.ones(size).double()
    loss = quadratic(hessian, gradient)
    result = flatness(loss, zeros(size), key=fs.key(3), n_directions=4000, epsilon=epsilon, chunk=4000)
    assert z(result.pair_variance_ratio, (1 + share) / 2) < 3.5
    assert z(result.pair_variance_ratio, 1) > 5
    singles = torch.cat([result.delta_losses, result.delta_losses_negative])[
        torch.randperm(8000, generator=_generator())
    ]
    means = singles.view(-1, 20).mean(1), result.even.view(-1, 10).mean(1)  # 400 runs of 20 evaluations each
    ratio = float(means[0].var() / means[1].var())
    assert abs(math.log(ratio / ((1 + share) / 2))) < 4 * math.sqrt(4 / 400)


def _generator():
    return torch.Generator().manual_seed(0)


def test_at_zero_gradient_a_pair_is_one_evaluation_twice():
    result = flatness(quadratic(symmetric(5), zeros(5)), zeros(5), key=fs.key(3))
    assert_close(float(result.pair_variance_ratio.value), 0.5)
    assert float(result.pair_variance_ratio.stderr) < 1e-9


@pytest.mark.slow
def test_common_directions_save_the_scatter_of_the_draw_between_neighbours():
    loss = loss_of("mlp")
    one, two = loss.net.theta, loss.net.theta - 0.05 * torch.func.grad(loss)(loss.net.theta)

    def difference(first, second):
        means = [
            flatness(loss, t, key=fs.key(k), n_directions=10).pair_mean.value for t, k in ((one, first), (two, second))
        ]
        return float(means[1] - means[0])

    common = np.var([difference(k, k) for k in range(8)])
    apart = np.var([difference(k, 100 + k) for k in range(8)])
    assert apart > 50 * common


def test_directions_drawn_once_give_the_same_bits():
    loss = loss_of("mlp", torch.float32)
    common = common_directions(loss.net, key=fs.key(7), num=9)
    for theta in (loss.net.theta, 2 * loss.net.theta):
        for chunk in (1, 8):
            with_, without = (
                flatness(loss, theta, key=fs.key(7), n_directions=6, chunk=chunk, directions=d) for d in (common, None)
            )
            assert torch.equal(with_.delta_losses, without.delta_losses)
            assert torch.equal(with_.delta_losses_negative, without.delta_losses_negative)
    assert "9 of 51 parameters" in repr(common)


def test_directions_drawn_once_are_not_drawn_again(monkeypatch):
    loss = loss_of("mlp")
    common = common_directions(loss.net, key=fs.key(7), num=3)
    monkeypatch.setattr(module, "stack", lambda dirs: pytest.fail(f"drawn again: {dirs}"))
    flatness(loss, loss.net.theta, key=fs.key(7), n_directions=3, directions=common)


def test_directions_do_not_depend_on_theta_and_are_drawn_once_in_a_profile(monkeypatch):
    drawn = []
    monkeypatch.setattr(module, "stack", lambda dirs: drawn.extend(dirs) or fs.stack(dirs))
    loss = quadratic(torch.eye(3).double(), torch.ones(3).double())
    profile = flatness_profile(loss, zeros(3), key=fs.key(1), epsilons=(0.1, 0.2, 0.4), n_directions=11)
    assert len(drawn) == 11
    slopes = [(r.delta_losses - r.delta_losses_negative) / (2 * r.epsilon) for r in profile]
    assert_close(slopes[0], slopes[1])
    moved = flatness(loss, torch.ones(3).double(), key=fs.key(1), n_directions=11)
    assert_close((moved.delta_losses - moved.delta_losses_negative) / 0.2, 2 * slopes[0])


# Statistics, plans, settings


@pytest.mark.parametrize("level", [2.0, -1.0])
def test_documented_statistics_are_those_of_numpy_on_one_side(level):
    loss = quadratic(symmetric(4), torch.ones(4).double(), level)
    result = flatness(loss, zeros(4), key=fs.key(1), n_directions=31, epsilon=0.4, threshold=0.05)
    d, values = result.delta_losses.numpy(), result.asdict()
    limit = 0.1 * level if level > 0 else 0.1
    wanted = {
        "baseline_loss": level,
        "mean_delta_loss": d.mean(),
        "median_delta_loss": np.median(d),
        "max_delta_loss": d.max(),
        "std_delta_loss": d.std(ddof=1),
        "p90_delta_loss": np.percentile(d, 90),
        "p10_delta_loss": np.percentile(d, 10),
        "flatness_ratio": (d < limit).mean(),
        "flatness_fraction": (d < 0.05).mean(),
        "mean_delta_loss_stderr": d.std(ddof=1) / 31**0.5,
        "pair_mean": (d + result.delta_losses_negative.numpy()).mean() / 2,
        "pair_mean_stderr": ((d + result.delta_losses_negative.numpy()) / 2).std(ddof=1) / 31**0.5,
        "second_order": 8 * (d + result.delta_losses_negative.numpy()).mean() / 2 / 0.4**2,
    }
    for name, value in wanted.items():
        assert math.isclose(values[name], value, rel_tol=1e-12, abs_tol=1e-15), name
    assert 0 < values["flatness_ratio"] < 1
    assert values["flatness_fraction"] != values["flatness_ratio"]


def test_one_side_of_two_is_the_side_alone():
    loss = loss_of("mlp")
    two, one = (flatness(loss, loss.net.theta, key=fs.key(1), two_sided=side) for side in (True, False))
    assert torch.equal(two.delta_losses, one.delta_losses)
    assert one.delta_losses_negative is None
    assert (one.num_forwards, two.num_forwards) == (9 + 50, 9 + 100)
    assert not {"pair_mean", "second_order", "pair_variance_ratio", "delta_losses_negative"} & one.asdict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "gpt2", "cnn"])
def test_every_plan_gives_the_same_samples(name, monkeypatch):
    loss = loss_of(name)
    theta, run = loss.net.theta, {"key": fs.key(1), "n_directions": 5, "epsilons": (0.1, 0.3)}
    first = flatness_profile(loss, theta, **run)
    assert first[0].plan.chunk == 8
    others = [flatness_profile(loss, theta, chunk=chunk, **run) for chunk in (1, 2)]
    others.append(flatness_profile(loss, loss.layout.unravel(theta), **run))
    monkeypatch.setattr(directional, "LAZY_FROM", 1)
    if len(loss.batches) == 1:
        others.append(flatness_profile(loss, theta, **run))
        assert others[-1][0].plan.lazy
        common = common_directions(loss.net, key=fs.key(1), num=5)
        others.append(flatness_profile(loss, theta, directions=common, **run))
        assert not others[-1][0].plan.lazy
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert_close(a.delta_losses, b.delta_losses, rtol=1e-6, atol=1e-11)
            assert_close(a.delta_losses_negative, b.delta_losses_negative, rtol=1e-6, atol=1e-11)


def test_long_batches_are_evaluated_one_at_a_time():
    model = seeded(0, lambda: nn.Linear(2, 3))
    for rows, chunk in ((MAPPED_POSITIONS, 8), (MAPPED_POSITIONS + 1, 1)):
        x, y = torch.zeros(rows, 2), torch.zeros(rows, dtype=torch.long)
        for targets, criterion in ((y, fs.classification), (y.float(), fs.custom(lambda out, y: out[:, 0] - y))):
            loss = fs.objective(fs.functional(model), [(x, targets)], criterion)
            assert flatness(loss, loss.net.theta, key=fs.key(0), n_directions=1).plan.chunk == chunk
            assert flatness(loss, loss.net.theta, key=fs.key(0), n_directions=1, chunk=3).plan.chunk == 3


def test_a_profile_is_its_single_results():
    loss = loss_of("mlp")
    profile = flatness_profile(
        loss, loss.net.theta, key=fs.key(1), epsilons=(0.1, 0.5), normalize="layer", threshold=0.2
    )
    for epsilon, result in zip((0.1, 0.5), profile, strict=True):
        alone = flatness(loss, loss.net.theta, key=fs.key(1), epsilon=epsilon, normalize="layer", threshold=0.2)
        assert torch.equal(result.delta_losses, alone.delta_losses)
        assert str(result) == str(alone)


@pytest.mark.slow
@given(st.integers(0, 2**32), st.floats(0.1, 10), st.floats(-3, 3))
def test_laws_scaling_and_blindness_of_pairs_to_linear_terms(seed, scale, slope):
    hessian, gradient = symmetric(4, seed), torch.linspace(-1, 1, 4, dtype=torch.float64)
    run = {"key": fs.key(seed), "n_directions": 5}
    first = flatness(quadratic(hessian, gradient), zeros(4), **run)
    scaled = flatness(quadratic(scale * hessian, scale * gradient), zeros(4), **run)
    tilted = flatness(quadratic(hessian, gradient + slope), zeros(4), **run)
    assert_close(scaled.delta_losses, scale * first.delta_losses)
    assert_close(tilted.even, first.even, rtol=1e-9, atol=1e-14)


# What is missing, lost or wrong


def test_non_finite_losses_are_kept_counted_and_left_out_of_the_means():
    loss = of_theta(lambda t: t[0] + torch.where(t[0] > 0.05, math.inf, 0.0), 3)
    result = flatness(loss, zeros(3), key=fs.key(1), n_directions=40)
    values, finite = result.asdict(), result.delta_losses[result.delta_losses.isfinite()]
    other = int((~result.delta_losses_negative.isfinite()).sum())
    assert values["n_nonfinite"] == 40 - len(finite) > 0
    assert values["n_nonfinite_negative"] == other > 0
    assert math.isclose(values["mean_delta_loss"], float(finite.mean()))
    assert values["max_delta_loss"] == float(finite.max())
    assert result.pair_mean.num == 40 - values["n_nonfinite"] - other
    assert values["flatness_ratio"] == len(finite) / 40  # a loss that is not finite is not flat
    assert f"{values['n_nonfinite']} at +d, {other} at -d" in str(result)


def test_without_a_finite_loss_nothing_is_known_but_that_nothing_is_flat():
    loss = of_theta(lambda t: torch.where(t.abs().sum() > 0, math.nan, 1.0), 3)
    values = flatness(loss, zeros(3), key=fs.key(1), n_directions=4).asdict()
    assert values["flatness_ratio"] == values["flatness_fraction"] == 0
    assert all(
        math.isnan(values[name]) for name in ("mean_delta_loss", "max_delta_loss", "p90_delta_loss", "pair_mean")
    )


def test_one_direction_has_values_and_no_errors():
    values = flatness(loss_of("mlp"), loss_of("mlp").net.theta, key=fs.key(1), n_directions=1).asdict()
    delta = values["delta_losses"][0]
    for name in ("mean", "median", "max", "p90", "p10"):
        assert values[f"{name}_delta_loss"] == delta
    assert values["pair_mean"] == (delta + values["delta_losses_negative"][0]) / 2
    errors = [value for name, value in values.items() if name.endswith("_stderr")]
    assert len(errors) == 10
    assert all(math.isnan(value) for value in errors)
    assert math.isnan(values["std_delta_loss"])


def test_the_trace_is_a_matter_of_global_directions():
    loss = loss_of("mlp")
    result = flatness(loss, loss.net.theta, key=fs.key(1), n_directions=3, normalize="filter", epsilon=0.01)
    assert math.isnan(float(result.second_order.value))
    assert not math.isnan(float(result.pair_mean.value))
    with pytest.raises(ValueError, match="weighs the blocks of the Hessian"):
        result.expected_from_trace(Estimate(torch.ones(()), torch.zeros(()), 1))


def test_a_relative_step_of_nothing_is_refused_and_its_share_undefined():
    loss = quadratic(torch.eye(3).double(), zeros(3), 1.0)
    with pytest.raises(ValueError, match="which is 0 here"):
        flatness(loss, zeros(3), key=fs.key(1), relative=True)
    assert math.isnan(flatness(loss, zeros(3), key=fs.key(1)).epsilon_relative)


def test_half_precision_that_swallows_the_step_warns():
    loss = loss_of("mlp", torch.bfloat16)
    with pytest.warns(UserWarning, match="in half precision"):
        flatness(loss, loss.net.theta, key=fs.key(1), n_directions=2, epsilon=1e-4)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n_directions": 0}, "`n_directions` must be an integer of at least 1, got 0"),
        ({"threshold": 0.0}, "`threshold` must be a finite number above 0"),
        ({"chunk": 0}, "`chunk` must be an integer of at least 1"),
        ({"epsilons": ()}, "`epsilons` is empty"),
        *(
            ({"epsilons": (0.1, x)}, "`epsilon` must be a finite number above 0")
            for x in (0.0, -0.1, math.nan, math.inf)
        ),
    ],
)
def test_bad_requests_get_one_clear_line(wrong, says):
    loss = loss_of("mlp")
    with pytest.raises(ValueError, match=says):
        flatness_profile(loss, loss.net.theta, **{"key": fs.key(1), "epsilons": (0.1,)} | wrong)


def test_directions_of_another_kind_are_refused():
    loss, other = loss_of("mlp"), quadratic(torch.eye(3).double(), zeros(3))
    theta, common = loss.net.theta, common_directions(loss.net, key=fs.key(1), num=4)
    run = {"key": fs.key(1), "n_directions": 4, "directions": common}
    flatness(loss, theta, **run)
    for wrong, says in (
        ({"normalize": "filter"}, "are for `normalize='global'`"),
        ({"key": fs.key(2)}, "were drawn with"),
        ({"n_directions": 5}, "`n_directions` is 5, and `directions` has 4"),
        ({"directions": common_directions(other.net, key=fs.key(1), num=4)}, "are of another net"),
    ):
        with pytest.raises(ValueError, match=says):
            flatness(loss, theta, **run | wrong)
