r"""Positive semidefinite matrices of few vectors, $U U^\top$: damped solutions and any power without the matrix itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_positive
from ..core.estimate import wide
from ..core.pack import storable


def woodbury_solve(root: Float[Tensor, "d r"], y: Float[Tensor, "d *k"], damping: float) -> Float[Tensor, "d *k"]:
    r"""$(\lambda I + U U^\top)^{-1} Y$ through a system of size r: of use where r < d.

    $$(\lambda I + U U^\top)^{-1} Y = \tfrac1\lambda Y - \tfrac1{\lambda^2} U (I + \tfrac1\lambda U^\top U)^{-1} U^\top Y.$$

    root: U, (d, r). y: (d,) or (d, k). damping: $\lambda > 0$, in the units of $U U^\top$; ValueError otherwise. Computed in
    the dtype of y; what is of the span of U loses $\log_{10}(\lVert U \rVert^2 / \lambda)$ digits.

    Woodbury (1950); Golub and Van Loan (2013), 2.1.4.

    >>> woodbury_solve(torch.tensor([[1.0], [0.0]]), torch.tensor([2.0, 2.0]), damping=1.0).tolist()
    [1.0, 2.0]
    """
    check_positive("damping", damping)
    inner = torch.eye(root.shape[1]).to(root) + root.T @ root / damping
    moved = torch.linalg.solve(inner, root.T @ y)
    return y / damping - root @ moved / damping**2


def woodbury_power(
    root: Float[Tensor, "d r"], y: Float[Tensor, "d *k"], power: float, damping: float
) -> Float[Tensor, "d *k"]:
    r"""$(\lambda I + U U^\top)^p Y$ for any real p, from the eigenvalues $k_i$ and eigenvectors Q of $U^\top U$.

    $$(\lambda I + U U^\top)^p = \lambda^p I + U Q \, \mathrm{diag}\Big(\frac{(k_i + \lambda)^p - \lambda^p}{k_i}\Big)
      Q^\top U^\top,$$

    where $k_i = 0$ has the limit $p \lambda^{p-1}$. Arguments and errors as of `woodbury_solve`, which is p = -1. No power
    is left out: the gradient is never returned as it is for a p that is not 1 or -1.

    >>> woodbury_power(torch.tensor([[2.0], [0.0]]), torch.tensor([1.0, 1.0]), power=0.5, damping=5.0)
    tensor([3.0000, 2.2361])
    """
    check_positive("damping", damping)
    values, vectors = torch.linalg.eigh((root.T @ root).to(wide(root.device)))
    share = values.clamp(min=0) / damping
    # expm1 and log1p, for the small: the difference of two powers that are alike has no digits
    slope = torch.where(share > 0, torch.expm1(power * torch.log1p(share)) / share, power) * damping ** (power - 1)
    basis = root @ vectors.to(root)
    weights = slope.to(y).reshape(-1, *[1] * (y.ndim - 1))
    return damping**power * y + basis @ (weights * (basis.T @ y))


class Eigenbasis(NamedTuple):
    """Eigenvectors of the eigenvalues that are not 0 for want of vectors."""

    values: Tensor
    """(r,), ascending, float64 where the device has it."""
    vectors: Tensor
    """(d, r)"""


@storable
@dataclass(frozen=True, eq=False, repr=False)
class SecondMoment:
    """A mean of outer products r r' of vectors of length d: as a matrix, or as rows where they are fewer than d.

    >>> moment = SecondMoment.of(torch.tensor([[2.0, 0.0, 0.0]]), num=1)
    >>> moment.dim, float(moment.trace), moment.dense()[0].tolist()
    (3, 4.0, [4.0, 0.0, 0.0])
    """

    data: Tensor
    """(d, d): the matrix. (r, d) with r < d: rows whose outer products add up to it."""

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"], num: int) -> SecondMoment:
        """Of vectors, all others of the `num` being 0."""
        total = Scatter(rows.shape[1])
        total.add(rows)
        return total.mean(num, rows.dtype)

    @property
    def dim(self) -> int:
        return self.data.shape[1]

    @property
    def is_dense(self) -> bool:
        return self.data.shape[0] == self.dim

    @property
    def trace(self) -> Tensor:
        return self.data.trace() if self.is_dense else self.data.square().sum()

    def diagonal(self) -> Tensor:
        return self.data.diagonal() if self.is_dense else self.data.square().sum(0)

    def dense(self) -> Tensor:
        """(d, d)."""
        return self.data if self.is_dense else self.data.T @ self.data

    def times(self, x: Tensor) -> Tensor:
        """x M, for x of (..., d)."""
        return x @ self.data if self.is_dense else (x @ self.data.T) @ self.data

    @cached_property
    def eigen(self) -> Eigenbasis:
        """All d of a matrix; of r rows the r of their span, the other eigenvalues being 0. Negative ones are rounding: 0."""
        data = self.data.to(wide(self.data.device))
        if self.is_dense:
            values, vectors = torch.linalg.eigh(data)
            return Eigenbasis(values.clamp(min=0), vectors.to(self.data.dtype).contiguous())
        _, sigma, rows = torch.linalg.svd(data, full_matrices=False)
        return Eigenbasis(sigma.square().flip(0), rows.flip(0).T.to(self.data.dtype).contiguous())

    def power(self, x: Tensor, power: float, shift: float, scale: float = 1.0) -> Tensor:
        """x (scale M + shift I)^p, for x of (..., d). A shift of 0 needs p >= 0, or a matrix without the eigenvalue 0."""
        values, vectors = self.eigen
        moved = (scale * values + shift) ** power
        if self.is_dense:
            return (x @ vectors * moved.to(x)) @ vectors.T
        rest = shift**power
        return rest * x + (x @ vectors * (moved - rest).to(x)) @ vectors.T

    def logdet(self, shift: float, scale: float = 1.0) -> float:
        """Of scale M + shift I."""
        return float(log_sum(scale * self.eigen.values, self.dim, shift))


class Scatter:
    """A running sum of outer products: the rows themselves as long as they are fewer than their entries."""

    def __init__(self, dim: int):
        self.dim, self.rows, self.num = dim, list[Tensor](), 0
        self.total: Tensor | None = None

    def add(self, rows: Float[Tensor, "n d"]) -> None:
        """Products in the dtype of the rows, sums in float64 where the device has it."""
        self.num += len(rows)
        self.rows.append(rows)
        if self.num >= self.dim:
            for each in self.rows:
                made = square(each.T).to(wide(each.device))
                self.total = made if self.total is None else self.total.add_(made)
            self.rows = []

    def mean(self, num: int, dtype: torch.dtype) -> SecondMoment:
        """The sum over num."""
        if self.total is not None:
            return SecondMoment((self.total / max(num, 1)).to(dtype))
        return SecondMoment((torch.cat(self.rows) / max(num, 1) ** 0.5).to(dtype))


def square(a: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """a a', of which a quarter is a copy of another."""
    half = len(a) // 2
    out = torch.empty(len(a), len(a), dtype=a.dtype, device=a.device)
    torch.mm(a[:half], a.T, out=out[:half])
    out[half:, :half] = out[:half, half:].T
    torch.mm(a[half:], a[half:].T, out=out[half:, half:])
    return out


def log_sum(values: Tensor, num: int, shift: float) -> Tensor:
    """sum of log(eigenvalue + shift), of which num - len(values) are those of 0."""
    whole = torch.log(values + shift).sum()
    missing = num - values.numel()
    return whole + missing * torch.log(torch.tensor(shift).to(whole)) if missing else whole
