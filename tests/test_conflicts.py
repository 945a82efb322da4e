"""Conflicts of tasks: against plain loops over gradients, and the tests' levels and power."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import scipy
import torch
from problems import problem, seeded, tokens

import funcscope as fs
from funcscope.core.keys import uniform
from funcscope.core.layout import View
from funcscope.curvature.gram import Grams
from funcscope.curvature.mean_gradients import bootstrapped, bounds, counts_drawn
from funcscope.curvature.rows import per_sample_gradients
from funcscope.curvature.scored_sequences import scored_sequences
from funcscope.fisher import gram_conflicts, label_test, task_conflicts, whitened_grams


def grams(a: torch.Tensor, b: torch.Tensor) -> list[Grams]:
    """From gradients (blocks, samples, coordinates)."""
    names = [f"b{i}" for i in range(len(a))]
    return [Grams(x @ y.mT, "sequence", 0, [], names) for x, y in ((a, a), (a, b), (b, b))]


def normals(seed: int, *shape: int) -> torch.Tensor:
    return seeded(seed, lambda: torch.randn(*shape, dtype=torch.float64))


def two_tasks() -> tuple[fs.Loss, fs.Loss]:
    model, _, criterion = problem("gpt2")
    net = fs.functional(model)
    return tuple(fs.objective(net, [tokens(seed, rows, 6)], criterion) for seed, rows in ((11, 4), (12, 3)))


def moments(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """The oracle: pairs of different samples, one at a time."""
    n, m = len(a), len(b)
    inner = sum(float(x @ y) for x in a for y in b) / (n * m)
    first = sum(float(a[i] @ a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    second = sum(float(b[i] @ b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    cosine = inner / math.sqrt(first * second) if min(first, second) > 0 else math.nan
    return {"inner": inner, "square_first": first, "square_second": second, "cosine": cosine}


def resolved(result) -> torch.Tensor:
    first = result.square_first > 2 * result.square_first_stderr
    return first & (result.square_second > 2 * result.square_second_stderr)


def test_every_block_of_a_model_has_the_moments_of_its_gradients():
    one, two = two_tasks()
    result = task_conflicts(one, two, one.net.theta, key=fs.key(0), num=19)
    a, b = (per_sample_gradients(loss, one.net.theta) for loss in (one, two))
    for i, (name, views) in enumerate(one.layout.blocks("layer").items()):
        assert result.blocks[i] == name
        places = torch.cat([torch.arange(one.layout.num)[one.layout.by_name[view.leaf].slice] for view in views])
        oracle = moments(a[:, places], b[:, places])
        if not resolved(result)[i]:
            oracle["cosine"] = math.nan
        for attribute, value in oracle.items():
            assert float(getattr(result, attribute)[i]) == pytest.approx(value, rel=1e-8, nan_ok=True)


def test_the_error_of_the_cosine_is_that_of_samples_left_out_in_turn():
    a, b = 4 + normals(0, 6, 4), 4 + normals(1, 5, 4)
    result = gram_conflicts(*grams(a[None], b[None]), key=fs.key(0), num=9)
    without_a = [moments(torch.cat([a[:i], a[i + 1 :]]), b)["cosine"] for i in range(6)]
    without_b = [moments(a, torch.cat([b[:i], b[i + 1 :]]))["cosine"] for i in range(5)]
    squares = 0.0
    for rest in (without_a, without_b):
        x = torch.tensor(rest, dtype=torch.float64)
        squares += float((len(x) - 1) / len(x) * (x - x.mean()).square().sum())
    assert float(result.cosine_stderr) == pytest.approx(math.sqrt(squares), rel=1e-9)
    assert gram_conflicts(*grams(a[None, :2], b[None]), key=fs.key(0), num=9).cosine_stderr.isnan().all()


def test_resamples_leave_out_pairs_of_copies():
    """Corrections 2.7a: with copies, lengths centre on those of the sample means."""
    a, b = 0.3 + normals(2, 7, 5), normals(3, 5, 5)
    three = [each.values for each in grams(a[None], b[None])]
    drawn = bootstrapped(*three, fs.key(4), 200)
    for r in range(3):
        counts = counts_drawn(7, fs.fold_in(fs.key(4), "first"), 200)[r]
        places = [i for i, times in enumerate(counts.tolist()) for _ in range(times)]
        pairs = [(i, j) for i, j in product(places, places) if i != j]
        oracle = sum(float(a[i] @ a[j]) for i, j in pairs) / len(pairs)
        assert float(drawn.first[0, r]) == pytest.approx(oracle, rel=1e-10)
        other = counts_drawn(5, fs.fold_in(fs.key(4), "second"), 200)[r]
        inner = float(a[places].mean(0) @ (other.double() @ b / 5))
        assert float(drawn.inner[0, r]) == pytest.approx(inner, rel=1e-10)
    truth = float(gram_conflicts(*grams(a[None], b[None]), key=fs.key(0), num=9).square_first)
    attenuated = float(a.mean(0).square().sum())
    stderr = float(drawn.first.std()) / 200**0.5
    assert abs(float(drawn.first.mean()) - truth) < 4 * stderr
    counts = counts_drawn(7, fs.fold_in(fs.key(4), "first"), 200).double()
    plain = ((counts @ three[0][0]) * counts).sum(1) / 49
    assert abs(float(plain.mean()) - truth) > 10 * stderr  # and lies above even what the sample mean has
    assert float(plain.mean()) > attenuated


def test_the_cosine_is_that_of_the_truth_where_that_of_the_means_is_half_of_it():
    blocks, n, m, p = 60, 24, 18, 80
    mean = torch.full((p,), 0.3, dtype=torch.float64)
    a, b = mean + normals(5, blocks, n, p), mean + normals(6, blocks, m, p)
    result = gram_conflicts(*grams(a, b), key=fs.key(0), num=9)
    naive = torch.nn.functional.cosine_similarity(a.mean(1), b.mean(1), dim=1)
    stderr = float(result.cosine.std()) / blocks**0.5
    assert abs(float(result.cosine.mean()) - 1) < 4 * stderr + 0.02
    assert resolved(result).all()
    assert float(naive.mean()) < 0.8
    ratio = float(result.inner_stderr.square().mean().sqrt() / result.inner.std())
    assert 0.75 < ratio < 1.35  # the error is that which repetitions have


def test_there_is_no_cosine_of_a_mean_that_is_not_told_from_zero():
    a, b = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double(), torch.ones(2, 2).double()
    result = gram_conflicts(*grams(a[None], b[None]), key=fs.key(0), num=19)
    assert float(result.square_first) == -1
    assert result.cosine.isnan().all()
    assert "no cosine" in result.notes[0]
    mean = torch.tensor([0.2, 0.8]).double()[:, None, None]  # weak, strong
    a, b = mean + normals(8, 2, 15, 10), mean + normals(38, 2, 15, 10)
    result = gram_conflicts(*grams(a, b), key=fs.key(0), num=99)
    assert min(result.square_first[0], result.square_second[0]) > 0  # by itself that gave a cosine
    assert resolved(result).tolist() == [False, True]
    for name in ("cosine", "cosine_stderr", "cosine_low", "cosine_high"):
        assert getattr(result, name).isnan().tolist() == [True, False]
    assert result.undefined.isfinite().all()
    assert result.notes[0] == "no cosine, as a mean gradient is not told from 0: b0."


def test_p_values_of_labels_are_uniform_where_tasks_do_not_differ_and_q_values_are_as_by_hand():
    a, b = (normals(seed, 300, num, 30).exp() for seed, num in ((7, 9), (8, 6)))  # skewed, unequal numbers
    result = gram_conflicts(*grams(a, b), key=fs.key(1), num=499)
    assert scipy.stats.kstest(result.p_differ.numpy(), "uniform").pvalue > 0.01
    assert result.q_differ.min() > 0.05
    for p, q in ((result.p_differ, result.q_differ), (result.p_conflict, result.q_conflict)):
        ordered, places = p.sort()
        m = len(p)
        oracle = [min(min(float(ordered[j]) * m / (j + 1), 1.0) for j in range(k, m)) for k in range(m)]
        torch.testing.assert_close(q[places], torch.tensor(oracle, dtype=torch.float64))


def test_the_test_of_conflict_has_its_level_where_means_are_orthogonal():
    p = 20
    first, second = torch.zeros(p).double(), torch.zeros(p).double()
    first[0], second[1] = 2.0, 2.0
    a, b = first + normals(9, 400, 15, p), second + normals(10, 400, 15, p)
    p_values = gram_conflicts(*grams(a, b), key=fs.key(2), num=299).p_conflict
    rejected = float((p_values <= 0.05).double().mean())
    assert 0.02 < rejected < 0.095  # of 400: .05 +- .011, and what 15 samples are short of many


@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.5)])
def test_errors_are_what_repetitions_have_whether_there_are_means_or_none(first, second):
    """The jackknife's are sqrt(2) times as large where both means are 0."""
    a, b = first + normals(30, 1000, 15, 20), second + normals(31, 1000, 18, 20)
    result = gram_conflicts(*grams(a, b), key=fs.key(2), num=1)
    for name in ("inner", "square_first", "square_second"):
        ratio = float(getattr(result, f"{name}_stderr").square().mean().sqrt() / getattr(result, name).std())
        assert 0.92 < ratio < 1.17, name


