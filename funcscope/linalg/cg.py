"""Conjugate gradients: the solution of a symmetric positive definite system, known by its products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count, check_flat, check_positive
from ..core.result import Result, internal, quantity
from ..core.tables import counted
from ..core.vectors import dot, norm
from .matvec import Matvec, Products, check_like

Status = Literal["converged", "max_steps", "negative_curvature", "stagnated"]
_Inverse = Callable[[Tensor], tuple[Tensor, float]]


class Solution(Result):
    """Where conjugate gradients have come to, and how they ended."""

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
        return f"{self.status.replace('_', ' ')}: {len(self.x)} unknowns, {counted(self.num_matvecs, 'product')}"


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
    whatever its sign: look at `curvature`, in the units of A. Indefinite matrices may also end unnoticed.
    A product per step, one for the true residual, and one for x0.

    Raises ValueError for a negative damping and for a preconditioner with $r^\top M r \le 0$, NonFinite for products
    that are not finite.

    Hestenes and Stiefel (1952), doi:10.6028/jres.049.044.

    >>> conjugate_gradient(lambda v: 4 * v, torch.tensor([1.0, 2.0])).x.tolist()
    [0.25, 0.5]
    """
    check_like(b)
    check_positive("tol", tol)
    check_count("max_steps", steps := min(10 * len(b), 1000) if max_steps is None else max_steps)
    start = _start(b, x0, damping)
    products = Products(matvec)

    def damped(v: Tensor) -> Tensor:
        return products(v).add(v, alpha=damping)

    size = float(b.abs().max())
    if size == 0:
        return Solution(torch.zeros_like(b), 0.0, 0, "converged")
    b, x = b / size, start.to(b) / size  # float32 squares of a gradient of 1e-23 are 0
    r = b.clone() if x0 is None else b - damped(x)
    status, residual, run = _solve(damped, _preconditioned(preconditioner), b, x, r, tol, steps)
    return Solution(x * size, residual, products.num, status, run.direction, run.curvature)


class _Run(NamedTuple):
    steps: int
    direction: Tensor | None = None
    curvature: float | None = None


def _start(b: Tensor, x0: Tensor | None, damping: float) -> Tensor:
    """The first iterate; the vectors are finite, of one length, and the damping takes no curvature away."""
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(
            f"`damping` must be a finite number of at least 0, got {damping!r}; `shifted` moves both ways."
        )
    start = torch.zeros_like(b) if x0 is None else x0
    check_flat("x0", start, len(b))
    for name, vector in (("b", b), ("x0", start)):
        if bad := int((~torch.isfinite(vector)).sum()):
            raise ValueError(f"`{name}` must be finite: it has {bad} entries that are not.")
    return start


def _solve(
    matvec: Matvec, inverse: _Inverse, b: Tensor, x: Tensor, r: Tensor, tol: float, steps: int
) -> tuple[Status, float, _Run]:
    """Runs from the true residual until that is small, or as long as each halves it; x is overwritten."""
    size, rest, run = norm(b), norm(r), _Run(0)
    while rest > tol * size:
        before, run = rest, _run(matvec, inverse, x, r, tol * size, steps)
        steps -= run.steps
        r = b - matvec(x)
        rest = norm(r)
        if rest > tol * size and (run.direction is not None or steps == 0 or rest > before / 2):
            return _reason(run, steps), rest / size, run
    return "converged", rest / size, run


def _reason(run: _Run, steps: int) -> Status:
    if run.direction is not None:
        return "negative_curvature"
    return "max_steps" if steps == 0 else "stagnated"


def _run(matvec: Matvec, inverse: _Inverse, x: Tensor, r: Tensor, enough: float, steps: int) -> _Run:
    """Steps from x with its residual r, both overwritten, until the recursive residual is small enough."""
    z, rz = inverse(r)
    p = z.clone()
    for step in range(steps):
        ap = matvec(p)
        curvature = dot(p, ap)
        if curvature <= 0:
            return _Run(step + 1, p, curvature / dot(p, p))
        x.add_(p, alpha=rz / curvature)
        r.sub_(ap, alpha=rz / curvature)
        if norm(r) <= enough:
            return _Run(step + 1)
        before = rz
        z, rz = inverse(r)
        p.mul_(rz / before).add_(z)
    return _Run(steps)


def _preconditioned(preconditioner: Matvec | None) -> _Inverse:
    """r -> (M r, r'M r)."""
    apply = Products(preconditioner) if preconditioner is not None else lambda r: r

    def inverse(r: Tensor) -> tuple[Tensor, float]:
        z = apply(r)
        rz = dot(r, z)
        if rz <= 0:
            raise ValueError(f"`preconditioner` must be positive definite, but r'Mr = {rz:.3g} for a residual r.")
        return z, rz

    return inverse
