"""Importance, pruning masks and their overlap."""

from __future__ import annotations

import math

import pytest
import scipy
import torch
from problems import problem, seeded
from torch import nn

import funcscope as fs
from funcscope.core.layout import Layout, View
from funcscope.fisher import importance, importance_vector, mask_overlap, obd_saliency, pruning_mask

LAYOUT = Layout.of(seeded(0, lambda: nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))))


def positive(seed: int, *shape: int) -> torch.Tensor:
    return seeded(seed, lambda: torch.rand(*shape, dtype=torch.float64)) ** 3


def test_shares_are_sums_over_blocks_with_the_error_of_a_ratio():
    rows = positive(1, 40, LAYOUT.num)
    result = importance(rows, LAYOUT, by="tensor")
    total = rows.sum(0)
    for i, leaf in enumerate(LAYOUT.leaves):
        assert float(result.share[i]) == pytest.approx(float(total[leaf.slice].sum() / total.sum()))
        rest = [torch.cat([rows[:j], rows[j + 1 :]]) for j in range(40)]
        left_out = torch.stack([x[:, leaf.slice].sum() / x.sum() for x in rest])
        jackknife = float((39 / 40 * (left_out - left_out.mean()).square().sum()).sqrt())
        assert float(result.share_stderr[i]) == pytest.approx(jackknife, rel=0.05)
    assert float((result.relative_density * result.sizes).sum()) == pytest.approx(LAYOUT.num)
    assert importance(rows[0], LAYOUT).share_stderr.isnan().all()
    vector = importance_vector(rows[0], LAYOUT, by="tensor")
    for leaf in LAYOUT.leaves:
        torch.testing.assert_close(vector[leaf.slice], rows[0][leaf.slice] / rows[0][leaf.slice].sum())
    torch.testing.assert_close(importance_vector(rows[0], LAYOUT), rows[0] / rows[0].sum())


