"""Accumulators against two passes over all values, and against the formulas of the documents."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import funcscope as fs
from funcscope.fisher.accumulators import Ema, Welford


def values(num, seed=0):
    return fs.normal(fs.key(seed), torch.zeros(num, 3, dtype=torch.float64))


def gathered(rows, weights):
    made = Welford.start(rows[0])
    for x, w in zip(rows, weights, strict=True):
        made = made.update(x, w)
    return made


WEIGHTS = st.lists(st.floats(0.01, 100), min_size=2, max_size=12)


@given(weights=WEIGHTS, cut=st.integers(0, 12))
def test_one_pass_in_parts_is_two_passes_over_all(weights, cut):
    """Oracle: the definitions, by sums over all values."""
    rows, w = 5 + values(len(weights)), torch.tensor(weights, dtype=torch.float64)[:, None]
    made = (
        gathered(rows[:cut], weights[:cut]).merge(gathered(rows[cut:], weights[cut:])) if 0 < cut < len(rows) else None
    )
    for each in filter(None, (made, gathered(rows, weights))):
        mean = (w * rows).sum(0) / w.sum()
        squares = (w * (rows - mean) ** 2).sum(0)
        assert_close(each.mean, mean)
        assert_close(each.scatter, squares)
        assert_close(each.variance, squares / (w.sum() - (w**2).sum() / w.sum()))
        n = len(rows)
        assert_close(each.stderr**2, n / (n - 1) * (w**2 * (rows - mean) ** 2).sum(0) / w.sum() ** 2)
        assert (each.num, each.num_effective) == (n, pytest.approx(float(w.sum() ** 2 / (w**2).sum())))


def test_equal_weights_give_the_standard_error_of_a_mean_whatever_they_are():
    """E20: the document takes the tokens, W, for the number of values."""
    rows = values(20)
    made = gathered(rows, [64.0] * 20)
    assert_close(made.stderr, rows.std(0) / 20**0.5)
    documented = (made.scatter / (made.weight - 1) / made.weight).sqrt()
    assert_close(made.stderr / documented, torch.full((3,), 8.0).double(), rtol=0.05, atol=0)


def test_a_large_mean_does_not_cancel():
    rows = 1e8 + values(50)
    assert_close(gathered(rows, [1.0] * 50).variance, rows.var(0), rtol=1e-6, atol=0)
    raw = (rows**2).mean(0) - rows.mean(0) ** 2  # negative control
    assert bool(((raw - rows.var(0)).abs() > 0.1 * rows.var(0)).any())


def test_few_values_have_no_error_and_bad_weights_are_refused():
    none = Welford.start(torch.zeros(3))
    one = none.update(torch.ones(3), 2.0)
    assert bool(one.stderr.isnan().all() and one.variance.isnan().all())
    assert math.isnan(none.num_effective)
    assert one.update(torch.full((3,), 9.0), 0.0) is one
    assert_close(none.merge(one).mean, one.mean)
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="`weight` must be a finite number of at least 0"):
            one.update(torch.ones(3), weight)


@pytest.mark.parametrize("num", [1, 2, 10])
def test_a_moving_average_is_a_weighted_mean_from_the_first_value_on(num):
    """E19: the document starts at the first value and still divides by 1 - beta^t."""
    rows, beta = values(num), 0.99
    made, documented = Ema.start(rows[0], decay=beta), rows[0]
    for t, x in enumerate(rows):
        made = made.update(x)
        documented = documented if t == 0 else beta * documented + (1 - beta) * x
    weights = beta ** torch.arange(num - 1.0, -1, -1, dtype=torch.float64)
    assert_close(made.mean, weights @ rows / weights.sum())
    assert float((documented / (1 - beta**num) / made.mean).abs().max()) > 5
    if num == 1:
        assert_close(documented / (1 - beta), 100 * made.mean)


def test_moving_averages_follow_each_other():
    rows = values(9)
    parts = [Ema.start(rows[0], decay=0.8) for _ in range(3)]
    for i, x in enumerate(rows):
        parts[i // 3] = parts[i // 3].update(x)
    whole = Ema.start(rows[0], decay=0.8)
    for x in rows:
        whole = whole.update(x)
    assert_close(parts[0].then(parts[1]).then(parts[2]).mean, whole.mean)
    assert_close(parts[0].then(parts[1].then(parts[2])).mean, whole.mean)
    assert bool(Ema.start(rows[0], decay=0.5).mean.isnan().all())
    with pytest.raises(ValueError, match="averages of one decay follow each other"):
        whole.then(Ema.start(rows[0], decay=0.5))
    with pytest.raises(ValueError, match="`decay` must lie between 0 and 1, got 1"):
        Ema.start(rows[0], decay=1.0)
