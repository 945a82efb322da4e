"""The loss on a line through theta: what every sharpness along a direction asks of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..core import vectors
from ..core.objective import Loss
from ..core.vectors import Leaves, inner, moved
from .leafwise import Terms, curvature_along, realised_norm, rounding_of_difference, slope_along, terms_at


@dataclass(frozen=True, eq=False)
class Line:
    """The points theta + a v, v and the point in memory as a whole; `leaf_lines.LeafLine` has them a leaf at a time."""

    loss: Loss
    at: Leaves
    v: Leaves

    def times(self, factor: float) -> Line:
        return replace(self, v={k: x * factor for k, x in self.v.items()})

    @cached_property
    def norm(self) -> float:
        return vectors.norm(self.v)

    @cached_property
    def base_norm(self) -> float:
        return vectors.norm(self.at)

    def inner(self, other: Any) -> float:
        """The inner product with another line's v."""
        return inner(self.v, other.v)

    def terms(self, a: float = 1.0) -> Terms:
        return terms_at(self.loss, moved(self.at, self.v, a) if a else self.at)

    def slope(self, weight: float) -> float:
        """The slope at theta."""
        return slope_along(self.loss, self.at, self.v, weight)

    def curvature(self, weight: float) -> float:
        r"""$v^\top H v / \|v\|^2$."""
        return curvature_along(self.loss, self.at, self.times(1 / self.norm).v, weight)

    def displacement(self) -> float:
        """The distance of theta and the point at a = 1, both rounded to the dtypes that the model computes in."""
        return realised_norm(self.loss, self.at, moved(self.at, self.v))

    def rounding(self, level: float) -> float:
        """`leafwise.rounding_of_difference`, where v is the gradient."""
        return rounding_of_difference(self.loss, self.at, self.v, level)
