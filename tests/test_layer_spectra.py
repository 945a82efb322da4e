"""Spectra of weights. Oracles: Pareto draws, scipy's Kolmogorov-Smirnov test and quadrature, plain loops over every xmin,
Gaussian matrices themselves; powerlaw and weightwatcher are in test_spectra_outsiders.py."""

import math

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcscope as fs
from funcscope.core.keys import key, normal
from funcscope.linalg.ranks import matrix_ranks
from funcscope.weights import fit_power_law, layer_spectra, log_normal_ratio
from funcscope.weights.marchenko_pastur import distance, marchenko_pastur_cdf, null_of, wishart_eigenvalues
from funcscope.weights.power_law import _half_normal_fit, _log_normaliser, bootstrap_alpha


def pareto(alpha, num, seed=0):
    return (1 - np.random.default_rng(seed).random(num)) ** (-1 / (alpha - 1))


def with_spectrum(x, rows, seed=0):
    """A matrix whose W'W has the eigenvalues x."""
    u, v = (
        np.linalg.qr(np.random.default_rng(seed + i).normal(size=(size, len(x))))[0]
        for i, size in enumerate((rows, len(x)))
    )
    return torch.tensor(u * np.sqrt(x) @ v.T)


@given(st.integers(12, 60), st.integers(0, 10_000), st.booleans())
@settings(max_examples=10)
def test_fit_is_that_of_a_loop_over_every_start_with_scipys_distance(num, seed, tied):
    x = np.random.default_rng(seed).lognormal(size=num)
    x = np.round(x, 1) + 0.1 if tied else x
    found, best = fit_power_law(x), None
    for start in np.unique(x):
        tail = x[x >= start]
        if len(tail) < 10 or tail.max() == start:
            continue
        alpha = 1 + len(tail) / np.log(tail / start).sum()
        ks = scipy.stats.kstest(tail, lambda at, start=start, alpha=alpha: 1 - (at / start) ** (1 - alpha))
        d = ks.statistic
        if tied:  # scipy's statistic takes ties apart; between jumps the two agree
            law = 1 - (np.unique(tail) / start) ** (1 - alpha)
            upto = np.searchsorted(np.sort(tail), np.unique(tail), "right") / len(tail)
            before = np.searchsorted(np.sort(tail), np.unique(tail), "left") / len(tail)
            d = max((upto - law).max(), (law - before).max())
        if best is None or d < best[0]:
            best = d, alpha, start, len(tail)
    assert best is not None
    assert found.ks == pytest.approx(best[0], abs=1e-9)
    assert found.alpha == pytest.approx(best[1], rel=1e-6)
    assert found.xmin == pytest.approx(best[2], rel=1e-9)
    assert found.num_tail == best[3]
    assert found.stderr == pytest.approx((found.alpha - 1) / best[3] ** 0.5)


def test_exponent_of_a_pareto_law_is_found_within_its_error_and_does_not_depend_on_the_unit():
    for alpha in (2.0, 3.5):
        x = pareto(alpha, 800)
        found = fit_power_law(x)
        assert abs(found.alpha - alpha) < 4 * found.stderr
        scaled = fit_power_law(7.5 * x)
        assert scaled.alpha == pytest.approx(found.alpha, rel=1e-9)
        assert scaled.xmin == pytest.approx(7.5 * found.xmin, rel=1e-9)


def test_the_tail_begins_where_the_power_law_does():
    x = np.concatenate([np.random.default_rng(0).uniform(0.2, 1, 400), pareto(3.0, 400)])
    found = fit_power_law(x)
    assert 0.9 < found.xmin < 1.8
    assert abs(found.alpha - 3.0) < 4 * found.stderr
    whole = 1 + len(x) / np.log(x / x.min()).sum()
    assert abs(whole - 3.0) > 4 * found.stderr  # without the choice of xmin


