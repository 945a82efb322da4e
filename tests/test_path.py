"""Straight paths between models, their barriers, and the matrix of barriers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import loss_of
from torch import nn
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.keys import uniform
from funcscope.landscape import evaluator
from funcscope.landscape import path as module
from funcscope.landscape.barriers import LossPath
from funcscope.landscape.path import barrier_matrix, linear_path
from funcscope.landscape.terms import Values


def point(size=1):
    """A model that is its parameters: x -> theta . x."""
    return fs.functional(nn.Linear(size, 1, bias=False, device="meta").to_empty(device="cpu").double())


def loss_from(function, n=1, size=1, seed=0, weights=None):
    """The mean over n sequences of function(theta . x, y), with x of ones where there is one parameter."""
    x = torch.ones(n, 1) if size == 1 else fs.normal(fs.fold_in(fs.key(seed), "x"), torch.empty(n, size))
    y = fs.normal(fs.fold_in(fs.key(seed), "y"), torch.empty(n, 1))
    w = torch.ones(n, 1) if weights is None else weights[:, None]
    criterion = fs.custom(lambda out, target: (function(out, target[0]), target[1]))
    return fs.objective(point(size), [(x.double(), (y.double(), w.double()))], criterion)


def wells(tilt=0.0):
    return loss_from(lambda out, y: (out**2 - 1) ** 2 + tilt * out)


def vector(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def drawn(seed, size):
    return fs.normal(fs.fold_in(fs.key(seed), "theta"), torch.empty(size, dtype=torch.float64))


def path_of(sums, weights=None):
    sums = torch.as_tensor(sums, dtype=torch.float64)
    weights = torch.ones(sums.shape[1], dtype=torch.float64) if weights is None else weights
    return LossPath("line", sums, weights, 1.0, 2.0**-53, 1, len(sums))


# Closed forms.


@given(seed=st.integers(0, 2**32), num=st.integers(1, 9).map(lambda k: 2 * k + 1), chunk=st.sampled_from([1, 3, None]))
def test_a_quadratic_has_its_closed_form(seed, num, chunk):
    """Oracle: L(t) - chord = -t(1-t) d'Hd / 2 for every H, definite or not."""
    loss = loss_from(lambda out, y: y * out**2 / 2 + out, n=5, size=3, seed=seed)
    a, b = drawn(seed, 3), drawn(seed + 1, 3)
    path = linear_path(loss, a, b, num=num, chunk=chunk)
    (x, (y, _)) = loss.batches[0]
    hessian = x.T @ (y * x) / 5
    bend, t = (b - a) @ hessian @ (b - a), torch.linspace(0, 1, num, dtype=torch.float64)
    slope = (x.mean(0) + hessian @ a) @ (b - a)
    assert_close(path.coefficients, t)
    assert_close(path.losses, loss(a) + slope * t + bend * t**2 / 2, rtol=1e-9, atol=1e-9)
    assert_close(path.excess, -bend * t * (1 - t) / 2, rtol=1e-9, atol=1e-9)
    assert_close(path.barrier_linear.value, (-bend).clamp(min=0) / 8, rtol=1e-9, atol=1e-9)
    highest = (slope * t + bend * t**2 / 2).max()
    assert_close(path.barrier_max.value, highest - (slope + bend / 2).clamp(min=0), rtol=1e-9, atol=1e-9)
    assert path.distance == pytest.approx(float((b - a).norm()), rel=1e-12)
    if 0 < path.argmax < num - 1:
        assert_close(path.curvature.value, bend, rtol=1e-7, atol=1e-7)
        assert path.curvature_per_distance == pytest.approx(float(bend) / path.distance**2, rel=1e-6)


def test_a_tilted_double_well_has_its_two_barriers_and_the_rise_between_its_ends_is_none():
    tilt = 0.25
    path = linear_path(wells(tilt), vector(-1.0), vector(1.0), num=5)
    assert path.losses.tolist() == [-0.25, 0.4375, 1.0, 0.6875, 0.25]
    assert float(path.barrier_linear.value) == 1.0
    assert float(path.barrier_max.value) == 1.0 - tilt
    assert float(path.losses.max() - path.losses[[0, -1]].min()) == 1.0 + tilt  # the original's, which counts the rise
    assert path.argmax == path.argmax_loss == 2
    assert float(path.curvature.value) == -16 + 32 / 4**2  # L'' + h^2 L''''/12
    assert path.curvature_per_distance == (-16 + 2) / 4
    assert path.total_variation == 2.0
    downhill = linear_path(loss_from(lambda out, y: -out), vector(0.0), vector(1.0))
    assert float(downhill.losses.max() - downhill.losses[[0, -1]].min()) == 1.0  # negative control
    assert abs(float(downhill.barrier_max.value)) + abs(float(downhill.barrier_linear.value)) < 1e-15
    assert math.isnan(float(linear_path(wells(), vector(0.5), vector(1.0)).curvature.value))  # a maximum at an end


