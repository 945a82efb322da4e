"""The loss on planes and lines: closed forms, direct evaluation, errors over sequences, holes, bad input."""

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import CATALOGUE, IN_FLOAT32, loss_of, problem, seeded
from torch import nn
from torch.testing import assert_close

import funcscope as fs
from funcscope.landscape import evaluator, terms
from funcscope.landscape.axes import Axes, plane_directions
from funcscope.landscape.planes import loss_lines, loss_plane
from funcscope.landscape.roughness import quadratic_residual

WIDE = {"dtype": torch.float64}


def exact(function, size: int) -> fs.Loss:
    """A loss that is this function of theta, on one row of data: a linear layer of the unit vectors gives theta back."""
    net = fs.functional(seeded(0, lambda: nn.Linear(size, 1, bias=False, dtype=torch.float64)))
    criterion = fs.custom(lambda out, _: function(out[:, 0]).reshape(1))
    return fs.objective(net, [(torch.eye(size, **WIDE), torch.zeros(1))], criterion)


def quadratic(size: int = 5, seed: int = 0):
    A = fs.normal(fs.key(seed), torch.zeros(size, size, **WIDE))
    A, b = A + A.T, fs.normal(fs.key(seed + 1), torch.zeros(size, **WIDE))
    return exact(lambda t: t @ A @ t / 2 + b @ t + 3, size), A, b


def two(size: int, seed: int = 9) -> torch.Tensor:
    return fs.normal(fs.key(seed), torch.zeros(2, size, **WIDE))


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_the_plane_of_a_quadratic_in_closed_form(chunk):
    loss, A, b = quadratic()
    theta, axes = torch.linspace(-1, 1, 5, **WIDE), two(5)
    plane = loss_plane(loss, theta, axes, num=(5, 4), span=((-0.5, 0.5), (0.0, 0.9)), chunk=chunk)
    assert_close(plane.axis_values, torch.tensor([-0.5, -0.25, 0, 0.25, 0.5], **WIDE))
    assert_close(plane.axis_values_2, torch.tensor([0, 0.3, 0.6, 0.9], **WIDE))
    for i, a in enumerate(plane.axis_values):
        for j, c in enumerate(plane.axis_values_2):
            t = theta + a * axes[0] + c * axes[1]
            assert_close(plane.grid_losses[i, j], t @ A @ t / 2 + b @ t + 3)
    assert plane.statistics["quad_residual"] < 1e-12
    assert plane.grid_stderr.isnan().all()  # one sequence has no error
    assert_close(plane.displacement, torch.tensor([0.5, 0.9], **WIDE) * axes.norm(dim=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOGUE)
def test_both_plans_are_direct_evaluation(name):
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if name in IN_FLOAT32 else {"rtol": 1e-9, "atol": 1e-11}
    loss = loss_of(name)
    theta = loss.net.theta
    axes = plane_directions(loss.net, key=fs.key(0))
    planes = [loss_plane(loss, theta, axes, num=(3, 6), span=0.3, chunk=chunk) for chunk in (1, 4)]
    for plane in planes:
        for i, a in enumerate(plane.axis_values):
            for j, b in enumerate(plane.axis_values_2):
                assert_close(
                    plane.grid_losses[i, j], loss(theta + a * axes.vectors[0] + b * axes.vectors[1]), **tolerance
                )
        assert_close(plane.baseline_loss, float(loss(theta)), **tolerance)
        assert plane.num_forwards == 20
    loop, mapped = planes
    assert_close(loop.grid_stderr, mapped.grid_stderr, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "mlp", "cnn"])
