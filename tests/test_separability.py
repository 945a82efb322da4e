"""Separability and interference of two tasks: against second moments multiplied out, and against losses after real steps."""

from __future__ import annotations

import math

import pytest
import torch
from problems import of_unlike_length, seeded

import funcscope as fs
from funcscope.curvature.gram import Grams
from funcscope.curvature.rows import per_sample_gradients
from funcscope.weights import gram_separability, separability, task_interference
from funcscope.weights.interference import _left_out, _second_orders, cross_forms


def normals(seed: int, *shape: int) -> torch.Tensor:
    return seeded(seed, lambda: torch.randn(*shape, dtype=torch.float64))


def grams(a: torch.Tensor, b: torch.Tensor) -> list[Grams]:
    """From gradients (blocks, samples, coordinates)."""
    names = [f"b{i}" for i in range(len(a))]
    return [Grams(x @ y.mT, "sequence", 0, [], names) for x, y in ((a, a), (a, b), (b, b))]


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def frobenius(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x * y).sum() / (x.norm() * y.norm()))


# ------------------------------------------------------------------------------------------------ separability


def test_the_alignment_is_that_of_second_moments_from_pairs_of_different_samples():
    a, b = 2 + normals(0, 12, 5), 1 + normals(1, 11, 5) * torch.tensor([1.0, 0.5, 0.5, 0.1, 0.1])
    result = gram_separability(*grams(a[None], b[None]), key=fs.key(0), num=9)
    n, m = len(a), len(b)
    outer_a, outer_b = (torch.einsum("ni,nj->nij", x, x) for x in (a, b))
    inner = float((outer_a.mean(0) * outer_b.mean(0)).sum())
    squares = [
        sum(float((s[i] * s[j]).sum()) for i in range(k) for j in range(k) if i != j) / (k * (k - 1))
        for s, k in ((outer_a, n), (outer_b, m))
    ]
    assert float(result.alignment) == pytest.approx(inner / math.sqrt(math.prod(squares)), rel=1e-10)
    assert float(result.alignment_of_all.value) == pytest.approx(float(result.alignment), rel=1e-12)
    torch.testing.assert_close(result.separability, 1 - result.alignment)
    assert float(result.separability_of_all.value) == pytest.approx(1 - float(result.alignment), rel=1e-12)
    assert float(result.separability_of_all.stderr) == float(result.alignment_of_all.stderr)


