"""Rules of merging. Oracles: exact fractions by hand, plain numpy entry by entry, least squares, mergekit."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import funcscope as fs
from funcscope.weights import merge_rules as rules
from funcscope.weights.elementwise import check_leaves
from funcscope.weights.magnitude_cuts import Cut, global_cut, largest, num_kept

KEY = fs.key(0)
seeds = st.integers(0, 2**32)


def leaves(seed, num, shape, dtype=torch.float64):
    like = torch.zeros(shape, dtype=dtype)
    return [fs.normal(fs.fold_in(fs.key(seed), k), like) for k in range(num)]


def row(*values):
    return torch.tensor(values, dtype=torch.float64)


def ties_by_hand(base, taus, num, scale, weights, plus_where_even=False):
    """Entry by entry, in exact fractions."""
    kept = []
    for tau in taus:
        order = sorted(range(len(tau)), key=lambda i, tau=tau: (-abs(tau[i]), i))[:num]
        kept.append([x if i in order else Fraction(0) for i, x in enumerate(tau)])
    merged = []
    for i, start in enumerate(base):
        total = sum(w * tau[i] for w, tau in zip(weights, kept, strict=True))
        sign = (total > 0) - (total < 0) or int(plus_where_even)
        agree = [(w, tau[i]) for w, tau in zip(weights, kept, strict=True) if tau[i] * sign > 0]
        mean = sum(w * x for w, x in agree) / sum(w for w, _ in agree) if agree else 0
        merged.append(start + scale * mean)
    return merged


whole = st.integers(-4, 4)


@given(st.data(), st.integers(1, 4), st.integers(1, 7), st.booleans())
def test_ties_is_the_paper_in_exact_fractions(data, num_models, size, weighted):
    base = data.draw(st.lists(whole, min_size=size, max_size=size))
    taus = data.draw(st.lists(st.lists(whole, min_size=size, max_size=size), min_size=num_models, max_size=num_models))
    num = data.draw(st.integers(1, size))
    weights = data.draw(st.lists(st.integers(1, 3), min_size=num_models, max_size=num_models)) if weighted else None
    merged = rules.ties(
        row(*base), [row(*tau) + row(*base) for tau in taus], density=num / size, scale=0.5,
        weights=None if weights is None else [float(w) for w in weights],
    )  # fmt: skip
    exact = ties_by_hand(
        [Fraction(x) for x in base], [[Fraction(x) for x in tau] for tau in taus], num, Fraction(1, 2),
        weights or [1] * num_models,
    )  # fmt: skip
    assert_close(merged, row(*map(float, exact)), rtol=1e-14, atol=1e-14)


def test_ties_elects_by_trimmed_vectors_and_adds_nothing_where_they_balance():
    base, taus = torch.zeros(3), [row(5, 1, 2), row(-1, -4, -2), row(-1, -4, 0)]
    first, second, third = rules.ties(base.double(), taus, density=1 / 3).tolist()
    assert (first, second, third) == (5, -4, 0)
    by_untrimmed = torch.stack(taus).sum(0).sign()  # a document elects before trimming: 3, -7, 0
    assert by_untrimmed.tolist() == [1, -1, 0]
    taus = [row(3, 0), row(-2, 0.5), row(-2, 0)]
    assert rules.ties(torch.zeros(2).double(), taus, density=1.0)[0] == -2  # whole vectors elect -
    taus = [row(3, 0), row(-2, 2.5), row(-2, 2.5)]
    assert rules.ties(torch.zeros(2).double(), taus, density=0.5).tolist() == [3, 2.5]  # trimmed ones elect +
    assert torch.stack(taus).sum(0).sign()[0] == -1
    balanced = [row(2.0), row(-2.0), row(-0.5)]
    assert rules.ties(torch.zeros(1).double(), balanced[:2], density=1.0) == 0
    assert rules.ties(torch.zeros(1).double(), balanced, density=1.0) == -1.25


@given(seeds, st.integers(1, 40), st.floats(0.01, 1))
def test_exactly_as_many_are_kept_and_none_that_is_smaller(seed, size, density):
    (x,) = leaves(seed, 1, size)
    x = (2 * x).round()  # with many ties
    mask, num = largest(x, density), num_kept(size, density)
    assert int(mask.sum()) == num == max(1, int(density * size + 0.5))
    stable = sorted(range(size), key=lambda i: (-abs(float(x[i])), i))[:num]
    assert sorted(stable) == mask.nonzero()[:, 0].tolist()


@given(seeds, st.floats(0.01, 1), st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_the_global_cut_is_that_of_all_tensors_in_a_row(seed, density, dtype, even):
    parts = [leaves(seed, 1, shape, dtype)[0] for shape in ((3, 4), (1,), (2, 3, 2), (5,))]
    parts = [(2 * x).round() for x in parts] if even else parts
    cut = global_cut(lambda: iter(parts), density)
    together = largest(torch.cat([x.flatten() for x in parts]), density)
    masks = []
    for x in parts:
        masks.append(cut.mask(x).flatten())
        cut = cut.behind(x)
    assert torch.equal(torch.cat(masks), together)


def test_a_cut_of_many_tensors_sees_each_once_per_pass():
    parts, calls = [leaves(4, 1, 9, torch.float32)[0] for _ in range(3)], []

    def tensors():
        for x in parts:
            calls.append(x)
            yield x

    global_cut(tensors, 0.3)
    assert len(calls) == 2 * len(parts)


def test_a_cut_counts_equal_magnitudes_in_the_order_of_a_transposed_tensor():
    x = torch.tensor([[1.0, -1.0, 0.0], [1.0, 2.0, -1.0]]).T
    assert Cut(1.0, 2).mask(x).tolist() == [[True, True], [False, True], [False, False]]
    assert Cut(1.0, 0).mask(x).sum() == 1
    assert Cut(1.0, 9).mask(x).sum() == 5
    assert [Cut(1.0, num).behind(x).num_equal for num in (2, 4, 6)] == [0, 0, 2]


def test_ties_over_the_whole_model_is_ties_of_the_flat_vector():
    base, one, other = leaves(3, 3, 30)
    flat = rules.ties(base, [one, other], density=0.2)
    sizes = (7, 1, 22)
    taus = [
        [rules.task_vector(b, x) for b, x in zip(base.split(sizes), leaf.split(sizes), strict=True)]
        for leaf in (one, other)
    ]
    cuts = [global_cut(lambda tau=tau: tau, 0.2) for tau in taus]
    merged = []
    for i, (b, *each) in enumerate(zip(base.split(sizes), one.split(sizes), other.split(sizes), strict=True)):
        merged.append(rules.ties(b, each, cuts=cuts))
        cuts = [cut.behind(tau[i]) for cut, tau in zip(cuts, taus, strict=True)]
    assert torch.equal(torch.cat(merged), flat)
    by_leaf = [
        rules.ties(b, list(each), density=0.2)
        for b, *each in zip(base.split(sizes), one.split(sizes), other.split(sizes), strict=True)
    ]
    assert not torch.equal(torch.cat(by_leaf), flat)


@given(seeds, st.integers(1, 4))
def test_linear_rules_are_one_family(seed, num):
    base, *others = leaves(seed, num + 1, (3, 2))
    weights = [0.5 + k for k in range(num)]
    shares = [w / sum(weights) for w in weights]
    mean = sum(share * x for share, x in zip(shares, others, strict=True))
    assert_close(rules.linear(others, weights), mean)
    assert_close(rules.task_arithmetic(base, others, shares), mean)
    assert_close(rules.dare(base, others, drop=0.0, key=KEY, name="w", weights=weights), mean)
    assert_close(rules.fisher(others, [torch.ones_like(base)] * num, weights), mean)
    assert torch.equal(rules.linear([base] * num, weights), base)
    assert_close(rules.task_arithmetic(base, others, 0.0), base)
    assert_close(rules.ties(base, others[:1], density=1.0), others[0])


@given(seeds, st.floats(0, 1), st.integers(2, 6))
def test_slerp_goes_at_constant_speed_along_the_arc(seed, t, size):
    a, b = leaves(seed, 2, size)
    b = b / b.norm() * a.norm()
    angle = np.arccos(np.clip(float(a @ b / a.norm() ** 2), -1, 1))
    point = rules.slerp(a, b, t)
    assert_close(point.norm(), a.norm(), rtol=1e-9, atol=0)
    assert_close(float(point @ a / a.norm() ** 2), np.cos(t * angle), rtol=0, atol=1e-6)
    assert_close(rules.slerp(a, b, 1 - t), rules.slerp(b, a, t))
    assert_close(rules.slerp(3 * a, 3 * b, t), 3 * point)


def test_slerp_is_linear_where_no_great_circle_is_the_only_one():
    a, zero = row(1.0, 2.0), row(0.0, 0.0)
    assert_close(rules.slerp(a, 2 * a, 0.25), 1.25 * a)
    assert_close(rules.slerp(a, zero, 0.25), 0.75 * a)
    assert_close(rules.slerp(a, -a, 0.25), 0.5 * a)
    nearly = rules.slerp(a, a + 1e-9 * row(2.0, -1.0), 0.25)
    assert_close(nearly, a + 0.25e-9 * row(2.0, -1.0), rtol=0, atol=1e-15)
    parallel = 1e-3 * row(2.0, -1.0)  # mergekit is linear here, which is shorter than both
    assert rules.slerp(a, a + parallel, 0.5).norm() > (a + parallel / 2).norm()


def test_dare_is_unbiased_and_has_the_variance_of_its_masks():
    base, one, other = leaves(1, 3, 200)
    tau = rules.linear([one, other]) - base
    draws = torch.stack(
        [rules.dare(base, [one, other], drop=0.4, key=fs.fold_in(KEY, i), name="w") for i in range(150)]
    )
    error = draws.mean(0) - base - tau
    variance = 0.4 / 0.6 * ((one - base).square() + (other - base).square()) / 4
    assert (error.square() * 150 / variance).mean() < 1.6
    assert_close((draws.var(0) / variance).mean(), torch.tensor(1.0).double(), rtol=0.06, atol=0)


def test_dare_draws_by_leaf_model_and_key_alone():
    base, one = torch.zeros(64), torch.ones(64)
    options = {"drop": 0.5, "key": KEY}
    first = rules.dare(base, [one], name="a", **options)
    assert torch.equal(first, rules.dare(base, [one], name="a", **options))
    assert torch.equal(first.view(8, 8), rules.dare(base.view(8, 8), [one.view(8, 8)], name="a", **options))
    assert not torch.equal(first, rules.dare(base, [one], name="b", **options))
    both = rules.dare(base, [one, one], name="a", **options)
    assert set(both.tolist()) == {0.0, 1.0, 2.0}  # the masks of two models are independent
    assert set(first.tolist()) == {0.0, 2.0}
    # the mean of 2 m and 2 m' is m + m', and m is half of the first draw: so is the other mask known
    mask, other = first / 2, both - first / 2
    signed = rules.dare(base, [one, -one], name="a", then="ties", **options)
    assert torch.equal(signed, 2 * (mask - other))  # where both survive they balance, alone each is elected


def test_fisher_merge_takes_sure_models_and_its_floor_means():
    thetas = [row(1.0, 1.0, 8.0), row(3.0, 5.0, 0.0)]
    fishers = [row(3.0, 0.0, 0.0), row(1.0, 2.0, 0.0)]
    merged = rules.fisher(thetas, fishers)
    assert_close(merged, row(1.5, 5.0, 4.0), rtol=1e-7, atol=1e-7)
    assert float(merged[1]) < 5  # the floor lets the other in
    scaled = rules.fisher([100 * x for x in thetas], [1e-30 * x for x in fishers])
    assert_close(scaled, 100 * merged)
    # definitions.md 2.8, correction: an epsilon in the denominator alone pulls weights that nobody needs to 0
    stacked, fish = torch.stack(thetas), torch.stack(fishers)
    documented = (fish * stacked).sum(0) / (fish.sum(0) + 1e-8)
    assert documented[2] == 0
    assert rules.fisher(thetas, [torch.zeros(3).double()] * 2, [1.0, 3.0]).tolist() == [2.5, 4.0, 2.0]
    floors = rules.fisher(thetas, fishers, means=[1.0, 3.0])
    assert_close(floors[2], torch.tensor(2.0).double())


@given(seeds, st.integers(1, 3))
def test_regmean_is_the_least_squares_map(seed, num):
    maps = leaves(seed, num, (4, 3))
    inputs = leaves(seed + 1, num, (9, 4))
    grams = [x.T @ x for x in inputs]
    found = rules.regmean(maps, grams, shrink=1.0)
    targets = np.concatenate([(x @ W).numpy() for x, W in zip(inputs, maps, strict=True)])
    exact = np.linalg.lstsq(np.concatenate([x.numpy() for x in inputs]), targets, rcond=None)[0]
    assert_close(found, torch.from_numpy(exact), rtol=1e-8, atol=1e-8)
    by_formula = [0.9 * g + 0.1 * g.diagonal().diag() for g in grams]
    shrunk = torch.linalg.solve(sum(by_formula), sum(g @ W for g, W in zip(by_formula, maps, strict=True)))
    assert_close(rules.regmean(maps, grams), shrunk, rtol=1e-8, atol=1e-8)
    assert_close(rules.regmean([maps[0]] * num, grams), maps[0], rtol=1e-12, atol=1e-12)


def test_a_weight_of_two_in_regmean_is_a_model_whose_rows_count_twice():
    maps, inputs = leaves(8, 2, (4, 3)), leaves(9, 2, (9, 4))
    twice = [inputs[0], inputs[1], inputs[1]]
    targets = np.concatenate([(x @ W).numpy() for x, W in zip(twice, (*maps, maps[1]), strict=True)])
    exact = np.linalg.lstsq(np.concatenate([x.numpy() for x in twice]), targets, rcond=None)[0]
    found = rules.regmean(maps, [x.T @ x for x in inputs], shrink=1.0, weights=[1.0, 2.0])
    assert_close(found, torch.from_numpy(exact), rtol=1e-8, atol=1e-8)


def test_regmean_takes_the_mean_of_what_no_input_sees():
    maps = leaves(5, 2, (3, 2))
    one, other = row(1.0, 0.0, 0.0), row(1.0, 1.0, 0.0)
    grams = [one.outer(one), other.outer(other)]
    for shrink in (0.9, 1.0):
        found = rules.regmean(maps, grams, shrink=shrink)
        assert_close(found[2], (maps[0] + maps[1])[2] / 2)
    assert_close(one @ found, one @ maps[0])  # two inputs, three rows: both models are met
    assert_close(other @ found, other @ maps[1])
    nothing = [torch.zeros(3, 3).double()] * 2
    assert_close(rules.regmean(maps, nothing, weights=[1.0, 3.0]), rules.linear(maps, [1.0, 3.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_leaves_are_merged_in_wide_sums_and_come_back_narrow(dtype):
    base, one, other = (x.to(dtype) for x in leaves(2, 3, (4, 5)))
    wide = [x.double() for x in (base, one, other)]
    for rule in (
        lambda b, *x: rules.linear(x, [1.0, 2.0]),
        lambda b, *x: rules.slerp(*x, 0.3),
        lambda b, *x: rules.task_arithmetic(b, x, [0.3, 0.7]),
        lambda b, *x: rules.ties(b, x, density=0.5, scale=0.7),
        lambda b, *x: rules.dare(b, x, drop=0.5, key=KEY, name="w", then="ties"),
        lambda b, *x: rules.fisher(x, [y.square() for y in wide[1:]]),
        lambda b, *x: rules.regmean(x, [torch.eye(4).double(), 3 * torch.eye(4).double()]),
    ):
        narrow, exact = rule(base, one, other), rule(*wide)
        assert narrow.dtype == dtype
        assert_close(narrow, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_long_leaves_are_merged_in_parts():
    from funcscope.core.vectors import PART

    one, other = leaves(7, 2, PART + 3, torch.float32)
    assert_close(rules.linear([one, other]), (one + other) / 2)
    assert rules.linear([torch.empty(0, 2)]).shape == (0, 2)


NAN = torch.tensor([float("nan"), 0.0])
ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: rules.linear([]), "at least 1 tensor"),
        (lambda: rules.ties(ONE, [], density=0.2), "at least 2 tensors"),
        (lambda: rules.linear([ONE, torch.ones(1)]), "one shape"),
        (lambda: rules.linear([ONE, NAN]), "finite"),
        (lambda: rules.ties(NAN, [ONE], density=0.2), "finite"),
        (lambda: rules.linear([ONE, ONE], [1.0, -1.0]), "must not sum to 0"),
        (lambda: rules.linear([ONE, ONE], [1.0]), "one for each of the 2"),
        (lambda: rules.task_arithmetic(ONE, [ONE], [1.0, 2.0]), "one for each of the 1"),
        (lambda: rules.ties(ONE, [ONE], density=0.0), "above 0"),
        (lambda: rules.ties(ONE, [ONE], density=1.5), "`density`"),
        (lambda: rules.ties(ONE, [ONE]), "either"),
        (lambda: rules.ties(ONE, [ONE], density=0.5, cuts=[Cut(0.0, 1)]), "either"),
        (lambda: rules.ties(ONE, [ONE], cuts=[]), "one per leaf"),
        (lambda: rules.ties(ONE, [ONE, ONE], density=0.5, weights=[1.0, 0.0]), "above 0"),
        (lambda: rules.dare(ONE, [ONE], drop=1.0, key=KEY, name="w"), "below 1"),
        (lambda: rules.slerp(ONE, ONE, 1.5), "`t`"),
        (lambda: rules.fisher([ONE], [-ONE]), "below 0"),
        (lambda: rules.fisher([ONE, ONE], [ONE]), "at least 2"),
        (lambda: rules.regmean([torch.eye(2)], [torch.eye(2), torch.eye(2)]), "one Gram"),
        (lambda: rules.regmean([torch.eye(2)], [-torch.eye(2)]), "squares"),
        (lambda: rules.regmean([torch.eye(2)], [torch.eye(2)], shrink=1.1), "`shrink`"),
        (lambda: global_cut(list, 0.5), "one or more"),
    ],
)
def test_what_has_no_merge_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_counters_have_no_mean():
    with pytest.raises(TypeError, match="floating"):
        check_leaves("leaves", [torch.ones(2, dtype=torch.long)])


def test_weights_are_in_the_election_and_in_the_floor_of_fishers():
    one, two = row(3.0), row(-2.0)
    assert_close(rules.ties(row(0.0), [one, two], density=1.0, weights=[1.0, 3.0]), row(-2.0))  # by number of votes: 3
    unused = [row(0.0, 2.0), row(0.0, 2.0)]
    assert_close(rules.fisher([row(0.0, 0.0), row(1.0, 1.0)], unused, weights=[1.0, 3.0]), row(0.75, 0.75))


def test_slerp_of_nearly_opposite_tensors_is_still_on_the_circle():
    e = 1e-3
    middle = rules.slerp(row(1.0, 0.0), row(-math.cos(e), math.sin(e)), 0.5)
    assert_close(
        middle, row(math.sin(e / 2), math.cos(e / 2)), rtol=1e-9, atol=1e-9
    )  # the linear mean is 2000 times shorter
