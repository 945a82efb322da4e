"""Tails and spectra by powerlaw and weightwatcher (bench/install_peers.sh), on the same numbers and the same matrices.

Both look at the tail's distribution function below each of its steps only, so that another start can be the best one.
`search` is the plain loop over every start with either statistic: theirs is its one side, ours its two, which is scipy's.
"""

import contextlib
import io

import numpy as np
import pytest
import scipy
import torch
from problems import seeded
from torch import nn

import funcscope as fs
from funcscope.weights import fit_power_law, layer_spectra, log_normal_ratio
from funcscope.weights.marchenko_pastur import marchenko_pastur_cdf

pytestmark = [pytest.mark.outsider, pytest.mark.filterwarnings("ignore")]
SEEDS = range(6)


def pareto(seed):
    return (1 - np.random.default_rng(seed).random(300)) ** (-1 / 1.4)


def heavy(seed, rows=120, columns=80):
    """Entries without a fourth moment: the eigenvalues have a tail."""
    return np.random.default_rng(seed).standard_t(2.3, (rows, columns))


def eigenvalues(seed):
    return np.linalg.svd(heavy(seed), compute_uv=False) ** 2


def search(x, sides, least=3):
    """alpha, xmin and distance from the start that is nearest to its fit."""
    x, found = np.sort(x), []
    for i in range(len(x) - least + 1):
        tail, num = x[i:], len(x) - i
        alpha = 1 + num / np.log(tail / tail[0]).sum()
        law = 1 - (tail / tail[0]) ** (1 - alpha)
        both = [np.abs(law - np.arange(num) / num).max(), (np.arange(1, num + 1) / num - law).max()]
        found.append((max(both[:sides]), alpha, tail[0]))
        if sides == 2:
            scipys = scipy.stats.kstest(tail, lambda at, t=tail, a=alpha: 1 - (at / t[0]) ** (1 - a)).statistic
            assert found[-1][0] == pytest.approx(scipys, abs=1e-12)
    distance, alpha, xmin = min(found)
    return alpha, xmin, distance


def powerlaws(x):
    powerlaw = pytest.importorskip("powerlaw")
    fit = powerlaw.Fit(x, parameter_ranges={"alpha": [1.0, 100.0]}, verbose=False)  # by default it ends at 3
    return fit.power_law.alpha, fit.xmin, fit.power_law.D


def weightwatchers(x):
    watched = pytest.importorskip("weightwatcher.WW_powerlaw").WWFit(x)
    return watched.alpha, watched.xmin, watched.D


@pytest.mark.parametrize("theirs", [powerlaws, weightwatchers])
@pytest.mark.parametrize("numbers", [pareto, eigenvalues])
def test_their_fit_is_the_search_with_one_side_and_ours_that_with_two(theirs, numbers):
    others = 0
    for seed in SEEDS:
        x = numbers(seed)
        one, two = search(x, 1), search(x, 2)
        ours = fit_power_law(x, least=3)
        assert theirs(x) == pytest.approx(one, rel=1e-5)
        assert (ours.alpha, ours.xmin, ours.ks) == pytest.approx(two, rel=1e-9)
        others += one[1] != two[1]
        if one[1] == two[1]:
            assert theirs(x)[:2] == pytest.approx((ours.alpha, ours.xmin), rel=1e-5)
    assert 0 < others < len(SEEDS)  # where the sides choose the same start, everything but the distance is the same


def test_powerlaw_has_the_same_exponent_and_error_from_the_same_start():
    powerlaw = pytest.importorskip("powerlaw")
    for x in [*map(pareto, SEEDS), *map(eigenvalues, SEEDS)]:
        ours = fit_power_law(x)
        theirs = powerlaw.Fit(
            x, xmin=ours.xmin * (1 - 1e-12), parameter_ranges={"alpha": [1.0, 100.0]}, verbose=False
        ).power_law
        assert theirs.alpha == pytest.approx(ours.alpha, rel=1e-5)
        assert theirs.sigma == pytest.approx(ours.stderr, rel=1e-4)
        assert -1e-9 < ours.ks - theirs.D < 1.01 / ours.num_tail  # one side of the steps only