def test_the_two_maxima_are_at_different_points():
    path = path_of([[0.0], [4.0], [6.0], [0.0], [9.0]])
    assert (path.argmax, path.argmax_loss) == (1, 4)
    assert (float(path.barrier_linear.value), float(path.barrier_max.value)) == (1.75, 0.0)


# The way there.


def test_the_points_are_the_nominal_ones_where_the_documented_loop_loses_its_start():
    """The loss is theta itself, from 0 to 1, so that losses are the coefficients that were used."""
    live = {"w": torch.zeros(1)}
    original = dict(live)  # aliases of the live weights, as a `state_dict()` is
    effective = []
    for share in (0, 0.2, 0.4, 0.6, 0.8, 1.0):
        live["w"].copy_((1 - share) * original["w"] + share * torch.ones(1))
        effective.append(float(live["w"]))
    assert effective == pytest.approx([0, 0.2, 0.52, 0.808, 0.9616, 1])
    for chunk in (1, 2, 8):
        path = linear_path(loss_from(lambda out, y: out), vector(0.0), vector(1.0), num=6, chunk=chunk)
        assert path.losses.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1], abs=1e-15)


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt2", "llama"])
def test_a_path_is_direct_evaluation_and_leaves_its_inputs_as_they_were(name):
    loss = loss_of(name)
    a, b = loss.net.theta, loss.net.theta + 0.3 * drawn(1, loss.layout.num)
    kept = a.clone(), b.clone(), {n: p.detach().clone() for n, p in loss.net.params.items()}
    paths = [linear_path(loss, a, b, num=6, chunk=chunk, buffers="fixed") for chunk in (1, 3, None)]
    paths.append(linear_path(loss, loss.net.params, loss.layout.unravel(b), num=6, buffers="fixed"))
    direct = torch.stack([loss.terms((1 - k / 5) * a + k / 5 * b)[0] for k in range(6)]).detach()
    for path in paths:
        assert_close(path.sums, direct, rtol=1e-5, atol=1e-5)  # some families compute in float32 inside
        with torch.no_grad():  # the end points themselves, to the last bit
            assert torch.equal(path.sums[0], Values(loss)(a)[0])
            assert torch.equal(path.sums[-1], Values(loss)(b)[0])
        assert_close(path.losses[2].item(), float(loss(0.6 * a + 0.4 * b)), rtol=1e-6, atol=1e-6)
        assert path.excess[[0, -1]].tolist() == [0.0, 0.0]
    assert [p.chunk for p in paths] == [1, 3, 8, 8]
    assert torch.equal(a, kept[0])
    assert torch.equal(b, kept[1])
    assert all(torch.equal(p, kept[2][n]) for n, p in loss.net.params.items())


@pytest.mark.parametrize("num", [3, 6, 8, 11, 21])
def test_the_points_are_the_convex_combinations_from_either_side(num):
    a, b = drawn(1, 50).float(), drawn(2, 50).float()
    there, back = module.on_line(a, b, num), module.on_line(b, a, num)
    row, mirror = torch.empty(50), torch.empty(50)
    for i in range(num):
        there(i, row)
        back(num - 1 - i, mirror)
        assert torch.equal(row, mirror)
        assert_close(row.double(), ((num - 1 - i) * a.double() + i * b.double()) / (num - 1), rtol=1e-6, atol=1e-6)
        if i in (0, num - 1):
            assert torch.equal(row, a if i == 0 else b)


@given(seed=st.integers(0, 2**32), num=st.integers(3, 12))
def test_swapping_the_ends_mirrors_everything_exactly(seed, num):
    loss = loss_from(lambda out, y: torch.sin(2 * out) + y * out, n=4, size=3, seed=seed)
    a, b = drawn(seed, 3), drawn(seed + 1, 3)
    there, back = linear_path(loss, a, b, num=num, chunk=1), linear_path(loss, b, a, num=num, chunk=1)
    for name in ("losses", "stderr", "excess", "excess_stderr"):
        assert torch.equal(getattr(there, name), getattr(back, name).flip(0)), name
    assert there.barrier_max == back.barrier_max
    assert there.barrier_linear == back.barrier_linear
    assert (there.distance, there.is_connected) == (back.distance, back.is_connected)
    assert there.argmax == num - 1 - back.argmax or there.barrier_linear.value == 0


