"""Interference in heads: against plain sums, and what its averages and tests can say."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import scipy
import torch
from problems import problem, seeded, tokens

import funcscope as fs
from funcscope.core.statistics import q_values
from funcscope.curvature.rows import per_sample_gradients
from funcscope.fisher import head_interference, head_views, label_test
from funcscope.fisher.interference import interference_of


@cache
def losses(name: str = "llama") -> tuple[fs.Loss, ...]:
    model, _, criterion = problem(name)
    net = fs.functional(model)
    return tuple(fs.objective(net, [tokens(seed, rows, 6)], criterion) for seed, rows in ((21, 3), (22, 4), (23, 5)))


@cache
def result(name: str = "llama", damping: float = 1e-2):
    a, b, held = losses(name)
    views = head_views(a.net, problem(name).model.config)
    return head_interference(a, b, held, a.net.theta, views=views, key=fs.key(0), damping=damping, num=19), views


def normals(seed: int, *shape: int) -> torch.Tensor:
    return seeded(seed, lambda: torch.randn(*shape, dtype=torch.float64))


def cut(loss, rows, views):
    places = []
    for view in views:
        leaf = loss.layout.by_name[view.leaf]
        index = torch.arange(leaf.offset, leaf.offset + leaf.numel).view(leaf.shape)
        places.append(index.movedim(view.dim, 0)[view.slice].flatten())
    return rows[:, torch.cat(places)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_number_is_the_sum_over_the_parameters_of_its_head(name):
    found, views = result(name)
    a, b, held = (per_sample_gradients(loss, loss.net.theta) for loss in losses(name))
    assert found.blocks == list(views)
    for at, each in enumerate(views.values()):
        x, y, rest = (cut(losses(name)[0], rows, each) for rows in (a, b, held))
        information = (rest**2).sum(0) / 5
        lam = 0.01 * float(information.mean())
        for i in (0, 2):
            for j in (1, 3):
                terms = x[i] / (information + lam)
                size = float((x[i].abs() / (information + lam) * y[j].abs()).sum())
                assert float(found.directed[at, i, j]) == pytest.approx(
                    float((terms * x[i] * y[j].abs()).sum()), rel=1e-6
                )
                assert float(found.signed[at, i, j]) == pytest.approx(float((terms * y[j]).sum()), abs=1e-6 * size)
                assert float(found.symmetric[at, i, j]) == pytest.approx(size, rel=1e-6)
        assert float(found.absolute[at, 1]) == pytest.approx(float(y[1].abs().sum()), rel=1e-6)
        assert float(found.ratio[at]) == pytest.approx(
            float(found.directed[at].mean() / y.abs().sum(1).mean()), rel=1e-6
        )
    assert found.directed.shape == (len(views), 3, 4)


def test_maps_have_a_place_for_every_head():
    found, _ = result()
    parts = found.coords["part"]
    assert parts == ["Q 0", "Q 1", "K 0", "V 0", "O 0", "O 1"]  # one head of keys for two of queries
    for i, layer in enumerate(found.coords["layer"]):
        for j, part in enumerate(parts):
            at = found.blocks.index(f"{layer}.{part.replace(' ', '.')}")
            assert float(found.heads[i, j]) == float(found.ratio[at])
            assert float(found.q_heads[i, j]) == float(found.q_directed[at])
    apart = replace(found, blocks=[block.replace("1.self_attn.V.0", "2.self_attn.V.0") for block in found.blocks])
    assert apart.heads.shape == (3, 6)
    assert int(apart.heads.isnan().sum()) == 6


def test_a_scale_of_the_loss_leaves_ratios_as_they_are():
    """E29: an absolute lambda is all there is of the sum where gradients are small."""
    a, b, held = normals(1, 5, 30), normals(2, 4, 30), normals(3, 6, 30)

    def ratio(scale, damping=1e-3):
        x, y, rest = (scale * each for each in (a, b, held))
        information = rest.square().mean(0)
        pooled = interference_of(x, y, information + damping * information.mean())
        return float(pooled.directed[:5, 5:].mean() / pooled.absolute[5:].mean())

    assert ratio(1e-6) == pytest.approx(ratio(1.0), rel=1e-12)
    fixed = interference_of(1e-6 * a, 1e-6 * b, (1e-6 * held).square().mean(0) + 1e-8)
    assert float(fixed.directed[:5, 5:].mean() / fixed.absolute[5:].mean()) < 1e-3


def test_an_average_over_the_samples_that_weigh_it_says_nothing_of_their_task():
    """E29: with I from task A's own sequences, the mean over A is the sum of |g| for every task A."""
    b, scales = normals(4, 6, 40), torch.linspace(0.1, 3, 40).double()
    tasks = [normals(5, 8, 40) * scales, normals(6, 8, 40) * scales.flip(0)]
    reference = (normals(7, 400, 40) * (scales.square() + scales.flip(0).square()).sqrt() / 2**0.5).square().mean(0)
    b = b * scales
    documented = [interference_of(a, b, a.square().mean(0)).directed[:8, 8:].mean(0) for a in tasks]
    for each in documented:
        torch.testing.assert_close(each, b.abs().sum(1))
    apart = [interference_of(a, b, reference).directed[:8, 8:].mean(0) for a in tasks]
    assert bool((apart[0] > 1.3 * apart[1]).all())  # the task with B's coordinates
    own = [interference_of(a, b, (normals(8, 4000, 40) * s).square().mean(0)) for a, s in ((tasks[0], scales),)]
    assert float(own[0].directed[:8, 8:].mean() / b.abs().sum(1).mean()) == pytest.approx(1, abs=0.2)


