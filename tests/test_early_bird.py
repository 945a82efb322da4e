"""Distances between masks of checkpoints, when they have settled, and overlaps of tickets beside chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import gpt2, seeded
from torch import nn

from funcscope.core.layout import Layout
from funcscope.curvature.mask_overlap import mask_overlap
from funcscope.weights import early_bird, prunable_leaves, sparse_mask, ticket_overlap

LAYOUT = Layout.of(seeded(0, lambda: nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 20))))
"""Two matrices of 200 weights each."""
WIDE = Layout.of(seeded(0, lambda: nn.Linear(4000, 1, bias=False)))


def vector(seed: int, layout: Layout = LAYOUT) -> torch.Tensor:
    return seeded(seed, lambda: torch.randn(layout.num))


def training(num: int, layout: Layout = LAYOUT) -> list[torch.Tensor]:
    """Weights that move less and less."""
    end = vector(0, layout)
    return [end + 2 * 0.5**i * vector(i + 1, layout) for i in range(num)]


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_distances_are_counted_differences_of_masks_of_the_prunable(density, scope):
    thetas = training(5)
    made = early_bird(LAYOUT, thetas, [0, 1, 2, 3, 4], density=density, scope=scope)
    weights = torch.cat([torch.arange(x.offset, x.offset + x.numel) for x in LAYOUT.leaves if len(x.shape) == 2])
    masks = [sparse_mask(t.abs(), LAYOUT, sparsity=1 - density, scope=scope)[weights].tolist() for t in thetas]
    for i in range(5):
        for j in range(5):
            different = sum(a != b for a, b in zip(masks[i], masks[j], strict=True))
            assert float(made.distance[i, j]) == pytest.approx(different / 400, abs=1e-12)
    assert made.num_prunable == 400
    assert made.successive_distance[1:].tolist() == [float(made.distance[i, i + 1]) for i in range(4)]
    assert made.distance_to_last.tolist() == made.distance[-1].tolist()
    torch.testing.assert_close(made.relative_distance_to_last * 2 * density * (1 - density), made.distance[-1])


@given(seed=st.integers(0, 99), window=st.integers(1, 4), limit=st.floats(0.02, 0.4))
def test_the_step_is_the_first_whose_last_distances_are_all_below_the_limit(seed, window, limit):
    sizes = np.random.default_rng(seed).random(7)
    end = vector(0)
    thetas = [end + float(size) * vector(i + 1) for i, size in enumerate(sizes)]
    steps = [10 * i for i in range(7)]
    made = early_bird(LAYOUT, thetas, steps, window=window, limit=limit)
    moves = made.successive_distance.tolist()
    expected = math.nan
    for i in range(window, 7):
        if all(move < limit for move in moves[i - window + 1 : i + 1]):
            expected = float(steps[i])
            break
    assert made.emergence_step == expected or (math.isnan(expected) and math.isnan(made.emergence_step))


def test_masks_that_settle_are_seen_and_masks_that_do_not_are_not():
    made = early_bird(LAYOUT, training(14), range(0, 140, 10))
    assert made.emergence_step == 90.0  # distances are below .1 from step 50 on, and five of them are asked for
    assert made.notes == []
    assert made.window_distance[:5].isnan().all()
    restless = early_bird(LAYOUT, [vector(i) for i in range(9)], range(9))
    assert math.isnan(restless.emergence_step)
    assert any("have not settled" in note for note in restless.notes)
    short = early_bird(LAYOUT, training(4), range(4))
    assert any("needs 6 checkpoints" in note for note in short.notes)


@pytest.mark.parametrize("density", [0.04, 0.96])
def test_nothing_is_said_where_random_masks_would_pass(density):
    thetas = [vector(i, WIDE) for i in range(8)]  # checkpoints that have nothing in common
    made = early_bird(WIDE, thetas, range(8), density=density)
    assert float(made.window_distance[-1]) < 0.1  # the rule fires
    assert math.isnan(made.emergence_step)
    assert any("the rule says nothing" in note for note in made.notes)
    assert made.chance_distance == pytest.approx(2 * density * (1 - density))
    finer = early_bird(WIDE, [vector(0, WIDE)] * 8, range(8), density=density, limit=0.01)
    assert finer.emergence_step == 5


def test_orders_of_positions_and_sorted_arrays_do_not_measure_it():
    """E33: argsorted positions are no ranks, and two sorted arrays are always alike."""
    first = vector(0, WIDE).abs()
    close = first + 0.003 * vector(1, WIDE).abs()
    true = scipy.stats.spearmanr(first, close).statistic
    documented = scipy.stats.spearmanr(first.argsort(), close.argsort()).statistic
    assert true > 0.9999
    assert documented < 0.5  # "not converged"
    assert float(early_bird(WIDE, [first, close], [0, 1]).distance[0, 1]) < 0.005

    other = vector(2, WIDE).abs()
    assert np.corrcoef(first.sort().values, other.sort().values)[0, 1] > 0.999  # "converged"
    made = early_bird(WIDE, [first, other], [0, 1])
    assert float(made.relative_distance_to_last[0]) == pytest.approx(1, abs=0.06)


def test_what_is_no_series_is_refused():
    with pytest.raises(ValueError, match="two checkpoints or more"):
        early_bird(LAYOUT, [vector(0)], [0])
    with pytest.raises(ValueError, match="`steps` must increase"):
        early_bird(LAYOUT, [vector(0)] * 2, [5, 5])
    with pytest.raises(ValueError, match="`thetas`"):
        early_bird(LAYOUT, [vector(0)[:-1]] * 2, [0, 5])
    with pytest.raises(ValueError, match="`thetas` must be finite"):
        early_bird(LAYOUT, [vector(0), vector(0) * math.nan], [0, 5])
    with pytest.raises(ValueError, match="`members` must be finite"):
        ticket_overlap(LAYOUT, [vector(0), vector(0) * math.inf], ["a", "b"])
    with pytest.raises(ValueError, match="`density`"):
        early_bird(LAYOUT, [vector(0)] * 2, [0, 5], density=1.5)
    with pytest.raises(ValueError, match="`limit`"):
        early_bird(LAYOUT, [vector(0)] * 2, [0, 5], limit=0.0)


# Overlap of tickets


def test_overlaps_are_those_of_pairs_inside_the_prunable_tensors():
    thetas = [vector(0), vector(0) + 0.5 * vector(1), vector(2)]
    made = ticket_overlap(LAYOUT, thetas, ["a", "b", "c"], density=0.3)
    sizes = [(x.offset, x.offset + x.numel) for x in LAYOUT.leaves if len(x.shape) == 2]
    masks = [sparse_mask(t.abs(), LAYOUT, sparsity=0.7) for t in thetas]
    for i in range(3):
        for j in range(3):
            both = expected = variance = room = 0.0
            for start, stop in sizes:
                a, b = masks[i][start:stop], masks[j][start:stop]
                n, na, nb = stop - start, int(a.sum()), int(b.sum())
                law = scipy.stats.hypergeom(n, na, nb)
                both, expected, variance = both + int((a & b).sum()), expected + law.mean(), variance + law.var()
                room += min(na, nb)
            assert float(made.kappa[i, j]) == pytest.approx((both - expected) / (room - expected))
            if i != j:
                assert float(made.z[i, j]) == pytest.approx((both - expected) / variance**0.5)
    assert made.kappa.diagonal().tolist() == [1.0] * 3
    assert made.z.diagonal().isnan().all()
    assert float(made.kappa[0, 1]) > 0.5
    assert abs(float(made.z[0, 2])) < 3 < float(made.z[0, 1])
    assert made.density.tolist() == pytest.approx([0.3] * 3)


def test_documented_overlap_is_the_density_at_most():
    """E22: identical masks of density .1 overlap by .1, below every threshold of the document."""
    theta = vector(0, WIDE)
    mask = sparse_mask(theta.abs(), WIDE, sparsity=0.9)
    assert float((mask & mask).double().mean()) == pytest.approx(0.1)
    made = ticket_overlap(WIDE, [theta, mask, vector(1, WIDE)], ["weights", "mask", "another"], density=0.1)
    assert float(made.kappa[0, 1]) == float(made.jaccard[0, 1]) == 1
    assert abs(float(made.kappa[0, 2])) < 0.1
    assert float(made.chance_jaccard[0, 2]) == pytest.approx(0.01 / 0.19)
    assert float(made.jaccard[0, 2]) == pytest.approx(0.01 / 0.19, abs=0.03)


def test_what_is_not_prunable_does_not_count_as_overlap():
    layout = Layout.of(seeded(0, gpt2))
    masks = [sparse_mask(vector(i, layout).abs(), layout, sparsity=0.5) for i in (0, 1)]  # embeddings, norms whole
    made = ticket_overlap(layout, masks, ["a", "b"])
    assert abs(float(made.z[0, 1])) < 3.5
    assert mask_overlap(*masks, layout, by="none").total_z > 10  # they would be counted as common
    inside = torch.cat([torch.arange(x.offset, x.offset + x.numel) for x in prunable_leaves(layout)])
    first, second = (mask[inside] for mask in masks)
    assert float(made.jaccard[0, 1]) == pytest.approx(int((first & second).sum()) / int((first | second).sum()))
    with pytest.raises(ValueError, match="`members` must be two or more"):
        ticket_overlap(layout, masks, ["a"])
    empty = ticket_overlap(layout, [torch.zeros_like(masks[0])] * 2, ["a", "b"])
    assert empty.kappa.isnan().all()
    assert len(empty.notes) == 1
