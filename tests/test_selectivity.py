"""Selectivity of units for classes. Oracles: loops over units and folds, units that are built, exchangeable data."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.keys import fold_in, uniform
from funcscope.representation import class_sums, selectivity, unit_numbers

NUM, CLASSES = 120, 3


def normal(seed, *shape):
    return fs.normal(fs.key(seed), torch.zeros(*shape, dtype=torch.float64))


def labelled(seed=0):
    """Tokens of 24 sequences of five, and a class for each sequence."""
    groups = torch.arange(NUM) // 5
    return groups, groups % CLASSES


def by_loop(means):
    """(selectivity, entropy, participation) of one unit."""
    means = [float(x) for x in means]
    top = max(range(len(means)), key=means.__getitem__)
    rest = sum(x for c, x in enumerate(means) if c != top) / (len(means) - 1)
    p = [x / sum(means) for x in means]
    entropy = -sum(x * math.log(x) for x in p if x > 0) / math.log(len(means))
    return (means[top] - rest) / (means[top] + rest), entropy, sum(means) ** 2 / sum(x * x for x in means)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6))
def test_numbers_of_units_are_their_definitions_and_have_their_ranges(seed, classes):
    means = uniform(fs.key(seed), torch.zeros(classes, 4, dtype=torch.float64))
    means[1:, 0] = 0.0
    means[0, 0] = 1.0
    means[:, 1] = 0.5
    found = unit_numbers(means)
    for unit in range(4):
        assert_close(torch.stack([x[unit] for x in found]), torch.tensor(by_loop(means[:, unit]), dtype=torch.float64))
    assert [float(x[0]) for x in found] == [1.0, 0.0, 1.0]
    assert [round(float(x[1]), 9) for x in found] == [0.0, 1.0, classes]
    assert_close(unit_numbers(7 * means).selectivity, found.selectivity)


def test_means_over_units_have_the_jackknife_error_of_folds_of_sequences():
    groups, labels = labelled()
    x = normal(0, NUM, 4)
    found = selectivity({"a": x}, labels, key=fs.key(0), groups=groups)
    numbers = torch.tensor([by_loop([x[labels == c, j].abs().mean() for c in range(CLASSES)]) for j in range(4)])
    assert_close(found.unit_selectivity[0].float(), numbers[:, 0])
    assert_close(found.class_entropy.float(), numbers[:, 1].mean()[None])
    assert_close(found.participation.float(), numbers[:, 2].mean()[None])
    left_out = []
    for fold in range(16):
        there = groups % 16 != fold
        each = [[x[there & (labels == c), j].abs().mean() for c in range(CLASSES)] for j in range(4)]
        left_out.append(sum(by_loop(unit)[0] for unit in each) / 4)
    values = torch.tensor(left_out, dtype=torch.float64)
    assert_close(found.selectivity_stderr[0], (15 / 16 * (values - values.mean()).square().sum()).sqrt())
    assert found.num_sequences == 24


def test_a_unit_of_one_class_is_found_among_units_of_none():
    groups, labels = labelled()
    x = normal(1, NUM, 5).abs()
    x[:, 0] = (labels == 2).double()
    x[:, 4] = 0.0
    found = selectivity({"a": x}, labels, key=fs.key(0), groups=groups)
    assert found.unit_selectivity[0, 0] == 1
    assert found.unit_class[0].tolist()[0::4] == [2, -1]
    assert found.unit_participation[0, 0] == 1
    assert found.unit_selectivity[0, 1:4].max() < 0.4
    assert found.num_undefined.tolist() == [1]
    assert found.unit_selectivity[0, 4].isnan()
    assert_close(found.p_value, torch.tensor([0.05], dtype=torch.float64))
    assert found.selectivity > found.selectivity_null + 3 * found.selectivity_stderr


def test_noise_has_a_selectivity_above_zero_and_the_null_has_it_too():
    groups, labels = labelled()
    found = selectivity({"a": normal(2, NUM, 200)}, labels, key=fs.key(0), groups=groups)
    assert found.selectivity > 0.05  # no unit knows a class
    assert abs(float(found.selectivity - found.selectivity_null)) < 4 * float(found.selectivity_stderr)
    assert found.p_value > 0.05


def test_permutations_over_sequences_keep_what_tokens_of_one_have_in_common():
    """Activations of a sequence are one number, and unrelated to its class: over tokens, labels would seem to tell."""
    hits = {"sequences": 0, "tokens": 0}
    for seed in range(10):
        groups = torch.arange(240) // 20
        x = normal(seed, 12, 30)[groups].abs()
        labels = (uniform(fold_in(fs.key(seed), 1), torch.zeros(12)).argsort() % 2)[groups]
        hits["sequences"] += bool(selectivity({"a": x}, labels, key=fs.key(seed), groups=groups).p_value <= 0.05)
        hits["tokens"] += bool(selectivity({"a": x}, labels, key=fs.key(seed)).p_value <= 0.05)
    assert hits["sequences"] <= 3  # 1 in 20
    assert hits["tokens"] == 10


def test_labels_within_sequences_go_to_others_of_the_same_length():
    groups = torch.tensor([0] * 4 + [1] * 4 + [2] * 3)
    labels = torch.tensor([0, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1])
    x = normal(0, 11, 3)
    found = selectivity({"a": x}, labels, key=fs.key(0), groups=groups)
    assert found.num_permutations == 19
    own = found.selectivity
    swapped = torch.cat([labels[4:8], labels[:4], labels[8:]])
    other = selectivity({"a": x}, swapped, key=fs.key(0), groups=groups).selectivity
    share = (found.selectivity_null - own) / (other - own)  # the null is a mean of these two
    assert 0.1 < float(share) < 0.9
    assert abs(float(share) * 19 - round(float(share) * 19)) < 1e-6
    ragged = selectivity({"a": x}, labels, key=fs.key(0), groups=torch.tensor([0] * 5 + [1] * 4 + [2] * 2))
    assert ragged.num_permutations == 0
    assert ragged.p_value.isnan().all()
    assert "There is no null" in " ".join(str(ragged).split())


def test_strength_says_what_of_signed_activations_counts():
    x = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    magnitude = class_sums(x, labels, 2)
    positive = class_sums(x, labels, 2, strength="positive")
    assert magnitude.totals.sum(0)[:, 0].tolist() == [2, 2]
    assert positive.totals.sum(0)[:, 0].tolist() == [2, 0]


def test_selectivity_refuses_classes_that_are_not_there():
    x = normal(0, 6, 2)
    with pytest.raises(ValueError, match="number of classes"):
        selectivity({"a": x}, torch.zeros(6, dtype=torch.long), key=fs.key(0))
    with pytest.raises(ValueError, match="class 1"):
        selectivity({"a": x}, torch.tensor([0, 2, 0, 2, 0, 2]), key=fs.key(0))
    with pytest.raises(ValueError, match="`labels` must be 0 to 1"):
        class_sums(x, torch.tensor([0, 1, 2, 0, 1, 2]), 2)
