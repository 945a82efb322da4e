"""Which entries are the largest in magnitude: exactly as many as asked, in one tensor or over many that are seen in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import chain, islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.checks import check_number
from ..core.pack import storable

DIGIT = 16
"""Bits of a magnitude that are looked at in one pass."""


@storable
class Cut(NamedTuple):
    """Entries of a magnitude above `least` are kept, and the first `num_equal` of those that equal it."""

    least: float
    num_equal: int

    def mask(self, x: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Those that are kept of a tensor."""
        size = x.abs().flatten()
        mask = size >= self.least
        equal = (size == self.least).nonzero()[:, 0]
        mask[equal[self.num_equal :]] = False
        return mask.view(x.shape)

    def behind(self, x: Float[Tensor, "..."]) -> Cut:
        """The cut for what comes behind this tensor: fewer equal ones are left."""
        return self._replace(num_equal=max(0, self.num_equal - int((x.abs() == self.least).sum())))


def num_kept(num: int, density: float) -> int:
    r"""$\max(1, \lfloor d n + 1/2 \rfloor)$: how many of n are a share of d. Raises ValueError for d outside (0, 1].

    >>> num_kept(10, 0.25), num_kept(2, 0.1)
    (3, 1)
    """
    check_number("density", density, 0.0, 1.0)
    if density == 0:
        raise ValueError("`density` must be a share above 0, up to 1, got 0: nothing would be left of a task vector.")
    return max(1, math.floor(density * num + 0.5))


def largest(x: Float[Tensor, "..."], density: float) -> Bool[Tensor, "..."]:
    """True for `num_kept` entries of the largest magnitudes; of those that equal the last of them, the first.

    >>> largest(torch.tensor([1.0, -3.0, 2.0, -2.0]), 0.5)
    tensor([False,  True,  True, False])
    """
    num = num_kept(x.numel(), density)
    if num >= x.numel():
        return torch.ones_like(x, dtype=torch.bool)
    size = x.abs().flatten()
    least = size.kthvalue(len(size) - num + 1).values
    return Cut(float(least), num - int((size > least).sum())).mask(x)


def global_cut(tensors: Callable[[], Iterable[Float[Tensor, "..."]]], density: float) -> Cut:
    r"""The cut that keeps exactly `num_kept` of the entries of many tensors together, which are never in memory at once.

    tensors: called once per pass, always with the same tensors in the same order, all of one dtype, float32 or float64.
    Bits of a positive float are ordered as the numbers are: each of two (float32) or four (float64) passes counts 16 of
    them, from the highest, among the entries whose bits above are those of the cut. Equal magnitudes are kept in the order
    of the tensors: `cut.mask(x)`, then `cut = cut.behind(x)` for the next.

    Raises ValueError where there is no entry, and for another dtype.

    >>> parts = [torch.tensor([1.0, -3.0]), torch.tensor([2.0, 2.0])]
    >>> global_cut(lambda: parts, 0.5)
    Cut(least=2.0, num_equal=1)
    """
    given = iter(tensors())
    first = list(islice(given, 1))
    width = torch.finfo(first[0].dtype).bits if first else 0
    if width not in _FLOATS:
        raise ValueError(f"`tensors` must be one or more, of float32 or float64, got {width or 'no'} bits.")
    prefix, rest = 0, 0
    for shift in range(width - DIGIT, -1, -DIGIT):
        counts = torch.zeros(2**DIGIT, dtype=torch.int64)
        for each in tensors() if rest else chain(first, given):
            codes = _codes(each, width)
            digits = (codes[codes >> (shift + DIGIT) == prefix] >> shift) & (2**DIGIT - 1) if rest else codes >> shift
            counts += torch.bincount(digits, minlength=2**DIGIT).cpu()
        rest = rest or num_kept(int(counts.sum()), density)
        from_here = counts.flip(0).cumsum(0).flip(0)
        digit = int((from_here >= rest).nonzero().max())
        rest -= int(from_here[digit] - counts[digit])
        prefix = (prefix << DIGIT) | digit
    return Cut(float(torch.tensor(prefix, dtype=_CODES[width]).view(_FLOATS[width])), rest)


_FLOATS = {32: torch.float32, 64: torch.float64}
_CODES = {32: torch.int32, 64: torch.int64}


def _codes(x: Tensor, width: int) -> Tensor:
    """Magnitudes as integers of the same order."""
    return x.abs().flatten().to(_FLOATS[width]).view(_CODES[width])