def test_likelihood_ratio_is_that_of_densities_by_quadrature():
    x = np.random.default_rng(1).lognormal(sigma=0.7, size=300)
    fit = fit_power_law(x, least=200)
    found = log_normal_ratio(x, fit)
    tail = np.sort(x)[-fit.num_tail :]

    def terms(mu, sigma):
        """Log-densities of the log-normal that begins at xmin, by scipy."""
        law = scipy.stats.lognorm(sigma, scale=math.exp(mu))
        return law.logpdf(tail) - law.logsf(fit.xmin * (1 - 1e-12))

    made = scipy.optimize.minimize(lambda at: -terms(at[0], math.exp(at[1])).sum(), [0.0, 0.0], method="Nelder-Mead")
    power = math.log(fit.alpha - 1) - math.log(fit.xmin) - fit.alpha * np.log(tail / fit.xmin)
    each = power - terms(made.x[0], math.exp(made.x[1]))
    assert found.log_ratio == pytest.approx(each.sum(), rel=1e-3)
    assert found.z == pytest.approx(each.sum() / (each.std() * len(tail) ** 0.5), rel=1e-2)
    assert found.p_value == pytest.approx(2 * scipy.stats.norm.sf(abs(found.z)), rel=1e-6)
    assert found.z < -2  # and it is a log-normal


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.5), (-3.0, 2.0), (40.0, 1e-6), (0.0, 1.0)])
def test_normaliser_is_the_integral(a, b):
    wanted = scipy.integrate.quad(lambda y: math.exp(-a * y - b * y * y), 0, np.inf)[0]
    assert _log_normaliser(a, b) == pytest.approx(math.log(wanted), rel=1e-7, abs=1e-7)


def test_a_power_law_is_not_rejected_for_the_log_normal_that_contains_it():
    ratios = [log_normal_ratio(x, fit_power_law(x, least=400)) for x in (pareto(3.0, 400, seed) for seed in range(10))]
    assert all(each.log_ratio <= 0 for each in ratios)
    assert sum(each.p_value < 0.05 for each in ratios) <= 2


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_law_of_marchenko_and_pastur_is_the_integral_of_its_density(ratio):
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2

    def density(x):
        return math.sqrt(max((high - x) * (x - low), 0)) / (2 * math.pi * ratio * x)

    at = np.linspace(low, high, 7)[1:-1]
    wanted = [scipy.integrate.quad(density, low, x, limit=200)[0] for x in at]
    np.testing.assert_allclose(marchenko_pastur_cdf(at, ratio), wanted, atol=2e-4)
    assert marchenko_pastur_cdf(np.array([low - 0.01, high + 0.01]), ratio).tolist() == [0.0, 1.0]


def test_eigenvalues_of_the_bidiagonal_model_are_those_of_gaussian_matrices():
    rows, columns, num = 12, 5, 300
    model = np.stack([np.sort(wishart_eigenvalues(rows, columns, key=fs.fold_in(key(0), i))) for i in range(num)])
    draws = np.random.default_rng(0).normal(size=(num, rows, columns))
    plain = np.linalg.eigvalsh(draws.transpose(0, 2, 1) @ draws)
    for i in range(columns):
        assert scipy.stats.ks_2samp(model[:, i], plain[:, i]).pvalue > 1e-3
    assert scipy.stats.ks_2samp(model[:, 0], wishart_eigenvalues(rows + 4, columns, key=key(0))).pvalue < 1
    assert model.sum(1).mean() == pytest.approx(rows * columns, rel=0.03)


def test_gaussian_matrices_have_no_exponent_and_trained_ones_do():
    like = torch.zeros(90, 60, dtype=torch.float64)
    heavy = with_spectrum(pareto(2.5, 60), 90)
    params = {"random": normal(key(0), like), "scaled": 30 * normal(key(1), like.T), "heavy": heavy, "bias": like[0]}
    found = layer_spectra(params, key=key(2), num_bootstrap=40)
    assert found.matrices == ["random", "scaled", "heavy"]
    assert found.alpha.isnan().tolist() == [True, True, False]
    assert found.log_normal_p.isnan().tolist() == [True, True, False]
    fit = fit_power_law(np.linalg.svd(heavy.numpy(), compute_uv=False) ** 2)
    assert float(found.alpha[2]) == pytest.approx(fit.alpha, rel=1e-6)
    assert float(found.alpha_low[2]) < fit.alpha < float(found.alpha_high[2])
    assert float(found.random_p[2]) == 0.01
    assert "random, scaled." in found.notes[0]
    assert "means nothing" in found.notes[0]
    ranks = matrix_ranks(heavy)
    assert float(found.effective_rank[2]) == pytest.approx(ranks.effective_rank, rel=1e-9)
    assert float(found.stable_rank[2]) == pytest.approx(float(heavy.norm() / torch.linalg.matrix_norm(heavy, 2)) ** 2)
    assert float(found.spectral_norm[1]) == pytest.approx(float(torch.linalg.matrix_norm(params["scaled"], 2)))


