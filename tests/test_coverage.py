"""Coverage of 95 % intervals of exact curvatures and of flatness, over directions and sequences drawn anew each time."""

import math

import numpy as np
import pytest
import torch
from problems import dense_hessian, seeded
from scipy import stats
from torch import nn

import funcscope as fs
from funcscope.core.estimate import Estimate, interval
from funcscope.core.standard_errors import means

SIZE, TEXTS, NUM, TIMES = 4000, 40, 24, 120
LEAST, MOST = (stats.binom.ppf(q, TIMES, 0.95) for q in (1e-3, 1 - 1e-3))


@pytest.fixture(scope="module")
def population():
    x = fs.normal(fs.key(1), torch.zeros(SIZE, 5).double())
    labels = (x[:, 0] + 0.5 * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()
    net = fs.functional(seeded(0, lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))).double())
    return net, x, labels


def repeated(population, measure, truth):
    """How often the interval holds the truth; the same with the error over directions alone; half widths over errors."""
    net, x, labels = population
    hits, alone, half, off = ({name: [] for name in truth} for _ in range(4))
    for seed in range(TIMES):
        texts = torch.from_numpy(np.random.default_rng(seed).integers(0, SIZE, TEXTS))
        estimates = measure(fs.objective(net, [(x[texts], labels[texts])], fs.classification), fs.key(seed))
        for name, true in truth.items():
            found = estimates[name]
            low, high = interval(found)
            hits[name].append(low <= true <= high)
            low, high = interval(Estimate(found.value, found.stderr, found.num))
            alone[name].append(low <= true <= high)
            half[name].append(float(found.stderr_total))
            off[name].append(float(found.value) - true)
    ratios = {name: float(np.mean(np.square(half[name])) / np.mean(np.square(off[name]))) ** 0.5 for name in truth}
    return {name: sum(each) for name, each in hits.items()}, {name: sum(each) for name, each in alone.items()}, ratios


@pytest.mark.slow
def test_intervals_of_exact_curvatures_cover(population):
    """Truth: forms of the dense Hessian of the population along 20,000 directions."""
    net, x, labels = population
    hessian = dense_hessian(fs.objective(net, [(x, labels)], fs.classification), net.theta)
    rows = fs.stack(fs.directions(net, key=fs.key(10**6), num=20000))
    forms = ((rows @ hessian) * rows).sum(1)
    truth = {"curvature_mean": forms.mean(), "curvature_std": forms.std()}
    truth |= {f"curvature_p{p}": forms.quantile(p / 100) for p in (10, 50, 90)}

    def measure(loss, key):
        make = {"n_samples": NUM, "compute_curvature": True, "curvature": "exact"}
        return fs.directional_losses(loss, net.theta, key=key, **make).estimates

    hits, alone, ratios = repeated(population, measure, {name: float(value) for name, value in truth.items()})
    assert min(hits.values()) >= LEAST, hits
    assert hits["curvature_mean"] <= MOST, hits
    assert max(ratios.values()) < 1.5, ratios
    assert alone["curvature_std"] < LEAST, alone  # negative control: over directions alone


@pytest.mark.slow
def test_intervals_of_flatness_cover(population):
    """Truth: the population along 3,000 directions."""
    net, x, labels = population
    make = {"epsilon": 0.5, "normalize": "global"}
    whole = fs.objective(net, [(x, labels)], fs.classification)
    names = ("mean_delta_loss", "median_delta_loss", "std_delta_loss", "p90_delta_loss", "p10_delta_loss", "pair_mean")
    large = fs.flatness(whole, net.theta, key=fs.key(10**6), n_directions=3000, chunk=50, **make).estimates
    truth = {name: float(large[name].value) for name in (*names, "second_order")}

    def measure(loss, key):
        return fs.flatness(loss, net.theta, key=key, n_directions=NUM, **make).estimates

    hits, alone, ratios = repeated(population, measure, truth)
    assert min(hits.values()) >= LEAST, hits
    assert max(hits[name] for name in ("pair_mean", "mean_delta_loss")) <= MOST, hits
    assert max(ratios.values()) < 1.5, ratios
    assert alone["std_delta_loss"] < LEAST, alone  # negative control: over directions alone


@pytest.mark.slow
@pytest.mark.parametrize(("num", "least", "most"), [(6, 0.75, 0.9), (30, 0.85, 0.93), (300, 0.92, 0.965)])
def test_a_mean_of_few_skewed_sequences_covers_as_little_as_the_note_says(num, least, most):
    """Lognormal losses, whose mean is exp(1/2): what Student's t interval makes of them whoever computes it."""
    draws = fs.normal(fs.key(3), torch.zeros(2000, num).double()).exp()
    value, stderr = means(draws, torch.ones(num).double())
    reach = stats.t.ppf(0.975, num - 1) * stderr
    covered = float(((value - math.exp(0.5)).abs() <= reach).double().mean())
    assert least < covered < most
