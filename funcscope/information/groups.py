"""Which sequence each row of activations is of: errors are over these, and neighbours are sought in the others."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.estimate import wide
from ..core.standard_errors import ratio_stderr

Groups = Int[Tensor, " n"]


class Grouping(NamedTuple):
    """Sequences counted from 0, by row; made by `grouping`."""

    sequence: Groups
    sizes: Groups
    """Rows of each sequence."""

    @property
    def num(self) -> int:
        return len(self.sizes)

    @property
    def are_single(self) -> bool:
        """Whether every row is a sequence of its own."""
        return self.num == len(self.sequence)

    def sums(self, values: Float[Tensor, "n *m"]) -> Float[Tensor, "g *m"]:
        """Over the rows of each sequence."""
        return values.new_zeros(self.num, *values.shape[1:]).index_add(0, self.sequence, values)

    def mean_stderr(self, values: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """Of the mean over rows, over sequences: `standard_errors.ratio_stderr`."""
        return ratio_stderr(self.sums(values)[None], self.sizes.to(values.dtype))[0]


def grouping(groups: Groups | None, num: int, device: torch.device) -> Grouping:
    """Of `num` rows, by the numbers of their sequences; every row a sequence of its own without.

    Raises ValueError where there are not as many whole numbers as rows.

    >>> grouping(torch.tensor([7, 7, 3]), 3, torch.device("cpu"))
    Grouping(sequence=tensor([1, 1, 0]), sizes=tensor([1, 2]))
    """
    if groups is None:
        index = torch.arange(num, device=device)
        return Grouping(index, torch.ones_like(index))
    if groups.shape != (num,):
        raise ValueError(
            f"`groups` must name the sequence of each of the {num} rows, shape ({num},), got {tuple(groups.shape)}."
        )
    check_labels("groups", groups)
    _, index, sizes = groups.to(device).unique(return_inverse=True, return_counts=True)
    return Grouping(index, sizes)


def with_second_order(stderr: Float[Tensor, ""], bias: Tensor | float, freedom: int) -> Float[Tensor, ""]:
    r"""A linearised error, at least $|b| \sqrt{2 / f}$: that of a chi-squared variable of f degrees, in a scale of mean b.

    Where the derivative is 0 (independence; labels that are all equally likely) an entropy moves by second order alone: by b
    in the mean, with f differences that can be there.
    """
    return (
        torch.maximum(stderr, abs(torch.as_tensor(bias).to(stderr)) * (2 / freedom) ** 0.5) if freedom > 0 else stderr
    )


def wide_rows(name: str, x: Tensor) -> Float[Tensor, "n d"]:
    """In float64, detached.

    Raises ValueError for another number of dimensions, without rows or columns, and for values that are not finite.
    """
    if x.ndim != 2 or not x.numel():
        raise ValueError(f"`{name}` must be rows of activations, shape (n, d), none of them 0, got {tuple(x.shape)}.")
    if not bool(x.isfinite().all()):
        raise ValueError(f"`{name}` must be finite, and some of its values are not: leave those rows out.")
    return x.detach().to(wide(x.device))


def unit_columns(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Columns by the power of 2 that brings their largest entry to between 1/2 and 1: their squares are numbers whatever
    the unit is, and no bit changes that matters where they are standardised afterwards.

    >>> unit_columns(torch.tensor([[3e200, 0.0], [-1e200, 0.0]], dtype=torch.float64)).abs().amax(0) < 1
    tensor([True, True])
    """
    most = math.log2(torch.finfo(x.dtype).max) - 24
    exponent = (x.abs().amax(0).log2().floor() + 1).clamp(-most, most)
    return x * torch.full_like(exponent, 2.0) ** -exponent


def centred_columns(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Less their mean; 0 where what is left is rounding beside the column's size, so that a constant stays one.

    >>> centred_columns(torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 3.0]], dtype=torch.float64)).tolist()
    [[0.0, -1.0], [0.0, 0.0], [0.0, 1.0]]
    """
    centred = x - x.mean(0)
    return torch.where(centred.abs().amax(0) > 1e-12 * x.abs().amax(0), centred, 0.0)


def check_pairs(x: Tensor, y: Tensor) -> None:
    """Row by row, two arrays are of the same tokens."""
    if len(x) != len(y):
        raise ValueError(f"`x` and `y` must be of the same tokens, row by row, got {len(x)} and {len(y)} rows.")


def check_labels(name: str, labels: Tensor) -> None:
    """One integer per row, and at least one row."""
    if labels.ndim != 1 or not len(labels) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"`{name}` must hold one whole number per row, shape (n,), got {labels.dtype} of {tuple(labels.shape)}."
        )
