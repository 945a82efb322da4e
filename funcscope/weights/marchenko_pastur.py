"""The spectrum of a matrix of independent entries: Marchenko and Pastur's law, and how far finite ones lie from it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy
import torch
from jaxtyping import Float

from ..core.keys import Key, fold_in, uniform

Eigenvalues = Float[np.ndarray, " n"]
GRID = 4096


class Null(NamedTuple):
    """Of random matrices of one shape."""

    distances: Float[np.ndarray, " r"]
    largest: Float[np.ndarray, " r"]
    """The largest eigenvalue by their mean."""


def marchenko_pastur_cdf(x: Eigenvalues, ratio: float) -> Eigenvalues:
    r"""Share of eigenvalues up to x, which have the mean 1, of a large random matrix with ratio = columns / rows, at most 1.

    With $x = 1 + c + 2 \sqrt c \cos\vartheta$ the density is $2 \sin^2 \vartheta / (\pi x)$ in $\vartheta$.

    Marchenko, Pastur (1967), doi:10.1070/SM1967v001n04ABEH001994.

    >>> marchenko_pastur_cdf(np.array([0.0, 4.0]), 1.0)
    array([0., 1.])
    """
    edges = np.linspace(0, math.pi, GRID + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    mass = 2 * np.sin(middle) ** 2 / (1 + ratio + 2 * math.sqrt(ratio) * np.cos(middle))
    above = np.concatenate([[0.0], mass.cumsum()])
    cosine = np.clip((x - 1 - ratio) / (2 * math.sqrt(ratio)), -1, 1)
    return 1 - np.interp(np.arccos(cosine), edges, above / above[-1])


def distance(eigenvalues: Eigenvalues, ratio: float) -> float:
    """Kolmogorov and Smirnov's, of eigenvalues over their mean, from the law of this ratio."""
    x = np.sort(eigenvalues) / eigenvalues.mean()
    law, num = marchenko_pastur_cdf(x, ratio), len(x)
    return float(np.maximum(np.arange(1, num + 1) / num - law, law - np.arange(num) / num).max())


def wishart_eigenvalues(rows: int, columns: int, *, key: Key) -> Eigenvalues:
    r"""Eigenvalues of G'G, G (rows, columns) with independent standard normal entries, without making G.

    G has the singular values of a bidiagonal matrix of independent $\chi_{N}, \dots, \chi_{N - n + 1}$ on the diagonal and
    $\chi_{n - 1}, \dots, \chi_1$ beside it (N rows, n columns, N at least n).

    Dumitriu, Edelman (2002), arXiv:math-ph/0206043.
    """
    degrees = np.concatenate([rows - np.arange(columns), np.arange(columns - 1, 0, -1)])
    unit = uniform(key, torch.zeros(len(degrees), dtype=torch.float64)).numpy() + 2.0**-25
    square = 2 * scipy.special.gammaincinv(degrees / 2, unit)
    diagonal, beside = square[:columns].copy(), square[columns:]
    cross = np.sqrt(beside * diagonal[1:])
    diagonal[:-1] += beside
    if columns == 1:
        return diagonal
    return np.maximum(scipy.linalg.eigvalsh_tridiagonal(diagonal, cross), 0)


def null_of(rows: int, columns: int, *, key: Key, num: int) -> Null:
    """Distances and largest eigenvalues of `num` random matrices, normed as `distance` does."""
    each = [wishart_eigenvalues(rows, columns, key=fold_in(key, i)) for i in range(num)]
    far = [distance(x, columns / rows) for x in each]
    return Null(np.array(far), np.array([x.max() / x.mean() for x in each]))
