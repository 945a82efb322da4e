"""Mutual information: closed forms, scikit-learn, plain numpy; what copies, dependence and the documented formulas do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.feature_selection import mutual_info_classif, mutual_info_regression
from sklearn.metrics import mutual_info_score
from torch.testing import assert_close

import funcscope as fs
from funcscope.information import (
    discrete_entropy,
    mutual_information_discrete,
    mutual_information_gaussian,
    mutual_information_infonce,
    mutual_information_ksg,
    mutual_information_ross,
)
from funcscope.information.gaussian_information import ledoit_wolf
from funcscope.information.groups import check_pairs, grouping

KEY = fs.key(0)
CONTINUOUS = pytest.mark.parametrize(
    "estimate",
    [
        lambda x, y, **more: mutual_information_ksg(x, y, key=KEY, **more),
        lambda x, y, **more: mutual_information_gaussian(x, y, **more),
        lambda x, y, **more: mutual_information_infonce(x, y, key=KEY, num_candidates=16, steps=10, **more),
    ],
    ids=["KSG", "Gaussian", "InfoNCE"],
)


def draws(seed, *shape):
    return fs.normal(fs.key(seed), torch.zeros(shape, dtype=torch.float64))


def pair(seed, num, dims, rho):
    x = draws(seed, num, dims)
    return x, rho * x + math.sqrt(1 - rho**2) * draws(seed + 10_000, num, dims)


def information(rho, dims=1):
    return -dims / 2 * math.log1p(-(rho**2))


def labels_of(seed, num, size):
    return (fs.core.keys.uniform(fs.key(seed), torch.zeros(num, dtype=torch.float64)) * size).long()


# Labels.


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 2)), min_size=2, max_size=80))
def test_plug_in_value_is_scikit_learns_and_miller_madow_the_three_entropies(pairs):
    x, y = torch.tensor(pairs).T
    plain = mutual_information_discrete(x, y, correction="plug-in")
    assert float(plain.value) == pytest.approx(mutual_info_score(x.numpy(), y.numpy()), abs=1e-9)
    parts = [discrete_entropy(each).entropy for each in (x, y, x * 10 + y)]
    assert_close(mutual_information_discrete(x, y).value, parts[0] + parts[1] - parts[2])


def test_a_xor_is_in_both_bits_and_in_neither_alone():
    a, b = torch.arange(4000) // 2 % 2, torch.arange(4000) % 2
    both = mutual_information_discrete(2 * a + b, a ^ b)
    assert float(both.value) == pytest.approx(math.log(2), abs=1e-3)
    for bit in (a, b):
        assert abs(float(mutual_information_discrete(bit, a ^ b).value)) < 1e-3


def test_error_of_a_channel_covers_and_the_correction_removes_the_bias():
    size, flipped, num, hits, values, plain = 3, 0.3, 120, [], [], []
    truth = math.log(size) + 0.7 * math.log(0.7) + 0.3 * math.log(0.15)
    for i in range(200):
        x, move = labels_of(i, num, size), labels_of(i + 1000, num, size - 1) + 1
        flip = fs.core.keys.uniform(fs.key(i + 2000), torch.zeros(num, dtype=torch.float64)) < flipped
        y = (x + move * flip) % size
        made = mutual_information_discrete(x, y)
        hits.append(abs(float(made.value) - truth) <= 1.96 * float(made.stderr))
        values.append(float(made.value))
        plain.append(float(mutual_information_discrete(x, y, correction="plug-in").value))
    noise = np.std(values) / 200**0.5
    assert 0.90 < np.mean(hits) < 0.99
    assert abs(np.mean(values) - truth) < 3 * noise
    assert np.mean(plain) - truth > 3 * noise  # the plug-in value is too high by 4 / 2N
    assert np.mean(plain) - truth == pytest.approx((size - 1) ** 2 / (2 * num), abs=4 * noise)


def test_error_at_independence_covers():
    made = [mutual_information_discrete(labels_of(i, 200, 4), labels_of(i + 1000, 200, 3)) for i in range(300)]
    assert np.mean([abs(float(m.value)) <= 1.96 * float(m.stderr) for m in made]) > 0.93


def test_bins_of_many_dimensions_give_log_n_whatever_the_data_are():
    """mistakes.md B, inventory 1b: the histogram of 20 dimensions has every row in a bin of its own."""
    x, y = draws(0, 1000, 20), draws(1, 1000, 20)
    of_bins = [((side > 0).long() * 2 ** torch.arange(20)).sum(1) for side in (x, y)]
    documented = mutual_information_discrete(*of_bins, correction="plug-in")
    assert float(documented.value) > 6.85  # log 1000 = 6.908, for independent sides
    assert "five times" in mutual_information_discrete(*of_bins).notes[-1]
    assert abs(float(mutual_information_gaussian(x, y).value)) < 0.1


@given(st.integers(0, 40), st.integers(2, 4))
def test_copies_within_a_sequence_change_neither_value_nor_error(seed, copies):
    groups = torch.arange(40).repeat_interleave(copies)
    x, y = labels_of(seed, 40, 3), labels_of(seed + 1, 40, 2)
    one, many = mutual_information_discrete(x, y), mutual_information_discrete(x[groups], y[groups], groups=groups)
    assert_close(one.value, many.value)
    assert_close(one.stderr, many.stderr)
    a, b = pair(seed, 40, 2, 0.5)
    one, many = mutual_information_gaussian(a, b), mutual_information_gaussian(a[groups], b[groups], groups=groups)
    assert_close(one.value, many.value)
    assert_close(one.stderr, many.stderr)


def test_labels_of_one_class_and_single_sequences():
    x, one = labels_of(0, 30, 3), torch.zeros(30, dtype=torch.long)
    made = mutual_information_discrete(x, one)
    assert float(made.value) == pytest.approx(0, abs=1e-12)
    assert "one label" in made.notes[0]
    made = mutual_information_ross(draws(0, 30, 1), one, key=KEY)
    assert float(made.value) == pytest.approx(0, abs=1e-12)
    assert "one label" in made.notes[-1]
    assert math.isnan(mutual_information_discrete(x, x, groups=one).stderr)
    assert math.isnan(mutual_information_ross(draws(0, 30, 1), x, key=KEY, groups=one).value)
    own = mutual_information_ross(draws(0, 4, 1), torch.arange(4), key=KEY)
    assert math.isnan(own.value)
    assert "no row has a neighbour" in own.notes[0]


# Nearest neighbours.


@pytest.mark.parametrize("num_neighbors", [3, 5])
def test_one_dimension_is_scikit_learns(num_neighbors):
    x, y = pair(0, 400, 1, 0.7)
    made = mutual_information_ksg(x, y, key=KEY, num_neighbors=num_neighbors)
    theirs = mutual_info_regression(x.numpy(), y[:, 0].numpy(), n_neighbors=num_neighbors, random_state=0)[0]
    assert float(made.value) == pytest.approx(theirs, abs=1e-9)
    labels = (y[:, 0] > 0).long() + (y[:, 0] > 1).long()
    made = mutual_information_ross(x, labels, key=KEY, num_neighbors=num_neighbors)
    theirs = mutual_info_classif(x.numpy(), labels.numpy(), n_neighbors=num_neighbors, random_state=0)[0]
    assert float(made.value) == pytest.approx(theirs, abs=1e-9)


def by_hand(x, y, groups, k):
    """Kraskov's first estimator among rows of other sequences, from whole matrices of distances."""
    from scipy.special import digamma

    scaled = [(side - side.mean(0)) / side.std(0) for side in (x.numpy(), y.numpy())]
    apart = [abs(side[:, None] - side).max(-1) for side in scaled]
    other, terms = groups[:, None] != groups, []
    for i in range(len(x)):
        near = np.sort(np.maximum(*apart)[i][other[i]])[k - 1]
        counts = [(each[i][other[i]] < near).sum() for each in apart]
        terms.append(digamma(k) + digamma(other[i].sum() + 1) - sum(digamma(n + 1) for n in counts))
    return np.mean(terms)


