"""Mean losses from the terms of single sequences, with the standard error over them: also of differences of losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.estimate import Crossed, Estimate
from ..core.pack import storable

FOLDS = 16
"""Groups of sequences that are left out in turn, for the bias of a statistic that is no mean."""
MOST = 2**22
"""Numbers that are stored per side, over directions and sequences: beyond, sequences are summed in groups."""


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
    num, total = len(weights), weights.sum()
    value = sums.sum(1) / total
    scatter = (sums - value[:, None] * weights).square().sum(1)
    factor = num / (num - 1) if num > 1 else math.nan
    return Means(value, (factor * scatter).sqrt() / total)


@storable
class Residuals(NamedTuple):
    r"""What each sequence (or group of them) adds beside the mean: $(s_{ds} - L_d w_{ds}) / W_d$; rows add up to 0.

    For directions by sequences, `negative` where both sides were evaluated. Linear: those of a loss change, of a second
    difference or of a mean over directions are the same combination of these.
    """

    centre: Float[Tensor, " g"]
    positive: Float[Tensor, "n g"]
    negative: Float[Tensor, "n g"] | None
    curvature: Float[Tensor, "m g"] | None = None
    """Of exact curvatures, along the first m directions; nan where those of a direction are not known."""
    num: int = 0
    """Sequences that score something; their groups are the columns."""

    def of(self, quantity: str, step: float) -> Float[Tensor, "n g"] | None:
        """The same of a quantity that is linear in the losses; None where it needs a side that was not evaluated."""
        one, two = 1 / (2 * step), 1 / step**2
        positive, negative, centre = {
            "loss": (1, 0, 0), "delta": (1, 0, -1), "negative": (0, 1, 0), "delta_negative": (0, 1, -1),
            "delta_two_sided": (0.5, 0.5, -1), "dir_grad": (one, -one, 0), "curvature": (two, two, -2 * two),
        }[quantity]  # fmt: skip
        rows = positive * self.positive + centre * self.centre
        if negative == 0:
            return rows
        return None if self.negative is None else rows + negative * self.negative

    @property
    def exact(self) -> Float[Tensor, "n g"] | None:
        """Of exact curvatures; nan along the directions whose sequences are not known, None where none is."""
        known = self.curvature
        if known is None or not known.isfinite().all(1).any():
            return None
        return torch.cat([known, known.new_full((len(self.positive) - len(known), known.shape[1]), math.nan)])


def num_groups(num_sequences: int, num_directions: int) -> int:
    """As many groups as sequences where there is room for them, 64 at the least."""
    return min(num_sequences, max(64, MOST // num_directions))


def residuals(
    terms: Float[Tensor, "*d 2 n"], scored: Tensor, groups: int
) -> tuple[Float[Tensor, " *d"], Float[Tensor, "*d g"]]:
    """The loss, and what each group of sequences adds beside it, from sums and weights per sequence.

    scored: the places of the sequences that score something; sequence i is of group i modulo `groups`.
    """
    sums, weights = terms.unbind(-2)
    total = weights.sum(-1)
    value = sums.sum(-1) / total
    beside = ((sums - value[..., None] * weights) / total[..., None])[..., scored]
    more = -len(scored) % groups
    return value, torch.nn.functional.pad(beside, (0, more)).unflatten(-1, (-1, groups)).sum(-2)


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