@pytest.mark.parametrize("by", ["none", "tensor", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_masks_keep_exactly_as_many_as_asked_and_the_largest_of_them(by, sparsity):
    score = seeded(2, lambda: torch.randint(0, 4, (LAYOUT.num,))).double()  # most are tied
    result = pruning_mask(score, LAYOUT, sparsity=sparsity, by=by)
    blocks = {"all": slice(0, LAYOUT.num)} if by == "none" else {leaf.name: leaf.slice for leaf in LAYOUT.leaves}
    if by == "layer":
        blocks = {"0": slice(0, 40), "1": slice(40, 58)}
    for part in blocks.values():
        n = part.stop - part.start
        keep = n - math.floor(sparsity * n + 0.5)
        order = sorted(range(part.start, part.stop), key=lambda k: (-float(score[k]), k))
        assert result.mask[part].nonzero().flatten().add(part.start).tolist() == sorted(order[:keep])
    assert float(result.num_kept.sum()) == int(result.mask.sum())


def test_the_documented_quantile_prunes_all_zeros():
    """E22: what is above the quantile; with 70 % of zeros, a sparsity of one half prunes 70 %."""
    fisher = torch.cat([torch.zeros(70), torch.rand(30, generator=torch.Generator().manual_seed(0)) + 1])
    layout = Layout.of(seeded(0, lambda: nn.Linear(100, 1, bias=False)))
    assert int((fisher > fisher.quantile(0.5)).sum()) == 30
    assert int(pruning_mask(fisher, layout, sparsity=0.5).mask.sum()) == 50


def test_what_is_in_no_view_is_kept_and_columns_can_be_pruned():
    views = {"two": (View("0.weight", 1, slice(2, 4)),)}
    score = torch.arange(LAYOUT.num).double()
    result = pruning_mask(score, LAYOUT, sparsity=0.5, by=views)
    inside = result.mask[:35].view(5, 7)
    assert int((~result.mask).sum()) == 5
    assert inside[:, [0, 1, 4, 5, 6]].all()
    assert inside[:2, 2:4].sum() == 0


def test_saliency_is_the_loss_of_deletion_at_the_minimum_of_a_quadratic():
    """E22: F alone ranks the other parameter first."""
    fisher, theta = torch.tensor([4.0, 1.0, 9.0]).double(), torch.tensor([0.1, 2.0, 0.0]).double()

    def loss(t):
        return (fisher * (t - theta) ** 2).sum() / 2

    deleted = [float(loss(theta * (torch.arange(3) != k))) for k in range(3)]
    torch.testing.assert_close(obd_saliency(fisher, theta), torch.tensor(deleted).double())
    assert int(obd_saliency(fisher, theta).argmax()) != int(fisher.argmax())


def test_identical_masks_overlap_wholly_random_ones_by_chance():
    layout = Layout.of(seeded(0, lambda: nn.Linear(1000, 40, bias=False)))
    a, b = (pruning_mask(positive(seed, 40000), layout, sparsity=s).mask for seed, s in ((3, 0.9), (4, 0.8)))
    same, other = mask_overlap(a, a, layout), mask_overlap(a, b, layout)
    assert float(same.jaccard) == float(same.dice) == float(same.kappa) == same.total_jaccard == same.total_kappa == 1
    assert float((a & a).double().mean()) == pytest.approx(0.1)  # E22: the documented overlap, said to be safe to merge
    assert float(other.chance_jaccard) == pytest.approx(0.02 / 0.28)
    assert abs(float(other.z)) < 3
    assert float(other.jaccard) == pytest.approx(0.02 / 0.28, rel=0.1)
    assert abs(float(other.kappa)) < 0.02
    assert 0.001 < float(other.p_value) < 0.999


def test_chance_is_the_hypergeometric_distribution():
    layout = Layout.of(seeded(0, lambda: nn.Linear(12, 1, bias=False)))
    first = torch.arange(12) < 5
    zs, values = [], []
    for seed in range(120):
        second = torch.zeros(12, dtype=torch.bool)
        second[seeded(seed, lambda: torch.randperm(12))[:4]] = True
        result = mask_overlap(first, second, layout)
        zs.append(float(result.z))
        values.append(result)
        both = int((first & second).sum())
        expected, sd = scipy.stats.hypergeom(12, 5, 4).mean(), scipy.stats.hypergeom(12, 5, 4).std()
        assert zs[-1] == pytest.approx((both - expected) / sd)
        tail = sum(math.comb(5, k) * math.comb(7, 4 - k) for k in range(both, 5)) / math.comb(12, 4)
        assert float(result.p_value) == pytest.approx(tail)
    z = torch.tensor(zs)
    assert abs(float(z.mean())) < 0.3
    assert float(z.std()) == pytest.approx(1, abs=0.2)


def test_totals_take_chance_within_blocks():
    """Two masks that keep one tensor and nothing else of it in common have no overlap above chance."""
    first, second = (torch.zeros(LAYOUT.num, dtype=torch.bool) for _ in range(2))
    first[0:30], second[5:35] = True, True
    within, plain = mask_overlap(first, second, LAYOUT), mask_overlap(first, second, LAYOUT, by="none")
    assert within.total_z == float(within.z[0]) < 0 < plain.total_z == float(plain.z)
    assert within.total_jaccard == plain.total_jaccard == 25 / 35
    assert within.total_chance_jaccard == pytest.approx((900 / 35) / (60 - 900 / 35))
    assert mask_overlap(~first & first, second, LAYOUT).kappa.isnan().all()


def test_masks_of_a_model_go_with_its_layout():
    model, batches, criterion = problem("mlp")
    loss = fs.objective(fs.functional(model), batches, criterion)
    rows = fs.curvature.per_sample_gradients(loss, loss.net.theta).square()
    shares = importance(rows, loss.layout, by="module")
    assert float(shares.share.sum()) == pytest.approx(1)
    result = pruning_mask(obd_saliency(rows.mean(0), loss.net.theta), loss.layout, sparsity=0.5)
    assert int(result.mask.sum()) == loss.layout.num - math.floor(loss.layout.num / 2 + 0.5)


def test_what_is_no_score_is_refused():
    for bad, what in (
        (torch.full((58,), math.nan), "finite"),
        (-torch.ones(58), "at least 0"),
        (torch.zeros(58), "above 0"),
    ):
        with pytest.raises(ValueError, match=what):
            importance(bad, LAYOUT)
    with pytest.raises(ValueError, match="58 entries"):
        importance(torch.ones(3), LAYOUT)
    with pytest.raises(ValueError, match="no nan, got one at 3"):
        pruning_mask(torch.ones(58).index_fill(0, torch.tensor(3), math.nan), LAYOUT, sparsity=0.5)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5"):
        pruning_mask(torch.ones(58), LAYOUT, sparsity=1.5)
    with pytest.raises(ValueError, match="mask of 58 parameters"):
        mask_overlap(torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool), LAYOUT)