@pytest.mark.parametrize("size", [1, 3])
def test_several_dimensions_and_sequences_are_those_by_hand(size):
    x, y = draws(3, 90, 2), draws(3, 90, 2) + draws(4, 90, 2)
    y = torch.cat([y, draws(5, 90, 1)], 1)
    groups = torch.arange(90) // size
    made = mutual_information_ksg(x, y, key=KEY, groups=groups, num_neighbors=4)
    assert float(made.value) == pytest.approx(by_hand(x, y, groups.numpy(), 4), abs=1e-9)
    assert (made.dims, made.num_groups) == ((2, 3), 90 // size)


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
def test_ksg_of_a_gaussian_pair_and_of_monotone_maps_of_it(rho):
    x, y = pair(1, 2000, 1, rho)
    made = mutual_information_ksg(x, y, key=KEY)
    assert float(made.value) == pytest.approx(information(rho), abs=0.05)
    scores = mutual_information_ksg(x, y, key=KEY, marginals="normal")
    assert float(scores.value) == pytest.approx(information(rho), abs=0.05)
    for through in (lambda z: z**3, torch.arcsinh) if rho else ():
        mapped = mutual_information_ksg(through(x), through(y), key=KEY)
        assert float(mapped.value) == pytest.approx(float(made.value), abs=0.1)
        again = mutual_information_ksg(through(x), through(y), key=KEY, marginals="normal")
        assert float(again.value) == pytest.approx(float(scores.value), abs=1e-9)


def test_tokens_of_one_sequence_are_near_and_that_is_no_information():
    """Slow walks, x and y independent: neighbours in time are neighbours on both sides."""
    steps = draws(0, 40, 50, 2).cumsum(1)
    x, y = (steps[..., i : i + 1].flatten(0, 1) for i in range(2))
    groups = torch.arange(40).repeat_interleave(50)
    documented = mutual_information_ksg(x, y, key=KEY)
    assert float(documented.value) > 0.1
    made = mutual_information_ksg(x, y, key=KEY, groups=groups)
    assert abs(float(made.value)) < 3 * float(made.stderr)
    assert float(documented.value) > 5 * float(documented.stderr)


def test_sums_of_univariate_informations_are_not_that_of_the_sides():
    """mistakes.md B 20: sum over the dimensions of x, mean over those of y, and the first component of y."""
    x = draws(2, 2000, 2)
    y = torch.stack([x[:, 0] * x[:, 1].sign(), x[:, 1].abs()], 1) + 0.3 * draws(7, 2000, 2)
    twin = torch.cat([x[:, :1], x[:, :1]], 1) + 0.05 * draws(8, 2000, 2)  # two views of one number
    target = x[:, :1] + 0.75 * draws(9, 2000, 1)
    truth = math.log(1 + 1 / 0.75**2) / 2

    def documented(side, other):
        each = [
            mutual_info_regression(side.numpy(), column.numpy(), n_neighbors=3, random_state=0) for column in other.T
        ]
        return np.sum(each, 1).mean()

    assert documented(twin, target) > 1.8 * truth  # the same information, counted twice
    assert float(mutual_information_ksg(twin, target, key=KEY).value) == pytest.approx(truth, abs=0.08)
    assert documented(x, y) < 0.75 * float(mutual_information_ksg(x, y, key=KEY).value)  # and a joint one left out
    first = torch.linalg.svd(y - y.mean(0), full_matrices=False)[2][:1].T
    by_component = np.mean(mutual_info_regression(x.numpy(), (y @ first)[:, 0].numpy(), random_state=0))
    assert by_component < 0.75 * float(mutual_information_ksg(x, y, key=KEY).value)


def test_equal_rows_are_parted_by_the_key_and_named():
    x, y = pair(0, 300, 1, 0.5)
    x = x.round(decimals=1)
    made = mutual_information_ksg(x, y, key=KEY)
    assert "equal others" in made.notes[-1]
    assert made == mutual_information_ksg(x, y, key=KEY)
    assert math.isfinite(made.value)
    assert not any("equal" in note for note in mutual_information_ksg(*pair(0, 300, 1, 0.5), key=KEY).notes)


def test_many_dimensions_and_few_rows_are_named():
    notes = mutual_information_ksg(draws(0, 100, 6), draws(1, 100, 6), key=KEY).notes
    assert any("12 dimensions" in note for note in notes)
    assert any("100 rows" in note for note in notes)
    assert math.isnan(mutual_information_ksg(draws(0, 4, 1), draws(1, 4, 1), key=KEY).value)
    wide = mutual_information_ksg(draws(0, 400, 5), pair(0, 400, 5, 0.9)[1], key=KEY)
    assert float(wide.value) < 0.6 * information(0.9, 5)  # and it is as low as the notes say


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_error_of_the_ksg_estimate_covers(rho):
    made = [mutual_information_ksg(*pair(i, 600, 1, rho), key=fs.key(i)) for i in range(150)]
    values, errors = (np.array([float(getattr(m, name)) for m in made]) for name in ("value", "stderr"))
    assert 0.85 < (abs(values - information(rho)) <= 1.96 * errors).mean() < 0.99
    assert errors.mean() == pytest.approx(values.std(), rel=0.2)


# Gaussian.


@pytest.mark.parametrize(("num", "dims", "rho"), [(60, 1, 0.8), (60, 5, 0.0), (60, 5, 0.7), (100, 20, 0.3)])
def test_the_bias_of_gaussian_information_is_the_wisharts_and_its_error_covers(num, dims, rho):
    keys, truth = 120, information(rho, dims)
    made = [mutual_information_gaussian(*pair(i, num, dims, rho)) for i in range(keys)]
    values, errors = (np.array([float(getattr(m, name)) for m in made]) for name in ("value", "stderr"))
    noise = values.std() / keys**0.5
    assert abs(values.mean() - truth) < 3 * noise
    plain = mutual_information_gaussian(*pair(0, num, dims, rho)).value
    x, y = pair(0, num, dims, rho)
    logdets = [float(torch.linalg.slogdet(torch.atleast_2d(each.T.cov()))[1]) for each in (x, y, torch.cat([x, y], 1))]
    bias = (logdets[0] + logdets[1] - logdets[2]) / 2 - float(plain)
    assert 1 < bias / (dims**2 / (2 * num)) < 2  # the first order alone is too little
    assert (abs(values - truth) <= 1.96 * errors).mean() > 0.87


@given(st.integers(0, 50))
def test_linear_maps_of_either_side_change_nothing(seed):
    x, y = pair(seed, 50, 3, 0.6)
    turned = mutual_information_gaussian(x @ draws(seed + 1, 3, 3) + 2, y @ draws(seed + 2, 3, 3))
    made = mutual_information_gaussian(x, y)
    assert_close(turned.value, made.value, rtol=1e-6, atol=1e-8)
    assert_close(turned.stderr, made.stderr, rtol=1e-5, atol=1e-7)


def test_shrinkage_is_ledoit_and_wolfs_and_of_sequences_where_rows_are_copies():
    z = draws(0, 60, 7) * torch.linspace(1, 3, 7)
    z = z - z.mean(0)
    single = grouping(None, 60, z.device)
    assert ledoit_wolf(z, single) == pytest.approx(ledoit_wolf_shrinkage(z.numpy(), assume_centered=True), rel=1e-9)
    groups = torch.arange(60).repeat_interleave(12)
    assert ledoit_wolf(z[groups], grouping(groups, 720, z.device)) == pytest.approx(ledoit_wolf(z, single), rel=1e-9)


def test_fewer_rows_than_dimensions_want_shrinkage_and_get_too_little():
    x, y = pair(0, 30, 20, 0.9)
    plain = mutual_information_gaussian(x, y)
    assert math.isnan(plain.value)
    assert "shrinkage" in plain.notes[0]
    shrunk = mutual_information_gaussian(x, y, shrinkage="ledoit-wolf")
    assert 0 < float(shrunk.value) < information(0.9, 20)
    assert "shrunk by" in shrunk.notes[0]
    for amount in (0.0, 1.0):
        assert float(mutual_information_gaussian(*pair(0, 300, 2, 0.9), shrinkage=amount).value) == pytest.approx(
            information(0.9, 2) * (1 - amount), abs=0.3
        )
    with pytest.raises(ValueError, match="shrinkage"):
        mutual_information_gaussian(x, y, shrinkage=1.5)


def test_a_side_that_is_a_map_of_the_other_has_no_finite_information():
    x = draws(0, 50, 2)
    made = mutual_information_gaussian(x, x @ draws(1, 2, 2))
    assert math.isnan(made.value)
    assert "linear relations" in made.notes[0]


# InfoNCE.


def test_infonce_is_a_lower_bound_near_the_truth_and_nothing_for_independent_sides():
    x, y = pair(0, 600, 1, 0.8)
    made = mutual_information_infonce(x, y, key=KEY, num_candidates=60, steps=100)
    assert 0.7 * information(0.8) < float(made.value) < information(0.8) + 2 * float(made.stderr)
    assert float(made.ceiling) == math.log(60)
    assert not made.saturated
    none = mutual_information_infonce(x, y.flip(0), key=KEY, num_candidates=60, steps=40)
    assert float(none.value) < 2 * float(none.stderr) + 1e-3
    assert float(none.value) > -0.05
    short = [mutual_information_infonce(x, y, key=fs.key(i), num_candidates=60, steps=5) for i in (0, 0, 1)]
    assert short[0] == short[1] != short[2]


def test_on_the_pairs_that_train_it_a_critic_finds_information_where_there_is_none():
    """mistakes.md B 21: the best epoch on the training pairs is no bound; independent sides get more than a nat."""
    x, y = draws(0, 128, 30), draws(1, 128, 30)
    W = torch.zeros(30, 30, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([W], lr=0.02)
    for _ in range(60):
        scores = x @ W @ y.T
        loss = (scores.logsumexp(1) - scores.diagonal()).mean()
        (W.grad,) = torch.autograd.grad(loss, [W])
        adam.step()
    documented = math.log(128) - float(loss.detach())
    assert documented > 1
    made = mutual_information_infonce(x, y, key=KEY, critic="bilinear", steps=60)
    assert abs(float(made.value)) < 0.1


def test_deterministic_layers_saturate_and_say_so():
    """mistakes.md B 22: between layers of a deterministic network the value is log K, whatever they share."""
    x = draws(0, 200, 6)
    layers = {width: torch.tanh(x @ draws(width, 6, width)) for width in (6, 12)}
    made = [mutual_information_infonce(x, h, key=KEY, num_candidates=16, steps=120) for h in layers.values()]
    for each in made:
        assert each.saturated
        assert "ceiling" in each.notes[-1]
        assert float(each.value) <= math.log(16)
    assert abs(float(made[0].value - made[1].value)) < 0.1


def test_candidates_are_of_other_sequences():
    """Rows that are alike within a sequence would be told from their own, were they candidates."""
    groups = torch.arange(60).repeat_interleave(5)
    x = draws(0, 60, 3)[groups] + 0.01 * draws(1, 300, 3)
    made = mutual_information_infonce(x, x, key=KEY, groups=groups, num_candidates=20, steps=100)
    assert float(made.ceiling) == math.log(20)
    assert float(made.value) > 0.9 * math.log(20)  # five alike among the candidates would cost up to log 5
    few = mutual_information_infonce(x, x, key=KEY, groups=groups, steps=5)
    assert float(few.ceiling) == math.log(30)  # of a half of the sequences
    assert math.isnan(mutual_information_infonce(x[:40], x[:40], key=KEY, groups=groups[:40]).value)


# All.


@CONTINUOUS
def test_constant_sides_have_no_information(estimate):
    made = estimate(torch.ones(60, 2), draws(0, 60, 2))
    assert float(made.value) == pytest.approx(0, abs=1e-6)


@CONTINUOUS
def test_one_sequence_has_no_error_and_says_so(estimate):
    x, y = pair(0, 60, 2, 0.5)
    made = estimate(x, y, groups=torch.zeros(60, dtype=torch.long))
    assert math.isnan(made.stderr)
    assert any("sequence" in note for note in made.notes)


@CONTINUOUS
def test_arguments_stay_and_half_precision_serves(estimate):
    x, y = (each.float() for each in pair(0, 100, 2, 0.5))
    before = x.clone(), y.clone()
    made = estimate(x, y)
    assert x.equal(before[0])
    assert y.equal(before[1])
    assert made.value.dtype == made.stderr.dtype == torch.float64
    assert math.isfinite(estimate(x.bfloat16(), y.bfloat16()).value)


def test_wrong_arguments_are_refused():
    x = draws(0, 20, 2)
    with pytest.raises(ValueError, match="row by row"):
        check_pairs(x, x[:5])
    with pytest.raises(ValueError, match="num_neighbors"):
        mutual_information_ksg(x, x, key=KEY, num_neighbors=0)
    with pytest.raises(ValueError, match="num_candidates"):
        mutual_information_infonce(x, x, key=KEY, num_candidates=1)
    with pytest.raises(ValueError, match="`y` must be finite"):
        mutual_information_gaussian(x, x / 0)
