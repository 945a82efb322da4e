"""Statistics of paired differences: a signed-rank test and effect sizes, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy import stats
from torch import Tensor

from ..core.estimate import Estimate, jackknife_stderr
from .statistics import Samples, left_out


def signed_rank_test(d: Samples) -> tuple[float, float]:
    """Wilcoxon's statistic and its two-sided p value."""
    if len(d) < 2:
        return math.nan, math.nan
    if not d.any():  # the conditional distribution has one point; scipy would divide 0 by 0
        return 0.0, 1.0
    found = stats.wilcoxon(d.numpy(), zero_method="pratt", correction=True)
    return float(found.statistic), float(found.pvalue)


def rank_biserial(d: Samples) -> Estimate:
    r"""$(R^+ - R^-)$ over all ranks: the mean sign of $d_i + d_j$, $i \le j$, ties and zeros included.

    Tukey's form of the signed rank sum; it gives every leave-one-out value by one search.
    """
    num = len(d)
    if num < 2:
        return Estimate(d.new_tensor(math.nan), d.new_tensor(math.nan), num)
    ordered = d.sort().values
    above = num - torch.searchsorted(ordered, -d, right=True)
    signs = (above - torch.searchsorted(ordered, -d)).to(d)  # over j, of the sign of d_i + d_j
    total = (signs.sum() + d.sign().sum()) / 2
    left_out = (total - signs) / (num * (num - 1) / 2)
    return jackknifed(total / (num * (num + 1) / 2), lambda: left_out, d)


def standardised_mean(d: Samples) -> Estimate:
    """Cohen's d_z: the mean difference over the standard deviation of the differences; jackknife standard error."""

    def ratios() -> Tensor:
        means, variances = left_out(d)
        return means / variances.sqrt()

    value = d.mean() / d.std() if len(d) > 1 else d.new_tensor(math.nan)
    return jackknifed(value, ratios, d)


def jackknifed(value: Tensor, left_out: Callable[[], Tensor], x: Samples) -> Estimate:
    """The value with the error that its leave-one-out values give; nan below 3 samples."""
    return Estimate(value, jackknife_stderr(left_out()) if len(x) > 2 else x.new_tensor(math.nan), len(x))