def test_the_test_of_conflict_is_too_careful_where_both_means_are_zero():
    a, b = normals(30, 500, 15, 20), normals(31, 500, 15, 20)
    result = gram_conflicts(*grams(a, b), key=fs.key(2), num=199)
    assert float((result.p_conflict <= 0.0501).double().mean()) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize(("num", "scale"), [(15, 1.0), (15, 2.0), (40, 1.0)])
def test_bounds_of_the_cosine_have_the_truth_within_them_as_often_as_they_say(num, scale):
    """Three parameters, where all of the noise is along the means; plain quantiles have .91 to .93 at 15 samples."""
    mean = torch.tensor([[3.0, 0.0, 0.0], [1.5, 1.5 * 3**0.5, 0.0]], dtype=torch.float64)
    a, b = (row + scale * normals(40 + i, 1500, num, 3) for i, row in enumerate(mean))
    draws = bootstrapped(a @ a.mT, a @ b.mT, b @ b.mT, fs.key(3), 400).cosine
    low, high = bounds(draws, num)
    covered = ((low <= 0.5) & (high >= 0.5)).double().mean()
    assert 0.92 < float(covered) < 0.97
    if num == 15:
        low, high = (draws.nanquantile(q, 1) for q in (0.025, 0.975))
        assert ((low <= 0.5) & (high >= 0.5)).double().mean() < covered - 0.015  # negative control