def test_p_values_of_random_matrices_are_uniform():
    nulls = null_of(30, 20, key=key(0), num=99).distances
    p = [
        (1 + (nulls >= distance(np.linalg.svd(w, compute_uv=False) ** 2, 20 / 30)).sum()) / 100
        for w in np.random.default_rng(0).normal(size=(200, 30, 20))
    ]
    assert scipy.stats.kstest(p, "uniform").pvalue > 1e-3
    assert np.mean(np.array(p) <= 0.05) < 0.12


def test_a_spike_above_the_bulk_is_counted():
    w = normal(key(0), torch.zeros(80, 40, dtype=torch.float64))
    u, v = normal(key(1), w[:, 0]), normal(key(2), w[0])
    spiked = w + 4 * torch.outer(u / u.norm(), v / v.norm()) * 80**0.5
    found = layer_spectra({"w": w, "spiked": spiked}, key=key(3), num_bootstrap=5)
    assert found.num_spikes.tolist() == [0, 1]


def test_kernels_are_reshaped_and_orientation_makes_no_difference():
    kernel = normal(key(0), torch.zeros(24, 4, 3, 3, dtype=torch.float64)).exp()
    params = {"conv": kernel, "flat": kernel.reshape(24, 36), "turned": kernel.reshape(24, 36).T}
    found = layer_spectra(params, key=key(1), num_bootstrap=5)
    for name in ("random_distance", "stable_rank", "ks", "spectral_norm", "num_tail"):
        values = getattr(found, name)
        torch.testing.assert_close(values, values[:1].expand(3), equal_nan=True)


def test_xmax_cuts_the_tail_only_and_eigenvalues_of_rounding_are_no_eigenvalues():
    x = pareto(2.5, 60)
    w = with_spectrum(x, 90)
    cut = float(np.sort(x)[-4])
    whole, less = (layer_spectra({"w": w}, key=key(0), num_bootstrap=5, xmax=at) for at in (None, cut * (1 + 1e-9)))
    assert (float(whole.num_cut), float(less.num_cut)) == (0, 3)
    assert float(less.alpha) == pytest.approx(fit_power_law(np.sort(x)[:-3]).alpha, rel=1e-6)
    assert float(less.spectral_norm) == float(whole.spectral_norm)
    low = with_spectrum(np.concatenate([x[:30], np.zeros(30)]), 90)
    assert float(layer_spectra({"w": low}, key=key(0), num_bootstrap=5).num_eigenvalues) == 30


def test_small_matrices_and_zeros_have_no_exponent():
    found = layer_spectra({"zero": torch.zeros(9, 9), "small": torch.diag(torch.arange(1.0, 6.0) ** 4)}, key=key(0))
    assert bool(found.alpha.isnan().all())
    assert math.isnan(float(found.stable_rank[0]))
    assert float(found.num_eigenvalues[0]) == 0
    assert any("too few" in text for text in found.notes)


@pytest.mark.slow
def test_bootstrap_intervals_cover_the_exponent():
    held = 0
    for seed in range(100):
        x = pareto(3.0, 300, seed)
        low, high = bootstrap_alpha(x, key=key(seed), num=100)
        held += low < 3.0 < high
    assert 88 <= held <= 99, held


def test_doors():
    with pytest.raises(ValueError, match="no weight matrix"):
        layer_spectra({"b": torch.ones(3)}, key=key(0))
    with pytest.raises(ValueError, match="`w` is not finite"):
        layer_spectra({"w": torch.full((3, 3), math.nan)}, key=key(0))
    with pytest.raises(ValueError, match="`num_null`"):
        layer_spectra({"w": torch.ones(3, 3)}, key=key(0), num_null=5)
    with pytest.raises(ValueError, match="positive, finite"):
        fit_power_law(np.array([1.0, 0.0]))


@pytest.mark.parametrize("seed", range(3))
def test_the_fitted_log_normal_has_the_moments_of_the_data(seed):
    """What a maximum of the likelihood of an exponential family is; z is only as right as the moments are."""
    y = np.random.default_rng(seed).lognormal(sigma=0.5, size=300)
    y = np.log(y / y.min())
    y = y / y.mean()
    a, b = _half_normal_fit(y)
    for power in (1, 2):
        moment = scipy.integrate.quad(
            lambda at, k=power: at**k * math.exp(-a * at - b * at**2 - _log_normaliser(a, b)), 0, 20
        )
        assert moment[0] == pytest.approx((y**power).mean(), rel=1e-6)
