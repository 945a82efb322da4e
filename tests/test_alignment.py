"""Alignment of several tasks: against moments by hand, conflicts of two tasks, and what documents call conflicts."""

from __future__ import annotations

import math

import pytest
import scipy
import torch
from problems import of_unlike_length, problem, seeded, tokens

import funcscope as fs
from funcscope.curvature.gram import Grams
from funcscope.curvature.rows import per_sample_gradients
from funcscope.curvature.scored_sequences import all_apart
from funcscope.curvature.task_pairs import task_grams
from funcscope.fisher import task_conflicts
from funcscope.gradients import gradient_alignment, gram_alignment


def normals(seed: int, *shape: int) -> torch.Tensor:
    return seeded(seed, lambda: torch.randn(*shape, dtype=torch.float64))


def grams(**rows: torch.Tensor) -> dict[tuple[str, str], Grams]:
    """From gradients (blocks, samples, coordinates) by task."""
    names = list(rows)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i:]]
    blocks = [f"b{i}" for i in range(len(rows[names[0]]))]
    return {(a, b): Grams(rows[a] @ rows[b].mT, "sequence", 0, [], blocks) for a, b in pairs}


def language_tasks(*lengths: int) -> dict[str, fs.Loss]:
    model, _, criterion = problem("gpt2")
    net = fs.functional(model)
    return {f"t{i}": fs.objective(net, [tokens(20 + i, 4, length)], criterion) for i, length in enumerate(lengths)}


def small_tasks(*seeds: int, rows: int = 4) -> dict[str, fs.Loss]:
    net = fs.functional(problem("mlp").model)
    data = {
        f"t{i}": (1 + normals(seed, rows, 4), torch.full((rows,), i % 3))  # a class each: strong mean gradients
        for i, seed in enumerate(seeds)
    }
    return {name: fs.objective(net, [each], fs.classification) for name, each in data.items()}


def u_statistic(x: torch.Tensor, y: torch.Tensor | None = None) -> float:
    if y is not None:
        return float(x.mean(0) @ y.mean(0))
    n = len(x)
    return sum(float(x[i] @ x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))


@pytest.mark.slow
def test_three_tasks_of_a_model_have_the_moments_of_the_gradients_of_their_losses():
    losses = language_tasks(5, 5, 4)
    theta = losses["t0"].net.theta
    result = gradient_alignment(losses, theta, key=fs.key(0), num=19)
    rows = {}
    for name, loss in losses.items():
        weights = loss.terms(theta)[1]
        rows[name] = per_sample_gradients(loss, theta) / weights.mean()
        gradient = torch.func.grad(loss)(theta)
        torch.testing.assert_close(rows[name].mean(0), gradient)  # that of the loss
    layout = losses["t0"].layout
    for i, views in enumerate(layout.blocks("layer").values()):
        places = torch.cat([torch.arange(layout.num)[layout.by_name[view.leaf].slice] for view in views])
        for q, (a, b) in enumerate([("t0", "t1"), ("t0", "t2"), ("t1", "t2")]):
            inner = u_statistic(rows[a][:, places], rows[b][:, places])
            assert float(result.inner[i, q]) == pytest.approx(inner, rel=1e-7)
    for i, name in enumerate(losses):
        assert float(result.inner_of_all[i, i]) == pytest.approx(u_statistic(rows[name]), rel=1e-7)


def test_two_tasks_have_the_cosines_of_task_conflicts():
    losses = small_tasks(1, 2, rows=12)
    one, two = losses.values()
    result = gradient_alignment(losses, one.net.theta, key=fs.key(0), by="tensor", num=9)
    other = task_conflicts(one, two, one.net.theta, key=fs.key(0), by="tensor", num=9)
    torch.testing.assert_close(result.cosine[:, 0], other.cosine, equal_nan=True)
    torch.testing.assert_close(result.cosine_stderr[:, 0], other.cosine_stderr, equal_nan=True)
    assert result.blocks == other.blocks
    assert other.cosine.isfinite().sum() > 1
    a, b = (per_sample_gradients(loss, one.net.theta) for loss in (one, two))
    cosine = u_statistic(a, b) / math.sqrt(u_statistic(a) * u_statistic(b))
    ratio = math.sqrt(u_statistic(a) / u_statistic(b))
    for at in ((0, 1), (1, 0)):
        assert float(result.cosine_of_all[at]) == pytest.approx(cosine, rel=1e-7)
        assert float(result.magnitude_ratio_of_all[at]) == pytest.approx(ratio ** (1 - 2 * at[0]), rel=1e-7)


