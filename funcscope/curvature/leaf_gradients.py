r"""The gradients of many sequences in one parameter, as sums of products that are not multiplied out.

A parameter of shape (r, ...) is a matrix of r rows and c columns here. The gradient of sequence b is a sum over positions of
$u_t v_t^\top$, or of $e_{i(t)} v_t^\top$ for a table, or it is there as a whole; several uses of one parameter add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.estimate import wide
from ..linalg.low_rank import square

AT_ONCE, LEAST = 1 << 20, 16
"""Numbers that are multiplied out at one time, and rows of the parameter at least: what a cache holds."""


class Outer(NamedTuple):
    """sum_t left_t right_t'."""

    left: Tensor
    """(n, t, r)"""
    right: Tensor
    """(n, t, c)"""


class Lookup(NamedTuple):
    """sum_t e_{ids_t} right_t', where e are unit vectors."""

    ids: Tensor
    """(n, t)"""
    right: Tensor
    """(n, t, c)"""


class Rows(NamedTuple):
    """The gradients themselves."""

    value: Tensor
    """(n, r c)"""


Part = Outer | Lookup | Rows


class LeafGradients(NamedTuple):
    """Gradients of n sequences in one parameter."""

    parts: list[Part]
    shape: tuple[int, int]
    """Rows and columns of the parameter."""

    @classmethod
    def of(cls, parts: list[Part], shape: tuple[int, ...]) -> LeafGradients:
        """Uses of one kind become one, with their positions side by side; in float32 at least."""
        rows = shape[0] if len(shape) > 1 else 1
        num = max(1, torch.Size(shape).numel())
        parts = [type(part)(*map(_widened, part)) for part in parts]
        made: list[Part] = []
        for kind in (Outer, Lookup):
            same = [part for part in parts if isinstance(part, kind)]
            made += [kind(*(torch.cat(each, 1) for each in zip(*same, strict=True)))] if len(same) > 1 else same
        whole = [part.value for part in parts if isinstance(part, Rows)]
        return cls([*made, *([Rows(torch.stack(whole).sum(0))] if whole else [])], (rows, num // rows))

    @property
    def num(self) -> int:
        return len(self.parts[0][0])

    def row(self, i: int) -> Tensor:
        """The gradient of one sequence, flat."""
        one = LeafGradients([type(part)(*(x[i : i + 1] for x in part)) for part in self.parts], self.shape)
        return one.dense(slice(None), slice(None)).flatten()

    def weighted(self, factors: Tensor) -> Tensor:
        """The sum of all gradients, times these factors, flat."""
        parts: list[Part] = []
        for part in self.parts:
            scaled = part[-1] * factors.to(part[-1]).reshape(-1, *[1] * (part[-1].ndim - 1))
            if isinstance(part, Rows):
                parts.append(Rows(scaled.sum(0, keepdim=True)))
            else:
                parts.append(type(part)(part[0].flatten(0, 1)[None], scaled.flatten(0, 1)[None]))
        return LeafGradients(parts, self.shape).dense(slice(None), slice(None)).flatten()

    def dense(self, rows: slice, cols: slice, out: Tensor | None = None) -> Tensor:
        """(n, r', c'): that part of every gradient. out: a buffer that is long enough, used in the place of new memory."""
        size = self.num, *(len(range(*s.indices(n))) for s, n in zip((rows, cols), self.shape, strict=True))
        like = next(x for part in self.parts for x in part if x.is_floating_point())
        made = like.new_empty(size) if out is None else out[: math.prod(size)].view(size)
        outer = [part for part in self.parts if isinstance(part, Outer)]
        if outer:
            torch.bmm(outer[0].left[:, :, rows].transpose(1, 2), outer[0].right[:, :, cols], out=made)
        else:
            made.zero_()
        for part in self.parts:
            if isinstance(part, Lookup):
                _look_up(part, rows, cols, made, self.shape[0])
            elif isinstance(part, Rows):
                made += part.value.unflatten(1, self.shape)[:, rows, cols]
        return made

    def gram(self, other: LeafGradients, rows: slice, cols: slice) -> Tensor:
        """(n, m), wide: inner products of those parts of the gradients."""
        one, two = self.parts, other.parts
        num_rows, num_cols = (len(range(*s.indices(n))) for s, n in zip((rows, cols), self.shape, strict=True))
        if len(one) == len(two) == 1 and isinstance(one[0], Outer) and isinstance(two[0], Outer):
            positions = one[0].left.shape[1] * two[0].left.shape[1]
            if positions * (num_rows + num_cols) <= num_rows * num_cols:
                return _by_positions(one[0], two[0], rows, cols)
        out = torch.zeros(self.num, other.num, dtype=wide(self.device), device=self.device)
        one_, two_ = (self, other) if other is not self else (self, self)
        tables = _compressed(one_, two_, rows)
        if tables is not None:
            one_, two_, rows = *tables, slice(None)
        buffers: list[Tensor | None] = [None, None]
        for part in row_chunks(rows, one_.shape[0], num_cols * max(self.num, other.num)):
            a = one_.dense(part, cols, buffers[0])
            b = a if two_ is one_ else two_.dense(part, cols, buffers[1])
            buffers = [x.flatten() if old is None else old for x, old in zip((a, b), buffers, strict=True)]
            out += square(a.flatten(1)) if b is a else a.flatten(1) @ b.flatten(1).T
        return out

    def squares(self, rows: slice, cols: slice) -> Tensor:
        """(n,), wide: squared lengths of those parts of the gradients."""
        (first, *more), (num_rows, num_cols) = self.parts, self.shape
        if not more and isinstance(first, Outer) and first.left.shape[1] * (num_rows + num_cols) <= num_rows * num_cols:
            left, right = first.left[:, :, rows], first.right[:, :, cols]
            both = torch.bmm(left, left.transpose(1, 2)) * torch.bmm(right, right.transpose(1, 2))
            return both.sum((1, 2), dtype=wide(self.device)).clamp(min=0)
        out = torch.zeros(self.num, dtype=wide(self.device), device=self.device)
        buffer: Tensor | None = None
        for part in row_chunks(rows, num_rows, num_cols * self.num):
            made = self.dense(part, cols, buffer)
            buffer = made.flatten() if buffer is None else buffer
            out += torch.linalg.vector_norm(made, dim=(1, 2), dtype=wide(self.device)).square()
        return out

    @property
    def device(self) -> torch.device:
        return self.parts[0][0].device

    def smaller(self) -> LeafGradients:
        """The same in the form that takes less memory."""
        stored = sum(x.numel() for part in self.parts for x in part)
        if stored <= self.num * self.shape[0] * self.shape[1]:
            return self
        return LeafGradients([Rows(self.dense(slice(None), slice(None)).flatten(1))], self.shape)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def _by_positions(one: Outer, two: Outer, rows: slice, cols: slice) -> Tensor:
    """sum_{t, s} (left_t . left_s) (right_t . right_s), a few sequences at a time."""
    (n, t, _), (m, s, _) = one.left.shape, two.left.shape
    lefts, rights = two.left[:, :, rows].flatten(0, 1).T, two.right[:, :, cols].flatten(0, 1).T
    out, size = [], max(1, 4 * AT_ONCE // (t * m * s))
    for at in range(0, n, size):
        left = one.left[at : at + size, :, rows].flatten(0, 1) @ lefts
        right = one.right[at : at + size, :, cols].flatten(0, 1) @ rights
        out.append((left * right).view(-1, t, m, s).sum((1, 3), dtype=wide(left.device)))
    return torch.cat(out)


def _look_up(part: Lookup, rows: slice, cols: slice, out: Tensor, num_rows: int) -> None:
    """Adds to `out` what belongs to those rows."""
    start, stop, _ = rows.indices(num_rows)
    sample, position = ((part.ids >= start) & (part.ids < stop)).nonzero(as_tuple=True)
    places = part.ids[sample, position] - start
    out.index_put_((sample, places), part.right[sample, position][:, cols], accumulate=True)


def _compressed(one: LeafGradients, two: LeafGradients, rows: slice) -> tuple[LeafGradients, LeafGradients] | None:
    """Tables with those rows only that both look up."""
    if rows != slice(None) or not all(len(x.parts) == 1 and isinstance(x.parts[0], Lookup) for x in (one, two)):
        return None
    used = [x.parts[0][0].unique() for x in (one, two)]
    both = used[0] if one is two else used[0][torch.isin(used[0], used[1])]
    if not len(both):
        both = used[0][:1]
    first, second = (_only(x, both) for x in (one, two))
    return (first, first) if one is two else (first, second)


def _only(x: LeafGradients, ids: Tensor) -> LeafGradients:
    part = x.parts[0]
    assert isinstance(part, Lookup)
    places = torch.searchsorted(ids, part.ids.contiguous()).clamp(max=len(ids) - 1)
    places = torch.where(ids[places] == part.ids, places, -1)
    return LeafGradients([Lookup(places, part.right)], (len(ids), x.shape[1]))


def row_chunks(rows: slice, num: int, width: int) -> Iterator[slice]:
    start, stop, _ = rows.indices(num)
    size = max(LEAST, AT_ONCE // max(width, 1))
    return (slice(at, min(at + size, stop)) for at in range(start, stop, size))
