"""Conjugate gradients: the solution of a symmetric positive definite system, known by its products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count, check_flat, check_positive
from ..core.directions import dot
from ..core.result import Result, internal, quantity
from .algebra import check_like
from .matvec import Matvec, Products

Status = Literal["converged", "max_steps", "negative_curvature", "stagnated"]


class Solution(Result):
    """What conjugate gradients found, and how they ended."""

    x: Float[Tensor, " p"] = internal()
    residual: float = quantity("relative residual")
    """$\\|b - (A + \\lambda I) x\\| / \\|b\\|$, from a product with x itself, not from the recursion; 0 for b = 0."""
    num_matvecs: int
    status: Status
    direction: Float[Tensor, " p"] | None = internal(default=None)
    """With `negative_curvature`: the direction p along which the steps ended."""
    curvature: float | None = quantity("curvature of the direction", default=None)
    """With `negative_curvature`: $p^\\top (A + \\lambda I) p / p^\\top p \\le 0$; an upper bound of the least eigenvalue."""

    @property
    def head(self) -> str:
        return f"{self.status.replace('_', ' ')}: {len(self.x)} unknowns, {self.num_matvecs} products"


def conjugate_gradient(
    matvec: Matvec,
    b: Float[Tensor, " p"],
    *,
    damping: float = 0.0,
    tol: float = 1e-6,
    max_steps: int | None = None,
    x0: Float[Tensor, " p"] | None = None,
    preconditioner: Matvec | None = None,
) -> Solution:
    r"""The x with $(A + \lambda I) x = b$, for a symmetric A with $A + \lambda I$ positive definite.

    Step n has the least error in the norm of $A + \lambda I$ over the first n Krylov vectors; with condition number
    $\kappa$ this error falls by $(\sqrt\kappa - 1)/(\sqrt\kappa + 1)$ or more a step.

    b, x0: (P,), x0 = 0 by default; x has dtype and device of b. damping: $\lambda \ge 0$, in the units of A.
    tol: on $\|b - (A + \lambda I)x\| / \|b\|$. max_steps: by default the smaller of 10 P and 1,000. preconditioner:
    products with a symmetric positive definite approximation of the inverse of $A + \lambda I$.

    status: `converged`: the true residual, with a product of its own, is at most tol; where the recursion says so and
    the product does not, the steps start again from the true residual. `stagnated`: such a start did not halve it:
    the dtype's rounding, about epsilon times $\kappa$, is above tol. `max_steps`: x is the last iterate.
    `negative_curvature`: a direction with $p^\top(A + \lambda I)p \le 0$ was met: the matrix is not positive definite,
    and x is the iterate before it. Nothing is damped in silence. For a singular A that curvature is 0 up to rounding,
    whatever its sign: look at `curvature`, in the units of A. Indefinite matrices may also end without being found out.
    A product per step, one for the true residual, and one for x0.

    Raises ValueError for a negative damping and for a preconditioner with $r^\top M r \le 0$, NonFinite for products
    that are not finite.

    Hestenes and Stiefel (1952), doi:10.6028/jres.049.044.

    >>> conjugate_gradient(lambda v: 4 * v, torch.tensor([1.0, 2.0])).x.tolist()
    [0.25, 0.5]
    """
    check_like(b)
    check_positive("tol", tol)
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(
            f"`damping` must be a finite number of at least 0, got {damping!r}; `shifted` moves both ways."
        )
    check_count("max_steps", steps := min(10 * len(b), 1000) if max_steps is None else max_steps)
    start = torch.zeros_like(b) if x0 is None else x0
    check_flat("x0", start, len(b))
    for name, vector in (("b", b), ("x0", start)):
        if not bool(torch.isfinite(vector).all()):
            raise ValueError(
                f"`{name}` must be finite: it has {int((~torch.isfinite(vector)).sum())} entries that are not."
            )
    products = Products(matvec)

    def damped(v: Tensor) -> Tensor:
        return products(v).add(v, alpha=damping)

    size = float(b.abs().max())
    if size == 0:
        return Solution(torch.zeros_like(b), 0.0, 0, "converged")
    b, x = b / size, start.to(b) / size  # float32 squares of a gradient of 1e-23 are 0
    r = b.clone() if x0 is None else b - damped(x)
    wanted = dot(b, b) ** 0.5
    left, run = dot(r, r) ** 0.5, _Run(0)
    status: Status = "converged"
    while left > tol * wanted:
        before = left
        run = _run(damped, preconditioner, x, r, tol * wanted, steps)
        steps -= run.steps
        r = b - damped(x)
        left = dot(r, r) ** 0.5
        if left <= tol * wanted:
            break
        if run.direction is not None:
            status = "negative_curvature"
            break
        if steps == 0 or left > before / 2:
            status = "max_steps" if steps == 0 else "stagnated"
            break
    return Solution(x * size, left / wanted, products.num, status, run.direction, run.curvature)


class _Run(NamedTuple):
    steps: int
    direction: Tensor | None = None
    curvature: float | None = None


def _run(matvec: Matvec, preconditioner: Matvec | None, x: Tensor, r: Tensor, enough: float, steps: int) -> _Run:
    """Steps from x with its residual r, both overwritten, until the recursive residual is small enough."""
    solve = _checked(preconditioner)
    z, rz = solve(r)
    p = z.clone()
    for step in range(steps):
        ap = matvec(p)
        curvature = dot(p, ap)
        if curvature <= 0:
            return _Run(step + 1, p, curvature / dot(p, p))
        x.add_(p, alpha=rz / curvature)
        r.sub_(ap, alpha=rz / curvature)
        if dot(r, r) ** 0.5 <= enough:
            return _Run(step + 1)
        before = rz
        z, rz = solve(r)
        p.mul_(rz / before).add_(z)
    return _Run(steps)


def _checked(preconditioner: Matvec | None) -> Callable[[Tensor], tuple[Tensor, float]]:
    """r -> (M r, r'M r)."""
    apply = Products(preconditioner) if preconditioner is not None else lambda r: r

    def solve(r: Tensor) -> tuple[Tensor, float]:
        z = apply(r)
        rz = dot(r, z)
        if rz <= 0:
            raise ValueError(f"`preconditioner` must be positive definite, but r'Mr = {rz:.3g} for a residual r.")
        return z, rz

    return solve
