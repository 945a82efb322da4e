"""Statistics of paired differences: a signed-rank test and effect sizes, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from ..core.checks import check_instance
from ..core.estimate import Estimate, jackknife_stderr
from .directional_result import DirectionalLosses
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


def variance_ratio(even: Samples, odd: Samples) -> Estimate:
    r"""$\tfrac12 (1 + \mathrm{Var}(o) / \mathrm{Var}(e))$; jackknife standard error."""
    if len(even) < 2:
        return Estimate(even.new_tensor(math.nan), even.new_tensor(math.nan), len(even))

    def ratios() -> Tensor:
        return (1 + left_out(odd)[1] / left_out(even)[1]) / 2

    return jackknifed((1 + odd.var() / even.var()) / 2, ratios, even)


def check(first: DirectionalLosses, second: DirectionalLosses, names: Any, level: Any) -> None:
    """Raises ValueError for results whose samples are no partners, for a level outside (0, 1), and for names that are one."""
    for name, result in (("first", first), ("second", second)):
        remedy = "what `directional_losses` returns for each model, with one `key`"
        check_instance(name, result, DirectionalLosses, remedy)
    settings = _settings(second)
    for name, one in _settings(first).items():
        other = settings[name]
        if one != other and None not in (one, other):
            raise ValueError(
                f"`{name}` must be the same in both results for sample i of the one to be the partner of sample i of the "
                f"other, got {one!r} and {other!r}: sample both models with one `{name}`."
            )
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, got {level!r}: 0.95 for a 95 % interval.")
    if len(names) != 2 or names[0] == names[1]:
        raise ValueError(f"`names` must be two different names, got {names!r}: one for each result, in their order.")


def _settings(result: DirectionalLosses) -> dict[str, Any]:
    """What makes samples partners; None for what was not asked for."""
    curvature = "difference" if result.exact_curvatures is None else "exact"
    return {
        "key": result.key,
        "n_samples": len(result.losses),
        "span": result.span,
        "normalize": result.normalize,
        "distribution": result.distribution,
        "relative_span": result.relative_span,
        "global_renorm": result.global_renorm,
        "curvature": curvature if result.compute_curvature else None,
    }
