"""One direction for several tasks: closed forms, and which of them are against a task."""

from __future__ import annotations

import sys

import pytest
import torch
from problems import of_unlike_length, problem, seeded

import funcscope as fs
from funcscope.curvature.scored_sequences import chosen
from funcscope.gradients import aggregation_weights, gradient_aggregation


def normals(seed: int, *shape: int) -> torch.Tensor:
    return seeded(seed, lambda: torch.randn(*shape, dtype=torch.float64))


def weights(gram: torch.Tensor, method: str, **options) -> torch.Tensor:
    pytest.importorskip("torchjd")
    return aggregation_weights(gram, method=method, key=fs.key(0), **options)


def grams(num: int, tasks: int, dim: int = 5) -> list[torch.Tensor]:
    rows = normals(num + tasks, num, tasks, dim) * torch.tensor([1.0, 3.0, 0.2, 2.0])[:tasks, None]
    return list(rows @ rows.mT)


@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_the_shortest_vector_between_two_gradients_has_a_closed_form(scale):
    for gram in [
        *grams(20, 2),
        torch.tensor([[1.0, 2.0], [2.0, 9.0]]).double(),
    ]:  # the last: one is nearer than all between
        first = (gram[1, 1] - gram[0, 1]) / (gram[0, 0] - 2 * gram[0, 1] + gram[1, 1])
        oracle = torch.stack([first, 1 - first]).clamp(0, 1)
        torch.testing.assert_close(weights(scale * gram, "mgda"), oracle, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_projected_gradients_of_two_tasks_have_a_closed_form_and_no_conflict(scale):
    for gram in grams(20, 2):
        inner = gram[0, 1].clamp(max=0)
        oracle = 1 - inner / gram.diagonal()
        found = weights(scale * gram, "pcgrad")
        torch.testing.assert_close(found, oracle)
        assert (gram @ found >= -1e-12).all()
    counter = torch.tensor([[4.0, 0, 0], [-1, 0.25, 0], [-1, -0.25, 0.125]]).double()  # proofs/pcgrad_conflict.py
    three = counter @ counter.T
    assert (three @ weights(three, "pcgrad")).min() < -1e-3


def test_equal_projections_are_equal():
    for gram in grams(5, 3):
        projections = gram @ weights(gram, "imtl_g") / gram.diagonal().sqrt()
        torch.testing.assert_close(projections, projections[:1].expand(3))


def test_the_order_of_projections_is_that_of_the_key_alone():
    pytest.importorskip("torchjd")
    gram = grams(30, 4, dim=3)[7]
    made = [aggregation_weights(gram, method="pcgrad", key=fs.key(seed)) for seed in (*range(12), 0)]
    assert torch.equal(made[0], made[-1])
    assert any(not torch.equal(made[0], each) for each in made)  # orders matter, and are drawn


@pytest.mark.outsider
def test_directions_in_the_cone_are_against_nobody():
    pytest.importorskip("torchjd")
    pytest.importorskip("quadprog")
    pytest.importorskip("qpsolvers")
    for gram in grams(20, 3, dim=2):  # three gradients in a plane: conflicts are certain, and the mean often has some
        for method in ("upgrad", "dualproj"):
            found = weights(gram, method)
            sizes = (found @ gram @ found).clamp(min=0).sqrt() * gram.diagonal().sqrt()
            assert (gram @ found >= -1e-5 * sizes - 1e-6 * gram.trace()).all()
    assert any((gram.mean(1) < 0).any() for gram in grams(20, 3, dim=2))


@pytest.mark.outsider
def test_the_ball_around_the_mean_of_radius_zero_is_the_mean():
    pytest.importorskip("torchjd")
    pytest.importorskip("cvxpy")
    pytest.importorskip("clarabel")
    for gram in grams(4, 3):
        torch.testing.assert_close(weights(gram, "cagrad", c=0.0), torch.full((3,), 1 / 3).double(), atol=1e-6, rtol=0)
        found = weights(1e-8 * gram, "cagrad", c=0.5) - 1 / 3  # of a length c times that of the mean
        assert float(found @ gram @ found) == pytest.approx(0.25 * float(gram.mean()), rel=1e-4)
        worst = [float((gram @ (found + 1 / 3)).min()), float(gram.mean(1).min())]
        assert worst[0] > worst[1]


def tasks(*shifts: float) -> dict[str, fs.Loss]:
    net = fs.functional(seeded(0, lambda: torch.nn.Linear(2, 1, bias=False).double()))
    half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    data = {f"t{i}": 1 + 0.3 * normals(i, 12 + i, 2) for i in range(len(shifts))}
    return {
        name: fs.objective(net, [(x, shift + 0.1 * normals(9, len(x), 1))], half_square)
        for (name, x), shift in zip(data.items(), shifts, strict=True)
    }


@pytest.mark.parametrize("methods", [["mean"], ["mean", "pcgrad", "mgda"]])
def test_a_step_along_the_direction_does_to_losses_what_inner_products_say(methods):
    if len(methods) > 1:
        pytest.importorskip("torchjd")
    losses = tasks(3.0, -1.0)
    theta = torch.zeros(2, dtype=torch.float64)
    result = gradient_aggregation(losses, theta, key=fs.key(0), methods=methods)
    gradients = torch.stack([torch.func.grad(loss)(theta) for loss in losses.values()])
    for row, inner, norm in zip(result.weights, result.inner, result.norm, strict=True):
        direction = row @ gradients
        assert float(norm) == pytest.approx(float(direction.norm()))
        torch.testing.assert_close(inner, gradients @ direction)
        step = 1e-6 * direction
        for loss, each in zip(losses.values(), inner, strict=True):
            assert float(loss(theta - step) - loss(theta)) == pytest.approx(-1e-6 * float(each), rel=1e-3)
    torch.testing.assert_close(result.lengths, gradients.norm(dim=1))
    assert result.num_conflicts.tolist() == [1.0, 0.0, 0.0][: len(methods)]  # the mean is against the weaker task
    assert (result.least_cosine[0] < 0).item()
    assert (result.inner_stderr > 0).all()


@pytest.mark.slow
def test_errors_are_what_repetitions_have():
    values, errors = [], []
    net = fs.functional(seeded(0, lambda: torch.nn.Linear(2, 1, bias=False).double()))
    half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    for seed in range(40):
        x = 1 + 0.5 * normals(seed, 2, 16, 2)
        y = torch.tensor([3.0, -1.0]).double()[:, None, None] + normals(50 + seed, 2, 16, 1)
        losses = {str(i): fs.objective(net, [(x[i], y[i])], half_square) for i in range(2)}
        result = gradient_aggregation(losses, torch.zeros(2).double(), key=fs.key(0), methods=["mean"])
        values.append(result.inner[0])
        errors.append(result.inner_stderr[0])
    ratio = torch.stack(errors).square().mean(0).sqrt() / torch.stack(values).std(0)
    assert ((ratio > 0.7) & (ratio < 1.5)).all()


def test_what_cannot_be_aggregated_is_refused(monkeypatch):
    losses = tasks(1.0, 2.0)
    theta = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="`method` must be one of 'mean'"):
        aggregation_weights(torch.eye(2), method="best")
    with pytest.raises(ValueError, match="not 0"):
        aggregation_weights(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="two tasks or more"):
        gradient_aggregation({"t0": losses["t0"]}, theta, key=fs.key(0))
    cnn = problem("cnn")
    other = fs.objective(fs.functional(cnn.model), cnn.batches, cnn.criterion)
    with pytest.raises(ValueError, match="same net"):
        gradient_aggregation({**losses, "other": other}, theta, key=fs.key(0))
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ImportError, match=r"pip install 'torchjd>=0.8'"):
        aggregation_weights(torch.eye(2), method="mgda")


