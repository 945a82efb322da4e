"""Divergences of predictions. Oracles: scipy's `rel_entr` and `jensenshannon`, sums over sequences by hand."""

import math

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from funcscope.core.keys import fold_in, key, normal
from funcscope.core.standard_errors import ratio_stderr
from funcscope.information import divergence_sums, js_divergence, kl_divergence, output_divergence
from funcscope.information.sequence_sums import SequenceSums


def logits(seed, *shape, scale=2.0):
    return scale * normal(key(seed), torch.zeros(shape, dtype=torch.float64))


def both(seed, b=5, t=7, v=11):
    return logits(seed, b, t, v), logits(seed + 1000, b, t, v)


def mask(b=5, t=7):
    return torch.arange(t) < torch.tensor([[7], [3], [5], [0], [6]])[:b]


def numbers(first, second, weight):
    """(kl, reverse, js), per sequence sums, by scipy."""
    p, q = (scipy.special.softmax(x.numpy(), -1) for x in (first, second))
    w = weight.double().numpy()
    each = (
        scipy.special.rel_entr(p, q).sum(-1),
        scipy.special.rel_entr(q, p).sum(-1),
        scipy.spatial.distance.jensenshannon(p, q, axis=-1) ** 2,
    )
    return torch.as_tensor(np.stack([(x * w).sum(1) for x in each])), torch.as_tensor(w.sum(1))


@given(st.integers(0, 10**6))
def test_divergences_are_scipys_with_errors_over_sequences(seed):
    first, second = both(seed)
    weight = mask().double() * (1 + torch.arange(7))
    found = output_divergence(divergence_sums(first, second, weight))
    sums, weights = numbers(first, second, weight)
    errors = ratio_stderr(sums, weights)
    for i, name in enumerate(("kl", "kl_reverse", "js")):
        assert getattr(found, name) == pytest.approx(float(sums[i].sum() / weights.sum()), rel=1e-10)
        assert getattr(found, f"{name}_stderr") == pytest.approx(float(errors[i]), rel=1e-6)
    assert (found.num_sequences, found.num_positions) == (4, float(weights.sum()))
    assert found.notes == []


@given(st.integers(0, 10**6), st.floats(1e-6, 30))
def test_js_is_symmetric_and_bounded_and_kl_is_not(seed, scale):
    p, q = (logits(seed + i, 4, 9, scale=scale).log_softmax(-1) for i in range(2))
    assert js_divergence(p, q).equal(js_divergence(q, p))
    assert (js_divergence(p, q) > 0).all()
    assert (js_divergence(p, q) <= math.log(2) * (1 + 1e-12)).all()
    assert js_divergence(p, p).equal(torch.zeros(4, dtype=torch.float64))
    assert kl_divergence(p, p).equal(torch.zeros(4, dtype=torch.float64))
    if scale > 0.1:
        assert not torch.allclose(kl_divergence(p, q), kl_divergence(q, p), rtol=1e-3)


def test_impossible_tokens_are_infinite_for_kl_alone_and_nothing_where_both_have_none():
    p = torch.tensor([0.5, 0.5, 0.0]).log()
    q = torch.tensor([1.0, 0.0, 0.0]).log()
    assert float(kl_divergence(p, q)) == math.inf
    assert float(kl_divergence(q, p)) == pytest.approx(math.log(2), rel=1e-6)
    assert float(js_divergence(p, q)) == pytest.approx(0.75 * math.log(4 / 3), rel=1e-6)
    found = output_divergence(divergence_sums(p.expand(2, 1, 3), q.expand(2, 1, 3), torch.ones(2, 1)))
    assert found.kl == math.inf
    assert "infinite" in found.notes[0]


def test_a_small_difference_is_not_rounding():
    """To second order, KL is half and JS an eighth of the variance of the difference of logits under p."""
    z, d = logits(0, 1, 50), 1e-6 * logits(1, 1, 50)
    p = z.softmax(-1)
    variance = float((p * d.square()).sum() - (p * d).sum() ** 2)
    one, other = z.log_softmax(-1), (z + d).log_softmax(-1)
    assert float(js_divergence(one, other)) == pytest.approx(variance / 8, rel=2e-3)
    assert float(kl_divergence(one, other)) == pytest.approx(variance / 2, rel=2e-3)


@pytest.mark.parametrize("size", [1e-8, 1e-10, 1e-12])
def test_a_difference_far_below_the_rounding_of_normalisers_has_its_size(size):
    z, d = logits(0, 5, 50), size * logits(1, 5, 50)
    d = (z + d) - z  # what is left of it in the sum
    p = z.softmax(-1)
    variance = (p * (d - (p * d).sum(-1, keepdim=True)).square()).sum(-1)
    one, other = z.log_softmax(-1), (z + d).log_softmax(-1)
    for found in (kl_divergence(one, other), kl_divergence(other, one), 4 * js_divergence(one, other)):
        assert_close(found, variance / 2, rtol=2e-3, atol=0.0)


