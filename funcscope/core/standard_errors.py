"""Standard errors: over sequences, of token-weighted means and of ratios; over draws, by the jackknife; over both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from .estimate import Crossed, Estimate
from .result import Derived, Result
from .tables import Quantity

FOLDS = 16
"""Groups of sequences that are left out in turn, for the bias of a statistic that is no mean."""


def jackknife_stderr(left_out: Float[Tensor, "*m n"]) -> Float[Tensor, "*m"]:
    r"""Standard error of a smooth statistic from its n leave-one-out values, along the last dimension.

    $$\mathrm{SE}^2 = \tfrac{n-1}{n} \textstyle\sum_i (s_{(i)} - \bar s)^2.$$

    For the mean this is sd / sqrt(n) exactly. Efron and Stein (1981), doi:10.1214/aos/1176345462.

    >>> import torch
    >>> x = torch.tensor([1.0, 2.0, 6.0])
    >>> left_out = (x.sum() - x) / 2
    >>> torch.allclose(jackknife_stderr(left_out), x.std() / 3**0.5)
    True
    """
    num = left_out.shape[-1]
    return ((num - 1) / num * (left_out - left_out.mean(-1, keepdim=True)).square().sum(-1)).sqrt()


def ratio_stderr(numerators: Float[Tensor, "*m n"], denominators: Float[Tensor, " n"]) -> Float[Tensor, "*m"]:
    r"""Standard error of $R = \sum_i a_i / \sum_i b_i$ over n sequences, linearised: of a token-weighted mean, say.

    $$\mathrm{SE}^2 = \frac{n}{n-1} \frac{\sum_i (a_i - R\, b_i)^2}{(\sum_i b_i)^2}.$$

    Every error over sequences is this one. Its residuals $a_i - R b_i$ are linear in a, so that those of differences and of
    means over directions are differences and means (`estimate.Crossed`); leave-one-out values, an order 1/n away, have no
    such parts, and serve statistics that are no means. nan where fewer than two sequences have a weight.

    Cochran (1977), Sampling techniques, section 2.11.

    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0, 6.0]])
    >>> torch.allclose(ratio_stderr(x, torch.ones(3)), x.std() / 3**0.5)
    True
    """
    num, total = int((denominators != 0).sum()), denominators.sum()
    if num < 2:
        return numerators.new_full(numerators.shape[:-1], math.nan)
    beside = numerators - (numerators.sum(-1, keepdim=True) / total) * denominators
    return (num / (num - 1) * beside.square().sum(-1)).sqrt() / total.abs()


class Means(NamedTuple):
    value: Float[Tensor, " m"]
    stderr: Float[Tensor, " m"]


def means(sums: Float[Tensor, "m n"], weights: Float[Tensor, " n"]) -> Means:
    r"""Token-weighted means of m sets of per-sequence sums, each with its standard error over the n sequences.

    $$L = \frac{\sum_i s_i}{W}, \qquad \mathrm{SE}^2 = \frac{n}{n-1} \frac{\sum_i (s_i - L w_i)^2}{W^2}, \qquad
      W = \sum_i w_i.$$

    Linear in the sums: given differences of sums (of two losses on the same sequences, or of a loss and a chord), these are
    the mean difference and its paired error. Sequences that score nothing do not count. The error takes the sequences for a
    random sample; nan for a single one. On the CPU.
    Cochran (1977), Sampling techniques, section 2.11.

    >>> import torch
    >>> means(torch.tensor([[1.0, 2.0, 6.0]]), torch.ones(3))
    Means(value=tensor([3.], dtype=torch.float64), stderr=tensor([1.5275], dtype=torch.float64))
    """
    scored = weights != 0
    sums, weights = sums[:, scored].cpu().double(), weights[scored].cpu().double()
    return Means(sums.sum(1) / weights.sum(), ratio_stderr(sums, weights))


def ratio_interval(
    numerators: Float[Tensor, " n"], denominators: Float[Tensor, " n"], level: float = 0.95
) -> tuple[float, float]:
    r"""Fieller's interval for a ratio of two means over n sequences, with Student's t of n - 1 degrees of freedom.

    $$\{r : (\bar a - r \bar b)^2 \le t^2\, \widehat{\mathrm{Var}}(\bar a - r \bar b)\},$$

    exact for normal pairs, and wider above than below where the denominator is uncertain. nan, twice, where the
    denominator's own interval reaches 0 (the set of ratios has no end then) and below two sequences.

    Fieller (1954), doi:10.1111/j.2517-6161.1954.tb00159.x.

    >>> import torch
    >>> low, high = ratio_interval(torch.tensor([2.0, 2.2, 1.8]), torch.ones(3))
    >>> round(low, 3), round(high, 3)                             # a certain denominator: 2 -+ 4.303 * 0.1155
    (1.503, 2.497)
    """
    num = len(numerators)
    if num < 2:
        return math.nan, math.nan
    both = torch.stack([numerators, denominators]).double()
    a, b = both.mean(1).tolist()
    (aa, ab), (_, bb) = (float(scipy.stats.t.ppf((1 + level) / 2, num - 1)) ** 2 / num * both.cov()).tolist()
    square, middle, rest = b * b - bb, a * b - ab, a * a - aa
    if square <= 0:
        return math.nan, math.nan
    half = math.sqrt(max(middle * middle - square * rest, 0.0))
    return (middle - half) / square, (middle + half) / square


def crossed(
    statistic: Callable[..., Estimate], columns: Sequence[Tensor], rows: Sequence[Float[Tensor, "n g"] | None]
) -> Estimate:
    """A statistic of columns over directions, with its error over sequences where the rows of all columns are known.

    To first order: sequence s of direction d moves it by the derivative by that direction's value times its residual.
    Rows that are nan are not known: the rest, two or more, serve a mean over directions (whose derivatives are all the
    same); any other statistic may hang on the directions that are missing, and its error over sequences is nan.
    """
    estimate = statistic(*columns)
    known = [row for row in rows if row is not None]
    if len(known) < len(rows) or not estimate.value.isfinite():
        return estimate
    slopes_at = torch.func.grad(lambda *x: statistic(*x).value, argnums=tuple(range(len(columns))))
    slopes = slopes_at(*columns)
    moves = torch.stack([slope[:, None] * row for slope, row in zip(slopes, known, strict=True)]).sum(0)
    linear = all(bool((slope == slope[0]).all()) for slope in slopes)
    there = torch.stack([row.isfinite().all(1) for row in known]).all(0)
    if not there.all():
        moves = moves[there] if linear and int(there.sum()) > 1 else torch.full_like(moves, math.nan)
    return Crossed.of_rows(estimate, moves, 0.0 if linear else _bias(slopes_at, columns, known))


def _bias(slopes_at: Callable[..., Sequence[Tensor]], columns: Sequence[Tensor], rows: Sequence[Tensor]) -> float:
    r"""Quenouille's $(k - 1)(\overline{T_{(s)}} - T)$ with one of k groups of sequences left out: what scatter over few
    sequences adds to a spread over directions, or takes from a correlation.

    Differences by the trapezoid rule from derivatives: those of a percentile are smooth where its values have kinks. What
    the derivatives at the columns themselves give adds up to 0.
    """
    folds = min(FOLDS, rows[0].shape[1])
    if folds < 2:
        return math.nan
    moves = [torch.stack([row[:, i::folds].sum(1) for i in range(folds)]) * folds / (folds - 1) for row in rows]
    total = 0.0
    for each in zip(*moves, strict=True):
        slopes = slopes_at(*(x - move for x, move in zip(columns, each, strict=True)))
        total -= sum(float(slope @ move) for slope, move in zip(slopes, each, strict=True)) / 2
    return (folds - 1) / folds * total


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