def test_planted_conflicts_are_found_and_nothing_else():
    a, b = normals(11, 8, 20, 50), normals(12, 8, 20, 50)
    a[3] += 0.5
    b[3] -= 0.5
    a[5] += 0.5
    b[5] += 0.5
    result = gram_conflicts(*grams(a, b), key=fs.key(3))
    assert (result.q_conflict <= 0.05).nonzero().flatten().tolist() == [3]
    assert (result.q_differ <= 0.05).nonzero().flatten().tolist() == [3]  # equal means do not differ
    assert float(result.cosine[3]) == pytest.approx(-1, abs=0.2)
    assert float(result.cosine_high[3]) < 0 < float(result.cosine_low[5])
    assert result.p_conflict.min() == pytest.approx(1 / 1000)
    assert "take 159" in gram_conflicts(*grams(a, b), key=fs.key(3), num=99).notes[-1]


def test_documented_p_values_call_every_pair_a_conflict_of_one_task_with_itself():
    """E28: coordinates permuted, in pairs whose cosine is at most -1/2, of two halves of the same data."""
    orders = seeded(12, lambda: torch.rand(200, 200)).argsort(1)
    signs = seeded(13, lambda: torch.randint(0, 2, (2, 12, 16, 1))) * 2.0 - 1
    axis = normals(14, 12, 1, 200)
    a, b = (signs[i] * axis + 0.3 * normals(15 + i, 12, 16, 200) for i in range(2))

    def documented(x, y):
        cosine = torch.nn.functional.cosine_similarity
        at = cosine(x, y, dim=0)
        return float(at), float((cosine(x[orders], y.expand(200, -1), dim=1).abs() >= at.abs()).double().mean())

    found = [documented(x, y) for x, y in product(a[0, :6], b[0, :6])]
    tested = [p for cosine, p in found if cosine <= -0.5]
    assert len(tested) > 5
    assert max(tested) == 0.0
    result = gram_conflicts(*grams(a, b), key=fs.key(4))
    assert result.q_conflict.min() > 0.05
    assert result.q_differ.min() > 0.05


