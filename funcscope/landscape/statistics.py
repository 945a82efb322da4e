"""Statistics of samples along random directions, each with its standard error over directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special, stats
from torch import Tensor

from ..core.estimate import Estimate, jackknife_stderr
from ..core.pack import storable
from ..core.result import Derived, Result
from ..core.tables import Quantity

Samples = Float[Tensor, " n"]


def mean(x: Samples) -> Estimate:
    """Sample mean; standard error sd / sqrt(n)."""
    return Estimate.of(x)


def spread(x: Samples) -> Estimate:
    """Sample standard deviation (n - 1); jackknife standard error; nan below 3 samples for the error, 2 for the value."""
    if len(x) < 2:
        return _undefined(x)
    return Estimate(x.std(), _jackknife(lambda _, v: v.sqrt(), x), len(x))


def variation(x: Samples) -> Estimate:
    """Coefficient of variation sd / |mean|; jackknife standard error."""
    if len(x) < 2:
        return _undefined(x)
    return Estimate(x.std() / x.mean().abs(), _jackknife(lambda m, v: v.sqrt() / m.abs(), x), len(x))


def correlation(x: Samples, y: Samples) -> Estimate:
    """Pearson's r; jackknife standard error; nan below 3 pairs, or where one of the two does not vary.

    The error is nan below 4 pairs: each of the leave-one-out values would be +1 or -1.
    """
    num = len(x)
    if num < 3:
        return _undefined(x)
    dx, dy = x - x.mean(), y - y.mean()
    xx, yy, xy = (dx * dx).sum(), (dy * dy).sum(), (dx * dy).sum()
    if xx == 0 or yy == 0:
        return Estimate(x.new_tensor(float("nan")), x.new_tensor(float("nan")), num)
    share = num / (num - 1)  # leaving out sample i takes n / (n - 1) times its product of deviations from each sum
    left_out = (xy - share * dx * dy) / ((xx - share * dx * dx) * (yy - share * dy * dy)).sqrt()
    return Estimate(
        xy / (xx * yy).sqrt(), jackknife_stderr(left_out) if num > 3 else left_out.new_tensor(float("nan")), num
    )


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
    weights = x.new_tensor(np.diff(special.betainc(rank + 1, num - rank, np.arange(num + 1) / num)))
    centre = weights @ ordered
    return Estimate(
        x.quantile(q).detach() + (centre - centre.detach()), (weights @ (ordered - centre).square()).sqrt(), num
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
    return Signs(above, below, float(stats.binomtest(above, above + below).pvalue) if above + below else 1.0)


def largest_share(x: Samples) -> float:
    """Share of the largest |x| in the sum of all: near 1, a mean is one sample and its t interval does not hold."""
    return float(x.abs().max() / x.abs().sum()) if x.any() else float("nan")


def left_out(x: Samples) -> tuple[Tensor, Tensor]:
    """Mean and variance without each sample, from deviations: differences of raw sums of squares would cancel."""
    num = len(x)
    deviation = x - x.mean()
    squares = deviation.square()
    variances = (squares.sum() - squares * num / (num - 1)) / (num - 2)
    return x.mean() - deviation / (num - 1), variances.clamp(min=0)


def _jackknife(statistic, x: Samples) -> Tensor:
    """Standard error of statistic(mean, variance) from its leave-one-out values."""
    return jackknife_stderr(statistic(*left_out(x))) if len(x) > 2 else x.new_tensor(float("nan"))


def _undefined(x: Samples) -> Estimate:
    nan = x.new_tensor(float("nan"))
    return Estimate(nan, nan, len(x))


class Statistic(Derived[Any]):
    """A property of a result: a statistic of some columns of its samples, as the result's method `estimated` has it."""

    def __init__(self, label: str, statistic: Callable[..., Estimate], *over: str, unit: str = "", **options: Any):
        super().__init__(lambda result: result.estimated(statistic, over, **options))
        self.quantity = Quantity(label, unit, (), "", "", True)

    @classmethod
    def all_of(cls, result: Result) -> dict[str, Estimate]:
        """Those that a result has, by name."""
        names = [name for name, each in vars(type(result)).items() if isinstance(each, cls)]
        return {name: estimate for name in names if (estimate := getattr(result, name)) is not None}
