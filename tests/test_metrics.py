"""Metrics beside the loss on planes, lines, paths and curves: weighted means by hand, one forward pass, bad functions."""

import math

import pytest
import torch
from problems import loss_of
from torch.testing import assert_close

import funcscope as fs
from funcscope.landscape.terms import Values, check_metrics

METRIC = {
    "accuracy": lambda out, labels: out.argmax(-1) == labels,
    "top": lambda out, labels: out.double().softmax(-1).amax(-1),
}


def by_hand(loss, theta):
    """(mean, error) per metric: sums over sequences of weight times value, and the error of a ratio over sequences."""
    sums, weights = {name: [] for name in METRIC}, []
    for inputs, targets in loss.batches:
        out = loss.net.apply(loss.params(theta), inputs).detach()
        for row, index, weight in zip(out, targets.index, targets.weight, strict=True):
            weights.append(float(weight.sum()))
            for name, metric in METRIC.items():
                sums[name].append(float((metric(row, index).double() * weight).sum()))
    answers, n, total = {}, sum(w > 0 for w in weights), sum(weights)
    for name, s in sums.items():
        mean = sum(s) / total
        scatter = sum((x - mean * w) ** 2 for x, w in zip(s, weights, strict=True))
        answers[name] = mean, math.sqrt(n / (n - 1) * scatter) / total
    return answers