def test_interference_grows_as_the_gradients_of_the_second_task():
    """E25: the document has sum g^2 in the place of g and squares it once more; and says that whitening favours large F."""
    a, b, information = normals(14, 5, 30), normals(15, 4, 30), normals(16, 6, 30).square().mean(0)
    one, ten = (interference_of(a, scale * b, information) for scale in (1, 10))
    torch.testing.assert_close(ten.directed[:5, 5:], 10 * one.directed[:5, 5:])
    documented = [((scale * b).square().sum(0).square() * information).sum() for scale in (1, 10)]
    assert float(documented[1] / documented[0]) == pytest.approx(1e4)
    weighed = interference_of(torch.eye(30).double(), b, information).signed[:30, 30:].sum(1)
    order = (weighed / b.sum(0)).abs().argsort()
    assert torch.equal(order, information.argsort(descending=True))  # more information, less weight


def test_permuting_rows_never_rejects_and_labels_of_samples_do():
    """E30: (i) a mean over all rows is the same in every order of rows; (ii) tests of a mean of what is never negative."""
    scales = torch.linspace(0.1, 3, 40).double()
    a, b = normals(9, 10, 40) * scales, normals(10, 8, 40) * scales.flip(0)
    pooled = interference_of(a, b, torch.ones(40).double())
    order = seeded(0, lambda: torch.randperm(10))
    documented = pooled.directed[:10, 10:]
    assert float((documented[order].mean() - documented.mean()).abs() / documented.mean()) < 1e-12
    assert float(label_test(pooled.directed[None], 10, key=fs.key(0)).p_value) == 0.001
    same = normals(11, 300, 18, 40) * scales
    several = torch.stack([interference_of(x[:10], x[10:], scales.square()).directed for x in same])
    p_values = label_test(several, 10, key=fs.key(1), num=499).p_value
    assert scipy.stats.kstest(p_values.numpy(), "uniform").pvalue > 0.01
    z = several[:, :10, 10:].flatten(1)
    assert bool((z.mean(1) / (z.std(1) / 80**0.5) > 5).all())  # "significant" in every one of them


