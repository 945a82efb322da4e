"""The loss on a line through theta whose points exist a leaf at a time, and its derivatives there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from ..core.layout import Leaf, Params
from ..core.leaf_rows import Part, rows_of
from ..core.objective import Loss
from ..core.restrict import LeafDirection, Leaves, moved_leaf, moved_rows
from ..core.vectors import dot
from ..core.vectors import norm as norm_of
from .leafwise import Terms
from .pullbacks import ONE_AT_A_TIME, named_if_missing


@dataclass(frozen=True, eq=False)
class LeafLine:
    """The points theta + a c v: `lines.Line` at the memory of the largest leaf.

    params: theta as it is stored; points are made in the dtype of v and rounded to those that the model computes in.
    """

    loss: Loss
    params: Params
    v: LeafDirection
    c: float = 1.0

    def times(self, factor: float) -> LeafLine:
        return replace(self, c=self.c * factor)

    @property
    def norm(self) -> float:
        return abs(self.c) * self.v.norm

    def inner(self, other: Any) -> float:
        r"""The inner product with a multiple of the same direction."""
        return self.c * other.c * self.v.norm**2

    @cached_property
    def base_norm(self) -> float:
        return norm_of(self.params)

    def terms(self, a: float = 1.0) -> Terms:
        """The terms at one point; no row of v is made at a = 0."""
        by_name = self.loss.layout.by_name

        def leaf(name: str, _: Tensor) -> Tensor:
            value, dtype = self.params[name], by_name[name].dtype
            return moved_leaf(value, [a * self.c], [self.v.parts(name)], dtype) if a else value.to(dtype)

        def rows(name: str, _: Tensor) -> Iterator[Part]:
            value = self.params[name]
            return moved_rows(value, [a * self.c], [self.v.parts(name)]) if a else rows_of(value, by_name[name])

        with torch.no_grad():
            return Terms(*(x.cpu().double() for x in self.loss.terms_at_leaves(leaf, rows)))

    def slope(self, weight: float) -> float:
        """The slope at theta, by a `jvp` for each batch."""
        with named_if_missing(self.loss, "a slope needs forward derivatives"), ONE_AT_A_TIME:
            return self.c * sum(float(slopes(line)[0].sum()) for line in self._batch_lines) / weight

    def curvature(self, weight: float) -> float:
        r"""$v^\top H v / \|v\|^2$, by `jvp` of `jvp`."""
        missing = named_if_missing(self.loss, "the curvature needs forward derivatives")
        with (
            missing,
            ONE_AT_A_TIME,
            torch.enable_grad(),
        ):  # without it torch takes formulas that have no derivative (SiLU)
            bent = sum(float(second_derivatives(line)[0].sum()) for line in self._batch_lines)
        return bent / weight / self.v.norm**2

    def displacement(self) -> float:
        """The distance of theta and the point at a = 1, both rounded to the dtypes that the model computes in."""
        total = 0.0
        for leaf, x, v in self._pieces():
            there = torch.add(x.to(v.dtype), v, alpha=self.c).to(leaf.dtype).to(v.dtype)
            gap = there - x.to(leaf.dtype).to(v.dtype)
            total += dot(gap, gap)
        return total**0.5

    def rounding(self, level: float) -> float:
        """`leafwise.rounding_of_difference`, where v is the gradient."""
        total = 2 * self.loss.net.unit_roundoff * abs(level)
        for leaf, x, v in self._pieces():
            roundoff = max(torch.finfo(leaf.dtype).eps, torch.finfo(v.dtype).eps) / 2
            total += roundoff * dot(x.to(v.dtype).abs(), v.abs())
        return total

    @property
    def _batch_lines(self) -> Iterator[BatchLine]:
        return (BatchLine(self.loss, self.params, self.v, batch) for batch in self.loss.batches)

    def _pieces(self) -> Iterator[tuple[Leaf, Tensor, Tensor]]:
        for leaf in self.loss.layout.leaves:
            pairs = zip(rows_of(self.params[leaf.name].detach(), leaf), self.v.parts(leaf.name), strict=True)
            yield from ((leaf, x, v) for (_, x), (_, v) in pairs)


class BatchLine:
    """One batch's outputs on the line through theta along a direction."""

    def __init__(self, loss: Loss, params: Params, direction: Leaves, batch: tuple[Any, Any]):
        self.loss, self.params, self.direction, (self.inputs, self.targets) = loss, params, direction, batch

    def outputs(self, a: Tensor) -> Tensor:
        def leaf(name: str, _: Tensor) -> Tensor:
            dtype = self.loss.layout.by_name[name].dtype
            return moved_leaf(self.params[name], [a], [self.direction.parts(name)], dtype)

        def rows(name: str, _: Tensor) -> Iterator[Part]:
            return moved_rows(self.params[name], [a], [self.direction.parts(name)])

        return self.loss.net.apply_leaves(leaf, self.inputs, rows)

    def terms(self, a: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss.scored(lambda _: self.outputs(a), self.inputs, self.targets)

    @property
    def ends(self) -> tuple[tuple[Tensor], tuple[Tensor]]:
        zero = torch.zeros((), device=self.loss.net.device)
        return (zero,), (torch.ones_like(zero),)


def slopes(line: BatchLine) -> tuple[Tensor, Tensor]:
    """The first derivative of the summed losses of each sequence, and its weight."""
    _, moved, weights = jvp(line.terms, *line.ends, has_aux=True)
    return moved, weights


def second_derivatives(line: BatchLine) -> tuple[Tensor, Tensor]:
    """The second derivative of the summed losses of each sequence, and its weight."""

    def slope(a: Tensor) -> tuple[Tensor, Tensor]:
        _, moved, weights = jvp(line.terms, (a,), line.ends[1], has_aux=True)
        return moved, weights

    _, curved, weights = jvp(slope, *line.ends, has_aux=True)
    return curved, weights