def check(loss, theta, metrics, errors, place):
    for name, (mean, stderr) in by_hand(loss, theta).items():
        assert_close(float(metrics[name][place]), mean, rtol=1e-6, atol=1e-9)
        assert_close(float(errors[name][place]), stderr, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_means_and_errors_are_those_by_hand_at_every_kind_of_point(name, chunk):
    loss = loss_of(name)
    theta, axes = loss.net.theta, fs.plane_directions(loss.net, key=fs.key(0))
    options = {"chunk": chunk, "metric": METRIC}
    plane = fs.loss_plane(loss, theta, axes, num=(2, 3), span=((0.0, 0.8), (-0.6, 0.6)), **options)
    point = theta + 0.8 * axes.vectors[0] - 0.6 * axes.vectors[1]
    check(loss, point, plane.metrics, plane.metrics_stderr, (1, 0))
    check(loss, theta, {k: e.value for k, e in plane.metrics_baseline.items()},
          {k: e.stderr for k, e in plane.metrics_baseline.items()}, ...)  # fmt: skip
    lines = fs.loss_lines(loss, theta, axes, num=3, span=0.6, **options)
    check(loss, theta - 0.6 * axes.vectors[1], lines.metrics, lines.metrics_stderr, (1, 0))
    end = theta + axes.vectors[0]
    path = fs.linear_path(loss, theta, end, num=5, **options)
    curve = fs.bezier_path(loss, theta, theta + axes.vectors[1], end, num=3, **options)
    for at, t in ((0, 0.0), (1, 0.25), (4, 1.0)):
        check(loss, (1 - t) * theta + t * end, path.metrics, path.metrics_stderr, at)
    check(loss, fs.bezier(theta, theta + axes.vectors[1], end, 0.5), curve.metrics, curve.metrics_stderr, 1)
    plain = fs.loss_plane(loss, theta, axes, num=(2, 3), span=((0.0, 0.8), (-0.6, 0.6)), chunk=chunk)
    assert torch.equal(plain.grid_losses, plane.grid_losses)
    assert torch.equal(fs.linear_path(loss, theta, end, num=5, chunk=chunk).sums, path.sums)
    assert plane.asdict()["metric_accuracy"].shape == plane.asdict()["metric_accuracy_stderr"].shape == (2, 3)
    assert path.asdict()["metric_top"].shape == (5,)


def sums_by_hand(loss, theta):
    """Per sequence, sums of weight times value of every metric, and the weights."""
    rows = []
    for inputs, targets in loss.batches:
        out = loss.net.apply(loss.params(theta), inputs).detach()
        each = [(metric(out, targets.index).double() * targets.weight).flatten(1).sum(1) for metric in METRIC.values()]
        rows.append(torch.stack([*each, targets.weight.double().flatten(1).sum(1)]))
    *sums, weights = torch.cat(rows, 1)
    return dict(zip(METRIC, sums, strict=True)), weights


def paired(sums, weights):
    """A mean of differences and its error over sequences, those of a ratio, by a plain sum."""
    n, mean = int((weights != 0).sum()), float(sums.sum() / weights.sum())
    scatter = sum((s - mean * w) ** 2 for s, w in zip(sums.tolist(), weights.tolist(), strict=True))
    return mean, math.sqrt(n / (n - 1) * scatter) / float(weights.sum())


def test_errors_of_changes_and_of_excesses_are_paired_by_hand():
    loss = loss_of("gpt2")
    theta, axes = loss.net.theta, fs.plane_directions(loss.net, key=fs.key(0))
    lines = fs.loss_lines(loss, theta, axes, num=3, span=0.6, metric=METRIC)
    path = fs.linear_path(loss, theta, theta + axes.vectors[0], num=5, metric=METRIC)
    (there, w), (here, _), (end, _) = (sums_by_hand(loss, theta + a * axes.vectors[0]) for a in (0.6, 0.0, 1.0))
    quarter, _ = sums_by_hand(loss, theta + 0.25 * axes.vectors[0])
    for name in METRIC:
        assert_close(
            float(lines.metrics_delta_stderr[name][0, 2]), paired(there[name] - here[name], w)[1], rtol=1e-6, atol=1e-9
        )
        excess = paired(quarter[name] - 0.75 * here[name] - 0.25 * end[name], w)
        numbers = (path.metrics_excess[name][1], path.metrics_excess_stderr[name][1])
        assert_close(tuple(map(float, numbers)), excess, rtol=1e-6, atol=1e-9)
    assert not torch.equal(lines.metrics_delta_stderr["top"], lines.metrics_stderr["top"])
    assert lines.asdict()["metric_top_delta_stderr"].shape == (2, 3)
    assert path.asdict()["metric_top_excess_stderr"].shape == (5,)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_matrix_of_barriers_has_the_metrics_of_its_paths(chunk):
    """Oracle: a loop over `linear_path`, and values by hand for the models themselves."""
    loss = loss_of("mlp")
    thetas = [3 * fs.normal(fs.key(i), loss.net.theta) for i in range(3)]
    for _ in range(60):  # trained apart: there are barriers between them
        thetas = [theta - torch.func.grad(loss)(theta) / 2 for theta in thetas]
    matrix = fs.barrier_matrix(loss, thetas, num=7, chunk=chunk, metric=METRIC)
    for i, theta in enumerate(thetas):
        check(loss, theta, matrix.metrics, matrix.metrics_stderr, (i, i))
        for j in range(i + 1, 3):
            path = fs.linear_path(loss, theta, thetas[j], num=7, chunk=chunk, metric=METRIC)
            for name in METRIC:
                for whole, part in ((matrix.metrics, path.metrics), (matrix.metrics_stderr, path.metrics_stderr),
                                    (matrix.metrics_excess, path.metrics_excess),
                                    (matrix.metrics_excess_stderr, path.metrics_excess_stderr)):  # fmt: skip
                    assert_close(whole[name][i, j], part[name][path.argmax], rtol=1e-9, atol=1e-12)
                    assert whole[name][i, j] == whole[name][j, i]
    assert any(bool((excess != 0).any()) for excess in matrix.metrics_excess.values())
    assert all(not excess.diagonal().any() for excess in matrix.metrics_excess.values())
    plain = fs.barrier_matrix(loss, thetas, num=7, chunk=chunk)
    assert torch.equal(plain.barrier_linear, matrix.barrier_linear)
    assert (plain.num_forwards, plain.metrics) == (matrix.num_forwards, {})
    assert matrix.asdict()["metric_accuracy_excess_stderr"].shape == (3, 3)


def test_a_trained_curve_has_the_metrics_of_its_line_and_its_path():
    loss = loss_of("mlp")
    theta, end = loss.net.theta, loss.net.theta + fs.normal(fs.key(2), loss.net.theta)
    curve = fs.connect(loss, theta, end, key=fs.key(0), steps=2, num=3, metric=METRIC)
    check(loss, (theta + end) / 2, curve.line.metrics, curve.line.metrics_stderr, 1)
    check(loss, fs.bezier(theta, curve.midpoint, end, 0.5), curve.path.metrics, curve.path.metrics_stderr, 1)
    values = curve.asdict()
    assert values["metric_top"].shape == values["line_metric_top"].shape == (3,)
    plain = fs.connect(loss, theta, end, key=fs.key(0), steps=2, num=3)
    assert torch.equal(plain.midpoint, curve.midpoint)
    assert plain.num_forwards == curve.num_forwards


@pytest.mark.parametrize("chunk", [1, 4])
def test_the_weights_of_a_custom_criterion_are_those_of_its_metrics(chunk):
    net = fs.functional(torch.nn.Linear(3, 1, bias=False, device="meta").to_empty(device="cpu").double())
    x, y = (fs.normal(fs.key(i), torch.zeros(5, k, dtype=torch.float64)) for i, k in ((1, 3), (2, 1)))
    w = torch.tensor([1.0, 2.0, 0.0, 4.0, 0.5], dtype=torch.float64)[:, None]
    loss = fs.objective(net, [(x, (y, w))], fs.custom(lambda out, t: ((out - t[0]) ** 2, t[1])))
    start, end = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    path = fs.linear_path(loss, start, end, num=4, chunk=chunk, metric={"absolute": lambda out, t: (out - t[0]).abs()})
    for i in range(4):
        value = (x @ (start + i / 3 * (end - start)) - y[:, 0]).abs()
        mean = (w[:, 0] * value).sum() / w.sum()
        stderr = (4 / 3 * ((value - mean) * w[:, 0]).square().sum()).sqrt() / w.sum()
        assert_close(path.metrics["absolute"][i], mean)
        assert_close(path.metrics_stderr["absolute"][i], stderr)


def test_they_cost_no_forward_pass_and_are_not_looked_at_where_nothing_is_scored(monkeypatch):
    loss, calls = loss_of("gpt2"), []
    apply = type(loss.net).apply
    monkeypatch.setattr(type(loss.net), "apply", lambda self, *x: calls.append(0) or apply(self, *x))
    holes = {
        "hole": lambda out, labels: torch.where(labels == 0, math.nan, 2.0),
        "one": lambda out, labels: labels >= 0,
    }
    sums, weights = Values(loss, holes.values()).rows(loss.net.theta)
    assert len(calls) == len(loss.batches)
    unscored = torch.cat([(t.index == 0).any(1) & ~((t.index == 0) & (t.weight != 0)).any(1) for _, t in loss.batches])
    assert unscored.any()  # positions of weight 0 have the label 0
    assert sums[1][unscored].isfinite().all()
    assert_close(sums[2], weights, check_dtype=False)


def test_reestimated_statistics_serve_metrics_too():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (
            torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).double().eval()
        )
    data = fs.normal(fs.key(1), torch.zeros(8, 3, dtype=torch.float64)), torch.tensor([0, 1] * 4)
    loss = fs.objective(fs.functional(model), [data], fs.classification)
    theta, axis = loss.net.theta, fs.normal(fs.key(2), loss.net.theta)[None]
    for chunk in (1, 2):
        lines = fs.loss_lines(loss, theta, axis, num=2, span=1.0, buffers="reestimate", metric=METRIC, chunk=chunk)
        own = loss.with_buffers(fs.running_statistics(loss, theta + axis[0]))
        check(own, theta + axis[0], lines.metrics, lines.metrics_stderr, (0, 1))


def test_a_function_that_is_no_metric_is_refused():
    loss = loss_of("mlp")
    theta = loss.net.theta
    with pytest.raises(ValueError, match=r"one value for every position.*leave out the mean"):
        fs.linear_path(loss, theta, 2 * theta, metric={"mean": lambda out, labels: out.mean()})
    for metric in ([len], {"a": 1}, {1: len}):
        with pytest.raises(TypeError, match="must map names to functions"):
            check_metrics(metric)
