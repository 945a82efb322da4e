"""Task vectors and merged models in memory. Oracles: numpy entry by entry, rules leaf by leaf, closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import seeded
from torch import nn
from torch.testing import assert_close

import funcscope as fs
from funcscope.weights import merge_rules as rules
from funcscope.weights.merging import METHODS, merge
from funcscope.weights.task_vectors import apply_task_vectors, task_vectors

KEY = fs.key(0)
seeds = st.integers(0, 2**32)


def layout_of():
    return seeded(0, lambda: fs.Layout.of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), dtype=torch.float64))


LAYOUT = layout_of()


def points(seed, num):
    return [fs.normal(fs.fold_in(fs.key(seed), k), torch.zeros(LAYOUT.num, dtype=torch.float64)) for k in range(num)]


def trimmed(tau, num):
    keep = sorted(range(len(tau)), key=lambda i: (-abs(tau[i]), i))[:num]
    out = np.zeros_like(tau)
    out[keep] = tau[keep]
    return out


@settings(max_examples=8)
@given(seeds, st.integers(1, 3), st.floats(0.1, 1))
def test_every_number_is_its_definition(seed, num, density):
    base, *thetas = points(seed, num + 1)
    found = task_vectors(base, thetas, LAYOUT, by="tensor", density=density)
    taus = [(theta - base).numpy() for theta in thetas]
    short = [trimmed(tau, max(1, int(density * LAYOUT.num + 0.5))) for tau in taus]
    for b, leaf in enumerate(LAYOUT.leaves):
        part = [tau[leaf.slice] for tau in taus]
        assert_close(found.norms[b], torch.tensor([np.linalg.norm(x) for x in part]))
        relative = [np.linalg.norm(x) / np.linalg.norm(base[leaf.slice].numpy()) for x in part]
        assert_close(found.relative_norms[b], torch.tensor(relative))
        cosines = np.array([[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in part] for x in part])
        assert_close(found.cosines[b], torch.from_numpy(cosines))
        for j in range(num):
            for k in range(num):
                products = short[j][leaf.slice] * short[k][leaf.slice]
                assert found.num_shared[b, j, k] == (products != 0).sum()
                assert found.num_opposed[b, j, k] == (products < 0).sum()
    first, last = short[0] != 0, short[-1] != 0
    assert_close(float(found.overlap[0, -1]), (first & last).sum() / (first | last).sum())
    a, b, o = first.mean(), last.mean(), (first & last).mean()
    assert_close(float(found.chance_overlap[0, -1]), a * b / (a + b - a * b))
    if density < 0.9:
        assert_close(float(found.kappa[0, -1]), (o - a * b) / (min(a, b) - a * b))


def test_independent_vectors_conflict_at_one_half_and_overlap_by_chance():
    layout = seeded(0, lambda: fs.Layout.of(nn.Linear(200, 100, bias=False)))
    base, one, other = (fs.normal(fs.fold_in(KEY, k), torch.zeros(layout.num)) for k in range(3))
    found = task_vectors(base, [base + one, base + other, base + 2 * one], layout, by="none", names=["a", "b", "c"])
    conflict = float(found.total_sign_conflicts[0, 1])
    assert abs(conflict - 0.5) < 4 * 0.5 / float(found.num_shared[0, 0, 1]) ** 0.5
    assert abs(float(found.kappa[0, 1])) < 0.03
    assert abs(float(found.overlap[0, 1] / found.chance_overlap[0, 1]) - 1) < 0.1
    assert (found.total_sign_conflicts[0, 2], found.kappa[0, 2], found.overlap[0, 2]) == (0, 1, 1)
    # mistakes.md E22: shared entries over all parameters are the density at most, of identical masks, too
    documented = float(found.num_shared[0, 0, 2]) / layout.num
    assert documented == 0.2


def test_conflicts_are_counted_behind_trimming():
    layout = seeded(0, lambda: fs.Layout.of(nn.Linear(10, 10, bias=False)))
    noise = fs.rademacher(KEY, torch.zeros(100))
    signal = torch.cat([torch.full((20,), 5.0), torch.zeros(80)])
    one, other = signal + 0.1 * noise, signal - 0.1 * noise
    found = task_vectors(torch.zeros(100), [one, other], layout, by="none")
    assert found.total_sign_conflicts[0, 1] == 0
    assert (
        float((one * other < 0).double().mean()) == 0.8
    )  # what a document reports: the noise of entries that are trimmed


def test_an_unchanged_model_has_no_angle_and_scale_changes_lengths_alone():
    base, one, other = points(1, 3)
    still = task_vectors(base, [base, one], LAYOUT, by="none")
    assert still.total_cosines[0].isnan().all()
    assert still.num_kept[0, 0] == 0
    assert "equals the base" in " ".join(still.notes)
    empty = task_vectors(torch.zeros_like(base), [one, other], LAYOUT)
    assert empty.total_relative_norms.isnan().all()
    assert empty.relative_norms.isnan().all()
    assert "base is 0" in " ".join(empty.notes)
    few, many = base.clone(), base + 1
    few[:2] += 1  # trimming keeps no zeros: one mask holds the other
    held = task_vectors(base, [few, many], LAYOUT, density=0.5)
    assert float(held.num_kept[:, 0].sum()) == 2
    assert float(held.kappa[0, 1]) == 1
    part = base.clone()
    part[LAYOUT.leaves[0].slice] += 1
    assert "in some blocks" in " ".join(task_vectors(base, [part, other], LAYOUT, by="tensor").notes)
    found = task_vectors(base, [one, other], LAYOUT)
    longer = task_vectors(base, [base + 3 * (one - base), other], LAYOUT)
    assert_close(longer.total_norms, found.total_norms * torch.tensor([3.0, 1.0]).double())
    assert_close(longer.cosines, found.cosines)
    assert torch.equal(longer.num_opposed, found.num_opposed)
    per_tensor = torch.cat([x.flatten() / x.norm() for x in LAYOUT.unravel(one - base).values()])
    turned = task_vectors(base, [base + per_tensor, one], LAYOUT)  # definitions.md 2.8: only one scale for all is safe
    assert turned.total_cosines[0, 1] < 0.99


@settings(max_examples=5)
@given(seeds)
def test_task_vectors_are_added_and_taken_away(seed):
    base, one, other = points(seed, 3)
    there = apply_task_vectors(base, [one, other], [1.0, -2.0])
    assert_close(there, base + one - 2 * other)
    leaves = [LAYOUT.unravel(x) for x in (base, one, other)]
    assert_close(LAYOUT.ravel(apply_task_vectors(leaves[0], leaves[1:], [1.0, -2.0])), there)
    assert torch.equal(apply_task_vectors(base, []), base)


@pytest.mark.parametrize("per_leaf", [False, True])
def test_merged_models_are_rules_of_leaves(per_leaf):
    base, one, other = points(2, 3)
    fishers = [x.square() for x in points(3, 2)]
    grams = [
        {"0.weight": x.T @ x} for x in (fs.normal(fs.fold_in(KEY, k), torch.zeros(5, 3).double()) for k in range(2))
    ]
    options = {"base": base, "fishers": fishers, "grams": grams, "key": KEY, "density": 0.3, "per_leaf": per_leaf}
    leaves = [LAYOUT.unravel(x) for x in (base, one, other)]
    merged = {method: merge([one, other], method, LAYOUT, **options) for method in METHODS}
    assert_close(merged["linear"], (one + other) / 2)
    assert_close(merged["task_arithmetic"], one + other - base)
    assert_close(merged["fisher"], (fishers[0] * one + fishers[1] * other) / sum(fishers), rtol=1e-5, atol=1e-6)
    elected = rules.ties(base, [one, other], density=0.3)
    assert torch.equal(merged["ties"], elected) is not per_leaf
    last = LAYOUT.unravel(merged["ties"])["1.weight"]
    assert (
        torch.equal(
            last, rules.ties(*[x["1.weight"] for x in leaves][:1], [x["1.weight"] for x in leaves[1:]], density=0.3)
        )
        is per_leaf
    )
    regressed = LAYOUT.unravel(merged["regmean"])
    maps = [x["0.weight"].T for x in leaves[1:]]
    assert_close(regressed["0.weight"].T, rules.regmean(maps, [each["0.weight"] for each in grams]))
    assert_close(regressed["1.weight"], (leaves[1]["1.weight"] + leaves[2]["1.weight"]) / 2)
    thinned = rules.dare(
        *[x["0.bias"] for x in leaves][:1], [x["0.bias"] for x in leaves[1:]], drop=0.5, key=KEY, name="0.bias"
    )
    assert torch.equal(LAYOUT.unravel(merged["dare"])["0.bias"], thinned)
    assert_close(LAYOUT.unravel(merged["slerp"])["0.weight"], rules.slerp(*(x["0.weight"] for x in leaves[1:]), 0.5))
    heavy = {"weights": [3.0, 1.0], "scale": 0.5}
    weighed = {
        method: merge([one, other], method, LAYOUT, **(options | heavy)) for method in METHODS if method != "slerp"
    }
    assert_close(weighed["linear"], (3 * one + other) / 4)
    assert_close(weighed["task_arithmetic"], base + 0.5 * (3 * (one - base) + (other - base)))
    parts = [x["0.bias"] for x in leaves]
    for method, then in (("dare", "linear"), ("dare_ties", "ties")):
        thinned = rules.dare(parts[0], parts[1:], drop=0.5, key=KEY, name="0.bias", then=then, **heavy)
        assert torch.equal(LAYOUT.unravel(weighed[method])["0.bias"], thinned)
    assert_close(weighed["fisher"], rules.fisher([one, other], fishers, [3.0, 1.0]))
    as_dicts = merge([dict(x) for x in leaves[1:]], "ties", LAYOUT, **(options | {"base": leaves[0]}))
    assert torch.equal(as_dicts, merged["ties"])


def test_cuts_and_floors_are_of_the_whole_model():
    base, one, other = points(2, 3)
    signs = torch.ones_like(base)  # all are as large: those that come first, over all leaves
    kept = merge([base + signs], "ties", LAYOUT, base=base, density=0.5) - base
    assert_close(kept, torch.where(torch.arange(len(base)) < int(len(base) / 2 + 0.5), 1.0, 0.0).double())
    fishers = [torch.full_like(base, 3.0), torch.full_like(base, 1.0)]
    unused = LAYOUT.leaves[0].slice
    for each in fishers:
        each[unused] = 0
    merged = merge([one, other], "fisher", LAYOUT, fishers=fishers)
    assert_close(
        merged, (3 * one + other) / 4
    )  # by the floors in a leaf that no model needs: those of their whole diagonals


def test_a_matrix_that_is_stored_in_out_is_regressed_as_it_is():
    from transformers.pytorch_utils import Conv1D

    layout = seeded(0, lambda: fs.Layout.of(Conv1D(3, 2), dtype=torch.float64))
    x = [fs.normal(fs.fold_in(KEY, k), torch.zeros(5, 2).double()) for k in range(2)]
    thetas = [fs.normal(fs.fold_in(KEY, k + 2), torch.zeros(layout.num).double()) for k in range(2)]
    merged = layout.unravel(
        merge(thetas, "regmean", layout, grams=[{"weight": each.T @ each} for each in x], shrink=1.0)
    )
    maps = [layout.unravel(each)["weight"] for each in thetas]
    exact = np.linalg.lstsq(
        torch.cat(x).numpy(), torch.cat([a @ w for a, w in zip(x, maps, strict=True)]).numpy(), rcond=None
    )
    assert_close(merged["weight"], torch.from_numpy(exact[0]))


ONES = torch.ones(LAYOUT.num, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: task_vectors(ONES, [], LAYOUT), "one model at least"),
        (lambda: task_vectors(ONES, [ONES[1:]], LAYOUT), r"thetas\[0\]"),
        (lambda: task_vectors(ONES * float("nan"), [ONES], LAYOUT), "finite"),
        (lambda: task_vectors(ONES, [ONES], LAYOUT, density=0.0), "density"),
        (lambda: task_vectors(ONES, [ONES], LAYOUT, names=["a", "b"]), "`names`"),
        (lambda: merge([], "linear", LAYOUT), "one model at least"),
        (lambda: merge([ONES], "ties", LAYOUT), "`base`"),
        (lambda: merge([ONES], "dare", LAYOUT, base=ONES), "`key`"),
        (lambda: merge([ONES], "fisher", LAYOUT), "`fishers`"),
        (lambda: merge([ONES], "regmean", LAYOUT), "`grams`"),
        (lambda: merge([ONES], "regmean", LAYOUT, grams=[{"x": torch.eye(3)}]), "`grams`"),
        (lambda: merge([ONES] * 3, "slerp", LAYOUT), "two models"),
        (lambda: apply_task_vectors(ONES, [ONES], [1.0, 2.0]), "`scales`"),
    ],
)
def test_what_is_no_set_of_models_is_refused(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()
