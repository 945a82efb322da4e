"""Mutual information of labels and Gaussian sides, and of all estimators: closed forms, scikit-learn, copies, constants."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from known_information import KEY, draws, information, labels_of, pair
from sklearn.covariance import ledoit_wolf_shrinkage
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

CONTINUOUS = pytest.mark.parametrize(
    "estimate",
    [
        lambda x, y, **more: mutual_information_ksg(x, y, key=KEY, **more),
        lambda x, y, **more: mutual_information_gaussian(x, y, **more),
        lambda x, y, **more: mutual_information_infonce(x, y, key=KEY, num_candidates=16, steps=10, **more),
    ],
    ids=["KSG", "Gaussian", "InfoNCE"],
)


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
    for i in range(150):
        x, move = labels_of(i, num, size), labels_of(i + 1000, num, size - 1) + 1
        flip = fs.core.keys.uniform(fs.key(i + 2000), torch.zeros(num, dtype=torch.float64)) < flipped
        y = (x + move * flip) % size
        made = mutual_information_discrete(x, y)
        hits.append(abs(float(made.value) - truth) <= 1.96 * float(made.stderr))
        values.append(float(made.value))
        plain.append(float(mutual_information_discrete(x, y, correction="plug-in").value))
    noise = np.std(values) / 150**0.5
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


# Gaussian.


@pytest.mark.parametrize(
    ("num", "dims", "rho"),
    [
        (60, 5, 0.7),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((60, 1, 0.8), (60, 5, 0.0), (100, 20, 0.3))),
    ],
)
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


@pytest.mark.parametrize("seed", range(4))
def test_one_sequence_does_not_say_what_its_rows_are_worth(seed):
    """The residuals of a single sequence add up to 0, and what is left of them is rounding of either sign."""
    x, y = pair(seed, 100, 2, 0.5)
    made = mutual_information_gaussian(x, y, groups=torch.zeros(100, dtype=torch.long))
    assert math.isnan(made.value)
    assert "independent rows" in made.notes[0]
    copies = mutual_information_gaussian(x.repeat(3, 1), y.repeat(3, 1), groups=torch.arange(300) // 100)
    assert float(copies.value) == pytest.approx(float(mutual_information_gaussian(x, y).value), abs=0.03)


@pytest.mark.parametrize("which", ["x", "y", "both"])
def test_neighbours_and_critics_know_a_constant_side(which):
    varying, still = draws(0, 40, 2), torch.full((40, 2), 0.1)
    x, y = (still if which in (name, "both") else varying for name in "xy")
    labels = torch.arange(40) % 2
    made = [
        mutual_information_gaussian(x, y),
        mutual_information_ksg(x, y, key=KEY),
        mutual_information_infonce(x, y, key=KEY, num_candidates=4, steps=2),
        mutual_information_ross(still, labels, key=KEY),
    ]
    for each in made:
        assert float(each.value) == 0
        assert list(each.notes) == ["one side is constant, and has no information about anything."]


def test_a_remedy_is_one_that_a_reader_can_follow():
    """The layers' metric has no shrinkage of its own."""
    x = draws(0, 50, 2)
    assert "of `mutual_information_gaussian`" in mutual_information_gaussian(x, 2 * x).notes[0]


@CONTINUOUS
@pytest.mark.parametrize("scale", [2.0**600, 2.0**-600])
def test_the_unit_of_a_side_changes_nothing_however_large_it_is(estimate, scale):
    x, y = pair(0, 60, 2, 0.5)
    assert float(estimate(scale * x, y).value) == pytest.approx(float(estimate(x, y).value), rel=1e-9)
