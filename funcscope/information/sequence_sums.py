"""Sums over sequences from which ratios and their errors follow: of fixed size, and added over batches."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.estimate import wide
from ..core.standard_errors import Means


class SequenceSums(NamedTuple):
    r"""Of k columns with a number per sequence: how many are not 0, their sums, and the sums of their products.

    Ratios of column sums have an error over sequences, whose residuals are linear in the columns:
    with $S = \sum_i v_i$ and $M = \sum_i v_i v_i^\top$, $R = u^\top S / S_j$ and $r = u - R e_j$,

    $$\mathrm{SE}^2 = \frac{n}{n-1} \frac{r^\top M r}{S_j^2},$$

    n the sequences with a weight in column j: `standard_errors.ratio_stderr` without the sequences themselves. An error
    below 1e-8 of R is rounding.
    """

    counts: Int[Tensor, " k"]
    totals: Float[Tensor, " k"]
    products: Float[Tensor, "k k"]

    @classmethod
    def of(cls, columns: Float[Tensor, "k n"]) -> SequenceSums:
        """Of the n sequences of a batch, each of which must be whole in it; on the CPU."""
        columns = columns.to(wide(columns.device)).cpu()
        return cls((columns != 0).sum(1), columns.sum(1), columns @ columns.T)

    def merge(self, other: SequenceSums) -> SequenceSums:
        """Of the sequences of both, which must be different ones."""
        return SequenceSums(*(a + b for a, b in zip(self, other, strict=True)))

    def ratios(self, numerators: Float[Tensor, "m k"], denominator: int) -> Means:
        """Values and errors of m ratios of linear combinations of the columns to one column; nan where that is empty.

        The error is nan where fewer than two sequences have a weight in the denominator.
        """
        numerators = numerators.to(self.totals)
        num, total = int(self.counts[denominator]), self.totals[denominator]
        values = _where(numerators, self.totals).sum(1) / total
        rest = numerators.clone()
        rest[:, denominator] -= values
        squares = _where(rest[:, :, None] * rest[:, None], self.products).sum((1, 2)).clamp_min(0)
        scale = num / (num - 1) if num > 1 else math.nan
        return Means(values, (scale * squares).sqrt() / total.abs())


def _where(factor: Tensor, value: Tensor) -> Tensor:
    """Products; a column that is not asked for may be infinite."""
    return torch.where(factor != 0, factor * value, 0.0)
