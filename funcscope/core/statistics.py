"""Statistics of samples, each with its standard error: of single samples, of pairs, and tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from .estimate import Estimate
from .keys import Key, fold_in, uniform
from .pack import storable
from .standard_errors import jackknife_stderr

Samples = Float[Tensor, " n"]


def mean(x: Samples) -> Estimate:
    """Sample mean; standard error sd / sqrt(n)."""
    return Estimate.of(x)


def jackknifed(value: Callable[[], Tensor], left_out: Callable[[], Tensor], x: Samples, least: int = 2) -> Estimate:
    """A statistic with the error that its leave-one-out values give; nan below `least` samples, the error also at `least`."""
    if len(x) < least:
        return _undefined(x)
    return Estimate(value(), jackknife_stderr(left_out()) if len(x) > least else x.new_tensor(math.nan), len(x))


def spread(x: Samples) -> Estimate:
    """Sample standard deviation (n - 1); jackknife standard error; nan below 3 samples for the error, 2 for the value."""
    return jackknifed(x.std, lambda: left_out(x)[1].sqrt(), x)


def variation(x: Samples) -> Estimate:
    """Coefficient of variation sd / |mean|; jackknife standard error."""

    def ratios() -> Tensor:
        means, variances = left_out(x)
        return variances.sqrt() / means.abs()

    return jackknifed(lambda: x.std() / x.mean().abs(), ratios, x)


def correlation(x: Samples, y: Samples) -> Estimate:
    """Pearson's r; jackknife standard error; nan below 3 pairs, or where one of the two does not vary.

    The error is nan below 4 pairs: each of the leave-one-out values would be +1 or -1.
    """
    dx, dy = x - x.mean(), y - y.mean()
    xx, yy, xy = (dx * dx).sum(), (dy * dy).sum(), (dx * dy).sum()
    if xx == 0 or yy == 0:
        return _undefined(x)
    share = len(x) / max(len(x) - 1, 1)  # leaving out i takes n / (n - 1) times its product of deviations from each sum

    def without(squares: Tensor, total: Tensor) -> Tensor:
        """nan where nothing but rounding is left: without that sample there is no correlation."""
        rest = total - share * squares
        return torch.where(rest > 4 * len(x) * torch.finfo(x.dtype).eps * total, rest, math.nan)

    return jackknifed(
        lambda: xy / (xx * yy).sqrt(),
        lambda: (xy - share * dx * dy) / (without(dx * dx, xx) * without(dy * dy, yy)).sqrt(),
        x,
        least=3,
    )


def standardised_mean(d: Samples) -> Estimate:
    """Cohen's d_z: the mean difference over the standard deviation of the differences; jackknife standard error."""

    def ratios() -> Tensor:
        means, variances = left_out(d)
        return means / variances.sqrt()

    return jackknifed(lambda: d.mean() / d.std(), ratios, d)


def variance_ratio(even: Samples, odd: Samples) -> Estimate:
    r"""$\tfrac12 (1 + \mathrm{Var}(o) / \mathrm{Var}(e))$; jackknife standard error."""
    return jackknifed(
        lambda: (1 + odd.var() / even.var()) / 2, lambda: (1 + left_out(odd)[1] / left_out(even)[1]) / 2, even
    )


def rank_biserial(d: Samples) -> Estimate:
    r"""$(R^+ - R^-)$ over all ranks: the mean sign of $d_i + d_j$, $i \le j$, ties and zeros included.

    Tukey's form of the signed rank sum; it gives every leave-one-out value by one search.
    """
    num, ordered = len(d), d.sort().values
    above = num - torch.searchsorted(ordered, -d, right=True)
    signs = (above - torch.searchsorted(ordered, -d)).to(d)  # over j, of the sign of d_i + d_j
    total = (signs.sum() + d.sign().sum()) / 2
    return jackknifed(lambda: total / (num * (num + 1) / 2), lambda: (total - signs) / (num * (num - 1) / 2), d)


def quantile(x: Samples, q: float) -> Estimate:
    r"""Sample quantile (linear interpolation at $h = (n - 1) q$); standard error of the order statistic of rank h + 1.

    $$\mathrm{SE}^2 = \textstyle\sum_i W_i (x_{(i)} - \bar x_W)^2, \quad
      W_i = I_{i/n}(h + 1, n - h) - I_{(i-1)/n}(h + 1, n - h),$$

    with the regularised incomplete beta function I: for a whole h, the exact variance of the quantile under resampling.
    Maritz, Jarrett (1978), doi:10.1080/01621459.1978.10480027, take other shapes of the beta, which do not exist near the
    ends. Its derivative by a sample is that sample's W: the value hangs on one or two samples, whose own moves say more than
    the quantile of many would move by.
    """
    num = len(x)
    if num < 2:
        return _undefined(x)
    ordered, rank = x.sort().values, (num - 1) * q
    weights = x.new_tensor(np.diff(scipy.special.betainc(rank + 1, num - rank, np.arange(num + 1) / num)))
    spread = ordered - ordered[0].detach()  # 0 where all samples are equal, on every processor
    centre = weights @ spread
    return Estimate(
        x.quantile(q).detach() + (centre - centre.detach()), (weights @ (spread - centre).square()).sqrt(), num
    )


