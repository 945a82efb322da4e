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