def test_few_samples_of_one_distribution_are_not_separable():
    """Second moments of samples themselves are: what pairs of a sample with itself add is as large as all the rest."""
    a, b = (normals(seed, 40, 30, 20) + 1.5 for seed in (2, 3))
    result = gram_separability(*grams(a, b), key=fs.key(0), num=9)
    known = result.alignment.isfinite()
    stderr = float(result.alignment[known].std()) / int(known.sum()) ** 0.5
    assert float(result.alignment[known].mean()) == pytest.approx(1, abs=4 * stderr + 0.01)
    naive = sum(frobenius(moment(x), moment(y)) for x, y in zip(a, b, strict=True)) / len(a)
    assert naive < 0.99
    ratio = float(result.alignment_stderr[known].square().mean().sqrt() / result.alignment[known].std())
    assert 0.7 < ratio < 1.5


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def documented_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over random halves of (CKA within a + CKA within b) / 2 - CKA between, of rows that do not belong together."""
    gaps = []
    for seed in range(20):
        halves = [x[seeded(seed + i, lambda x=x: torch.randperm(len(x)))].chunk(2) for i, x in enumerate((a, b))]
        (a1, a2), (b1, b2) = halves
        gaps.append((linear_cka(a1, a2) + linear_cka(b1, b2)) / 2 - (linear_cka(a1, b1) + linear_cka(a2, b2)) / 2)
    return sum(gaps) / len(gaps)


def test_the_gap_of_cka_knows_participation_ratios_and_no_directions():
    """E26: it is positive where tasks have nothing in common but differ in participation ratio, and as much where they share
    all that they can; for equal ratios it is 0, whether tasks share all or nothing."""
    wide, narrow = torch.ones(40), torch.cat([torch.full((2,), 4.0), torch.full((38,), 0.05)])
    n, zeros = 64, torch.zeros(64, 40, dtype=torch.float64)
    a, b, c = normals(4, n, 40) * wide, normals(5, n, 40) * narrow, normals(6, n, 40) * narrow
    d = normals(7, n, 40) * wide

    def ours(x, y):
        result = gram_separability(*grams(x[None], y[None]), key=fs.key(1), num=199)
        return float(result.alignment), float(result.p_differ)

    apart = torch.cat([a, zeros], 1), torch.cat([zeros, b], 1)
    assert documented_gap(*apart) > 0.1
    assert documented_gap(a, b) == pytest.approx(documented_gap(*apart), abs=0.05)
    assert ours(*apart)[0] == pytest.approx(0, abs=1e-9)
    assert ours(*apart)[1] <= 0.005
    same, other = torch.cat([b, zeros], 1), torch.cat([zeros, c], 1)
    assert documented_gap(b, c) == pytest.approx(0, abs=0.03)  # one distribution
    assert documented_gap(same, other) == pytest.approx(0, abs=0.03)  # no direction in common
    assert ours(b, c)[0] > 0.9
    assert ours(same, other)[0] == pytest.approx(0, abs=1e-9)
    assert ours(a, d)[1] > 0.05


def test_opposite_gradients_are_aligned_and_lengths_do_not_count():
    a, b = 2 + normals(8, 12, 4), -2 + normals(9, 10, 4)
    one = gram_separability(*grams(a[None], b[None]), key=fs.key(0), num=99)
    other = gram_separability(*grams(1e3 * a[None], b[None]), key=fs.key(0), num=99)
    assert float(one.alignment) == pytest.approx(1, abs=0.1)
    assert float(other.alignment) == pytest.approx(float(one.alignment), rel=1e-9)
    assert float(other.p_differ) < 0.02 < float(one.p_differ)
    directed = [
        gram_separability(*grams(scale * a[None], b[None]), key=fs.key(0), num=99, unit_length=True)
        for scale in (1, 1e3)
    ]
    assert float(directed[0].p_differ) == float(directed[1].p_differ)


def test_p_values_of_tasks_that_do_not_differ_have_their_level():
    a, b = (normals(seed, 200, 9, 12) for seed in (10, 11))
    p_values = gram_separability(*grams(a, b), key=fs.key(2), num=99).p_differ
    assert 0.015 < float((p_values <= 0.0501).double().mean()) < 0.1


def two_classifiers(num: int = 10) -> tuple[fs.Loss, fs.Loss]:
    net = fs.functional(
        seeded(0, lambda: torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double())
    )
    data = [(1 + normals(seed, num + seed, 4), torch.full((num + seed,), seed)) for seed in (0, 1)]
    return tuple(fs.objective(net, [each], fs.classification) for each in data)


def test_blocks_and_all_of_a_model_are_those_of_its_gradients():
    one, two = two_classifiers()
    theta = one.net.theta
    result = separability(one, two, theta, key=fs.key(0), by="tensor", num=9)
    a, b = (per_sample_gradients(loss, theta) for loss in (one, two))
    for i, leaf in enumerate(one.layout.leaves):
        oracle = gram_separability(*grams(a[None, :, leaf.slice], b[None, :, leaf.slice]), key=fs.key(0), num=9)
        torch.testing.assert_close(result.alignment[i], oracle.alignment[0], equal_nan=True)
    oracle = gram_separability(*grams(a[None], b[None]), key=fs.key(0), num=9)
    torch.testing.assert_close(result.alignment_of_all.value, oracle.alignment[0])
    with pytest.raises(ValueError, match="different scored sequences that the other one has not"):
        separability(one, one, theta, key=fs.key(0))


# ------------------------------------------------------------------------------------------------ interference


def regressions(num: int, shift: float = 1.0) -> tuple[fs.Loss, fs.Loss, torch.Tensor]:
    """Task A at its least: residuals are 1 or -1, so that its Fisher matrix and Hessian are one matrix; B is elsewhere."""
    net = fs.functional(seeded(0, lambda: torch.nn.Linear(3, 1, bias=False).double()))
    theta = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    losses = []
    for seed, away in ((20, 0.0), (21, shift)):
        x = normals(seed, num, 3)
        signs = seeded(seed + 5, lambda: torch.randint(0, 2, (num, 1))).double() * 2 - 1
        y = x @ (theta + away)[:, None] + signs
        losses.append(fs.objective(net, [(x, y)], half_square))
    return losses[0], losses[1], theta


def test_predictions_are_the_losses_after_the_steps_where_fisher_matrix_and_hessian_are_one():
    first, second, theta = regressions(30)
    for rate in (0.1, 1.0):
        result = task_interference(first, second, theta, learning_rate=rate, by="none")
        gradients = [torch.func.grad(loss)(theta) for loss in (first, second)]
        real = float(first(theta - rate * gradients[1]) - first(theta))
        assert float(result.change[1]) == pytest.approx(real, rel=1e-9)
        assert float(result.predicted[1]) == pytest.approx(real, rel=1e-9)
        hessian = torch.func.hessian(first)(theta)
        second_order = rate**2 / 2 * float(gradients[1] @ hessian @ gradients[1])
        assert float(result.predicted[1] - result.first_order.value) == pytest.approx(second_order, rel=1e-9)
        assert float(result.first_order.value) == pytest.approx(-rate * float(gradients[0] @ gradients[1]), rel=1e-9)
        assert abs(float(result.remainder[0])) > 0.1 * float(result.second_order[0])  # of B, whose labels are elsewhere


def test_the_second_order_is_that_of_the_mean_gradient_and_its_error_what_repetitions_have():
    repetitions, n, m = 1500, 12, 15
    mean = torch.tensor([0.5, -0.3, 0.0, 0.0])
    root = torch.tensor([1.0, 2.0, 0.5, 1.0])
    a, b = normals(30, repetitions, n, 4) * root, mean + normals(31, repetitions, m, 4)
    forms = cross_forms(a @ b.mT)[:, 1]
    truth = float((root * mean).square().sum())
    stderr = float(forms.std()) / repetitions**0.5
    assert float(forms.mean()) == pytest.approx(truth, abs=4 * stderr)
    noise = float(root.square().sum()) / m
    plugged_in = cross_forms(a @ b.mT, unbiased=False)[:, 1].mean()
    assert float(plugged_in) == pytest.approx(truth + noise, abs=5 * stderr)
    assert noise > 10 * stderr


def test_errors_of_second_orders_are_what_repetitions_have():
    root = torch.tensor([1.0, 2.0, 0.5, 1.0])
    for shift, most in ((0.0, 1.8), (1.0, 1.2)):
        a, b = 0.5 + normals(32, 400, 12, 4) * root, shift + normals(33, 400, 15, 4)
        found = _second_orders(a @ b.mT, (torch.ones(12).double(), torch.ones(15).double()), 1.0)
        ratio = found.stderr.square().mean(0).sqrt() / found.values.std(0)
        assert ((ratio > 0.85) & (ratio < most)).all(), ratio


def test_errors_are_from_each_sequence_left_out_in_turn():
    values = normals(34, 2, 5, 4)
    rows, columns = _left_out(values)
    for i in range(5):
        torch.testing.assert_close(rows[..., i], cross_forms(torch.cat([values[:, :i], values[:, i + 1 :]], 1)))
    for j in range(4):
        torch.testing.assert_close(columns[..., j], cross_forms(torch.cat([values[..., :j], values[..., j + 1 :]], 2)))
    squares = [(k - 1) / k * (x - x.mean(-1, keepdim=True)).square().sum(-1) for k, x in ((5, rows), (4, columns))]
    torch.testing.assert_close(
        _second_orders(values, (torch.ones(5).double(), torch.ones(4).double()), 2**0.5).stderr, sum(squares).sqrt()
    )


def documented_damage(a: torch.Tensor, b: torch.Tensor) -> float:
    """E25: B's gradient is squared and summed before it is squared again and weighed by A's Fisher diagonal."""
    return float((b.square().sum(0).square() * a.square().mean(0)).sum())


def test_a_damage_is_of_second_order_in_the_gradient_and_there_is_none_without_one():
    """E25."""
    a, b = normals(40, 20, 6), normals(41, 20, 6)
    assert documented_damage(a, 2 * b) / documented_damage(a, b) == pytest.approx(16)
    form = cross_forms((a @ b.T)[None])[0, 1]
    assert float(cross_forms((2 * a @ b.T)[None])[0, 0] / cross_forms((a @ b.T)[None])[0, 0]) == pytest.approx(4)
    assert float(cross_forms((a @ (2 * b).T)[None])[0, 1] / form) == pytest.approx(4)
    opposed = torch.cat([b, -b])  # no step at all
    assert documented_damage(a, opposed) > documented_damage(a, b)
    assert float(cross_forms((a @ opposed.T)[None], unbiased=False)[0, 1]) == pytest.approx(0, abs=1e-20)


def test_learning_rates_scale_orders_and_the_ratio_of_damages_does_not_depend_on_them():
    first, second, theta = regressions(150)
    one, two = (task_interference(first, second, theta, learning_rate=rate, by="tensor") for rate in (0.01, 0.03))
    assert float(two.first_order.value / one.first_order.value) == pytest.approx(3)
    torch.testing.assert_close(two.second_order, 9 * one.second_order)
    torch.testing.assert_close(two.second_order_stderr, 9 * one.second_order_stderr)
    assert one.log_ratio.value.isnan()  # A is at its least: no mean gradient, and no damage that is told from 0
    assert any("no ratio" in note for note in one.notes)
    start = theta + 2
    there = [task_interference(first, second, start, learning_rate=rate, by="tensor") for rate in (0.01, 0.03)]
    assert float(there[0].log_ratio.value) == pytest.approx(float(there[1].log_ratio.value))
    assert float(there[0].log_ratio.value) == pytest.approx(
        float((there[0].second_order[0] / there[0].second_order[1]).log())
    )
    swapped = task_interference(second, first, start, learning_rate=0.01, by="tensor")
    assert float(swapped.log_ratio.value) == pytest.approx(-float(there[0].log_ratio.value))
    torch.testing.assert_close(swapped.change.flip(0), there[0].change)


def test_first_orders_of_blocks_add_up_and_second_ones_are_those_of_cut_gradients():
    one, two = two_classifiers()
    theta, rate = one.net.theta, 0.1
    result = task_interference(one, two, theta, learning_rate=rate, by="tensor")
    assert float(result.first_order_of_blocks.sum()) == pytest.approx(float(result.first_order.value))
    a, b = (per_sample_gradients(loss, theta) for loss in (one, two))
    for i, leaf in enumerate(one.layout.leaves):
        form = cross_forms((a[:, leaf.slice] @ b[:, leaf.slice].T)[None])[0]
        torch.testing.assert_close(result.second_order_of_blocks[i], rate**2 / 2 * form)
    with pytest.raises(ValueError, match="`learning_rate` must be a finite number above 0"):
        task_interference(one, two, theta, learning_rate=0.0)


@pytest.mark.parametrize("length", [1, 4])
def test_the_weights_of_sequences_are_in_the_losses(length):
    """Sequences of several scored positions: sums and means differ by the number of positions."""
    net = fs.functional(seeded(0, lambda: torch.nn.Linear(2, 1, bias=False).double()))
    half_square = fs.custom(lambda out, y: (out - y)[..., 0] ** 2 / 2)
    losses = []
    for seed, away in ((50, 0.0), (51, 1.0)):
        x = normals(seed, 9, length, 2) / length
        y = (x @ torch.full((2, 1), away).double()) + 0.1 * normals(seed + 7, 9, length, 1)
        losses.append(fs.objective(net, [(x, y)], half_square))
    theta = torch.zeros(2, dtype=torch.float64)
    result = task_interference(*losses, theta, learning_rate=0.5, by="none")
    gradients = [torch.func.grad(loss)(theta) for loss in losses]
    assert float(result.first_order.value) == pytest.approx(-0.5 * float(gradients[0] @ gradients[1]), rel=1e-9)
    rows = per_sample_gradients(losses[0], theta)
    fisher = rows.T @ rows / losses[0].terms(theta)[1].sum()
    oracle = 0.125 * float(gradients[1] @ fisher @ gradients[1])
    assert float(result.predicted[1] - result.first_order.value) == pytest.approx(oracle, rel=1e-9)


def test_weights_of_sequences_are_part_of_the_sample():
    """Of texts of unlike length, gradients go with lengths: with mean weights held, errors are some three times too large."""
    losses, theta, rate = [of_unlike_length(seed, num) for seed, num in ((1, 9), (2, 11))], torch.zeros(2).double(), 0.5
    result = task_interference(*losses, theta, learning_rate=rate, by="none")
    rows = [per_sample_gradients(loss, theta) for loss in losses]
    weights = [loss.terms(theta)[1] for loss in losses]

    def orders(kept):
        a, b = (x[there] for x, there in zip(rows, kept, strict=True))
        v, w = (x[there].mean() for x, there in zip(weights, kept, strict=True))
        scale = rate**2 / 2 / torch.stack([w * v**2, v * w**2])
        first = -rate * (a.mean(0) @ b.mean(0)) / (v * w)
        return torch.cat([first[None], cross_forms((a @ b.T)[None])[0] * scale])

    every = [torch.arange(len(x)) for x in rows]
    oracle = orders(every)
    torch.testing.assert_close(torch.cat([result.first_order.value[None], result.second_order]), oracle)
    square = torch.zeros(3).double()
    for side in range(2):
        left = [orders([at[at != i] if k == side else at for k, at in enumerate(every)]) for i in every[side]]
        values = torch.stack(left)
        square += (len(left) - 1) / len(left) * (values - values.mean(0)).square().sum(0)
    torch.testing.assert_close(result.second_order_stderr, square[1:].sqrt())
    assert float(result.first_order.stderr) == pytest.approx(float(square[0].sqrt()), rel=0.15)  # to first order
    held = [(x / w.mean()).mean(0) for x, w in zip(rows, weights, strict=True)]
    naive = (
        rate
        * sum(
            float(((x / w.mean()) @ other).var()) / len(x)
            for x, w, other in zip(rows, weights, held[::-1], strict=True)
        )
        ** 0.5
    )
    assert naive > 2 * float(result.first_order.stderr)