def test_a_gradient_without_a_fold_is_that_of_the_loss_without_it():
    """Sequences of unlike length: the mean over positions has another weight without each of them."""
    losses, theta = {"a": of_unlike_length(1, 8), "b": of_unlike_length(2, 8)}, torch.zeros(2).double()
    result = gradient_aggregation(losses, theta, key=fs.key(0), methods=["mean"], folds=8)
    left = []
    for i in range(8):
        parts = [chosen(loss, torch.arange(8) != i) for loss in losses.values()]
        g = torch.stack([torch.func.grad(part)(theta) for part in parts])
        left.append(torch.cat([g @ g.mean(0), g.mean(0).norm()[None]]))
    values = torch.stack(left)
    oracle = (7 / 8 * (values - values.mean(0)).square().sum(0)).sqrt()
    torch.testing.assert_close(torch.cat([result.inner_stderr[0], result.norm_stderr]), oracle)


def test_a_task_whose_gradient_is_of_one_sequence_has_no_errors():
    net = fs.functional(seeded(0, lambda: torch.nn.Linear(1, 1, bias=False).double()))
    half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    data = {"a": ([[1.0], [2.0]], [[1.0], [0.0]]), "b": ([[1.0], [3.0]], [[2.0], [1.0]])}
    losses = {
        name: fs.objective(net, [(torch.tensor(x).double(), torch.tensor(y).double())], half_square)
        for name, (x, y) in data.items()
    }
    result = gradient_aggregation(losses, torch.zeros(1).double(), key=fs.key(0), methods=["mean"])
    torch.testing.assert_close(result.lengths, torch.tensor([0.5, 2.5]).double())
    assert result.norm_stderr.isnan().all()
    assert "no errors: without one of the folds a task has no gradient." in result.notes
