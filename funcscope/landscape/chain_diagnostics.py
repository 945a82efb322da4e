"""Whether Markov chains have mixed: split R-hat of ranks, and how many independent draws theirs are worth."""

from __future__ import annotations

import math

import numpy as np
import scipy
from jaxtyping import Float
from torch import Tensor

LEAST_DRAWS = 4
"""Of a chain: halves of fewer have no variance."""


def split_r_hat(draws: Float[Tensor, "c t"]) -> float:
    r"""Rank-normalised split $\hat R$: how much further apart halves of chains lie than their own spread explains.

    Every chain is cut into halves of T draws, and draws are replaced by normal scores of their ranks among all. With B the
    variance of the halves' means, W the mean of their variances:

    $$\hat R = \sqrt{\frac{(T - 1) W / T + B}{W}},$$

    the larger one of that of the draws and that of their distances from the median (which sees chains of unlike spread).
    1 for chains of one stationary distribution; above 1.1 they are not mixed, or drift. nan for fewer than 4 draws, for
    draws that are not finite and where none varies.

    Vehtari, Gelman, Simpson, Carpenter, Bürkner (2021), doi:10.1214/20-BA1221.

    >>> import torch
    >>> split_r_hat(torch.arange(400.0)[None]) > 1.5                  # a drift
    True
    """
    x = _halves(draws)
    if x is None:
        return math.nan
    return max(_r_hat(_normal_scores(x)), _r_hat(_normal_scores(np.abs(x - np.median(x)))))


def effective_samples(draws: Float[Tensor, "c t"]) -> float:
    r"""How many independent draws have a mean of the same variance as these: $M / (1 + 2 \sum_k \rho_k)$ of M draws.

    $\rho_k$ is the autocorrelation at lag k over the halves of all chains, in which a distance between chains counts as
    correlation at every lag. The sum ends by Geyer's rule, where the sum of two neighbours would be negative, and these sums
    do not rise. At most $M \log_{10} M$. nan as for `split_r_hat`.

    Geyer (1992), doi:10.1214/ss/1177011137; Vehtari et al. (2021), doi:10.1214/20-BA1221.
    """
    x = _halves(draws)
    if x is None:
        return math.nan
    chains, num = x.shape
    covariance = _autocovariance(x)
    within = covariance[:, 0].mean() * num / (num - 1)
    total = within * (num - 1) / num + (x.mean(1).var(ddof=1) if chains > 1 else 0.0)
    rho = 1 - (within - covariance.mean(0) * num / (num - 1)) / total
    rho[0] = 1.0
    pairs = rho[: num // 2 * 2].reshape(-1, 2).sum(1)
    negative = np.flatnonzero(pairs < 0)
    pairs = np.minimum.accumulate(pairs[: negative[0] if len(negative) else None])
    many = chains * num
    return float(many / max(2 * pairs.sum() - 1, 1 / math.log10(many)))


def _halves(draws: Tensor) -> np.ndarray | None:
    """(2 c, t // 2), without the middle draw of an odd number; None where nothing can be said."""
    x = draws.detach().cpu().double().numpy()
    half = x.shape[1] // 2
    if x.shape[1] < LEAST_DRAWS or not x.size or not np.isfinite(x).all() or np.ptp(x) == 0:
        return None
    return np.concatenate([x[:, :half], x[:, -half:]])


def _normal_scores(x: np.ndarray) -> np.ndarray:
    return scipy.special.ndtri((scipy.stats.rankdata(x).reshape(x.shape) - 0.375) / (x.size + 0.25))


def _r_hat(x: np.ndarray) -> float:
    num, within = x.shape[1], x.var(axis=1, ddof=1).mean()
    between = x.mean(1).var(ddof=1)
    return float(np.sqrt((num - 1) / num + between / within)) if within > 0 else math.inf


def _autocovariance(x: np.ndarray) -> np.ndarray:
    """At every lag, of each row, over the number of draws."""
    num = x.shape[1]
    spectrum = np.fft.rfft(x - x.mean(1, keepdims=True), n=2 * num)
    return np.fft.irfft(np.abs(spectrum) ** 2)[:, :num] / num
