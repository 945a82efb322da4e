"""Power laws in the tail of positive numbers: exponent, where the tail begins, and whether a log-normal fits it better."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy
import torch
from jaxtyping import Float, Int

from ..core.checks import check_count
from ..core.keys import Key, fold_in, uniform

Numbers = Float[np.ndarray, " n"]
CELLS = 2**21
"""Distances between distributions that are in memory at a time."""
STOP = {"ftol": 1e-15, "gtol": 1e-9}
"""scipy's own stop leaves R right to 1e-8 and z, in which the error counts to first order, to 1e-4."""


class PowerLaw(NamedTuple):
    """A density proportional to x^-alpha from xmin on; nan where there is no tail."""

    alpha: float
    stderr: float
    """(alpha - 1) / sqrt(num_tail): of the exponent where xmin is known."""
    xmin: float
    ks: float
    """Largest distance between the distribution function of the tail and the fitted one."""
    num_tail: int


class LikelihoodRatio(NamedTuple):
    """Of a power law over a log-normal on the same tail."""

    log_ratio: float
    z: float
    p_value: float


def fit_power_law(x: Numbers, *, least: int = 10) -> PowerLaw:
    r"""The power law of a tail by maximum likelihood, from the point at which it is closest to its fit.

    $$\hat\alpha = 1 + n \Big/ \textstyle\sum_{x_i \ge x_{\min}} \ln (x_i / x_{\min}), \qquad
      x_{\min} = \arg\min_{x_k} \sup_{x \ge x_k} |F_k(x) - (1 - (x / x_k)^{1 - \hat\alpha_k})|,$$

    over all x_k that leave `least` numbers or more; F_k is the distribution function of the tail, whose steps count on both
    sides (the published programs look at one side only, by which tails of a few numbers look closer than they are).

    Raises ValueError for numbers that are not positive and finite.

    Clauset, Shalizi, Newman (2009), arXiv:0706.1062.

    >>> fit_power_law(np.array([1.0, 2.0, 4.0]), least=3).alpha           # 1 + 3 / (3 ln 2)
    2.4426950408889634
    """
    check_count("least", least, 2)
    if not (np.isfinite(x).all() and (x > 0).all()):
        raise ValueError("`x` must hold positive, finite numbers: a power law has no others.")
    logs = np.sort(np.log(x))
    num = len(logs)
    starts = np.flatnonzero(np.diff(logs, prepend=-np.inf) > 0)
    starts = starts[(num - starts >= least) & (logs[starts] < logs[-1])] if num else starts
    if not len(starts):
        return PowerLaw(math.nan, math.nan, math.nan, math.nan, 0)
    tails = num - starts
    excess = np.cumsum(logs[::-1])[::-1][starts] / tails - logs[starts]
    distance = _distances(logs, starts, excess)
    best = int(distance.argmin())
    slope, tail = float(1 / excess[best]), int(tails[best])
    return PowerLaw(
        1 + slope, slope / math.sqrt(tail), math.exp(logs[starts[best]]), float(distance[best]), tail
    )  # fmt: skip


def bootstrap_alpha(x: Numbers, *, key: Key, num: int, least: int = 10, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the exponent over `num` resamples, each with the choice of its own xmin; nan without a fit."""
    like = torch.zeros(len(x), dtype=torch.float64)
    places = ((uniform(fold_in(key, i), like) * len(x)).long().numpy() for i in range(num))
    found = np.array([fit_power_law(x[place], least=least).alpha for place in places])
    found = found[np.isfinite(found)]
    if len(found) < 2:
        return math.nan, math.nan
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def log_normal_ratio(x: Numbers, fit: PowerLaw) -> LikelihoodRatio:
    r"""Whether the tail is a power law or a log-normal one, by Vuong's test of their likelihoods.

    $$R = \sum_i \big(\ln p_{\mathrm{power}}(x_i) - \ln p_{\mathrm{normal}}(x_i)\big), \qquad z = R / (\sqrt n\, s),$$

    s the standard deviation of the terms, p two-sided. The log-normal, too, begins at xmin: in $y = \ln(x / x_{\min})$ its
    density is proportional to $e^{-a y - b y^2}$, $b \ge 0$, fitted by maximum likelihood; the power law is its edge b = 0.
    R is therefore never above 0: a z far below 0 speaks against the power law, a p that is not small leaves both.
    At the edge R and z are 0.

    Vuong (1989), doi:10.2307/1912557; Clauset, Shalizi, Newman (2009), arXiv:0706.1062, section 5.
    """
    if not fit.num_tail:
        return LikelihoodRatio(math.nan, math.nan, math.nan)
    y = np.sort(np.log(x))[-fit.num_tail :] - math.log(fit.xmin)
    y = y / y.mean()  # the power law is exp(-y) in this unit
    a, b = _half_normal_fit(y)
    terms = -y + a * y + b * y**2 + _log_normaliser(a, b)
    ratio = float(terms.sum())
    if ratio >= 0 or terms.std() == 0:
        return LikelihoodRatio(0.0, 0.0, 1.0)
    z = ratio / (math.sqrt(len(y)) * float(terms.std()))
    return LikelihoodRatio(ratio, z, math.erfc(-z / math.sqrt(2)))


def _distances(
    logs: Numbers, starts: Int[np.ndarray, " k"], excess: Float[np.ndarray, " k"]
) -> Float[np.ndarray, " k"]:
    """Kolmogorov and Smirnov's of every tail from its own fit."""
    num = len(logs)
    below, upto = np.searchsorted(logs, logs, "left"), np.searchsorted(logs, logs, "right")
    found = np.empty(len(starts))
    for first in range(0, len(starts), step := max(1, CELLS // num)):
        at = starts[first : first + step]
        away = (logs[None, at[0] :] - logs[at, None]) / excess[first : first + step, None]
        survival, left = np.exp(-np.maximum(away, 0)), (num - at)[:, None]
        higher = survival - (num - upto[None, at[0] :]) / left
        lower = (num - below[None, at[0] :]) / left - survival
        found[first : first + step] = np.where(away >= 0, np.maximum(higher, lower), 0).max(1)
    return found


def _half_normal_fit(y: Numbers) -> tuple[float, float]:
    """a, b of the largest likelihood; its logarithm is concave in them."""
    first, second = float(y.mean()), float((y**2).mean())

    def cost(at: np.ndarray) -> float:
        return float(at[0] * first + at[1] * second + _log_normaliser(at[0], at[1]))

    limits = [(-200.0, 200.0), (1e-9, 200.0)]
    made = [
        scipy.optimize.minimize(cost, start, method="L-BFGS-B", bounds=limits, options=STOP)
        for start in ((1.0, 1e-3), (0.0, 0.5))
    ]
    best = min(made, key=lambda each: each.fun)
    return float(best.x[0]), float(best.x[1])


def _log_normaliser(a: float, b: float) -> float:
    """log of the integral of exp(-a y - b y^2) over y > 0."""
    z = a / (2 * math.sqrt(b))
    tail = (
        math.log(scipy.special.erfcx(z)) if z > 0 else math.log(2) + scipy.special.log_ndtr(-z * math.sqrt(2)) + z * z
    )
    return 0.5 * math.log(math.pi / (4 * b)) + float(tail)
