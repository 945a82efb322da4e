"""Operators made of operators: sums, multiples, shifts, deflation, principal submatrices; and the way out of matvecs.

Every result is a closure over its arguments, symmetric where they are, and takes one product of each per product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Real

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from ..core.checks import check_count
from .matvec import Matvec, Products, check_like

Slices = Sequence[slice]
"""Disjoint contiguous runs of coordinates of a flat vector."""


def check_slices(name: str, slices: Slices, num: int) -> None:
    """`slices` are disjoint, not empty and lie inside `num` coordinates, which Python would cut them to in silence."""
    spans = []
    for s in slices:
        start, stop = s.start or 0, num if s.stop is None else s.stop
        if s.step not in (None, 1) or not 0 <= start < stop <= num:
            raise ValueError(f"`{name}` must hold slices of step 1 with 0 <= start < stop <= {num}, got {s}.")
        spans.append((start, stop))
    if not spans:
        raise ValueError(f"`{name}` must hold at least one slice, got none.")
    spans.sort()
    for (_, stop), (start, _) in pairwise(spans):
        if start < stop:
            raise ValueError(f"`{name}` must not hold a coordinate twice, but coordinate {start} is in two slices.")


def added(*matvecs: Matvec) -> Matvec:
    """The sum of one or more operators: $v \\mapsto A v + B v + \\dots$

    >>> added(lambda v: v, lambda v: 2 * v)(torch.ones(2)).tolist()
    [3.0, 3.0]
    """
    if not matvecs:
        raise ValueError("`matvecs` must hold at least one operator: the size of an empty sum is unknown.")

    def matvec(v: Tensor) -> Tensor:
        total = matvecs[0](v).clone()  # the next one may use the same buffer
        for other in matvecs[1:]:
            total = total + other(v)
        return total

    return _in_space_of(matvec, *matvecs)


def scaled(matvec: Matvec, factor: float) -> Matvec:
    """A multiple of an operator: $v \\mapsto c A v$, for a finite number c.

    >>> scaled(lambda v: v, -2.0)(torch.ones(2)).tolist()
    [-2.0, -2.0]
    """
    _check_finite("factor", factor)
    return _in_space_of(lambda v: factor * matvec(v), matvec)


def shifted(matvec: Matvec, shift: float) -> Matvec:
    """An operator whose eigenvalues are all moved: $v \\mapsto A v + c v$, for a finite number c.

    >>> shifted(lambda v: 2 * v, 0.5)(torch.ones(2)).tolist()
    [2.5, 2.5]
    """
    _check_finite("shift", shift)
    return _in_space_of(lambda v: matvec(v) + shift * v, matvec)


def projected(matvec: Matvec, basis: Float[Tensor, "k p"]) -> Matvec:
    r"""An operator without some directions (deflation): $(I - Q Q^\top) A (I - Q Q^\top)$, 0 on the span of Q.

    basis: (k, P), the columns of Q as orthonormal rows, of dtype and device of the vectors. With eigenvectors of A all
    other eigenvalues stay as they are; with any others the result is A seen from the orthogonal complement.

    Raises ValueError where the rows are not orthonormal: an entry of $Q^\top Q - I$ above 1,000 times the dtype's
    epsilon. What they are off by leaks, times the norm of A.

    >>> deflated = projected(lambda v: torch.tensor([5.0, 1.0]) * v, torch.tensor([[1.0, 0.0]]))
    >>> deflated(torch.ones(2)).tolist()
    [0.0, 1.0]
    """
    gram = basis @ basis.T
    off = float((gram - torch.eye(len(basis)).to(gram)).abs().amax()) if len(basis) else 0.0
    if not off <= 1000 * torch.finfo(basis.dtype).eps:
        raise ValueError(
            f"`basis` must have orthonormal rows, but its Gram matrix is off the identity by {off:.2g}. "
            "`torch.linalg.qr(basis.T).Q.T` has the same span."
        )

    def outside(v: Tensor) -> Tensor:
        return v - (basis @ v) @ basis

    return lambda v: outside(matvec(outside(v)))


def masked(matvec: Matvec, kept: Bool[Tensor, " p"] | Slices) -> Matvec:
    """A principal submatrix, with zeros around it: $v \\mapsto m * A (m * v)$ with m 1 on the kept coordinates.

    kept: a boolean vector of shape (P,), or slices; both have the same result, and slices take no memory.

    >>> ones = lambda v: v.sum() * torch.ones(3)
    >>> masked(ones, [slice(0, 2)])(torch.ones(3)).tolist()
    [2.0, 2.0, 0.0]
    """
    if isinstance(kept, Tensor):
        return lambda v: torch.where(kept, matvec(torch.where(kept, v, 0)), 0)

    def keep(v: Tensor) -> Tensor:
        check_slices("kept", kept, len(v))
        return embedded(gathered(v, kept), kept, len(v))

    return lambda v: keep(matvec(keep(v)))


def principal(matvec: Matvec, like: Float[Tensor, " p"], slices: Slices) -> Matvec:
    """A principal submatrix as an operator of its own size, on vectors such as `gathered(like, slices)`.

    Its coordinates are those of the slices, in the order given. It has the block's eigenvalues without the P - n zeros
    of `masked`. Raises ValueError where slices overlap, are empty or reach over the end.

    >>> ones, like, block = lambda v: v.sum() * torch.ones(3), torch.zeros(3), [slice(0, 2)]
    >>> principal(ones, like, block)(torch.ones(2)).tolist()
    [2.0, 2.0]
    """
    num = len(like)
    check_slices("slices", slices, num)
    return lambda v: gathered(matvec(embedded(v, slices, num)), slices)


def gathered(vector: Float[Tensor, " p"], slices: Slices) -> Float[Tensor, " n"]:
    """The entries of some slices as one shorter vector, in the order of the slices.

    >>> gathered(torch.arange(5.0), [slice(3, 5), slice(0, 1)]).tolist()
    [3.0, 4.0, 0.0]
    """
    return torch.cat([vector[s] for s in slices])


def embedded(vector: Float[Tensor, " n"], slices: Slices, num: int) -> Float[Tensor, " p"]:
    """The inverse of `gathered`: a vector of `num` entries that is 0 outside the slices.

    >>> embedded(torch.ones(2), [slice(1, 3)], 4).tolist()
    [0.0, 1.0, 1.0, 0.0]
    """
    out = vector.new_zeros(num)  # under vmap mapped like `vector`, so that it may be written to
    start = 0
    for s in slices:
        size = len(range(num)[s])
        out[s] = vector[start : start + size]
        start += size
    if start != len(vector):
        raise ValueError(f"`vector` must have the {start} entries of its slices, got {len(vector)}.")
    return out


def dense(
    matvec: Matvec, like: Float[Tensor, " p"], *, chunk: int | None = None, limit: int = 4096
) -> Float[Tensor, "p p"]:
    """The matrix itself, column j from the j-th unit vector: P products and P^2 numbers, for small P.

    Not symmetrised: compare it with its transpose to see the asymmetry. chunk: this many columns at a time by `vmap`,
    where the matvec allows it; by default one after the other.

    Raises ValueError where P is above `limit`, NonFinite where an entry is not finite.

    >>> dense(lambda v: torch.tensor([1.0, 2.0]) * v, torch.zeros(2)).tolist()
    [[1.0, 0.0], [0.0, 2.0]]
    """
    check_like(like)
    if len(like) > limit:
        raise ValueError(
            f"`like` must have at most `limit` = {limit} entries, got {len(like)}: the matrix would have "
            f"{len(like) ** 2:.2g}. Use products with it, or raise `limit`."
        )
    eye = torch.eye(len(like)).to(like)
    products = Products(matvec)
    if chunk is not None:
        check_count("chunk", chunk)
        with torch.no_grad():
            columns = torch.func.vmap(matvec, chunk_size=chunk)(eye)
        products = Products(lambda e: columns[int(e.argmax())])  # the same refusals, column by column
    return torch.stack([products(e).clone() for e in eye], dim=1)  # a matvec may write to one buffer again


def to_scipy(matvec: Matvec, like: Float[Tensor, " p"]) -> LinearOperator:
    """The operator for scipy (`eigsh`, `cg`, `lobpcg`, ...): numpy in, numpy out, in dtype and on device of `like`.

    A product that is not finite raises NonFinite. Float32 limits what tolerance scipy can reach.

    >>> from scipy.sparse.linalg import eigsh
    >>> diagonal = torch.arange(10.0, dtype=torch.float64)
    >>> round(float(eigsh(to_scipy(lambda v: diagonal * v, diagonal), k=1, return_eigenvectors=False)[0]), 6)
    9.0
    """
    check_like(like)
    products = Products(matvec)

    def product(x: np.ndarray) -> np.ndarray:
        return products(torch.tensor(x.reshape(-1)).to(like)).cpu().numpy().reshape(x.shape).copy()

    dtype = torch.empty(0, dtype=like.dtype).numpy().dtype
    return LinearOperator((len(like), len(like)), matvec=product, rmatvec=product, dtype=dtype)


def _in_space_of(made: Matvec, *matvecs: Matvec) -> Matvec:
    """What is made of operators whose vectors are in shares on several ranks has such vectors, too."""
    for space in (matvec.space for matvec in matvecs if hasattr(matvec, "space")):
        made.space = space  # type: ignore[attr-defined]
    return made


def _check_finite(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}.")