@pytest.mark.slow
@given(seed=st.integers(0, 2**32), shift=st.floats(-5, 5), num=st.integers(3, 9))
def test_order_and_invariance_of_the_barriers(seed, shift, num):
    """0 <= barrier_max <= barrier_linear; a constant moves neither, a slope along the path not the second."""
    weights = 1 + torch.arange(6.0)

    def moved(constant, slope):
        bent = loss_from(
            lambda out, y: torch.cos(3 * out + y) + constant + slope * out, n=6, seed=seed, weights=weights
        )
        return linear_path(bent, vector(0.0), vector(2.0), num=num)

    plain, constant, slope = moved(0.0, 0.0), moved(shift, 0.0), moved(0.0, shift)
    assert 0 <= plain.barrier_max.value <= plain.barrier_linear.value
    for name in ("barrier_max", "barrier_linear"):
        for number in ("value", "stderr"):
            wanted = getattr(getattr(plain, name), number)
            assert_close(getattr(getattr(constant, name), number), wanted, rtol=1e-9, atol=1e-9)
    assert_close(slope.barrier_linear.value, plain.barrier_linear.value, rtol=1e-9, atol=1e-9)
    assert_close(slope.excess_stderr, plain.excess_stderr, rtol=1e-9, atol=1e-9)


def test_a_model_and_itself_have_no_barrier():
    loss = loss_of("gpt2", torch.float32)
    for chunk in (1, 8):
        path = linear_path(loss, loss.net.theta, loss.net.theta, chunk=chunk)
        assert path.distance == 0
        assert path.is_connected
        assert float(path.barrier_linear.value) <= 4 * path.unit_roundoff * float(path.losses[0])
        assert math.isnan(path.curvature_per_distance)
        if chunk == 1:
            assert float(path.barrier_max.value) == float(path.barrier_linear.value) == path.total_variation == 0


def test_rounding_along_a_straight_loss_is_no_barrier():
    loss = loss_from(lambda out, y: 0.7 + 0 * y + out / 3, n=4)  # no scatter between sequences: an error of 0
    paths = [linear_path(loss, vector(0.1), vector(x), num=41) for x in (0.2, 0.7, 1.3, 3.1)]
    assert any(
        float(p.barrier_linear.value) > 2 * float(p.barrier_linear.stderr) for p in paths
    )  # why there is a floor
    assert all(p.is_connected for p in paths)


# Errors.


def test_errors_are_paired_by_hand():
    weights = vector(1.0, 2.0, 5.0, 0.0)
    sums = vector(0.0, 1.0, 2.0, 0.0, 3.0, 1.0, 9.0, 0.0, 4.0, 2.0, 4.0, 0.0, 1.0, 1.0, 1.0, 0.0).view(4, 4)
    path = path_of(sums, weights)

    def by_hand(s):
        mean = sum(s[:3]) / 8
        return mean, math.sqrt(3 / 2 * sum((x - mean * w) ** 2 for x, w in zip(s, (1, 2, 5), strict=False)) / 64)

    rows = sums.tolist()
    for i in range(4):
        chord = [(1 - i / 3) * x + i / 3 * y for x, y in zip(rows[0], rows[3], strict=True)]
        excess = [x - y for x, y in zip(rows[i], chord, strict=True)]
        assert (path.losses[i].item(), path.stderr[i].item()) == pytest.approx(by_hand(rows[i]))
        assert (path.excess[i].item(), path.excess_stderr[i].item()) == pytest.approx(by_hand(excess), abs=1e-15)
    assert (path.argmax, path.argmax_loss) == (1, 1)
    rise = [x - y for x, y in zip(rows[1], rows[0], strict=True)]  # the ends are 3/8 and 3/8: the first counts
    assert (float(path.barrier_max.value), float(path.barrier_max.stderr)) == pytest.approx(by_hand(rise))
    assert path.barrier_linear.num == 3
    assert float(path.barrier_linear.stderr) == float(path.excess_stderr[1])
    bend = [9 * (x - 2 * y + z) for x, y, z in zip(*rows[:3], strict=True)]
    assert (float(path.curvature.value), float(path.curvature.stderr)) == pytest.approx(by_hand(bend))
    assert float(path.barrier_linear.stderr) != pytest.approx(float(path.stderr[1]))  # negative control: unpaired


