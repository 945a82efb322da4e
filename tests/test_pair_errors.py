"""Errors of means over pairs: over all samples of small populations, where the variance is known, and against loops."""

from itertools import product

import pytest
import torch
from problems import seeded
from torch.testing import assert_close

from funcscope.curvature.pair_errors import crossed_stderr, pair_stderr


def normals(seed, *shape):
    return seeded(seed, lambda: torch.randn(*shape, dtype=torch.float64))


def off_mean(x):
    """Over pairs of different samples."""
    return (x.sum((-2, -1)) - x.diagonal(dim1=-2, dim2=-1).sum(-1)) / (x.shape[-1] * (x.shape[-1] - 1))


def anova(h):
    """The oracle: least squares of an effect for each sample, pair by pair. V_J from samples left out in turn, and V_2."""
    n, whole = len(h), float(off_mean(h))
    pairs = [(i, j) for i in range(n) for j in range(i)]
    design = torch.zeros(len(pairs), n, dtype=torch.float64)
    for row, (i, j) in enumerate(pairs):
        design[row, [i, j]] = 1
    values = torch.stack([h[i, j] for i, j in pairs])
    fitted = design @ torch.linalg.lstsq(design, values[:, None]).solution
    zeta = float((values - fitted[:, 0]).square().sum()) / (n * (n - 3) / 2)
    keep = [[j for j in range(n) if j != i] for i in range(n)]
    rest = torch.tensor([float(off_mean(h[at][:, at])) for at in keep])
    jackknife = float((n - 1) / n * (rest - rest.mean()).square().sum())
    assert rest.mean().item() == pytest.approx(whole)
    return jackknife, 2 * zeta / (n * (n - 1))


@pytest.mark.parametrize("n", [4, 5, 9])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_errors_of_pairs_are_those_of_an_analysis_of_variance_by_loops(n, mean):
    h = torch.stack([x @ x.T for x in mean + normals(n, 6, n, 3)])
    for one, error in zip(h, pair_stderr(h), strict=True):
        jackknife, of_pairs = anova(one)
        assert float(error) ** 2 == pytest.approx(max(jackknife - n / (n - 2) * of_pairs, of_pairs / 2), rel=1e-5)
    assert_close(pair_stderr(h + torch.eye(n)), pair_stderr(h))  # diagonals do not enter
    assert_close(pair_stderr(h, torch.full((n, n), 3.0)), pair_stderr(h) / 3)


def test_the_error_of_crossed_pairs_is_that_of_a_two_way_analysis_of_variance_by_loops():
    h = 0.5 + normals(0, 5, 4)
    n, m = h.shape
    rows, columns, all_ = h.mean(1), h.mean(0), h.mean()
    residual = sum(float(h[i, j] - rows[i] - columns[j] + all_) ** 2 for i, j in product(range(n), range(m)))
    of_pairs = residual / ((n - 1) * (m - 1)) / (n * m)
    jackknife = float(rows.var() / n + columns.var() / m)
    assert float(crossed_stderr(h)) ** 2 == pytest.approx(max(jackknife - of_pairs, of_pairs / 2))
    assert crossed_stderr(h[:1]).isnan()
    assert pair_stderr(h[:2, :2]).isnan()


@pytest.mark.slow
@pytest.mark.parametrize("num", [5, 10, 20])
@pytest.mark.parametrize("tails", ["normal", "t5"])
def test_errors_of_traces_of_covariances_are_what_repetitions_have(num, tails):
    x = normals(num, 6000, num, 20)
    if tails == "t5":
        x = x / (normals(99, 5, 6000, num, 20).square().mean(0)).sqrt()
    gram = x @ x.mT
    own = gram.diagonal(dim1=1, dim2=2)
    halves = (own[:, :, None] + own[:, None] - 2 * gram) / 2
    ratio = float(pair_stderr(halves).square().mean().sqrt() / off_mean(halves).std())
    assert 0.9 < ratio < 1.1