@pytest.mark.parametrize("pooled", [True, False])
def test_whitening_by_the_samples_of_one_task_makes_tasks_differ(pooled):
    """Corrections 2.7b: with task A's own Fisher the level at .05 is .13 and more."""
    a, b = 1 + normals(20, 400, 8, 60), 1 + normals(21, 400, 8, 60)
    weights = torch.cat([a, b], 1).square().mean(1, keepdim=True) if pooled else a.square().mean(1, keepdim=True)
    a, b = a / weights.sqrt(), b / weights.sqrt()
    both = torch.cat([a, b], 1)
    rejected = float((label_test(both @ both.mT, 8, key=fs.key(0), num=199).p_value <= 0.0501).double().mean())
    assert rejected < 0.085 if pooled else rejected > 0.12


def test_whitened_grams_are_those_of_divided_gradients():
    one, two = two_tasks()
    theta = one.net.theta
    a, b = (per_sample_gradients(loss, theta) for loss in (one, two))
    held = per_sample_gradients(two, theta).square().mean(0) + 1e-6
    some = [leaf for leaf in one.layout.leaves if leaf.name.endswith(("h.1.attn.c_attn.weight", "h.0.ln_2.bias"))]
    views = {leaf.name: (View(leaf.name, 0, slice(None)),) for leaf in some}
    for given in (None, held):
        three = whitened_grams(one, two, theta, by=views, fisher=given, damping=0.01)
        for leaf in some:
            x, y = a[:, leaf.slice], b[:, leaf.slice]
            weights = torch.cat([x, y]).square().mean(0) if given is None else given[leaf.slice]
            root = (weights + 0.01 * weights.mean()).sqrt()
            for gram, (u, v) in zip(three, ((x, x), (x, y), (y, y)), strict=True):
                torch.testing.assert_close(gram.block(leaf.name), (u / root) @ (v / root).T, rtol=1e-9, atol=1e-9)
    assert len(some) == 2
    result = task_conflicts(one, two, theta, key=fs.key(0), by=views, whitened=True, num=19)
    dense = gram_conflicts(*whitened_grams(one, two, theta, by=views), key=fs.key(0), num=19)
    assert torch.equal(result.inner, dense.inner)


def test_directions_are_compared_whatever_their_lengths():
    a, b = normals(22, 3, 6, 10), normals(23, 3, 5, 10)
    scaled = a * torch.arange(1, 7)[None, :, None]
    one, other = (gram_conflicts(*grams(x, b), key=fs.key(0), unit_length=True, num=99) for x in (a, scaled))
    torch.testing.assert_close(one.inner, other.inner)
    assert torch.equal(one.p_differ, other.p_differ)
    oracle = torch.nn.functional.cosine_similarity(a[:, :, None], b[:, None], dim=3).mean((1, 2))
    torch.testing.assert_close(one.inner, oracle)


def test_the_label_test_counts_as_by_hand():
    x = normals(24, 7, 3)
    pooled = x @ normals(25, 3, 3) @ x.T  # not symmetric
    found = label_test(pooled[None], 3, key=fs.key(5), num=49)

    def statistic(first, second):
        between = sum(float(pooled[i, j]) for i in first for j in second) / 12
        within = [
            sum(float(pooled[i, j]) for i in s for j in s if i != j) / (len(s) * (len(s) - 1)) for s in (first, second)
        ]
        return between - sum(within) / 2

    at = statistic([0, 1, 2], [3, 4, 5, 6])
    assert float(found.statistic) == pytest.approx(at)
    count = 0
    for i in range(49):
        order = uniform(fs.fold_in(fs.key(5), i), torch.zeros(7).double()).argsort()
        labels = (torch.arange(7) < 3)[order]
        first = [k for k in range(7) if labels[k]]
        count += statistic(first, [k for k in range(7) if k not in first]) <= at + 1e-12
    assert float(found.p_value) == pytest.approx((1 + count) / 50)


