"""Eigenvalues of a symmetric matrix from products alone: both ends, the largest magnitude, with residuals."""

from __future__ import annotations

from typing import get_args

from jaxtyping import Bool, Float
from torch import Tensor

from ..core.checks import check_choice, check_count, check_positive
from ..core.keys import Key, check_key, fold_in
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from .krylov import Krylov
from .matvec import Matvec, Products, check_symmetric
from .search import NOISE, Look, Search, Which
from .space import Like, space_of

BASIS = 100
"""Basis vectors that are kept before a restart, unless more are asked for."""
NAMES = {
    "magnitude": "of largest magnitude",
    "largest": "largest",
    "smallest": "smallest",
    "both": "from both ends",
}


REMEDY = (
    "What is not converged has no sure rank: pass a larger `max_matvecs`, or ask for fewer. A residual that is the error of "
    "the products (`hessian_difference`) stays: compute in float64."
)


class Eigenpairs(Result):
    """Some eigenvalues in descending order, each with the norm of its residual; prints itself as a table."""

    values: Float[Tensor, " k"] = quantity("eigenvalue", per="rank", name="eigenvalues")
    """Ritz values in float64."""
    residuals: Float[Tensor, " k"] = quantity("residual", per="rank")
    """||A y - theta y||, with what rounding adds to it, at least 4 units of it in the largest |theta|, and the error that
    products say they have beside it (`matvec.error()`, as `hessian_difference` has it): an eigenvalue lies within it of
    theta."""
    converged: Bool[Tensor, " k"] = quantity("converged", per="rank", shown=False)
    """Residual at most `tol` times the largest |theta| at its end (or what rounding explains), and its place certain."""
    vectors: Float[Tensor, "k p"] | None = internal()
    """Unit vectors, one per value, where they were asked for."""
    num_matvecs: int
    which: Which
    tol: float
    key: Key

    @property
    def resolved(self) -> Bool[Tensor, " k"]:
        """|theta| is above its residual: the sign is known, and the value can be told from 0."""
        return self.values.abs() > self.residuals

    @derived("state", per="rank")
    def states(self) -> list[str]:
        """For each value: converged, not converged, or not resolved (from 0)."""
        return [
            "converged" if done else "not converged" if known else "not resolved"
            for done, known in zip(self.converged.tolist(), self.resolved.tolist(), strict=True)
        ]

    @property
    def head(self) -> str:
        cost = counted(self.num_matvecs, "product")
        return f"{counted(len(self.values), 'eigenvalue')} {NAMES[self.which]} (tol {self.tol:g}, {cost})"

    @property
    def coords(self) -> dict[str, range]:
        return {"rank": range(1, len(self.values) + 1)}

    @property
    def notes(self) -> list[str]:
        return [] if bool(self.converged.all()) else [REMEDY]