def test_in_float32_the_plans_agree_to_1e_6_and_the_centre_of_the_loop_is_the_baseline(name):
    loss = loss_of(name, torch.float32)
    axes = plane_directions(loss.net, key=fs.key(1))
    loop, mapped = (loss_plane(loss, loss.net.theta, axes, num=13, span=0.2, chunk=chunk) for chunk in (1, 8))
    assert_close(loop.grid_losses, mapped.grid_losses, rtol=1e-6, atol=0)
    assert float(loop.grid_losses[6, 6]) == loop.baseline_loss
    assert float(loop.grid_delta_stderr[6, 6]) == 0
    assert_close(float(mapped.grid_losses[6, 6]), mapped.baseline_loss, rtol=1e-6, atol=0)
    lines = loss_lines(loss, loss.net.params, axes, num=13, span=0.2, chunk=1)
    assert_close(lines.losses[0], loop.grid_losses[:, 6], rtol=1e-6, atol=0)
    assert_close(lines.losses[1], loop.grid_losses[6], rtol=0, atol=0)  # the same steps from the same base


@pytest.mark.parametrize("name", ["gpt2", "mlp", "cnn"])
def test_the_baseline_has_the_rounding_of_the_points_that_it_is_compared_with(name):
    """Mapped matrix products round otherwise than those of a loop: a step of 0 would have a loss change."""
    loss = loss_of(name, torch.float32)
    axes = plane_directions(loss.net, key=fs.key(1))
    for chunk in (1, 8):
        lines = loss_lines(loss, loss.net.theta, axes, num=3, span=(0.0, 0.2), chunk=chunk)
        assert lines.delta_losses[:, 0].tolist() == lines.delta_stderr[:, 0].tolist() == [0.0, 0.0]
        assert lines.delta_losses[:, 1:].all()


def test_the_default_plan_follows_the_sizes(monkeypatch):
    loss = loss_of("gpt2", torch.float32)
    theta, axes = loss.net.theta, plane_directions(loss.net, key=fs.key(1))
    assert loss_plane(loss, theta, axes, num=2).chunk == 8
    for name in ("MAPPED_UP_TO", "MAPPED_POSITIONS", "MAPPED_WORK"):
        with monkeypatch.context() as patch:
            patch.setattr(evaluator, name, 20)
            assert loss_plane(loss, theta, axes, num=2).chunk == 1
    kept = loss_of("gpt2", torch.float32, attention="keep")
    assert loss_plane(kept, theta, axes, num=2).chunk == 1


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "mlp"])
def test_scoring_a_few_rows_at_a_time_changes_no_bit(name, monkeypatch):
    loss = loss_of(name, torch.float32, attention="keep")
    monkeypatch.setattr(terms, "ROWS", 100)
    sums, weights = terms.Values(loss)(loss.net.theta)
    wanted = loss.terms(loss.net.theta)
    assert torch.equal(sums, wanted[0])
    assert torch.equal(weights, wanted[1])


@pytest.mark.parametrize("num", [(3, 4), (9, 17)])
def test_the_roughness_of_a_linear_loss_is_its_slopes_at_every_resolution(num):
    slope = torch.tensor([1.0, -2.0, 4.0], **WIDE)
    loss = exact(lambda t: slope @ t + 10, 3)
    axes = torch.tensor([[1.0, 1, 0], [0, 0, 1]], **WIDE)
    plane = loss_plane(loss, torch.zeros(3, **WIDE), axes, num=num, span=((-1.0, 1.0), (-3.0, 2.0)))
    first, second = (num[0] - 1) * num[1], num[0] * (num[1] - 1)
    wanted = (1.0 * first + 4.0 * second) / (first + second)  # |slope| along d1 is 1, along d2 is 4
    found = plane.statistics
    assert found["roughness"] == pytest.approx(wanted)
    assert found["normalized_roughness"] == pytest.approx(wanted / abs(found["loss_mean"]))
    assert found["normalized_roughness_range"] == pytest.approx(wanted / (2 + 20))
    assert found["loss_max"] - found["loss_min"] == pytest.approx(2 + 20)


def original_roughness(grid: np.ndarray) -> float:
    n = len(grid)
    return float((np.abs(np.diff(grid, axis=0)).sum() + np.abs(np.diff(grid, axis=1)).sum()) / (2 * n * n))


