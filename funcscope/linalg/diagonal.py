"""The diagonal of a symmetric operator from products with random vectors; and the sketch that XTrace shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_count
from ..core.keys import BLOCK, Distribution, Key, check_key, draw, fold_in, rademacher
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from ..core.vectors import dot, norm
from .matvec import Matvec, Products, check_like


class DiagonalEstimate(Result):
    """A diagonal with the standard error of each of its entries, both of shape (P,)."""

    value: Float[Tensor, " p"] = quantity("diagonal entry", per="parameter", stderr="stderr")
    stderr: Float[Tensor, " p"] = internal()
    num_matvecs: int

    @derived("mean entry")
    def mean(self) -> float:
        return float(self.value.double().mean())

    @derived("root mean square of the standard errors")
    def rms_stderr(self) -> float:
        return float(self.stderr.double().square().mean().sqrt())

    @property
    def head(self) -> str:
        return f"diagonal of {len(self.value)} entries from {counted(self.num_matvecs, 'product')}"


def hutchinson_diagonal(matvec: Matvec, like: Float[Tensor, " p"], *, key: Key, num: int) -> DiagonalEstimate:
    r"""Diagonal of A from `num` products with random signs; unbiased for every square A.

    $$\widehat{A_{jj}} = \tfrac1m \textstyle\sum_i z_{ij} (A z_i)_j, \qquad
      \mathrm{Var} = \tfrac1m \textstyle\sum_{l \ne j} A_{jl}^2.$$

    like: shape (P,), gives dtype and device of value and stderr; num = m, the number of samples and of products. Draws
    are those of `hutchinson_trace` with the same key: the entries sum to that estimate. Errors of different entries are
    correlated. One probe has no standard error: it is nan. Streams: five vectors in memory, for every m.

    Bekas, Kokiopoulou and Saad (2007), doi:10.1016/j.apnum.2007.01.003, with signs. Mean, variance:
    proofs/hutchinson.py.

    >>> from funcscope.core.keys import key
    >>> estimate = hutchinson_diagonal(lambda v: 2 * v, torch.zeros(5), key=key(0), num=4)
    >>> estimate.mean, estimate.rms_stderr
    (2.0, 0.0)
    """
    check_sampled(like, key, num, 1)
    products, mean, scatter = Products(matvec), torch.zeros_like(like), torch.zeros_like(like)
    for i in range(num):  # Welford's update: a sum of squares would lose the digits of a small scatter
        z = rademacher(fold_in(key, i), like)
        gap = z.mul_(products(z)).sub_(mean)
        mean.add_(gap, alpha=1 / (i + 1))
        scatter.add_(gap.square_(), alpha=i / (i + 1))
    return DiagonalEstimate(mean, _stderr(scatter, num), num)


def xdiag(matvec: Matvec, like: Float[Tensor, " p"], *, key: Key, num: int) -> DiagonalEstimate:
    r"""Diagonal of A by exchangeable test vectors: each is the probe of what all others leave over; unbiased.

    $$\widehat{\mathrm{diag}} = \tfrac1k \textstyle\sum_i \big( \mathrm{diag}(Q_i Q_i^\top A)
      + \omega_i * (I - Q_i Q_i^\top) A \omega_i \big)$$

    with $k = \lfloor m/2 \rfloor$ vectors of random signs $\omega$ and $Q_i$ an orthonormal basis of $A \omega_j$,
    $j \ne i$. As in `xtrace` one sketch serves all $Q_i$.

    like: shape (P,), float32 or float64, gives dtype and device of value and stderr; num = m, at least 2; of an odd
    number one is not used. From P products on, the unit vectors are taken instead: exact, with stderr 0. For A of rank
    below k exact up to rounding. Memory: 2 k vectors; time: $O(k^2 P)$ beside the products.

    stderr is sd / sqrt(k) of the k leave-one-out estimates of an entry (nan for k = 1), which are not independent. One
    vector rarely has much of one entry, so that a single stderr is noisier than that of a trace: read it as an average
    over entries.

    Epperly, Tropp and Webber (2024), doi:10.1137/23M1548323.

    >>> from funcscope.core.keys import key
    >>> first = torch.tensor([3.0, 0, 0, 0, 0, 0, 0])
    >>> xdiag(lambda v: first * v, torch.zeros(7), key=key(0), num=4).value.tolist()
    [3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    check_sampled(like, key, num, 2)
    products = Products(matvec)
    if num >= len(like):
        return DiagonalEstimate(unit_products(products, like), torch.zeros_like(like), products.num)
    k = num // 2
    space = sketch(products, lambda i: rademacher(fold_in(key, i), like), like, k)
    images = torch.empty_like(space.basis)
    for j, q in enumerate(space.basis):
        images[j] = products(q)
    out = space.left_out
    length = (out * space.coefs).sum(0).to(like)
    value, scatter = torch.empty_like(like), torch.empty_like(like)
    for start in range(0, len(like), BLOCK):  # of a k by P matrix of leave-one-out estimates only a slab is in memory
        span = slice(start, min(start + BLOCK, len(like)))
        place, keys = (span.start, span.stop), (fold_in(key, i) for i in range(k))
        omega = torch.stack([draw(each, len(like), "rademacher", *place, device=like.device) for each in keys])
        gone, image = (out.T.to(like) @ rows[:, span] for rows in (space.basis, images))
        changes = gone * (omega.to(like) * length[:, None] - image)
        value[span] = (space.basis[:, span] * images[:, span]).sum(0) + changes.mean(0)
        scatter[span] = (changes - changes.mean(0)).square().sum(0)
    return DiagonalEstimate(value, _stderr(scatter, k), products.num)


@dataclass(frozen=True, eq=False)
class Sketch:
    """An orthonormal basis of the products of A with k test vectors: $A \\omega_i = Q r_i$ up to rounding."""

    basis: Float[Tensor, "r p"]
    """The columns of Q, as rows."""
    coefs: Float[Tensor, "r k"]
    """The columns r_i, float64 on the CPU; an echelon form, so that its rank is r."""
    forms: Float[Tensor, " k"]
    """$\\omega_i^\\top A \\omega_i$."""
    floor: float
    """The size below which what a product added to the basis was taken for rounding."""

    @property
    def rank(self) -> int:
        return len(self.basis)

    @property
    def left_out(self) -> Float[Tensor, "r k"]:
        """Column i: the unit vector s with $Q (I - ss^\\top) Q^\\top$ the projector on the other products.

        It is 0 where the others span the whole of Q. Column i of the pseudo-inverse of R, transposed, is orthogonal to
        all other columns of R where column i alone holds the rank up; where it does not, what is left of the least
        singular value without it is above `floor`.
        """
        if not self.rank:
            return self.coefs
        u, sigma, vh = torch.linalg.svd(self.coefs, full_matrices=True)
        sigma = sigma.clamp(min=float(sigma[0]) * torch.finfo(sigma.dtype).eps)
        pinv = u @ (vh[: self.rank] * (sigma[-1] / sigma)[:, None])
        size = pinv.norm(dim=0)
        alone = sigma[-1] * vh[self.rank :].norm(dim=0) <= self.floor
        return torch.where(alone & (size > 0), pinv / size.clamp(min=torch.finfo(size.dtype).tiny), 0.0)


def sketch(products: Products, draw: Callable[[int], Tensor], like: Float[Tensor, " p"], num: int) -> Sketch:
    """The sketch with the test vectors `draw(0)` to `draw(num - 1)`, by Gram-Schmidt repeated where digits are lost."""
    basis = like.new_empty(num, len(like))
    coefs, forms = torch.zeros(num, num, dtype=torch.float64), torch.zeros(num, dtype=torch.float64)
    rank, floor = 0, 0.0
    for i in range(num):
        omega = draw(i)
        y = products(omega).clone()  # it is written to, and may be the matvec's own
        forms[i], size = dot(omega, y), norm(y)
        floor = max(floor, num * torch.finfo(like.dtype).eps * size)
        size = _orthogonalise(y, basis[:rank], coefs[:rank, i], size, floor)
        if size > floor:
            coefs[rank, i] = size
            torch.div(y, size, out=basis[rank])
            rank += 1
    return Sketch(basis[:rank], coefs[:rank], forms, floor)


def unit_products(products: Products, like: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """The diagonal, from a product with every unit vector."""
    diagonal, unit = torch.zeros_like(like), torch.zeros_like(like)
    for j in range(len(like)):
        unit[j] = 1.0
        diagonal[j] = products(unit)[j]
        unit[j] = 0.0
    return diagonal


def narrow(x: Tensor) -> Tensor:
    """A short vector to where small matrices are: float64 on the CPU."""
    return x.cpu().double()


def check_sampled(like: Tensor, key: Key, num: int, least: int, distribution: str = "rademacher") -> None:
    """The arguments that every estimator takes."""
    check_like(like)
    check_draws(key, num, least, distribution)


def check_draws(key: Key, num: int, least: int, distribution: str) -> None:
    """Those that say what is drawn."""
    check_key(key)
    check_count("num", num, least)
    check_choice("distribution", distribution, get_args(Distribution))


def _orthogonalise(y: Tensor, basis: Tensor, coefs: Tensor, size: float, floor: float) -> float:
    """Take the span of the basis out of y, add to its coefficients, return the norm that is left."""
    while len(basis) and size > floor:
        before, part = size, basis @ y
        y.sub_(part @ basis)
        coefs += narrow(part)
        size = norm(y)
        if size > before / 2:  # at most one digit lost: what is left of the basis in y is rounding
            break
    return size


def _stderr(scatter: Tensor, num: int) -> Tensor:
    """sd / sqrt(n) from the sum of squares around the mean; in place."""
    return scatter.div_(num * (num - 1)).sqrt_() if num > 1 else torch.full_like(scatter, float("nan"))