def eigenpairs(
    matvec: Matvec,
    like: Like,
    *,
    key: Key,
    num: int = 5,
    which: Which = "magnitude",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    max_basis: int | None = None,
    block: int = 1,
    vectors: bool = False,
    check: bool = False,
) -> Eigenpairs:
    r"""The `num` eigenvalues of a symmetric A that are largest in magnitude, largest, smallest, or at each end.

    Ritz values $\theta$ of A on a Krylov space of a random start, with unit vectors y and residuals $\|Ay - \theta y\|$.
    A value is converged where its residual is at most `tol` times the largest $|\theta|$ at its own end, or what rounding
    explains, and where no eigenvalue before it can have been missed: when residuals are small, a fresh random start is
    given to what the space leaves out, until a missed eigenvalue would have shown itself but for a chance of 1 %. The
    search ends where all are converged, at `max_matvecs` products, or where the space is exhausted and all is exact.
    Without `max_matvecs` it ends at 100 and 20 per wanted value, or at 1.4 times the products after which all residuals
    are below `tol` times the largest $|\theta|$ of all: an end that is dense, or near 0, then stays unconverged.

    like: a vector of shape (P,), float32 or float64, for dtype and device; or `net.shares` of a model on several ranks, for
    the same values on each, and each rank's rows of the vectors. Values have the unit of A, in float64.
    Memory: up to `max_basis` vectors (default: 100, or twice the wanted values and blocks), allocated as the basis grows,
    `block` more, and one for every fresh start; a smaller basis restarts (thick restart) and takes more products.

    Residuals of the recurrence know no rounding: not that of products, sums and restarts, up to a hundred units of the
    dtype at long vectors or after many restarts, and more where products are made in a coarser one. A product of its vector
    measures the smallest residual at the end, and each that is not 4 times above the rounding which shows; to others that
    is added. These products are within `max_matvecs`, and left out where it is just enough for the whole space.

    A residual r guarantees an eigenvalue within r of $\theta$, nothing more: its rank is sure only where `converged`, its
    sign only where `resolved` ($|\theta| > r$). One start shows one copy of each eigenvalue; further copies, and members of
    tight clusters, come with the fresh starts, or sooner with a `block` of the multiplicity. In float32, scale a matrix of
    norm below 1e-15 first: squares of its products vanish.

    Raises ValueError for `num` above P ("both": P / 2), `block` above P, `max_basis` too small, an unknown `which`,
    and, with `check=True` (two more products), a matvec that is not symmetric; NonFinite for a product that is not
    finite.

    Krylov spaces: Paige (1972), doi:10.1093/imamat/10.3.373; restart: Wu and Simon (2000),
    doi:10.1137/S0895479898334605.

    >>> import torch
    >>> from funcscope.core.keys import key
    >>> pairs = eigenpairs(lambda v: torch.arange(-9.0, 6.0) * v, torch.zeros(15), key=key(0), num=2)
    >>> [round(value, 2) for value in pairs.values.tolist()]     # of -9, -8, ..., 5
    [-8.0, -9.0]
    """
    check_key(key)
    num_rows = (held := space_of(like)).num
    total = _check_request(num_rows, num, which, tol, block, max_matvecs)
    limit = _basis_limit(max_basis, total, block, num_rows)
    products = Products(matvec, held)
    if check:
        check_symmetric(products, like, key=fold_in(key, "check"))
    budget = products.num + (100 + 20 * total if max_matvecs is None else max_matvecs)
    space = Krylov(products, like, key=fold_in(key, "start"), block=block)
    search = Search(space, total, which, tol, block, limit=limit, patient=max_matvecs is not None)
    while not search.over(budget):
        search.step()
    look = search.look(total)
    converged = search.converged(look)
    residuals = _measured(space, look, budget - products.num)
    # those so far are of the matrix that the products belong to
    look = look._replace(residuals=residuals + products.error)
    converged = converged & search.near(look)
    down = look.values.argsort(descending=True)
    return Eigenpairs(
        look.values[down],
        look.residuals[down],
        converged[down],
        space.basis.combined(look.S[:, down]) if vectors else None,
        products.num,
        which,
        tol,
        key,
    )


def _measured(space: Krylov, look: Look, most: int) -> Float[Tensor, " k"]:
    """The residuals with what rounding adds to them, from `most` products at most, of the vectors themselves.

    The recurrence knows no error of its own: of products, of projections, of each restart. The smallest residual is
    measured, and every other that is not far above what that error has shown itself to be; the rest have it added.
    """
    residuals, noise = look.residuals.clone(), space.rounding
    down = residuals.argsort().tolist()
    for num, index in enumerate(down):
        if num == most or (num and residuals[index] > NOISE * noise):
            residuals[down[num:]] += noise
            break
        y = space.basis.combined(look.S[:, [index]])
        rest = space.products(y[0]).detach()[None] - look.values[index].to(y) * y
        size = space.basis.norms(rest)[0] / space.basis.norms(y)[0]
        noise = max(noise, size - float(residuals[index]))
        residuals[index] = max(size, space.rounding)
    return residuals


def _check_request(num_rows: int, num: int, which: str, tol: float, block: int, max_matvecs: int | None) -> int:
    """How many values are asked for in all."""
    check_choice("which", which, get_args(Which))
    check_count("num", num)
    check_count("block", block)
    check_positive("tol", tol)
    total = 2 * num if which == "both" else num
    if total > num_rows:
        ends = " at each of both ends" if which == "both" else ""
        raise ValueError(
            f"`num` = {num}{ends} asks for {total} eigenvalues of a matrix that has {num_rows}: ask for fewer."
        )
    if block > num_rows:
        raise ValueError(f"`block` must be at most P = {num_rows}, got {block}.")
    if max_matvecs is not None:
        check_count("max_matvecs", max_matvecs, min(num_rows, -(-total // block) * block))
    return total


def _basis_limit(max_basis: int | None, total: int, block: int, num_rows: int) -> int:
    least = min(num_rows, total + 2 * block)
    if max_basis is None:
        return max(least, BASIS, 2 * (total + block))
    check_count("max_basis", max_basis, least)
    return max_basis
