"""Entropies of labels, outputs and spectra, against closed forms, plain numpy and what the documented formulas give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.streams import Moments
from funcscope.information import (
    covariance_entropy,
    discrete_entropy,
    entropy_of_counts,
    entropy_sums,
    output_entropy,
    spectral_entropy,
)
from funcscope.information.groups import check_labels, grouping, wide_rows
from funcscope.linalg.ranks import matrix_ranks


def draws(seed, *shape):
    return fs.normal(fs.key(seed), torch.zeros(shape, dtype=torch.float64))


def labels_of(seed, num, size):
    return (fs.core.keys.uniform(fs.key(seed), torch.zeros(num, dtype=torch.float64)) * size).long()


@given(st.lists(st.integers(0, 6), min_size=2, max_size=60))
def test_entropy_of_labels_is_that_of_their_counts(values):
    labels, counts = torch.tensor(values), np.bincount(values)
    share = counts[counts > 0] / len(values)
    plain = -(share * np.log(share)).sum()
    for correction, more in (("plug-in", 0.0), ("miller-madow", (len(share) - 1) / (2 * len(values)))):
        made = discrete_entropy(labels, correction=correction)
        assert float(made.entropy) == pytest.approx(plain + more, abs=1e-12)
        other = entropy_of_counts(torch.tensor(counts), correction=correction)
        assert_close(made.entropy, other.entropy)
        assert_close(made.stderr, other.stderr)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=20), st.integers(2, 4))
def test_copies_of_rows_within_a_sequence_are_no_samples(values, copies):
    labels = torch.tensor(values)
    made, again = (
        discrete_entropy(labels.repeat_interleave(m), groups=torch.arange(len(values)).repeat_interleave(m))
        for m in (1, copies)
    )
    assert_close(made.entropy, again.entropy)
    assert_close(made.stderr, again.stderr)


def test_miller_madow_leaves_a_bias_of_the_next_order_and_its_error_covers():
    size, num, keys = 8, 60, 250
    made = [discrete_entropy(labels_of(i, num, size)) for i in range(keys)]
    plain = [float(discrete_entropy(labels_of(i, num, size), correction="plug-in").entropy) for i in range(keys)]
    values, errors = (np.array([float(getattr(each, name)) for each in made]) for name in ("entropy", "stderr"))
    noise = values.std() / keys**0.5
    assert abs(values.mean() - math.log(size)) < 4 * noise + 2 * (size**2 - 1) / (12 * num**2)
    assert abs(np.mean(plain) - math.log(size) + (size - 1) / (2 * num)) < 4 * noise + (size**2 - 1) / (6 * num**2)
    assert (abs(values - math.log(size)) <= 1.96 * errors).mean() > 0.9  # degenerate: all labels are equally likely


def test_error_of_unequal_labels_covers():
    shares = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    truth, hits = float(torch.special.entr(shares).sum()), []
    for i in range(300):
        at = fs.core.keys.uniform(fs.key(i), torch.zeros(100, dtype=torch.float64))
        made = discrete_entropy(torch.searchsorted(shares.cumsum(0)[:2], at))
        hits.append(abs(float(made.entropy) - truth) <= 1.96 * float(made.stderr))
    assert 0.90 < np.mean(hits) < 0.99


def test_labels_without_variety_have_no_entropy_and_one_sequence_no_error():
    assert float(discrete_entropy(torch.zeros(5, dtype=torch.long)).entropy) == 0
    assert float(discrete_entropy(torch.zeros(5, dtype=torch.long)).stderr) == 0
    made = discrete_entropy(torch.tensor([0, 1, 1]), groups=torch.zeros(3, dtype=torch.long))
    assert math.isnan(made.stderr)
    assert "one sequence" in made.notes[0]
    assert float(entropy_of_counts(torch.tensor([0, 3])).entropy) == 0


def test_wrong_labels_counts_and_groups_are_refused():
    for bad in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.long), torch.zeros(0, dtype=torch.long)):
        with pytest.raises(ValueError, match="whole number"):
            check_labels("labels", bad)
    with pytest.raises(ValueError, match="groups"):
        grouping(torch.tensor([0]), 2, torch.device("cpu"))
    for counts in ([-1, 2], [0, 0]):
        with pytest.raises(ValueError, match="counts"):
            entropy_of_counts(torch.tensor(counts))


# Outputs.


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_output_entropy_is_numpys_over_valid_positions(chunk):
    logits, mask = draws(0, 3, 5, 7), torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [0, 1, 1, 1, 0]], dtype=torch.bool)
    z = logits.numpy()
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    rows = np.where(mask.numpy(), -(p * np.log(p)).sum(-1), 0)
    made = output_entropy(entropy_sums(logits[:1], mask[:1]).merge(entropy_sums(logits[1:], mask[1:], chunk=chunk)))
    assert float(made.entropy) == pytest.approx(rows.sum() / 11, rel=1e-12)
    a, n = rows.sum(1), mask.sum(1).numpy()
    stderr = math.sqrt(3 / 2 * ((a - made.entropy.item() * n) ** 2).sum()) / 11
    assert float(made.stderr) == pytest.approx(stderr, rel=1e-9)
    assert (made.num, made.num_groups) == (11, 3)


def test_padding_and_its_logits_change_nothing():
    logits, mask = draws(1, 2, 4, 5), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    other = torch.where(mask[..., None], logits, math.nan)
    assert output_entropy(entropy_sums(logits, mask)) == output_entropy(entropy_sums(other, mask))


def test_clamped_logarithm_of_bfloat16_cuts_the_tail_and_log_space_does_not():
    """mistakes.md B 25: -log max(p, 1e-4) in half precision caps what a rare class counts by at 9.2 nats."""
    logits = torch.zeros(1, 1, 50_001)
    logits[..., 0] = 14.0
    made = float(output_entropy(entropy_sums(logits, torch.ones(1, 1, dtype=torch.bool))).entropy)
    p = torch.softmax(logits.double(), -1)
    truth = float(-(p * p.log()).sum())
    assert made == pytest.approx(truth, rel=1e-5)
    documented = float(-(p * p.clamp_min(1e-4).log()).sum())
    assert documented < 0.8 * truth


def test_impossible_classes_add_nothing_and_logits_that_are_nan_are_named():
    logits = torch.tensor([[[0.0, 0.0, -math.inf], [1.0, -math.inf, -math.inf]]])
    made = output_entropy(entropy_sums(logits, torch.ones(1, 2, dtype=torch.bool)))
    assert float(made.entropy) == pytest.approx(math.log(2) / 2, rel=1e-6)
    bad = output_entropy(entropy_sums(torch.full((2, 1, 3), math.nan), torch.ones(2, 1, dtype=torch.bool)))
    assert math.isnan(bad.entropy)
    assert "not finite" in bad.notes[0]
    none = output_entropy(entropy_sums(logits, torch.zeros(1, 2, dtype=torch.bool)))
    assert math.isnan(none.entropy)
    assert "no position" in none.notes[0]


def test_sums_merge():
    logits, mask = draws(2, 4, 3, 5), torch.ones(4, 3, dtype=torch.bool)
    merged = entropy_sums(logits[:1], mask[:1]).merge(entropy_sums(logits[1:], mask[1:]))
    for one, other in zip(merged, entropy_sums(logits, mask), strict=True):
        assert_close(one, other)


# Spectra.


@pytest.mark.parametrize(("num", "dims"), [(40, 6), (6, 40), (12, 12)])
@pytest.mark.parametrize("order", [0.5, 1.0, 2.0])
def test_spectral_entropy_is_numpys_of_the_covariance_with_few_rows_and_many(num, dims, order):
    x = draws(0, num, dims) * torch.linspace(0.2, 3, dims) + 5
    values = np.linalg.eigvalsh(np.cov(x.numpy().T))
    p = values[values > 1e-12] / values.sum()
    truth = -(p * np.log(p)).sum() if order == 1 else np.log((p**order).sum()) / (1 - order)
    assert float(spectral_entropy(x, order=order).entropy) == pytest.approx(truth, rel=1e-9)
    assert float(covariance_entropy(x.T.cov(), order=order).entropy) == pytest.approx(truth, rel=1e-9)


def test_spectral_rank_is_that_of_the_centred_matrix():
    x = draws(1, 30, 5)
    assert float(spectral_entropy(x).spectral_rank) == pytest.approx(matrix_ranks(x - x.mean(0)).spectral_rank)


def test_orders_near_one_meet_von_neumanns_and_fall_with_the_order():
    x = draws(2, 50, 4) * torch.tensor([4.0, 2.0, 1.0, 0.5])
    at = [spectral_entropy(x, order=order) for order in (0.5, 1 - 1e-5, 1.0, 1 + 1e-5, 2.0)]
    values = [float(each.entropy) for each in at]
    assert values == sorted(values, reverse=True)
    assert values[1] == pytest.approx(values[2], abs=1e-4)
    assert float(at[3].stderr) == pytest.approx(float(at[2].stderr), rel=1e-4)


@given(st.integers(0, 50), st.floats(0.1, 10))
def test_rotations_shifts_and_scale_change_nothing(seed, scale):
    x = draws(seed, 20, 4)
    turn = torch.linalg.qr(draws(seed + 1000, 4, 4))[0]
    one, other = spectral_entropy(x), spectral_entropy(scale * x @ turn + 3)
    assert_close(one.entropy, other.entropy)
    assert_close(one.stderr, other.stderr)


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_error_over_sequences_is_the_jackknifes_to_first_order(order):
    groups = torch.arange(200) // 5
    x = draws(3, 200, 3) * torch.tensor([3.0, 2.0, 1.0]) + 3 * draws(4, 40, 3)[groups]
    made = spectral_entropy(x, groups=groups, order=order)
    without = torch.stack([spectral_entropy(x[groups != g], order=order).entropy for g in range(40)])
    assert float(made.stderr) == pytest.approx(float(fs.core.standard_errors.jackknife_stderr(without)), rel=0.1)
    assert float(made.stderr) > 1.3 * float(spectral_entropy(x, order=order).stderr)  # rows are not independent


def test_error_of_the_spectral_entropy_covers():
    scale = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    truth = float(covariance_entropy(torch.diag(scale.square())).entropy)
    made = [spectral_entropy(draws(i, 400, 3) * scale) for i in range(200)]
    assert 0.90 < np.mean([abs(float(m.entropy) - truth) <= 1.96 * float(m.stderr) for m in made]) < 0.99


def test_moments_of_a_corpus_give_the_same_entropy_without_an_error():
    x = draws(7, 60, 4) * torch.tensor([4.0, 2.0, 1.0, 0.5])
    mean = x.mean(0)
    moments = Moments(60, 6, mean, (x - mean).T @ (x - mean), torch.zeros(3, 4), mean)
    made = covariance_entropy(moments)
    assert_close(made.entropy, spectral_entropy(x).entropy)
    assert math.isnan(made.stderr)
    assert made.notes


def test_what_does_not_vary_has_no_spectrum_and_few_rows_are_named():
    made = spectral_entropy(torch.ones(5, 3))
    assert math.isnan(made.entropy)
    assert "nothing varies" in made.notes[0]
    assert math.isnan(covariance_entropy(torch.zeros(2, 2)).entropy)
    one = spectral_entropy(draws(0, 9, 3), groups=torch.zeros(9, dtype=torch.long))
    assert math.isnan(one.stderr)
    assert "one sequence" in one.notes[0]
    assert "too low" in spectral_entropy(draws(0, 5, 30)).notes[0]
    assert math.isnan(spectral_entropy(draws(0, 1, 3)).entropy)


def test_wrong_arrays_and_orders_are_refused():
    for bad in (torch.zeros(0, 3), torch.zeros(3), torch.zeros(2, 3, 4), torch.full((2, 2), math.nan)):
        with pytest.raises(ValueError, match="`x`"):
            wide_rows("x", bad)
    with pytest.raises(ValueError, match="order"):
        spectral_entropy(draws(0, 5, 2), order=0.0)
    for bad in (
        Moments(2, 2, torch.zeros(2), torch.ones(2), torch.zeros(3, 2), torch.zeros(2)),
        torch.full((2, 2), math.nan),
    ):
        with pytest.raises(ValueError, match="covariance"):
            covariance_entropy(bad)


def test_labels_that_are_seen_too_rarely_are_named_as_pairs_are():
    assert "9 labels in 9 rows" in discrete_entropy(torch.arange(9)).notes[0]
    assert "9 labels in 9 rows" in entropy_of_counts(torch.ones(9, dtype=torch.long)).notes[0]
    assert not discrete_entropy(torch.arange(45) % 9).notes
    assert not discrete_entropy(torch.zeros(2, dtype=torch.long)).notes


def test_sequences_are_named_by_whole_numbers():
    with pytest.raises(ValueError, match="`groups` must hold one whole number per row"):
        grouping.__wrapped__(torch.zeros(4), 4, torch.device("cpu"))


@pytest.mark.parametrize("order", [1 - 1e-6, 1 + 1e-10, 1 + 1e-13])
def test_orders_next_to_one_do_not_cancel(order):
    x = draws(0, 500, 3)
    near, one = spectral_entropy(x, order=order), spectral_entropy(x)
    assert float(near.entropy) == pytest.approx(float(one.entropy), rel=1e-8)
    assert float(near.stderr) == pytest.approx(float(one.stderr), rel=1e-5)


def test_both_ways_to_an_entropy_of_order_alpha_agree_where_they_meet():
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    for order in (0.91, 1.09):
        made = covariance_entropy(torch.diag(p), order=order)
        assert float(made.entropy) == pytest.approx(float(p.pow(order).sum().log() / (1 - order)), rel=1e-12)


def test_what_is_no_covariance_has_no_spectral_entropy():
    with pytest.raises(ValueError, match="must be symmetric"):
        covariance_entropy(torch.tensor([[1.0, 5.0], [0.0, 1.0]]))
    for matrix in (-torch.eye(3), torch.tensor([[1.0, 2.0], [2.0, 1.0]])):
        with pytest.raises(ValueError, match="no eigenvalue below 0, got -1"):
            covariance_entropy(matrix)
    x = draws(0, 5, 9).float()
    assert covariance_entropy(x.T @ x).spectral_rank < 5  # of rank 5, with rounding on both sides of 0


@pytest.mark.parametrize("num", [3, 7, 49, 1001])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1])
def test_a_constant_is_no_direction_however_its_mean_is_rounded(num, value):
    x = torch.full((num, 4), value, dtype=torch.float64)
    assert math.isnan(spectral_entropy(x).entropy)
    beside = torch.cat([x, draws(0, num, 2)], 1)
    assert float(spectral_entropy(beside).entropy) == pytest.approx(
        float(spectral_entropy(beside[:, 4:]).entropy), rel=1e-9
    )
