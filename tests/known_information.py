"""Pairs whose mutual information is known, for the tests of its estimators."""

from __future__ import annotations

import math

import torch

import funcscope as fs

KEY = fs.key(0)


def draws(seed, *shape):
    return fs.normal(fs.key(seed), torch.zeros(shape, dtype=torch.float64))


def pair(seed, num, dims, rho):
    """Gaussian sides, each column correlated with its own of the other."""
    x = draws(seed, num, dims)
    return x, rho * x + math.sqrt(1 - rho**2) * draws(seed + 10_000, num, dims)


def information(rho, dims=1):
    return -dims / 2 * math.log1p(-(rho**2))


def labels_of(seed, num, size):
    """Independent, all equally likely."""
    return (fs.core.keys.uniform(fs.key(seed), torch.zeros(num, dtype=torch.float64)) * size).long()