def test_q_values_are_not_those_of_reversed_ranks():
    """E30 (iii): the document takes ranks in reverse and carries minima from the left, so that all are the smallest p."""
    p_values = torch.tensor([0.001, 0.01, 0.02, 0.5]).double()
    documented = (p_values * 4 / torch.arange(4, 0, -1)).cummin(0).values
    assert documented.tolist() == pytest.approx([0.001] * 4)
    assert q_values(p_values.tolist()) == pytest.approx([0.004, 0.02, 0.08 / 3, 0.5])


def test_clusters_of_one_p_value_are_never_found():
    """E30 (iv): one p in every cell makes one cluster of all cells, and no permutation of True alone has another size."""
    scales = torch.linspace(0.1, 3, 40).double()
    a, b = normals(9, 10, 40) * scales, normals(10, 8, 40) * scales.flip(0)  # tasks that differ
    pooled = interference_of(a, b, torch.ones(40).double()).directed
    p_value = float(label_test(pooled[None], 10, key=fs.key(0)).p_value)
    cells = torch.full((10 * 8,), p_value) <= 0.05
    size = int(cells.sum())
    sizes = [int(cells[seeded(i, lambda: torch.randperm(80))].sum()) for i in range(99)]
    documented = (1 + sum(x >= size for x in sizes)) / 100
    assert (size, documented, p_value) == (80, 1.0, 0.001)


def test_errors_are_those_of_repetitions():
    means, errors = [], []
    for seed in range(120):
        pairs = interference_of(normals(seed, 6, 12), normals(1000 + seed, 9, 12), torch.ones(12).double()).directed[
            :6, 6:
        ]
        means.append(float(pairs.mean()))
        errors.append(float((pairs.mean(1).var() / 6 + pairs.mean(0).var() / 9).sqrt()))
    rms = float(torch.tensor(errors).square().mean().sqrt())
    assert rms == pytest.approx(float(torch.tensor(means).std()), rel=0.25)
    found, _ = result()
    a, b = found.directed[0], found.absolute[0]
    jackknife = 0.0
    for left in (
        [a[[i for i in range(3) if i != k]].mean() / b.mean() for k in range(3)],
        [a[:, [j for j in range(4) if j != k]].mean() / b[[j for j in range(4) if j != k]].mean() for k in range(4)],
    ):
        x = torch.stack(left)
        jackknife += float((len(x) - 1) / len(x) * (x - x.mean()).square().sum())
    assert float(found.ratio_stderr[0]) == pytest.approx(jackknife**0.5, rel=0.15)
    rows, cols = found.directed[0].mean(1), found.directed[0].mean(0)
    assert float(found.mean_directed_stderr[0]) == pytest.approx(float((rows.var() / 3 + cols.var() / 4).sqrt()))


def test_what_is_not_held_out_is_refused():
    a, b, held = losses()
    views = head_views(a.net, problem("llama").model.config)
    rest = {"views": views, "key": fs.key(0), "num": 9}
    joined = fs.objective(a.net, [tokens(23, 5, 6), tokens(22, 4, 6)], fs.causal_lm)
    with pytest.raises(ValueError, match="5 of it has the gradient of 0 of the second task"):
        head_interference(a, b, joined, a.net.theta, **rest)
    with pytest.raises(ValueError, match="blocks must be named"):
        head_interference(a, b, held, a.net.theta, **(rest | {"views": {"x": next(iter(views.values()))}}))
    with pytest.raises(ValueError, match="`damping` must be at least 0"):
        head_interference(a, b, held, a.net.theta, **rest, damping=-1.0)


def test_few_held_out_samples_raise_the_ratio():
    """1 / I is convex: a task compared with its own distribution has a ratio above 1 that tends to 1."""
    a, b = normals(30, 200, 30), normals(31, 200, 30)
    ratios = []
    for num in (5, 20, 2000):
        pooled = interference_of(a, b, normals(32, num, 30).square().mean(0))
        ratios.append(float(pooled.directed[:200, 200:].mean() / pooled.absolute[200:].mean()))
    assert ratios[0] > 1.3 > ratios[1] > 1.03
    assert ratios[2] == pytest.approx(1, abs=0.05)