def order(x: Samples, q: float) -> Estimate:
    """`quantile`; that of a single sample is that sample, its error undefined."""
    return Estimate(x[0], x.new_tensor(float("nan")), 1) if len(x) == 1 else quantile(x, q)


@storable
class Signs(NamedTuple):
    """How many samples lie above and below 0, and the exact two-sided binomial p value that both are equally likely."""

    num_above: int
    num_below: int
    p_value: float

    @property
    def are_one(self) -> bool:
        """Whether there are two samples or more, all on one side."""
        return self.num_above + self.num_below > 1 and 0 in (self.num_above, self.num_below)


def signs(x: Samples) -> Signs:
    """The sign test: of the median, whatever the tails; zeros are left out, and nan without any sample.

    >>> import torch
    >>> signs(torch.tensor([1e10, 1.0, 2.0, -1.0, 3.0, 5.0]))
    Signs(num_above=5, num_below=1, p_value=0.21875)
    """
    above, below = int((x > 0).sum()), int((x < 0).sum())
    if not len(x):
        return Signs(0, 0, float("nan"))
    return Signs(above, below, float(scipy.stats.binomtest(above, above + below).pvalue) if above + below else 1.0)


def largest_share(x: Samples) -> float:
    """Share of the largest |x| in the sum of all: near 1, a mean is one sample and its t interval does not hold."""
    return float(x.abs().max() / x.abs().sum()) if x.any() else float("nan")


def signed_rank_test(d: Samples) -> tuple[float, float]:
    """Wilcoxon's statistic and its two-sided p value."""
    if len(d) < 2:
        return math.nan, math.nan
    if not d.any():  # the conditional distribution has one point; scipy would divide 0 by 0
        return 0.0, 1.0
    found = scipy.stats.wilcoxon(d.numpy(), zero_method="pratt", correction=True)
    return float(found.statistic), float(found.pvalue)


def q_values(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's: the false discovery rate at which each would be called; nan stays, and counts as no test.

    >>> [round(q, 3) for q in q_values([0.01, float("nan"), 0.04, 0.5])]
    [0.03, nan, 0.06, 0.5]
    """
    known = [not math.isnan(p) for p in p_values]
    adjusted = iter(
        scipy.stats.false_discovery_control([p for p in p_values if not math.isnan(p)]) if any(known) else ()
    )
    return [float(next(adjusted)) if each else math.nan for each in known]


def permutation_p_value(statistic: Callable[[Tensor], float], labels: Tensor, *, key: Key, num: int = 999) -> float:
    """Share of `num` random orders of the labels, theirs counted in, whose statistic is at least that of the labels.

    nan for a statistic that is nan; an order whose statistic is nan counts as one that is as large.
    Valid for every num where all orders are equally likely without an effect: Phipson, Smyth (2010),
    doi:10.2202/1544-6115.1585.
    """
    like = torch.zeros(len(labels), dtype=torch.float64)
    orders = (uniform(fold_in(key, i), like).argsort() for i in range(num))
    at = statistic(labels)
    if math.isnan(at):
        return math.nan
    return (1 + sum(not statistic(labels[order]) < at for order in orders)) / (1 + num)


def bootstrap_stderr(statistic: Callable[[Tensor], Tensor], num_data: int, *, key: Key, num: int = 200) -> Tensor:
    """Standard error of a statistic of places among `num_data` sequences: its sd over `num` resamples; nan for one datum.

    Efron (1979), doi:10.1214/aos/1176344552. For what has no residual per sequence; else `standard_errors.ratio_stderr`.
    """
    like = torch.zeros(num_data, dtype=torch.float64)
    places = ((uniform(fold_in(key, i), like) * num_data).long() for i in range(num))
    drawn = torch.stack([statistic(place) for place in places]).std(0)
    return drawn if num_data > 1 else torch.full_like(drawn, math.nan)


def left_out(x: Samples) -> tuple[Tensor, Tensor]:
    """Mean and variance without each sample, from deviations: differences of raw sums of squares would cancel."""
    num = len(x)
    deviation = x - x.mean()
    squares = deviation.square()
    variances = (squares.sum() - squares * num / (num - 1)) / (num - 2)
    return x.mean() - deviation / (num - 1), variances.clamp(min=0)


def _undefined(x: Samples) -> Estimate:
    nan = x.new_tensor(math.nan)
    return Estimate(nan, nan, len(x))