def test_a_probability_that_underflows_is_not_0():
    p, q = (torch.tensor([0.0, least, 1.0], dtype=torch.float64).log_softmax(-1) for least in (-900.0, -math.inf))
    assert float(kl_divergence(p, q)) == math.inf
    assert float(kl_divergence(q, p)) == 0
    assert str(float(js_divergence(p, q))) == str(float(js_divergence(p, p))) == "0.0"  # not -0


@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_kl_is_scipys_and_never_negative(seed, power):
    z, w = (logits(seed + i, 4, 9, scale=10**power) for i in range(2))
    w[:, 0], w[0, 1] = -math.inf, 800.0
    found = kl_divergence(w.log_softmax(-1), z.log_softmax(-1))
    p, q = (scipy.special.softmax(x.numpy(), -1) for x in (w, z))
    wanted = torch.as_tensor(scipy.special.rel_entr(p, q).sum(-1))
    there = wanted.isfinite()  # scipy has no logarithm of a softmax that underflows
    assert bool((found >= 0).all())
    assert_close(found[there], wanted[there], rtol=1e-9, atol=1e-15)


def test_chunks_batches_and_padding_change_nothing():
    first, second = both(3)
    whole = output_divergence(divergence_sums(first, second, mask()))
    hidden = torch.where(mask()[..., None], first, torch.nan)  # padding is not looked at
    parts = [divergence_sums(hidden[i : i + 2], second[i : i + 2], mask()[i : i + 2], chunk=3) for i in (0, 2, 4)]
    merged = output_divergence(parts[2].merge(parts[0]).merge(parts[1]))
    for name in ("kl", "kl_reverse", "js", "kl_stderr", "kl_reverse_stderr", "js_stderr"):
        assert getattr(merged, name) == pytest.approx(getattr(whole, name), rel=1e-9)
    turned = output_divergence(divergence_sums(second, first, mask()))
    assert turned.kl == pytest.approx(whole.kl_reverse, rel=1e-12)
    assert turned.js == pytest.approx(whole.js, rel=1e-12)


def test_positions_of_unrelated_prompts_are_no_pair():
    """Mistake 24: unpaired, one and the same model has a divergence from itself, and what was stored as KL was JS."""
    model = logits(5, 6, 4, 11)  # predictions of one model on six prompts
    paired = output_divergence(divergence_sums(model, model.clone(), torch.ones(6, 4)))
    unpaired = output_divergence(divergence_sums(model, model.roll(1, 0), torch.ones(6, 4)))
    assert (paired.kl, paired.js, paired.js_stderr) == (0.0, 0.0, 0.0)
    assert unpaired.js > 0.1
    assert unpaired.kl > 2 * unpaired.js  # their key `kl_divergence` held the latter
    with pytest.raises(ValueError, match="unrelated positions"):
        divergence_sums(model, model[:, :3], torch.ones(6, 4))


def test_a_mean_over_batches_of_the_batch_is_no_mean_over_positions():
    """Mistake 25: `F.kl_div(..., reduction='batchmean')` divides by sequences, and padding counts."""
    first, second = both(7)
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    documented = float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))
    found = output_divergence(divergence_sums(first, second, torch.ones(5, 7)))
    assert documented == pytest.approx(7 * found.kl, rel=1e-9)
    masked = output_divergence(divergence_sums(first, second, mask()))
    sums, weights = numbers(first, second, mask())
    assert masked.kl == pytest.approx(float(sums[0].sum() / weights.sum()), rel=1e-9)
    assert masked.kl != pytest.approx(found.kl, rel=1e-2)


def test_logits_that_are_no_numbers_and_empty_masks_are_nan_and_say_so():
    first, second = both(8)
    lost = output_divergence(divergence_sums(first * torch.nan, second, torch.ones(5, 7)))
    none = output_divergence(divergence_sums(first, second, torch.zeros(5, 7)))
    for found in (lost, none):
        assert math.isnan(found.kl)
        assert math.isnan(found.js)
        assert "nan" in found.notes[0]
    single = output_divergence(divergence_sums(first[:1], second[:1], torch.ones(1, 7)))
    assert math.isnan(single.kl_stderr)
    assert "single sequence" in single.notes[0]
    with pytest.raises(ValueError, match="`weight` must have the shape"):
        divergence_sums(first, second, torch.ones(5, 6))


@given(st.integers(0, 10**6), st.integers(2, 9))
def test_errors_of_sums_are_those_of_the_sequences(seed, num):
    columns = logits(seed, 3, num)
    columns[2] = columns[2].abs() * (normal(fold_in(key(seed), 1), columns[2]) > -1)
    sums = SequenceSums.of(columns[:, :1]).merge(SequenceSums.of(columns[:, 1:]))
    mix = torch.tensor([[1.0, 0.0, 0.0], [2.0, -3.0, 0.5]], dtype=torch.float64)
    found = sums.ratios(mix, 2)
    if float(columns[2].sum()) > 0:
        assert_close(found.value, (mix @ columns).sum(1) / columns[2].sum())
    assert_close(found.stderr, ratio_stderr(mix @ columns, columns[2]), equal_nan=True, rtol=1e-6, atol=1e-9)
