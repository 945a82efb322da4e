r"""Kronecker products $c\, G \otimes A$ of two second moments, as they act on matrices: $V \mapsto c\, G V A$."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_number
from ..core.pack import storable
from .low_rank import SecondMoment, log_sum


@storable
@dataclass(frozen=True, eq=False, repr=False)
class Kronecker:
    r"""$c\, G \otimes A$ on matrices V of (o, i), flattened row by row: $\mathrm{vec}(V) \mapsto \mathrm{vec}(c\, G V A)$.

    Row by row, as torch flattens, the product is G (x) A; column by column, as most papers write it, A (x) G. With `values`
    the eigenvectors are those, and the eigenvalues are given (EKFAC).

    >>> one = Kronecker(SecondMoment(2 * torch.eye(2)), SecondMoment(torch.eye(1)), scale=3.0)
    >>> one.times(torch.ones(1, 2)).tolist(), float(one.trace)
    ([[6.0, 6.0]], 12.0)
    """

    a: SecondMoment
    g: SecondMoment
    scale: float
    values: Tensor | None = None
    """(eigenvectors of G, of A): eigenvalues in the place of the products, c included."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.g.dim, self.a.dim

    @property
    def num(self) -> int:
        return self.g.dim * self.a.dim

    @cached_property
    def eigenvalues(self) -> Float[Tensor, "p q"]:
        """Of the eigenvectors that the factors have; all others are 0."""
        if self.values is not None:
            return self.values
        return self.scale * torch.outer(self.g.eigen.values, self.a.eigen.values)

    @property
    def is_singular(self) -> bool:
        """Eigenvalues that are 0, or are not above the rounding of the largest."""
        values = self.eigenvalues
        least = torch.finfo(self.a.data.dtype).eps * float(values.max()) if values.numel() else 0.0
        return values.numel() < self.num or bool((values <= least).any())

    @property
    def trace(self) -> Tensor:
        return self.scale * self.a.trace * self.g.trace if self.values is None else self.values.sum()

    def diagonal(self) -> Float[Tensor, "o i"]:
        """The entries on the diagonal, at their places in V."""
        if self.values is None:
            return self.scale * torch.outer(self.g.diagonal(), self.a.diagonal())
        squares = [side.eigen.vectors.square() for side in (self.g, self.a)]
        return squares[0] @ self.values.to(squares[0]) @ squares[1].T

    def times(self, v: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """The product with v."""
        self._check(v)
        if self.values is None:
            return self.scale * self.g.times(self.a.times(v).mT).mT
        return self._back(self.values.to(v) * self._rotated(v))

    def power(self, v: Float[Tensor, "o i"], power: float, damping: float) -> Float[Tensor, "o i"]:
        r"""$(c\, G \otimes A + \lambda I)^p$, exactly, in the basis of the factors' eigenvectors."""
        self._check(v, damping)
        if power < 0 and damping == 0 and self.is_singular:
            raise ValueError("`damping` must be above 0 for a negative power of a singular product, got 0.")
        moved = (self.eigenvalues + damping) ** power
        if self.eigenvalues.numel() == self.num:
            return self._back(moved.to(v) * self._rotated(v))
        rest = damping**power
        return rest * v + self._back((moved - rest).to(v) * self._rotated(v))

    def quadratic(self, v: Float[Tensor, "o i"], power: float, damping: float) -> Float[Tensor, ""]:
        r"""$\langle V, (c\, G \otimes A + \lambda I)^p V \rangle$; of p = 1, $c\, \mathrm{tr}(V^\top G V A)$ at first."""
        if self.values is None and power == 1:
            return (v * self.times(v)).sum() + damping * v.square().sum()
        return (v * self.power(v, power, damping)).sum()

    def logdet(self, damping: float) -> float:
        check_number("damping", damping, 0.0)
        return float(log_sum(self.eigenvalues, self.num, damping))

    def pi_shifts(self, damping: float) -> tuple[float, float]:
        r"""What is added to A and to c G: $\pi \sqrt\lambda$ and $\sqrt\lambda / \pi$.

        $\pi = \sqrt{(\mathrm{tr} A / \dim A) / (c\, \mathrm{tr} G / \dim G)}$, so that each gets the same share of its mean
        eigenvalue; 1 where one of the traces is 0, and any would do. Martens and Grosse (2015), 6.3.
        """
        check_number("damping", damping, 0.0)
        mean_a, mean_g = float(self.a.trace) / self.a.dim, self.scale * float(self.g.trace) / self.g.dim
        pi = math.sqrt(mean_a / mean_g) if mean_a > 0 and mean_g > 0 else 1.0
        return pi * math.sqrt(damping), math.sqrt(damping) / pi

    def pi_power(self, v: Float[Tensor, "o i"], power: float, damping: float) -> Float[Tensor, "o i"]:
        r"""$(c G + \sqrt\lambda/\pi\, I)^p\, V\, (A + \pi \sqrt\lambda\, I)^p$: damped factor by factor."""
        self._check(v)
        to_a, to_g = self.pi_shifts(damping)
        return self.g.power(self.a.power(v, power, to_a).mT, power, to_g, self.scale).mT

    def pi_logdet(self, damping: float) -> float:
        to_a, to_g = self.pi_shifts(damping)
        return self.g.dim * self.a.logdet(to_a) + self.a.dim * self.g.logdet(to_g, self.scale)

    def _check(self, v: Tensor, damping: float = 0.0) -> None:
        if v.shape != self.shape:
            raise ValueError(f"`v` must be a matrix of shape {self.shape}, got {tuple(v.shape)}.")
        check_number("damping", damping, 0.0)

    def _rotated(self, v: Tensor) -> Tensor:
        return self.g.eigen.vectors.to(v).T @ v @ self.a.eigen.vectors.to(v)

    def _back(self, v: Tensor) -> Tensor:
        return self.g.eigen.vectors.to(v) @ v @ self.a.eigen.vectors.to(v).T
