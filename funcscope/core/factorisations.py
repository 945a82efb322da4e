"""Determinants, solutions of linear systems and products of reflections, from factors that are differentiated themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten, linalg = torch.ops.aten, torch.linalg


def _slogdet(A: Tensor) -> Any:
    """Sign and log |det| as torch returns them. A singular matrix: a sign of 0, -inf, and no derivative."""
    even, pivots = _pivots(A)
    pair = (even * pivots.sgn().prod(-1), pivots.abs().log().sum(-1))
    return torch.return_types.linalg_slogdet(pair)  # type: ignore[attr-defined]


def _det(A: Tensor) -> Tensor:
    even, pivots = _pivots(A)
    return even * pivots.prod(-1)


def _logdet(A: Tensor) -> Tensor:
    sign, log = _slogdet(A)
    return torch.where(sign < 0, torch.nan, log)


def _pivots(A: Tensor) -> tuple[Tensor, Tensor]:
    """A = P L U: the determinant of P, which is no function to differentiate, and the diagonal of U."""
    LU, swaps = linalg.lu_factor(A)
    row = torch.arange(1, A.shape[-1] + 1, dtype=swaps.dtype, device=A.device)
    odd = (swaps != row).sum(-1) % 2
    return (1 - 2 * odd).to(A.dtype), LU.diagonal(dim1=-2, dim2=-1)


def _solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    """Raises torch's own error for a singular matrix."""
    vector = B.ndim == 1 or (B.ndim == A.ndim - 1 and B.shape == A.shape[:-1])
    X = linalg.lu_solve(*linalg.lu_factor(A), B[..., None] if vector else B, left=left)
    return X[..., 0] if vector else X


def _solve_ex(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False) -> Any:
    _, info = linalg.solve_ex(A.detach(), B.detach(), left=left, check_errors=check_errors)
    return torch.return_types.linalg_solve_ex((_solve(A, B, left=left), info))  # type: ignore[attr-defined]


def _tensorsolve(A: Tensor, B: Tensor, dims: Any = None) -> Tensor:
    if dims is not None:
        return linalg.tensorsolve(A, B, dims)
    return _solve(A.reshape(B.numel(), -1), B.reshape(-1)).reshape(A.shape[B.ndim :])


def _triangular_solve(
    b: Tensor, A: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> Any:
    T = A.mT if transpose else A
    X = linalg.solve_triangular(T, b, upper=upper != transpose, unitriangular=unitriangular)
    return torch.return_types.triangular_solve((X, A.clone()))


def _cholesky_inverse(L: Tensor, upper: bool = False) -> Tensor:
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    Y = linalg.solve_triangular(L, eye, upper=upper)
    return Y @ Y.mH if upper else Y.mH @ Y


def _householder_product(A: Tensor, tau: Tensor) -> Tensor:
    """The first columns of the product of I - tau_i v_i v_i', v_i the i-th column below the diagonal under a 1."""
    m, n, k = *A.shape[-2:], tau.shape[-1]
    eye = torch.eye(m, n, dtype=A.dtype, device=A.device)
    V = A.tril(-1)[..., :k] + torch.eye(m, k, dtype=A.dtype, device=A.device)
    Q = eye.expand(*A.shape[:-2], m, n)
    for i in reversed(range(k)):
        v = V[..., i : i + 1]
        Q = Q - tau[..., i, None, None] * (v @ (v.mH @ Q))
    return Q


TABLE: list[tuple[Callable, tuple[Any, ...]]] = [
    (_det, (torch.det, linalg.det, Tensor.det, aten.det, aten.linalg_det)),
    (_logdet, (torch.logdet, Tensor.logdet, aten.logdet)),
    (_slogdet, (torch.slogdet, linalg.slogdet, Tensor.slogdet, aten.slogdet, aten.linalg_slogdet)),
    (_solve, (linalg.solve, aten.linalg_solve)),
    (_solve_ex, (linalg.solve_ex, aten.linalg_solve_ex)),
    (_tensorsolve, (linalg.tensorsolve, aten.linalg_tensorsolve)),
    (_triangular_solve, (torch.triangular_solve, Tensor.triangular_solve, aten.triangular_solve)),
    (_cholesky_inverse, (torch.cholesky_inverse, Tensor.cholesky_inverse, aten.cholesky_inverse)),
    (_householder_product, (linalg.householder_product, torch.orgqr, Tensor.orgqr, aten.linalg_householder_product)),
]