def test_the_higher_end_is_the_one_that_counts():
    path = path_of([[1.0, 1.0, 2.0], [8.0, 9.0, 9.0], [6.0, 5.0, 7.0]])
    rise = torch.tensor([2.0, 4.0, 2.0], dtype=torch.float64)
    assert_close(path.barrier_max.value, rise.mean())
    assert_close(path.barrier_max.stderr, rise.std() / 3**0.5)


def test_error_bars_of_a_barrier_cover_its_true_value():
    """Sequences drawn anew 300 times; a barrier of 2, one point between the ends, so that no maximum is selected."""
    inside, scores = 0, []
    for i in range(300):
        k = fs.fold_in(fs.key(7), i)
        weights = 1 + 3 * uniform(fs.fold_in(k, "w"), torch.empty(40, dtype=torch.float64))
        noise = fs.normal(k, torch.empty(3, 40, dtype=torch.float64)) + 5 * fs.normal(
            fs.fold_in(k, "common"), torch.empty(40, dtype=torch.float64)
        )
        path = path_of((vector(1.0, 4.0, 3.0)[:, None] + noise) * weights, weights)
        scores.append(float((path.barrier_linear.value - 2) / path.barrier_linear.stderr))
        inside += abs(scores[-1]) < 2
    assert abs(inside / 300 - 0.954) < 3.5 * math.sqrt(0.954 * 0.046 / 300)
    assert abs(np.mean(scores)) < 3.5 / math.sqrt(300)


def test_a_flat_path_is_connected_mostly_though_its_barrier_is_never_below_0():
    """The negative control of `barrier <= 0`: noise alone makes it positive."""
    connected = above = 0
    for i in range(200):
        noise = fs.normal(fs.fold_in(fs.key(8), i), torch.empty(3, 50, dtype=torch.float64))
        path = path_of(noise + 1)
        above += bool(path.barrier_linear.value > 0)
        connected += bool(path.is_connected)
    assert 60 < above < 140
    assert connected > 180


@pytest.mark.parametrize(
    ("sums", "said"),
    [
        ([[0, 0], [1, 1], [0, 0]], False),
        ([[0, 0], [0, 1], [0, 0]], True),  # 0.5 ± 0.5
        ([[0, 0], [1, 2], [0, 0]], False),  # 1.5 ± 0.5
        ([[0], [1], [0]], None),  # one sequence has no error
        ([[0], [0], [0]], True),
        ([[1], [1 + 2**-52], [1]], True),  # rounding
        ([[0, 0], [math.inf, 0], [0, 0]], False),
        ([[0, 0], [math.nan, 0], [0, 0]], None),
        ([[0, 0], [math.nan, 0], [1, 1], [0, 0]], False),
        ([[0, 0], [-math.inf, 0], [0, 0]], True),
    ],
)
def test_what_is_said_of_a_connection(sums, said):
    assert path_of(sums).is_connected is said


def test_the_tolerance_is_in_standard_errors():
    path = path_of([[0, 0], [1, 2], [0, 0]])
    assert (path.connected(2.9), path.connected(3.1)) == (False, True)


# Losses that are not finite.


def test_an_infinite_loss_is_an_infinite_barrier():
    path = linear_path(loss_from(lambda out, y: out**-2.0, n=3), vector(-1.0), vector(1.0), num=5)
    assert path.losses.tolist() == [1.0, 4.0, math.inf, 4.0, 1.0]
    assert (float(path.barrier_max.value), float(path.barrier_linear.value)) == (math.inf, math.inf)
    assert math.isnan(float(path.barrier_linear.stderr))
    assert (path.n_nonfinite, path.is_connected, path.argmax) == (1, False, 2)


def test_a_loss_of_nan_is_counted_and_left_out_of_the_maxima():
    path = linear_path(loss_from(lambda out, y: out**2 / out.abs(), n=3), vector(-1.0), vector(1.0), num=5)
    assert path.losses[2].isnan()
    assert (path.n_nonfinite, float(path.barrier_linear.value), path.is_connected) == (1, 0.0, None)
    assert math.isnan(path.asdict()["losses"][2])


# How it is evaluated.


