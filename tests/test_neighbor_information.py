"""Mutual information from nearest neighbours: scikit-learn, whole matrices of distances, sequences, monotone maps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from known_information import KEY, draws, information, pair
from scipy.special import digamma
from sklearn.feature_selection import mutual_info_classif, mutual_info_regression

import funcscope as fs
from funcscope.information import (
    mutual_information_ksg,
    mutual_information_ross,
)


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


@pytest.mark.parametrize("rho", [0.0, 0.6, pytest.param(0.9, marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("size", [1, 4])
def test_sides_that_are_maps_of_each_other_reach_the_ceiling_and_say_so(size):
    """Without it the same number, whatever the map, and an error of 0."""
    x, groups = draws(0, 200, 1), torch.arange(200) // size
    made = mutual_information_ksg(x, 2 * x, key=KEY, groups=groups)
    assert float(made.ceiling) == pytest.approx(digamma(200 - size + 1) - digamma(5))
    assert float(made.value) == pytest.approx(float(made.ceiling))
    assert made.saturated
    assert "near the ceiling" in made.notes[-1]
    assert mutual_information_ksg(x, 3 * x, key=KEY, groups=groups).saturated  # but for rounding of distances
    assert not mutual_information_ksg(*pair(0, 200, 1, 0.8), key=KEY).saturated