def planted(noise: float = 1.0) -> dict[str, torch.Tensor]:
    """Means at 0, 60 and 180 degrees, of lengths 3, 3 and 6."""
    means = torch.tensor([[3.0, 0.0], [1.5, 1.5 * 3**0.5], [-6.0, 0.0]]).double()
    return {
        name: torch.cat([mean + noise * normals(i, 1, 30, 2), noise * normals(9 + i, 1, 30, 8)], 2)
        for i, (name, mean) in enumerate(zip("abc", means, strict=True))
    }


def test_off_diagonals_are_what_tasks_are_to_each_other():
    """Mistake 16: a document's matrix reads a name that nobody gives, and is 0 off the diagonal."""
    result = gram_alignment(grams(**planted()), key=fs.key(1), num=199)
    oracle = torch.tensor([[1.0, 0.5, -1.0], [0.5, 1.0, -0.5], [-1.0, -0.5, 1.0]]).double()
    assert ((result.cosine_of_all - oracle).abs() <= 3 * result.cosine_of_all_stderr + 1e-12).all()
    documented = [
        [max(0.0, -{"overall_conflict": float(x)}.get("global_conflict", 0.0)) for x in row] for row in oracle
    ]
    assert not torch.tensor(documented).any()
    assert (result.conflict_of_all > 0.3).tolist() == [[False, False, True], [False, False, True], [True, True, False]]
    assert (result.q_conflict_of_all <= 0.05).tolist() == (result.conflict_of_all > 0.3).tolist()
    ratios = torch.tensor([[1.0, 1.0, 0.5], [1.0, 1.0, 0.5], [2.0, 2.0, 1.0]]).double()
    assert ((result.magnitude_ratio_of_all - ratios).abs() <= 3 * result.magnitude_ratio_of_all_stderr + 1e-12).all()


def test_the_mean_of_cosines_of_chunks_is_nearer_to_zero_and_its_error_is_not_zero():
    """Mistake 17."""
    rows = planted(noise=8.0)
    a, c = (rows[name].repeat(1, 1, 1) for name in "ac")
    a, c = (torch.cat([each, mean + 8 * normals(30 + i, 1, 130, 10)], 1) for i, (each, mean) in enumerate(
        ((a, torch.tensor([3.0] + 9 * [0.0])), (c, torch.tensor([-6.0] + 9 * [0.0])))))  # fmt: skip
    cosine = torch.nn.functional.cosine_similarity
    chunks = cosine(a[0].view(40, 4, 10).mean(1), c[0].view(40, 4, 10).mean(1), dim=1)
    result = gram_alignment(grams(a=a, c=c), key=fs.key(2), num=99)
    assert float(chunks.mean()) > -0.6  # for -1
    assert float(result.cosine_of_all[0, 1]) == pytest.approx(-1, abs=3 * float(result.cosine_of_all_stderr[0, 1]))
    assert float(result.cosine_of_all[0, 1]) < float(cosine(a[0].mean(0), c[0].mean(0), dim=0))
    documented_std = 0.0
    assert float(result.cosine_of_all_stderr[0, 1]) > documented_std
    assert float(chunks.std()) > 0.1


def test_a_p_value_of_thirty_samples_knows_nothing_of_the_data():
    """Mistake 15: neither how many sequences there are, nor how many parameters."""

    def documented(cosine: torch.Tensor) -> torch.Tensor:
        return torch.tensor(scipy.stats.norm.cdf(cosine.clamp(-0.999, 0.999).atanh() * 27**0.5))

    blocks = 300  # no conflict: orthogonal means in three parameters, no stronger than their noise
    mean = torch.eye(3).double()
    a, b = (1.2 * mean[i] + 3 * normals(40 + i, blocks, 12, 3) for i in range(2))
    cosine = torch.nn.functional.cosine_similarity(a.mean(1), b.mean(1), dim=1)
    false_calls = float((documented(cosine) <= 0.05).double().mean())
    p_values = gram_alignment(grams(a=a, b=b), key=fs.key(3), num=199).p_conflict[:, 0]
    assert false_calls > 0.2
    assert float((p_values <= 0.0501).double().mean()) < 0.1
    wide = torch.tensor([1.0, -0.1 / 0.99**0.5])  # a weak conflict, sure: -.1, of 40 sequences with little noise
    first = torch.tensor([1.0, 0.0]) + 0.02 * normals(50, 1, 40, 2)
    second = torch.stack([wide[1], torch.ones(())]) + 0.02 * normals(51, 1, 40, 2)
    result = gram_alignment(grams(a=first.double(), b=second.double()), key=fs.key(4))
    assert float(result.cosine) == pytest.approx(-0.1, abs=0.02)
    assert float(documented(result.cosine)) > 0.2
    assert float(result.q_conflict) <= 0.002


