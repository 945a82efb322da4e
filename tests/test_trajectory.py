"""How gradients turn: against pairs of folds by loops, and descents on quadratics in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from problems import of_unlike_length, seeded

import funcscope as fs
from funcscope.curvature.rows import per_sample_gradients
from funcscope.gradients import alignment_trajectory, gradient_trajectory


def normals(seed: int, *shape: int) -> torch.Tensor:
    return seeded(seed, lambda: torch.randn(*shape, dtype=torch.float64))


def regression(num: int = 9, noise: float = 0.3, seed: int = 0, offset: float = 0.0) -> fs.Loss:
    net = fs.functional(seeded(0, lambda: torch.nn.Linear(3, 1, bias=False).double()))
    x = offset + normals(seed, num, 3)
    y = x @ torch.tensor([[2.0], [-1.0], [1.0]]).double() + noise * normals(seed + 1, num, 1)
    return fs.objective(net, [(x, y)], fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2))


def test_cosines_are_those_of_pairs_of_different_sequences():
    loss = regression(num=40, offset=3.0)
    thetas = [torch.zeros(3).double(), torch.tensor([0.5, 0.2, 0.0]).double(), torch.tensor([0.6, -0.4, 0.3]).double()]
    result = alignment_trajectory(loss, thetas, [0, 10, 30], folds=40)
    (x, y) = loss.batches[0]
    rows = [(x @ theta - y[:, 0])[:, None] * x for theta in thetas]
    n = len(x)

    def product(a, b, there):
        pairs = [(i, j) for i in there for j in there if i != j]
        return sum(float(a[i] @ b[j]) for i, j in pairs) / len(pairs)

    def cosine(k, m, there=range(n)):
        squares = [product(rows[q], rows[q], there) for q in (k, m)]
        return product(rows[k], rows[m], there) / math.sqrt(math.prod(squares))

    assert float(result.cosine_next[0]) == pytest.approx(cosine(0, 1))
    assert float(result.cosine_last[1]) == pytest.approx(cosine(1, 2))
    assert float(result.cosine_first[2]) == pytest.approx(cosine(0, 2))
    assert float(result.cosine_first[0]) == pytest.approx(1)
    rest = torch.tensor([cosine(0, 1, [j for j in range(n) if j != i]) for i in range(n)], dtype=torch.float64)
    stderr = ((n - 1) / n * (rest - rest.mean()).square().sum()).sqrt()
    assert float(result.cosine_next_stderr[0]) == pytest.approx(float(stderr))
    update = thetas[1] - thetas[0]
    inner = -float(rows[0].mean(0) @ update)
    length = math.sqrt(product(rows[0], rows[0], range(n)))
    assert float(result.cosine_update[0]) == pytest.approx(inner / (length * float(update.norm())))
    assert result.cosine_next[2].isnan()
    assert result.cosine_update[2].isnan()


def test_gradients_of_the_same_sequences_are_not_alike_by_their_noise():
    """With nothing but noise, gradients of one sequence at two checkpoints are the same, and so are their means."""
    loss = regression(num=200, noise=5.0)
    thetas = [torch.tensor([2.0, -1.0, 1.0]).double() + shift for shift in (0.0, 1e-3)]
    plain = torch.nn.functional.cosine_similarity(*(torch.func.grad(loss)(theta) for theta in thetas), dim=0)
    assert float(plain) > 0.99
    result = alignment_trajectory(loss, thetas, [0, 1])
    assert result.cosine_next[0].isnan()
    assert "at step 0, 1" in result.notes[-1]


def test_real_steps_of_descent_are_along_their_gradients():
    loss = regression(num=40)
    thetas = [torch.zeros(3, dtype=torch.float64)]
    for _ in range(3):
        thetas.append(thetas[-1] - 0.1 * torch.func.grad(loss)(thetas[-1]))
    result = alignment_trajectory(loss, thetas, [0, 1, 2, 3], folds=10)
    assert result.num_folds == 10
    known = result.cosine_update[:3]
    assert (known - 1).abs().max() < 0.05
    turned = alignment_trajectory(loss, thetas[::-1], [0, 1, 2, 3], folds=10)
    assert float(turned.cosine_update[0]) < -0.9


@pytest.mark.parametrize("rate", [0.1, 1.5])
def test_a_descent_on_a_quadratic_has_a_closed_form(rate):
    loss = regression(num=10)
    theta = torch.tensor([3.0, 0.0, -2.0]).double()
    hessian = torch.func.hessian(loss)(theta)
    at_start = torch.func.grad(loss)(theta)
    before = theta.clone()
    result = gradient_trajectory(loss, theta, steps=6, learning_rate=rate)
    shrink = torch.eye(3).double() - rate * hessian
    gradients = [torch.linalg.matrix_power(shrink, t) @ at_start for t in range(7)]
    torch.testing.assert_close(result.norms, torch.stack([g.norm() for g in gradients]))
    cosine = torch.nn.functional.cosine_similarity
    for t in range(6):
        assert float(result.cosine_next[t]) == pytest.approx(float(cosine(gradients[t], gradients[t + 1], dim=0)))
    assert float(result.cosine_first[6]) == pytest.approx(float(cosine(gradients[0], gradients[6], dim=0)))
    moved = -rate * sum(gradients[:6])
    assert result.displacement == pytest.approx(float(moved.norm()))
    assert result.path_length == pytest.approx(rate * sum(float(g.norm()) for g in gradients[:6]))
    assert float(result.losses[6]) == pytest.approx(float(loss(theta + moved)))
    assert torch.equal(theta, before)
    beyond = float(torch.linalg.eigvalsh(hessian)[-1]) > 2 / rate
    assert (result.num_rises > 0) == beyond
    assert result.relative_drop == pytest.approx(1 - float(loss(theta + moved) / loss(theta)))


def test_what_is_no_trajectory_is_refused():
    loss = regression()
    theta = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="got 1 and 1 steps"):
        alignment_trajectory(loss, [theta], [0])
    with pytest.raises(ValueError, match="three different scored sequences, got 2"):
        alignment_trajectory(regression(num=2), [theta, theta + 1], [0, 1])
    with pytest.raises(ValueError, match="`learning_rate`"):
        gradient_trajectory(loss, theta, learning_rate=-1.0)
    with pytest.raises(ValueError, match="`steps`"):
        gradient_trajectory(loss, theta, steps=0)


def test_a_descent_that_leaves_float32_behind_has_its_cosines_as_long_as_it_is_finite():
    """Squares of float32 gradients from 1e19 on are infinite in float32, and what is divided by them is 0."""
    net = fs.functional(seeded(0, lambda: torch.nn.Linear(2, 1, bias=False)))
    half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    loss = fs.objective(net, [(torch.ones(1, 2), torch.zeros(1, 1))], half_square)
    found = gradient_trajectory(loss, torch.tensor([4.0, 0.0]), steps=25, learning_rate=11.0)
    oracle = 4 * 2**0.5 * 21.0 ** torch.arange(26).double()
    torch.testing.assert_close(found.norms, oracle, rtol=1e-4, atol=0)
    assert float(found.norms[-1]) > 1e30
    torch.testing.assert_close(found.cosine_next[:-1], -torch.ones(25).double())
    assert found.straightness == pytest.approx(20 / 22, rel=1e-3)  # of a step after another, 21 times as long
    assert any("diverged" in note for note in found.notes)
    gone = gradient_trajectory(loss, torch.tensor([4.0, 0.0]), steps=40, learning_rate=11.0)
    assert gone.cosine_next[-3:].isnan().all()


def test_of_sequences_of_unlike_length_it_is_the_gradient_of_the_loss():
    """One sequence to a fold: a plain mean of the folds' gradients would count short ones as much as long ones."""
    loss = of_unlike_length(3, 12)
    points = [torch.zeros(2).double(), torch.tensor([0.2, 0.5]).double()]
    found = alignment_trajectory(loss, points, [0, 1], folds=12)
    rows, weights, step = per_sample_gradients(loss, points[0]), loss.terms(points[0])[1], points[1] - points[0]

    def numbers(kept):
        x, share = rows[kept], weights[kept].mean()
        off = (x @ x.T).masked_fill(torch.eye(len(x), dtype=torch.bool), 0).sum() / (len(x) * (len(x) - 1)) / share**2
        return torch.stack([off, -(x.mean(0) / share) @ step / off.sqrt() / step.norm()])

    every = torch.arange(12)
    values = torch.stack([numbers(every[every != i]) for i in every])
    errors = (11 / 12 * (values - values.mean(0)).square().sum(0)).sqrt()
    torch.testing.assert_close(torch.stack([found.square[0], found.cosine_update[0]]), numbers(every))
    torch.testing.assert_close(torch.stack([found.square_stderr[0], found.cosine_update_stderr[0]]), errors)
    torch.testing.assert_close((rows / weights.mean()).mean(0), torch.func.grad(loss)(points[0]))
