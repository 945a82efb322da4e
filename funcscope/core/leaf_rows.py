"""A leaf some rows at a time: what is as long as theta never exists as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .keys import BLOCK
from .layout import Leaf
from .vectors import PART


class Part(NamedTuple):
    """Some rows of a leaf: `leaf[rows]`."""

    rows: slice
    values: Tensor


def row_slices(leaf: Leaf) -> list[slice]:
    """The rows of a leaf in parts of about `PART` entries, on borders of blocks where that is possible.

    One part where a filter runs across the rows: its norm needs them all.
    """
    if leaf.filter_dim != 0 or leaf.numel <= PART:
        return [slice(0, leaf.shape[0] if leaf.shape else 1)]
    row = leaf.numel // leaf.shape[0]
    whole = BLOCK // math.gcd(BLOCK, row)  # rows after which a block ends, too
    step = max(1, PART // row)
    step = max(whole, step // whole * whole) if whole * row <= 2 * PART else step
    return [slice(first, min(first + step, leaf.shape[0])) for first in range(0, leaf.shape[0], step)]


def rows_of(value: Tensor, leaf: Leaf) -> Iterator[Part]:
    """A leaf's value, some rows at a time."""
    return (Part(rows, value[rows] if leaf.shape else value) for rows in row_slices(leaf))


def extent(leaf: Leaf, rows: slice) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Where some rows of a leaf begin and end in the flattened leaf, and their shape."""
    if not leaf.shape:
        return (0, 1), ()
    stride = leaf.numel // max(1, leaf.shape[0])
    return (rows.start * stride, rows.stop * stride), (rows.stop - rows.start, *leaf.shape[1:])


def joined(parts: Iterable[Part]) -> Tensor:
    """The leaf that the parts make up."""
    values = [part.values for part in parts]
    return values[0] if len(values) == 1 else torch.cat(values)
