"""Statistics of samples along random directions, each with its standard error over directions."""

from __future__ import annotations

from jaxtyping import Float
from scipy.stats.mstats import mjci
from torch import Tensor

from ..core.estimate import Estimate, jackknife_stderr

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
    """Sample quantile (linear interpolation); Maritz-Jarrett standard error."""
    if len(x) < 2:
        return _undefined(x)
    value = x.quantile(q)
    centred = (x - value).numpy()  # the method takes a difference of squares
    return Estimate(value, x.new_tensor(float(mjci(centred, prob=[q])[0])), len(x))


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