def test_a_loop_where_the_model_is_large_or_attention_is_kept(monkeypatch):
    kept = loss_of("gpt2", attention="keep")
    loss = loss_of("mlp")
    monkeypatch.setattr(evaluator, "mapped", lambda *_: pytest.fail("mapped"))
    for one, most in ((kept, kept.layout.num), (loss, loss.layout.num - 1)):
        monkeypatch.setattr(evaluator, "MAPPED_UP_TO", most)
        path = linear_path(one, one.net.theta, one.net.theta + 0.1, num=4)
        assert path.chunk == 1
    monkeypatch.setattr(evaluator, "MAPPED_UP_TO", loss.layout.num)
    with pytest.raises(pytest.fail.Exception):
        linear_path(loss, loss.net.theta, loss.net.theta + 0.1, num=4)


def test_every_point_is_evaluated_once_and_nothing_is_recorded(monkeypatch):
    loss, calls = loss_of("mlp"), []
    rows = Values.rows
    monkeypatch.setattr(Values, "rows", lambda self, theta: calls.append(theta) or rows(self, theta))
    start = loss.net.theta.requires_grad_()
    path = linear_path(loss, start, loss.net.theta + 1, num=7, chunk=1)
    assert len(calls) == path.num_forwards == 7
    assert not path.sums.requires_grad
    assert len({id(x) for x in calls[2:]}) == 1  # one buffer, of which there are views
    calls.clear()
    found = barrier_matrix(loss, [drawn(i, loss.layout.num) for i in range(4)], num=5, chunk=1)
    assert len(calls) == found.num_forwards == 4 + 6 * 3


def test_no_graph_is_made():
    recording = []
    loss = loss_from(lambda out, y: recording.append(torch.is_grad_enabled()) or out)
    linear_path(loss, vector(0.0).requires_grad_(), vector(1.0), num=4, chunk=1)
    assert len(recording) >= 4
    assert not any(recording)


def test_a_model_that_cannot_be_mapped_is_looped_over():
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) if bool(self.weight.sum() > 0) else super().forward(-x)

    model = Branching(1, 1, bias=False, device="meta").to_empty(device="cpu").double()
    loss = fs.objective(fs.functional(model), [(torch.ones(1, 1).double(),) * 2], fs.custom(lambda out, y: out - y))
    with pytest.warns(UserWarning, match="one at a time"):
        path = linear_path(loss, vector(-1.0), vector(1.0), num=3, chunk=2)
    assert path.chunk == 1
    assert path.losses.tolist() == [0.0, -1.0, 0.0]


def test_ends_of_two_precisions_meet_in_the_wider_one():
    loss = wells()
    path = linear_path(loss, vector(-1.0, dtype=torch.float32), vector(1 / 3), num=4)
    assert path.losses[1].item() == pytest.approx((float(vector(-1 + 4 / 9)) ** 2 - 1) ** 2, rel=1e-12)
    assert path.losses[-1].item() == pytest.approx((1 / 9 - 1) ** 2, rel=1e-12)
    assert path.unit_roundoff == 2.0**-53
    narrow = [vector(x, dtype=torch.float32) for x in (-1.0, 1.0)]
    assert linear_path(loss, *narrow).unit_roundoff == 2.0**-24  # of the points, though the model is float64


# The matrix.