def test_what_is_not_told_from_zero_has_no_cosine_and_a_note():
    rows = planted()
    rows["b"] = normals(7, 1, 30, 10)
    result = gram_alignment(grams(**rows), key=fs.key(5), num=19)
    assert result.cosine_of_all.isnan().tolist() == [[False, True, False], [True, True, True], [False, True, False]]
    assert result.cosine[0].isnan().tolist() == [True, False, True]
    assert result.conflict[0].isnan().tolist() == [True, False, True]
    assert result.notes == ["no cosine in 2 of 3 cells, as a mean gradient is not told from 0."]


def test_sequences_of_several_tasks_are_left_out_of_all():
    losses = small_tasks(1, 2, 3)
    net = losses["t0"].net
    data = [each.batches[0] for each in (losses["t0"], small_tasks(4, rows=3)["t0"])]
    (x, y), (more, labels) = [(inputs, targets.index) for inputs, targets in data]
    losses["t3"] = fs.objective(net, [(more, labels), (x[:1], y[:1])], fs.classification)
    kept, lost = all_apart(losses, net.theta)
    assert [len(loss.terms(net.theta)[0]) for loss in kept.values()] == [3, 4, 4, 3]
    assert lost.shared == 2
    result = gradient_alignment(losses, net.theta, key=fs.key(0), num=9)
    assert result.num_sequences == {"t0": 3, "t1": 4, "t2": 4, "t3": 3}
    assert result.notes[0] == "2 sequences left out: in several tasks: no independent samples."


def test_what_are_no_tasks_is_refused():
    losses = small_tasks(1, 2)
    theta = losses["t0"].net.theta
    with pytest.raises(ValueError, match="two tasks or more"):
        gradient_alignment({"t0": losses["t0"]}, theta, key=fs.key(0))
    cnn = problem("cnn")
    other = fs.objective(fs.functional(cnn.model), cnn.batches, cnn.criterion)
    with pytest.raises(ValueError, match="same net"):
        gradient_alignment({**losses, "other": other}, theta, key=fs.key(0))
    made = grams(**planted())
    del made["b", "c"]
    with pytest.raises(ValueError, match=r"not \[\('b', 'c'\)\]"):
        gram_alignment(made, key=fs.key(0))
    same = {"t0": losses["t0"], "t1": losses["t0"], "t2": losses["t1"]}
    with pytest.raises(ValueError, match="that no other one has, got 0"):
        gradient_alignment(same, theta, key=fs.key(0))
    with pytest.raises(ValueError, match="two sequences at least"):
        gram_alignment(grams(a=normals(0, 1, 1, 3), b=normals(1, 1, 4, 3)), key=fs.key(0))


def test_errors_of_ratios_and_inner_products_have_the_weights_of_sequences_in_them():
    """Against each sequence left out in turn; of gradients that go with lengths, held weights would make them much larger."""
    losses, theta = {"a": of_unlike_length(1, 15), "b": of_unlike_length(2, 12)}, torch.zeros(2).double()
    result = gradient_alignment(losses, theta, key=fs.key(0), num=19)
    rows = {name: per_sample_gradients(loss, theta) for name, loss in losses.items()}
    weights = {name: loss.terms(theta)[1] for name, loss in losses.items()}

    def numbers(**kept):
        x = {name: rows[name][kept[name]] / weights[name][kept[name]].mean() for name in rows}
        squares = {name: u_statistic(each) for name, each in x.items()}
        return torch.tensor(
            [u_statistic(x["a"], x["b"]), math.sqrt(squares["a"] / squares["b"]), squares["a"]]
        ).double()

    every = {name: torch.arange(len(each)) for name, each in rows.items()}
    square = torch.zeros(3).double()
    for name, at in every.items():
        left = torch.stack([numbers(**{**every, name: at[at != i]}) for i in at])
        square += (len(at) - 1) / len(at) * (left - left.mean(0)).square().sum(0)
    inner, ratio, length = square.sqrt().tolist()
    assert float(result.inner_of_all_stderr[0, 1]) == pytest.approx(inner, rel=0.15)
    assert float(result.magnitude_ratio_of_all_stderr[0, 1]) == pytest.approx(ratio, rel=0.15)
    assert float(result.inner_of_all_stderr[0, 0]) == pytest.approx(length, rel=0.15)
    held = gram_alignment(task_grams(losses, theta), key=fs.key(0), num=19)
    assert float(held.inner_of_all_stderr[0, 1]) > 2 * float(result.inner_of_all_stderr[0, 1])
    torch.testing.assert_close(held.cosine_of_all, result.cosine_of_all)


def test_conflicts_of_blocks_are_negative_cosines():
    result = gram_alignment(grams(**planted()), key=fs.key(1), num=19)
    assert result.conflict.shape == result.cosine.shape
    torch.testing.assert_close(result.conflict[0], torch.tensor([0.0, 1.0, 0.5]).double(), atol=0.15, rtol=0)
    torch.testing.assert_close(result.conflict, torch.where(result.cosine < 0, -result.cosine, 0.0))
