"""Statistics over directions, and that their error bars cover."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.testing import assert_close

import funcscope as fs
from funcscope.core import statistics
from funcscope.core.standard_errors import jackknife_stderr

PAIRS = st.integers(3, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, 10**6)))


def sample(n, seed, heavy=False):
    x = fs.normal(fs.key(seed), torch.zeros(n, dtype=torch.float64))
    return x**3 if heavy else x


def leave_one_out(statistic, *columns):
    """Oracle: the statistic recomputed without each sample."""
    num = len(columns[0])
    keep = [torch.arange(num) != i for i in range(num)]
    return jackknife_stderr(torch.stack([statistic(*(column[k] for column in columns)) for k in keep]))


@given(PAIRS)
def test_jackknife_errors_are_those_of_leaving_out_one_sample(pair):
    n, seed = pair
    x, y = sample(n, seed, heavy=True) + 5, sample(n, seed + 1)
    assert_close(statistics.spread(x).stderr, leave_one_out(torch.std, x))
    assert_close(statistics.variation(x).stderr, leave_one_out(lambda v: v.std() / v.mean().abs(), x))
    assert_close(statistics.mean(x).stderr, leave_one_out(torch.mean, x))
    if n > 3:
        r = statistics.correlation(x, y)
        assert_close(float(r.value), float(stats.pearsonr(x, y).statistic))
        assert_close(r.stderr, leave_one_out(lambda u, v: torch.corrcoef(torch.stack([u, v]))[0, 1], x, y))


def test_too_few_samples_are_undefined_and_not_zero():
    one = torch.tensor([2.0], dtype=torch.float64)
    empty = one[:0]
    for estimate in (statistics.spread(one), statistics.variation(one), statistics.correlation(one, one)):
        assert estimate.value.isnan()
        assert estimate.stderr.isnan()
    assert float(statistics.mean(one).value) == 2
    assert statistics.mean(one).stderr.isnan()
    assert statistics.mean(empty).value.isnan()
    assert statistics.quantile(one, 0.5).value.isnan()
    assert statistics.spread(torch.cat([one, one + 1])).stderr.isnan()
    constant = torch.ones(5, dtype=torch.float64)
    assert statistics.correlation(constant, sample(5, 0)).value.isnan()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimate", "truth"),
    [
        (statistics.mean, 0.0),
        (statistics.spread, 1.0),
        (lambda x: statistics.quantile(x, 0.5), 0.0),
        (lambda x: statistics.quantile(x, 0.9), float(stats.norm.ppf(0.9))),
        (lambda x: statistics.correlation(x, x + 2 * sample(len(x), hash(float(x[0])) % 10**6)), 1 / 5**0.5),
    ],
)
def test_two_standard_errors_cover_the_truth_as_often_as_they_should(estimate, truth):
    """400 repetitions of 50 samples: 2 standard errors should cover in 95 %; binomial scatter is 1.1 %."""
    found = [estimate(sample(50, 1000 + i)) for i in range(400)]
    z = np.array([(float(e.value) - truth) / float(e.stderr) for e in found])
    assert 0.90 <= np.mean(np.abs(z) < 2) <= 0.985


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_q_values_are_the_smallest_rates_at_which_benjamini_and_hochberg_reject(p_values):
    """Oracle: their step-up rule, level by level."""
    ordered, num = sorted(p_values), len(p_values)
    for p, q in zip(p_values, statistics.q_values([*p_values, math.nan]), strict=False):
        levels = [x * num / (i + 1) for i, x in enumerate(ordered) if x >= p]
        assert q == pytest.approx(min(1.0, *levels) if len(levels) > 1 else min(1.0, levels[0]))
    assert math.isnan(statistics.q_values([0.1, math.nan])[1])


def test_a_permutation_test_has_the_exact_p_value_and_the_bootstrap_the_error_of_a_mean():
    x = torch.tensor([3.0, 2.5, 2.0, 0.1, 0.2, 0.0], dtype=torch.float64)
    labels = torch.tensor([1, 1, 1, 0, 0, 0])
    p = statistics.permutation_p_value(lambda of: float(x[of == 1].mean()), labels, key=fs.key(0), num=1999)
    assert p == pytest.approx(1 / 20, abs=4 * (0.05 * 0.95 / 1999) ** 0.5)  # one of the 20 choices of three
    stderr = statistics.bootstrap_stderr(lambda at: x[at].mean(), len(x), key=fs.key(0), num=2000)
    assert float(stderr) == pytest.approx(float(x.std(correction=0)) / 6**0.5, rel=0.07)


def test_a_correlation_that_hangs_on_one_sample_has_no_error():
    for size in (0.1, 1.0, 3.0, 1e6):
        x = torch.tensor([0.0, 0.0, 0.0, 0.0, size], dtype=torch.float64)
        estimate = statistics.correlation(x, torch.arange(1.0, 6.0, dtype=torch.float64))
        assert estimate.stderr.isnan(), size
        assert estimate.value.isfinite()


def test_a_permutation_whose_statistic_is_nan_proves_nothing():
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    assert math.isnan(statistics.permutation_p_value(lambda _: math.nan, labels, key=fs.key(0), num=9))
    seen = iter([0.0, *[math.nan] * 9])
    assert statistics.permutation_p_value(lambda _: next(seen), labels, key=fs.key(0), num=9) == 1.0


def test_one_datum_has_no_bootstrap_error():
    x = torch.tensor([3.0])
    assert statistics.bootstrap_stderr(lambda at: x[at].mean(), 1, key=fs.key(0), num=5).isnan()


def test_two_samples_have_no_correlation_and_an_effect_size_divides_by_n_minus_1():
    """The documented ones: Pearson's of two points, which is 1 or -1 whatever they are, and a deviation over n."""
    x, y = sample(2, 1), sample(2, 2)
    assert abs(float(torch.corrcoef(torch.stack([x, y]))[0, 1])) == pytest.approx(1)
    assert statistics.correlation(x, y).value.isnan()
    d = sample(5, 3) + 1
    documented = float(d.mean() / d.std(correction=0))
    assert float(statistics.standardised_mean(d).value) == pytest.approx(documented * (4 / 5) ** 0.5)
    assert abs(float(statistics.standardised_mean(d).value) - documented) > 0.05