def test_roughness_does_not_depend_on_the_resolution_where_the_original_does():
    loss = exact(lambda t: torch.sin(3 * t[0]) + torch.cos(2 * t[1]) * t[0], 2)
    found = {
        n: loss_plane(loss, torch.tensor([0.2, 0.1], **WIDE), torch.eye(2, **WIDE), num=n, span=0.8) for n in (11, 41)
    }
    coarse, fine = found[11].statistics["roughness"], found[41].statistics["roughness"]
    assert abs(coarse / fine - 1) < 0.05
    originals = {n: original_roughness(plane.grid_losses.numpy()) for n, plane in found.items()}
    assert originals[11] / originals[41] > 3  # scales as the step


def test_the_quadratic_residual_is_the_share_that_least_squares_leaves():
    loss = exact(lambda t: torch.exp(t[0]) + t[1] ** 3, 2)
    plane = loss_plane(loss, torch.zeros(2, **WIDE), torch.eye(2, **WIDE), num=(5, 6), span=1e-2)
    x, y = np.meshgrid(100 * plane.axis_values.numpy(), 100 * plane.axis_values_2.numpy(), indexing="ij")
    design = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1).reshape(-1, 6)
    z = plane.grid_losses.numpy().ravel()
    z = (z - z.mean()) / z.std()
    left = z - design @ np.linalg.lstsq(design, z, rcond=None)[0]
    assert plane.statistics["quad_residual"] == pytest.approx(np.sqrt((left**2).mean()), rel=1e-6)
    assert plane.statistics["quad_residual"] > 1e-6


def test_the_quadratic_residual_knows_no_unit():
    x, y = torch.linspace(-1, 1, 5, **WIDE), torch.linspace(-1, 1, 4, **WIDE)
    grid = (x[:, None] - 2 * y).square() + y
    assert quadratic_residual(1e-150 * grid, 1e-9 * x, 1e9 * y + 1e9) < 1e-9


def test_undefined_statistics_are_nan():
    x = torch.linspace(-1, 1, 3, **WIDE)
    assert math.isnan(quadratic_residual(torch.ones(3, 3, **WIDE), x, x))
    assert math.isnan(quadratic_residual(torch.arange(4.0, **WIDE).square().view(2, 2), x[::2], x[::2]))
    flat = loss_plane(exact(lambda t: 0 * t[0], 2), torch.ones(2, **WIDE), torch.eye(2, **WIDE), num=3).statistics
    assert flat["roughness"] == flat["loss_std"] == 0
    for name in ("normalized_roughness", "normalized_roughness_range", "quad_residual"):
        assert math.isnan(flat[name])


@pytest.mark.parametrize("chunk", [1, 2])
def test_points_that_are_not_finite_stay_holes_and_are_counted(chunk):
    loss = exact(lambda t: torch.sqrt(0.6 - t[0]) + 2 * t[1], 2)  # nan beyond 0.6
    theta, axes = torch.zeros(2, **WIDE), torch.eye(2, **WIDE)
    plane = loss_plane(loss, theta, axes, num=5, span=1.0, chunk=chunk)
    hole = plane.axis_values > 0.6
    assert (plane.grid_losses.isnan() == hole[:, None]).all()
    assert plane.n_nonfinite == 5
    kept = plane.grid_losses[:4]
    found = plane.statistics
    assert found["loss_mean"] == pytest.approx(float(kept.mean()))
    assert found["loss_std"] == pytest.approx(float(kept.std()))
    edges = torch.cat([kept.diff(dim=0).flatten(), kept.diff(dim=1).flatten()]).abs() / 0.5
    assert found["roughness"] == pytest.approx(float(edges.mean()))
    assert math.isfinite(found["quad_residual"])
    lines = loss_lines(loss, theta, axes, num=5, span=1.0, chunk=chunk)
    assert lines.n_nonfinite == 1