@pytest.mark.slow
@pytest.mark.parametrize("whitened", [False, True], ids=["plain", "whitened"])
def test_sequences_without_a_label_are_no_samples(whitened):
    """As gradients of 0 they would make both tasks longer, and every task more like itself."""
    model, _, criterion = problem("gpt2")
    net = fs.functional(model)
    ids, mask = tokens(11, 6, 6).values()
    labels = ids.masked_fill(mask == 0, -100)
    labels[[1, 4]] = -100
    batch, rows = {"input_ids": ids, "attention_mask": mask, "labels": labels}, [0, 2, 3, 5]
    some = fs.objective(net, [batch], criterion)
    rest = fs.objective(net, [{name: x[rows] for name, x in batch.items()}], criterion)
    other = fs.objective(net, [tokens(12, 4, 6)], criterion)
    found, oracle = (
        task_conflicts(loss, other, net.theta, key=fs.key(0), whitened=whitened, num=19) for loss in (some, rest)
    )
    assert (found.num_first, found.num_unscored, oracle.num_unscored) == (4, 2, 0)
    assert found.notes[0] == "2 sequences left out: not scored: no samples."
    for name in ("inner", "square_first", "cosine", "p_differ", "inner_stderr"):
        torch.testing.assert_close(getattr(found, name), getattr(oracle, name), equal_nan=True)


def test_what_a_criterion_of_ones_own_does_not_score_is_no_sample():
    net = fs.functional(seeded(0, lambda: torch.nn.Linear(2, 1)))
    criterion = fs.custom(lambda out, y: ((out[:, 0] - y) ** 2, (y > 0).to(out)))
    x, y = torch.ones(5, 2), torch.tensor([1.0, -1.0, 2.0, -1.0, 3.0])
    loss, lost = scored_sequences(fs.objective(net, [(x[:2], y[:2]), (x[2:], y[2:])], criterion), net.theta)
    assert lost == 2
    assert torch.cat([targets for _, targets in loss.batches]).tolist() == [1, 2, 3]


def test_what_is_no_pair_of_tasks_is_refused():
    a, b = normals(26, 1, 4, 3), normals(27, 1, 3, 3)
    aa, ab, bb = grams(a, b)
    with pytest.raises(ValueError, match=r"\(n, n\), \(n, m\)"):
        gram_conflicts(aa, bb, ab, key=fs.key(0))
    with pytest.raises(ValueError, match="same blocks"):
        gram_conflicts(replace(aa, blocks=["x"]), ab, bb, key=fs.key(0))
    with pytest.raises(ValueError, match="two samples at least, got 4 and 1"):
        gram_conflicts(*grams(a, b[:, :1]), key=fs.key(0))
    with pytest.raises(ValueError, match="sample 2 of the first task has none in block 0"):
        gram_conflicts(*grams(a * torch.tensor([1.0, 1, 0, 1])[None, :, None], b), key=fs.key(0), unit_length=True)
    one, _ = two_tasks()
    mlp = problem("mlp")
    other = fs.objective(fs.functional(mlp.model), mlp.batches, mlp.criterion)
    with pytest.raises(ValueError, match="same net"):
        task_conflicts(one, other, one.net.theta, key=fs.key(0))
    with pytest.raises(ValueError, match="no samples of a test"):
        gram_conflicts(*(replace(each, unit="token") for each in (aa, ab, bb)), key=fs.key(0))
    theta = one.net.theta
    theta[0] = math.nan  # of token 0, which is padding here and there
    with pytest.raises(ValueError, match=r"of sequence \d in `transformer.wte.weight` is not finite"):
        whitened_grams(one, one, theta, by={"x": (View("transformer.wte.weight", 0, slice(None)),)})
    with pytest.raises(ValueError, match="above 0 in block"):
        whitened_grams(one, one, one.net.theta, fisher=torch.zeros_like(one.net.theta))
