"""What random directions have in common: moments of the cosine of two of them, and the least that many must have."""

from __future__ import annotations

import math

from ..core.checks import check_count


def mean_abs_coordinate(m: int) -> float:
    r"""$\mathbb E |\cos|$ of two random directions of m dimensions: $\Gamma(m/2) / (\sqrt\pi\, \Gamma((m+1)/2))$.

    It is $\sqrt{2 / (\pi m)}$ for large m, and $\mathbb E \cos^2 = 1 / m$ for every m (proofs/random_overlap.py).

    Raises ValueError for m below 1.

    >>> round(mean_abs_coordinate(1), 12), round(mean_abs_coordinate(3), 12)    # on a sphere the height is uniform
    (1.0, 0.5)
    """
    check_count("m", m)
    return math.exp(math.lgamma(m / 2) - math.lgamma((m + 1) / 2)) / math.pi**0.5


def welch_bound(n: int, m: int) -> float:
    r"""The least that the largest |cos| of n directions of m dimensions can be: $\sqrt{(n - m) / (m (n - 1))}$, 0 for n <= m.

    A bound of the largest, not of the mean: that of random directions may lie below it or above it.

    Raises ValueError for n below 0 and m below 1.

    Welch (1974), doi:10.1109/TIT.1974.1055219.

    >>> welch_bound(3, 2), welch_bound(2, 2)                                    # three directions 120 degrees apart
    (0.5, 0.0)
    """
    check_count("n", n, 0)
    check_count("m", m)
    return math.sqrt((n - m) / (m * (n - 1))) if n > m else 0.0
