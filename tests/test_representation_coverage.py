"""Intervals of representations: 95 % of them hold the truth, or the mean over samples of that size, in 90 to 99 % of keys."""

import math

import pytest
import scipy
import torch

import funcscope as fs
from funcscope.core.keys import uniform
from funcscope.representation import (
    activation_spectra,
    gride,
    layer_similarity,
    levina_bickel,
    linear_reconstruction,
    two_nn,
)
from funcscope.representation.sequences import BLOCKS

KEYS = 200
SCALES = torch.tensor([3.0, 2.0, 1.5, 1.0, 0.7, 0.5, 0.3, 0.2], dtype=torch.float64)


def normal(key, *shape):
    return fs.normal(key, torch.zeros(*shape, dtype=torch.float64))


def torus(i, num, dim):
    angle = 2 * math.pi * uniform(fs.key(i), torch.zeros(num, dim, dtype=torch.float64))
    return torch.cat([angle.sin(), angle.cos()], 1)


def coverage(values, errors, truth, quantile):
    assert bool(errors.isfinite().all())
    return float(((values - truth).abs() <= quantile * errors).double().mean())


def pair(i):
    x = SCALES * normal(fs.key(i), 64, 8)
    return x, x @ MAP + normal(fs.fold_in(fs.key(i), "y"), 64, 5)


MAP = fs.normal(fs.key(10**9), torch.zeros(8, 5, dtype=torch.float64)) / 2


def true_cka():
    xx = SCALES.square().diag()
    yy = MAP.T @ xx @ MAP + torch.eye(5, dtype=torch.float64)
    return float((xx @ MAP).norm() ** 2 / xx.norm() / yy.norm())


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["debiased_cka", "cka", "cca", "procrustes", "neighbours"])
def test_similarities(measure):
    values, errors = [], []
    for i in range(KEYS):
        x, y = pair(i)
        found = layer_similarity({"x": x}, {"y": y}, key=fs.key(0), measure=measure, num=19)
        values.append(found.similarity[0, 0])
        errors.append(found.similarity_stderr[0, 0])
    values, errors = torch.stack(values), torch.stack(errors)
    truth = true_cka() if measure == "debiased_cka" else values.mean()
    assert 0.9 <= coverage(values, errors, truth, scipy.stats.t.ppf(0.975, BLOCKS - 1)) <= 0.99


@pytest.mark.slow
def test_ranks():
    found = [activation_spectra({"x": SCALES * normal(fs.key(i), 64, 8)}) for i in range(KEYS)]
    quantile = scipy.stats.t.ppf(0.975, BLOCKS - 1)
    square = SCALES.square()
    for name in (
        "participation_ratio",
        "spectral_rank",
        "effective_rank",
        "stable_rank",
        "debiased_participation_ratio",
    ):
        values, errors = (torch.cat([getattr(each, name + end) for each in found]) for end in ("", "_stderr"))
        truth = square.sum() ** 2 / square.square().sum() if name.startswith("debiased") else values.mean()
        assert 0.9 <= coverage(values, errors, truth, quantile) <= 0.99, name


@pytest.mark.slow
def test_dimensions():
    found = [two_nn(torus(i, 400, 2)) for i in range(KEYS)]
    for name in ("mle", "censored", "fit"):
        values, errors = (
            torch.stack([getattr(getattr(each, name), what) for each in found]) for what in ("value", "stderr")
        )
        assert 0.9 <= coverage(values, errors, 2.0, 1.96) <= 0.99, name
    for function, neighbours in ((gride, (2, 4, 8)), (levina_bickel, (3, 10))):
        scales = [function(torus(i, 1000, 2), neighbours=neighbours) for i in range(KEYS)]
        values, errors = (
            torch.stack([getattr(each, what) for each in scales]) for what in ("dimension", "dimension_stderr")
        )
        for i, k in enumerate(neighbours):
            assert 0.9 <= coverage(values[:, i], errors[:, i], 2.0, 1.96) <= 0.99, (function, k)


@pytest.mark.slow
def test_dimensions_of_tokens_in_sequences():
    """40 sequences of 10 tokens that are near each other: the mean over keys, since even density is an approximation."""
    groups = torch.arange(40).repeat_interleave(10)
    values, errors = [], []
    for i in range(KEYS):
        angle = 2 * math.pi * uniform(fs.key(i), torch.zeros(40, 1, 2, dtype=torch.float64))
        angle = (angle + 0.3 * normal(fs.fold_in(fs.key(i), 1), 40, 10, 2)).flatten(0, 1)
        found = two_nn(torch.cat([angle.sin(), angle.cos()], 1), groups)
        values.append(found.mle.value)
        errors.append(found.mle.stderr)
    values, errors = torch.stack(values), torch.stack(errors)
    assert 0.9 <= coverage(values, errors, values.mean(), 1.96) <= 0.99


@pytest.mark.slow
def test_held_out_shares():
    values, errors = [], []
    groups = torch.arange(60).repeat_interleave(3)
    for i in range(KEYS):
        x = (normal(fs.key(i), 60, 1, 6) + normal(fs.fold_in(fs.key(i), 1), 60, 3, 6)).flatten(0, 1)
        y = x[:, :4].tanh() + 0.5 * normal(fs.fold_in(fs.key(i), 2), 60, 1, 4).expand(60, 3, 4).flatten(0, 1)
        found = linear_reconstruction({"x": x, "y": y}, groups, key=fs.key(0), alphas=[1.0])
        values.append(found.r2[0])
        errors.append(found.r2_stderr[0])
    values, errors = torch.stack(values), torch.stack(errors)
    assert 0.9 <= coverage(values, errors, values.mean(), 1.96) <= 0.99