def test_a_coordinate_that_overflows_does_not_spoil_the_points_after_it():
    """Steps from an infinite coordinate would not lead back to a finite one."""
    net = fs.functional(seeded(0, lambda: nn.Linear(2, 1, bias=False)))
    criterion = fs.custom(lambda out, _: out[:1].abs().log())
    loss = fs.objective(net, [(torch.eye(2), torch.zeros(1))], criterion)
    axes = torch.tensor([[0.0, 1.0], [3e38, 0.0]])
    plane = loss_plane(loss, torch.ones(2), axes, num=(2, 7), span=((0.0, 1.0), (-4.0, 2.0)), chunk=1)
    wanted = torch.tensor([math.inf, math.inf, math.inf, math.log(3e38), 0.0, math.log(3e38), math.inf], **WIDE)
    assert_close(plane.grid_losses, wanted.expand(2, 7), rtol=1e-6, atol=1e-6)


def classifier(rows: int, seed: int = 3) -> fs.Loss:
    model = seeded(0, lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double())
    x, y = seeded(seed, lambda: (torch.randn(rows, 4, **WIDE), torch.randint(0, 3, (rows,))))
    return fs.objective(fs.functional(model), [(x, y)], fs.classification)


@pytest.mark.parametrize("chunk", [1, 8])
def test_errors_are_those_of_a_hand_made_paired_sample(chunk):
    loss = classifier(20)
    theta, axes = loss.net.theta, plane_directions(loss.net, key=fs.key(0))
    plane = loss_plane(loss, theta, axes, num=(3, 5), span=0.5, chunk=chunk)
    t = theta + plane.axis_values[2] * axes.vectors[0] + plane.axis_values_2[1] * axes.vectors[1]
    there, here = (loss.terms(x)[0] for x in (t, theta))
    assert_close(plane.grid_stderr[2, 1], there.std() / 20**0.5)
    assert_close(plane.grid_delta_stderr[2, 1], (there - here).std() / 20**0.5)
    lines = loss_lines(loss, theta, axes, num=5, span=0.5, chunk=chunk)
    assert_close(lines.delta_stderr[1], plane.grid_delta_stderr[1])
    assert_close(lines.delta_losses[1], plane.grid_losses[1] - plane.baseline_loss)


@pytest.mark.slow
def test_paired_errors_cover_the_loss_change_of_the_population():
    """95 % intervals, 200 samples of 40 rows from a population of 4,000: two-sided binomial at 4 standard deviations."""
    whole = classifier(4000)
    theta, axes = whole.net.theta, plane_directions(whole.net, key=fs.key(0))
    options = {"num": 2, "span": (0.0, 0.3), "chunk": 1}
    truth = loss_lines(whole, theta, axes, **options).delta_losses[0, 1]
    (x, labels), inside = whole.batches[0], 0
    for trial in range(200):
        rows = torch.randint(4000, (40,), generator=torch.Generator().manual_seed(trial))
        part = fs.objective(whole.net, [(x[rows], labels.index[rows])], fs.classification)
        found = loss_lines(part, theta, axes, **options)
        inside += abs(float((found.delta_losses[0, 1] - truth) / found.delta_stderr[0, 1])) < 2.023
    assert abs(inside - 190) < 4 * (200 * 0.95 * 0.05) ** 0.5 + 1