def test_the_matrix_is_every_pair_of_paths():
    loss = loss_from(lambda out, y: torch.cos(2 * out) + y * out, n=7, size=3, weights=1 + torch.arange(7.0))
    thetas = [2 * drawn(i, 3) for i in range(4)]
    found = barrier_matrix(loss, thetas, num=9, names="abcd")
    sums = torch.zeros(2, 7, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            path = linear_path(loss, thetas[i], thetas[j], num=9)
            for name in ("barrier_max", "barrier_linear"):
                estimate = getattr(path, name)
                assert_close(getattr(found, name)[i, j], estimate.value, rtol=1e-9, atol=1e-12)
                assert_close(getattr(found, f"{name}_stderr")[i, j], estimate.stderr, rtol=1e-9, atol=1e-12)
            assert_close(found.distance[i, j].item(), path.distance)
            if i < j:
                t, higher = path.coefficients[path.argmax], 0 if path.losses[0] > path.losses[-1] else -1
                sums[0] += (path.sums[path.argmax_loss] - path.sums[higher]) / 6
                sums[1] += (path.sums[path.argmax] - (1 - t) * path.sums[0] - t * path.sums[-1]) / 6
    off = ~torch.eye(4, dtype=torch.bool)
    for k, name in enumerate(("barrier_max", "barrier_linear")):
        matrix, mean = getattr(found, name), getattr(found, f"mean_{name}")
        assert torch.equal(matrix, matrix.T)
        assert not matrix.diagonal().any()
        assert matrix[off].max() > 0.1
        assert_close(mean.value, matrix[off].mean())
        assert_close(mean.stderr, path.mean(sums[k]).stderr)
    assert found.asdict()["names"] == ("a", "b", "c", "d")


def test_the_matrix_takes_dicts_and_counts_what_is_not_finite():
    loss = loss_from(lambda out, y: out**-2.0, n=2)
    found = barrier_matrix(loss, [loss.layout.unravel(vector(x)) for x in (-1.0, 1.0, 2.0)], num=3)
    assert found.barrier_linear[0].tolist() == [0.0, math.inf, 4 - (1 + 1 / 4) / 2]
    assert (found.n_nonfinite, float(found.mean_barrier_linear.value)) == (1, math.inf)
    assert found.names == ("0", "1", "2")


# What comes out, and what may go in.


@pytest.mark.parametrize(
    ("start", "end", "options", "message"),
    [
        (vector(1.0, 2.0), vector(1.0), {}, r"`start` must be a flat vector of shape \(1,\)"),
        (vector(1.0), vector(1.0, 2.0), {}, r"`end` must be a flat vector of shape \(1,\)"),
        (vector(1.0), vector(math.nan), {}, "`end` must hold finite numbers, 1 of 1 are not"),
        (vector(math.inf), vector(1.0), {}, "`start` must hold finite numbers"),
        (vector(1e200), vector(1.0), {}, "the loss at `start` is inf"),
        (vector(1.0), {"weight": vector(1.0)}, {}, r"`end\['weight'\]` must have shape \(1, 1\)"),
        ({"bias": vector(1.0)}, vector(1.0), {}, "unknown: .'bias'."),
        (vector(1.0), vector(1.0), {"num": 2}, "`num` must be an integer of at least 3, got 2"),
        (vector(1.0), vector(1.0), {"chunk": 0}, "`chunk` must be an integer of at least 1, got 0"),
        (vector(1.0), vector(1.0).to("meta"), {}, "end`? is on meta, the model on cpu"),
    ],
)
def test_bad_input_is_named(start, end, options, message):
    with pytest.raises(ValueError, match=message):
        linear_path(wells(), start, end, **options)


@pytest.mark.parametrize(
    ("thetas", "options", "message"),
    [
        ([vector(1.0)], {}, "the number of models` must be an integer of at least 2, got 1"),
        ([vector(1.0)] * 2, {"num": 2}, "`num` must be an integer of at least 3"),
        ([vector(1.0)] * 2, {"names": ["a"]}, "`names` must be 2 different names"),
        ([vector(1.0)] * 2, {"names": ["a", "a"]}, "`names` must be 2 different names"),
        ([vector(1.0), vector(math.nan)], {}, r"`thetas\[1\]` must hold finite numbers"),
    ],
)
def test_bad_input_to_the_matrix_is_named(thetas, options, message):
    with pytest.raises(ValueError, match=message):
        barrier_matrix(wells(), thetas, **options)


def test_a_pair_with_nothing_but_holes_between_is_undefined_and_counted():
    loss = loss_from(lambda out, y: (out**2 - 0.5).log())  # nan between -1 and 1
    found = barrier_matrix(loss, [vector(-1.0), vector(1.0), vector(1.0)], num=5)
    assert found.nonfinite.tolist() == [[0, 3, 3], [3, 0, 0], [3, 0, 0]]
    assert found.n_nonfinite == 6
    assert torch.isnan(found.barrier_linear).tolist() == [
        [False, True, True],
        [True, False, False],
        [True, False, False],
    ]
    assert torch.isnan(found.mean_barrier_linear.value)


def test_a_barrier_of_none_has_no_error_and_says_why():
    bowl = loss_from(lambda out, y: (out - y) ** 2, n=5)
    none = linear_path(bowl, vector(-1.0), vector(3.0), num=7)
    assert (none.texts, float(none.barrier_max.value)) == ({"barrier_max": "0", "barrier_linear": "0"}, 0.0)
    assert "0 ± 0" not in str(none)
    assert "The largest loss is at an end: there is no barrier over the higher end" in str(none)
    over = linear_path(loss_from(lambda out, y: (out**2 - 1) ** 2 + y * out, n=5), vector(-1.0), vector(1.0), num=7)
    assert over.texts == {}
    assert not [note for note in over.notes if "no barrier" in note]
    rising = linear_path(
        loss_from(lambda out, y: -(out**2), n=2), vector(0.0), vector(1.0), num=5
    )  # above its chord alone
    assert list(rising.texts) == ["barrier_max"]