@pytest.mark.parametrize("seed", range(4))
def test_powerlaw_has_the_same_likelihood_ratio_over_a_log_normal(seed):
    """Its search for the log-normal stops earlier, which z shows to first order."""
    powerlaw = pytest.importorskip("powerlaw")
    x = np.random.default_rng(seed).lognormal(sigma=[0.5, 0.5, 0.3, 1.0][seed], size=300)
    fit = fit_power_law(x, least=100)
    theirs = powerlaw.Fit(x, xmin=fit.xmin * (1 - 1e-12), parameter_ranges={"alpha": [1.0, 100.0]}, verbose=False)
    ours = log_normal_ratio(x, fit)
    ratio, p = theirs.distribution_compare("power_law", "lognormal")
    z, _ = theirs.distribution_compare("power_law", "lognormal", normalized_ratio=True)
    assert ratio == pytest.approx(ours.log_ratio, rel=1e-6)
    assert z == pytest.approx(ours.z, rel=1e-3)
    assert p == pytest.approx(ours.p_value, rel=1e-3 * (1 + ours.z**2))
    assert ours.log_ratio < ratio + 1e-9  # our log-normal is at least as likely


def watch():
    """weightwatcher's table of two matrices, and ours."""
    ww = pytest.importorskip("weightwatcher")
    model = seeded(0, lambda: nn.Sequential(nn.Linear(120, 80, bias=False), nn.Linear(80, 60, bias=False)).double())
    with torch.no_grad():
        for seed, layer in enumerate(model):
            layer.weight.copy_(torch.tensor(heavy(seed, *layer.weight.shape)))
    with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
        table = ww.WeightWatcher(model=model).analyze()
    params = {name: value.detach() for name, value in model.named_parameters()}
    return table, layer_spectra(params, key=fs.key(0), least=3, num_bootstrap=2, num_null=99), params


def test_weightwatcher_has_the_same_norms_and_ranks_of_the_same_matrices():
    """Its spectral norm is the largest eigenvalue, its entropy that of the eigenvalues over log rank."""
    table, ours, _ = watch()
    same = {
        "sv_max": ours.spectral_norm,
        "spectral_norm": ours.spectral_norm**2,
        "log_spectral_norm": (ours.spectral_norm**2).log10(),
        "stable_rank": ours.stable_rank,
        "matrix_rank": ours.num_eigenvalues,
        "entropy": ours.spectral_rank.log() / ours.num_eigenvalues.log(),
    }
    for name, values in same.items():
        np.testing.assert_allclose(table[name].to_numpy(dtype=float), values.numpy(), rtol=1e-5, err_msg=name)


def test_weightwatchers_tails_of_a_models_matrices_are_the_one_sided_search():
    table, ours, params = watch()
    for at, value in enumerate(params.values()):
        x = np.linalg.svd(value.numpy(), compute_uv=False) ** 2
        row = table.iloc[at]
        theirs = row["alpha"], row["xmin"], row["D"]
        assert theirs == pytest.approx(search(x, 1), rel=1e-5)
        mine = [float(column[at]) for column in (ours.alpha, ours.xmin, ours.ks)]
        assert mine == pytest.approx(search(x, 2), rel=1e-9)
        assert row["sigma"] == pytest.approx((row["alpha"] - 1) / row["num_pl_spikes"] ** 0.5, rel=1e-6)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_weightwatchers_density_of_marchenko_and_pastur_integrates_to_our_distribution_function(ratio):
    theirs = pytest.importorskip("weightwatcher.RMT_Util").marchenko_pastur_fun
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    for share in (0.1, 0.4, 0.8):
        x = low + share * (high - low)
        area = scipy.integrate.quad(lambda at: float(theirs(np.array([at]), 1 / ratio)[1][0]), low, x)[0]
        assert marchenko_pastur_cdf(np.array([x]), ratio)[0] == pytest.approx(area, abs=2e-6)