def test_batches_split_are_the_whole_and_inputs_are_unchanged():
    name, dtype = "gpt2", torch.float64
    loss = loss_of(name, dtype)
    model, batches, criterion = problem(name, dtype)
    rows = [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]
    split = fs.objective(loss.net, rows, criterion)
    theta, axes = loss.net.theta, plane_directions(loss.net, key=fs.key(0))
    before = [x.clone() for x in (theta, axes.vectors, *model.parameters(), *loss.tensors())]
    one, many = (loss_plane(x, theta, axes, num=3, span=0.3, chunk=chunk) for x, chunk in ((loss, 1), (split, 1)))
    loss_plane(loss, theta, axes, num=3, span=0.3, chunk=4)
    for field in ("grid_losses", "grid_stderr", "grid_delta_stderr"):
        assert_close(getattr(one, field), getattr(many, field))
    assert one.num_batches == len(batches)
    assert many.asdict()["n_batches_used"] == 5
    after = [theta, axes.vectors, *model.parameters(), *loss.tensors()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_a_relative_span_is_a_share_of_theta_along_every_axis():
    loss = classifier(6)
    theta, norm = loss.net.theta, float(loss.net.theta.norm())
    axes = two(len(theta)) * torch.tensor([[1.0], [100.0]], **WIDE)
    plane = loss_plane(loss, theta, axes, num=3, span=0.2, relative_span=True)
    assert_close(plane.displacement, torch.full((2,), 0.2 * norm, **WIDE))
    assert_close(plane.relative_displacement, torch.full((2,), 0.2, **WIDE))
    assert_close(plane.axis_values * float(axes[0].norm()), torch.tensor([-0.2, 0, 0.2], **WIDE) * norm)
    absolute = loss_plane(loss, theta, axes, num=3, span=0.2)
    assert_close(absolute.actual_span, torch.full((2,), 0.2, **WIDE))
    lines = loss_lines(loss, theta, axes, num=3, span=(0.0, 0.2), relative_span=True)
    assert_close(lines.displacement, torch.full((2,), 0.2 * norm, **WIDE))
    assert_close(lines.axis_values, torch.tensor([0.0, 0.1, 0.2], **WIDE))
    assert_close(lines.coefficients[1] * float(axes[1].norm()), lines.axis_values * norm)


def test_parallel_axes_are_allowed_and_said_and_half_precision_is_cast_inside():
    loss = loss_of("gpt2", torch.bfloat16)
    theta = loss.net.theta
    axes = torch.stack([theta, -2 * theta])
    plane = loss_plane(loss, theta, axes, num=3, span=0.1)
    assert plane.asdict()["orthogonality_check"] == pytest.approx(1.0)
    assert_close(plane.grid_losses[0, 1], loss(0.9 * theta).double(), rtol=2e-2, atol=0)
    for chunk in (1, 8):
        centre = loss_plane(loss, theta, axes, num=3, span=0.1, chunk=chunk)
        assert centre.grid_losses.isfinite().all()


def test_bad_requests_get_one_clear_line():
    loss = classifier(5)
    theta, axes, plane = loss.net.theta, plane_directions(loss.net, key=fs.key(0)), inspect.unwrap(loss_plane)
    for span in (0.0, -1.0, float("nan"), math.inf):
        with pytest.raises(ValueError, match="`span` must be a finite number above 0"):
            plane(loss, theta, axes, span=span)
    with pytest.raises(ValueError, match="low < high"):
        plane(loss, theta, axes, span=((0.1, 0.1), (0.0, 1.0)))
    for num in (1, (3, 1)):
        with pytest.raises(ValueError, match="`num` must be an integer of at least 2"):
            plane(loss, theta, axes, num=num)
    with pytest.raises(ValueError, match="a plane has two axes, got 3"):
        plane(loss, theta, torch.eye(len(theta), **WIDE)[:3])
    with pytest.raises(ValueError, match="must be a flat vector of shape"):
        plane(loss, theta, torch.eye(7, **WIDE)[:2])
    with pytest.raises(ValueError, match="floating matrix"):
        plane(loss, theta, theta)
    with pytest.raises(ValueError, match="direction 2 have a norm of 0"):
        plane(loss, theta, torch.stack([theta, 0 * theta]))
    with pytest.raises(ValueError, match="not finite"):
        plane(loss, theta, Axes(torch.stack([theta, theta / 0]), ("a", "b"), "given"))
    with pytest.raises(ValueError, match=r"share of .* which is 0 here"):
        plane(loss, 0 * theta, axes, relative_span=True)
    with pytest.raises(ValueError, match="the loss at theta is nan"):
        plane(loss, theta * float("nan"), axes)
    with pytest.raises(ValueError, match="`chunk` must be an integer of at least 1"):
        plane(loss, theta, axes, chunk=0)
    with pytest.raises(ValueError, match="`theta` must be a flat vector"):
        plane(loss, theta[:-1], axes)
    with pytest.raises(ValueError, match="`num` must be an integer of at least 2"):
        loss_lines(loss, theta, axes, num=1)


def test_a_loss_that_is_no_function_of_theta_is_refused():
    class Drifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 2, **WIDE))
            self.register_buffer("calls", torch.zeros(1, **WIDE))

        def forward(self, x):
            self.calls += 1
            return x @ self.weight.T * self.calls

    data = seeded(0, lambda: (torch.randn(4, 2, **WIDE), torch.tensor([0, 1, 2, 0])))
    loss = fs.objective(
        fs.functional(seeded(0, Drifting)), [(data[0] * torch.tensor([1.0, 2.0]), data[1])], fs.classification
    )
    loss = replace(loss, criterion=replace(loss.criterion, positionwise=False))
    with torch.no_grad():
        loss.net.params["weight"].copy_(torch.arange(6.0).view(3, 2))
    with pytest.raises(ValueError, match=r"at one call and .* at the next"):
        loss_plane(loss, loss.net.theta, torch.eye(6, **WIDE)[:2], chunk=1)


