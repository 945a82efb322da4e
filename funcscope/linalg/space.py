"""Where the vectors of a matvec live: on one device, or in shares on the ranks of a process group."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_instance
from ..core.keys import Distribution, Key, random
from ..core.vectors import dot


@runtime_checkable
class Space(Protocol):
    """What an algorithm asks of vectors that it does not hold as a whole; `core.shares.Shares` is one."""

    @property
    def num(self) -> int:
        """The dimension, P."""

    @property
    def like(self) -> Tensor:
        """A vector of the length that is held here, for its dtype and device."""

    def draw(self, key: Key, distribution: Distribution) -> Tensor:
        """The part of a random vector that is held here."""

    def dot(self, x: Tensor, y: Tensor) -> float:
        """The inner product of two vectors."""

    def summed(self, x: Tensor) -> Tensor:
        """Sums over what is held here, float64 on the CPU -> over the whole vectors."""


Like = Float[Tensor, " p"] | Space
"""A vector of shape (P,), for dtype and device; or the space of shares of such vectors, `net.shares`."""


class Whole:
    """The space of vectors that are held as a whole.

    >>> Whole(torch.zeros(3)).dot(torch.ones(3), torch.ones(3))
    3.0
    """

    def __init__(self, like: Float[Tensor, " p"]):
        self.like, self.num = like, len(like)

    def draw(self, key: Key, distribution: Distribution) -> Tensor:
        return random(key, self.like, distribution)

    def dot(self, x: Tensor, y: Tensor) -> float:
        return dot(x, y)

    def summed(self, x: Tensor) -> Tensor:
        return x


def space_of(like: Like) -> Space:
    """The space of `like`: flat, with at least one entry, of float32 or float64, in which a basis stays orthogonal."""
    if not isinstance(like, Tensor) and isinstance(like, Space):
        return like
    check_like(like)
    return Whole(like)


def check_like(like: object) -> None:
    """`like` is a flat vector with at least one entry, of float32 or float64: in those a basis stays orthogonal."""
    if not isinstance(like, Tensor) and isinstance(like, Space):
        raise ValueError(
            "`like` is the space of vectors on several ranks, and this algorithm takes whole vectors: `hutchinson_trace`, "
            "`eigenpairs` and `spectral_density` take shares of them."
        )
    check_instance("like", like, Tensor, "`net.theta`, or `net.layout.ravel(params)`")
    assert isinstance(like, Tensor)
    if like.ndim != 1 or len(like) == 0:
        raise ValueError(f"`like` must be a flat vector with at least one entry, got shape {tuple(like.shape)}.")
    if like.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"`like` must be float32 or float64, got {like.dtype}: keep a wide vector, cast in the matvec.")