def test_parameters_of_wrong_shapes_are_refused_and_half_precision_vectors_widened():
    loss = loss_of("mlp", torch.float32)
    axes = fs.plane_directions(loss.net, key=fs.key(0))
    turned = {name: value.T.contiguous() if value.ndim == 2 else value for name, value in loss.net.params.items()}
    with pytest.raises(ValueError, match=r"`theta\['0.weight'\]` must have shape \(6, 4\), got \(4, 6\)"):
        fs.loss_plane(loss, turned, axes, num=3)
    half = loss.net.theta.bfloat16()
    for chunk in (1, 8):
        wide, narrow = (fs.loss_lines(loss, theta, axes, num=3, chunk=chunk).losses for theta in (half.float(), half))
        assert torch.equal(wide, narrow)


def test_a_grid_that_half_precision_does_not_resolve_is_told():
    loss = loss_of("gpt2", torch.bfloat16)
    axes = fs.plane_directions(loss.net, key=fs.key(0))
    with pytest.warns(UserWarning, match=r"apart in half precision: rounding of the weights is part"):
        fs.loss_plane(loss, loss.net.theta, axes, num=5, span=0.01)
    with pytest.warns(UserWarning, match="apart in half precision"):
        fs.loss_lines(loss, loss.net.theta, axes, num=41, span=0.1)
    fs.loss_plane(loss, loss.net.theta, axes, num=3, span=0.1)  # warnings are errors


def test_axes_are_taken_in_every_form_that_they_come_in():
    loss = loss_of("mlp")
    theta = loss.net.theta
    dirs = fs.directions(loss.net, key=fs.key(0), num=2)
    wanted = fs.loss_plane(loss, theta, fs.stack(dirs), num=3).grid_losses
    for axes in (dirs, list(dirs)):
        assert torch.equal(fs.loss_plane(loss, theta, axes, num=3).grid_losses, wanted)
    run = fs.principal_directions([theta, theta + dirs[0].dense(), theta + dirs[1].dense()])
    assert torch.equal(
        fs.loss_plane(loss, theta, run, num=3).grid_losses, fs.loss_plane(loss, theta, run.axes, num=3).grid_losses
    )
    for bad in ([theta, theta], torch.zeros(0, len(theta)), "xy"):
        with pytest.raises(ValueError, match=r"`axes` must be made by `plane_directions`, .*, got "):
            inspect.unwrap(fs.loss_lines)(loss, theta, bad, num=3)


def test_spans_and_numbers_of_points_in_every_form():
    loss = loss_of("mlp")
    theta, axes = loss.net.theta, fs.plane_directions(loss.net, key=fs.key(0))
    plane = inspect.unwrap(fs.loss_plane)
    one = plane(loss, theta, axes, num=3, span=(np.float32(-0.1), np.float32(0.3)))
    assert one.axis_values.tolist() == pytest.approx([-0.1, 0.1, 0.3])
    two = plane(loss, theta, axes, num=[3, 2], span=[[-0.1, 0.3], [0.1, 0.2]])
    assert two.grid_losses.shape == (3, 2)
    assert type(plane(loss, theta, axes, num=2, span=np.float32(0.1)).asdict()["span"]) is float
    for bad in (((0, 1), (0, 1), (0, 1)), (), (0.1,), 0.0):
        with pytest.raises(ValueError, match=r"`span` must be a"):
            plane(loss, theta, axes, num=3, span=bad)
    with pytest.raises(ValueError, match=r"`num` must be an integer of at least 2, or two of them"):
        plane(loss, theta, axes, num=(3, 4, 5))
    kept = two.grid_losses.clone()
    two.asdict()["grid_losses"][:] = 0
    assert torch.equal(two.grid_losses, kept)


def test_a_metric_that_writes_to_what_it_is_given_is_refused_and_named():
    loss, theta = small_loss()
    for bad in (lambda out, _: out.sub_(1.0)[..., 0], lambda out, labels: labels.zero_() + 0 * out[..., 0]):
        with pytest.raises(ValueError, match=r"writes to its arguments.*write to a clone"):
            fs.linear_path(loss, theta, theta + 1, num=3, metric={"bad": bad})


def test_names_of_metrics_do_not_meet_those_of_their_errors():
    loss, theta = small_loss()

    def right(out, labels):
        return out.argmax(-1) == labels

    for name in ("a_stderr", "a_baseline", "a_excess", "a_delta_stderr"):
        with pytest.raises(ValueError, match=rf"`metric` has '{name}'.*choose another"):
            fs.linear_path(loss, theta, theta + 1, num=3, metric={"a": right, name: right})
    with pytest.raises(TypeError, match="must return real numbers"):
        fs.linear_path(loss, theta, theta + 1, num=3, metric={"a": lambda out, _: out[..., 0] * 1j})


def test_large_integers_of_a_metric_are_exact_and_frames_have_its_errors():
    model = seeded(0, lambda: torch.nn.Linear(3, 2))
    inputs = fs.normal(fs.key(1), torch.zeros(6, 3))
    loss = fs.objective(fs.functional(model), [(inputs, torch.tensor([0, 1, 0, 1, 1, 0]))], fs.classification)
    theta = loss.net.theta
    metric = {"big": lambda out, labels: labels * 0 + 2**24 + 1, "right": lambda out, labels: out.argmax(-1) == labels}
    path = fs.linear_path(loss, theta, theta + 1, num=3, metric=metric)
    assert path.metrics["big"].tolist() == [2**24 + 1] * 3
    rows = path.frame().set_index("quantity").loc["metric_right"]
    assert_close(torch.tensor(rows["value"].to_numpy()), path.metrics["right"])
    assert_close(torch.tensor(rows["stderr"].to_numpy()), path.metrics_stderr["right"])


def small_loss():
    model = seeded(0, lambda: torch.nn.Linear(3, 2)).double()
    inputs = fs.normal(fs.key(1), torch.zeros(6, 3, dtype=torch.float64))
    loss = fs.objective(fs.functional(model), [(inputs, torch.tensor([0, 1, 0, 1, 1, 0]))], fs.classification)
    return loss, loss.net.theta
