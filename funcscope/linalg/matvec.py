"""A symmetric matrix that is known by its products: what every algorithm of this room takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_instance
from ..core.keys import Key, fold_in, normal
from ..core.vectors import dot

Matvec = Callable[[Float[Tensor, " p"]], Float[Tensor, " p"]]
"""v -> A v, for vectors of one length, dtype and device."""


def check_like(like: Tensor) -> None:
    """`like` is a flat vector with at least one entry, of float32 or float64: in those a basis stays orthogonal."""
    check_instance("like", like, Tensor, "`net.theta`, or `net.layout.ravel(params)`")
    if like.ndim != 1 or len(like) == 0:
        raise ValueError(f"`like` must be a flat vector with at least one entry, got shape {tuple(like.shape)}.")
    if like.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"`like` must be float32 or float64, got {like.dtype}: keep a wide vector, cast in the matvec.")


class NonFinite(ArithmeticError):
    """A product has entries that are not finite: whatever is computed from it would be, too."""


class Products:
    """The products that one call of an algorithm takes: counted, and refused where they are not finite.

    >>> products = Products(lambda v: 2 * v)
    >>> products(torch.ones(3)).tolist(), products.num
    ([2.0, 2.0, 2.0], 1)
    """

    def __init__(self, matvec: Matvec):
        if not callable(matvec):
            raise TypeError(
                f"`matvec` must be a function v -> A v such as `fs.hessian(loss, theta)`, got a {type(matvec).__name__}: "
                "a matrix becomes one by `lambda v: A @ v`."
            )
        self.matvec = matvec
        self.num = 0

    @property
    def error(self) -> float:
        """How far products of unit vectors are from those of the matrix that is meant, where the matvec says so; else 0.

        `hessian_difference` does, by an attribute `error`, a function of no arguments.
        """
        return float(getattr(self.matvec, "error", float)())

    def __call__(self, v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        self.num += 1
        with torch.no_grad():
            out = self.matvec(v)
        if out.shape != v.shape or out.dtype != v.dtype:
            raise ValueError(
                f"the matvec made {out.dtype} {tuple(out.shape)} of a vector of {v.dtype} {tuple(v.shape)}: a symmetric "
                "matrix keeps both. Cast inside the matvec, or pass a `like` of its dtype."
            )
        if not bool(torch.isfinite(out.sum())):  # one pass; a sum of finite numbers that overflows is looked at again
            bad = int((~torch.isfinite(out)).sum())
            if bad:
                raise NonFinite(
                    f"product {self.num} has {bad} entries of {len(out)} that are not finite, from a vector that has "
                    f"{int((~torch.isfinite(v)).sum())}. Look at the loss and its gradient at theta, or compute in a wider "
                    "dtype."
                )
        return out


def asymmetry(matvec: Matvec, like: Float[Tensor, " p"], *, key: Key) -> float:
    r"""How far a matvec is from symmetric: $|\langle u, Av\rangle - \langle v, Au\rangle| / (\|Au\| \|v\| + \|Av\| \|u\|)$.

    u and v are two normal draws; 0 for every symmetric A up to rounding, and not 0, with probability one, for any
    other linear map. Two products.

    >>> from funcscope.core.keys import key
    >>> A = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> asymmetry(lambda v: (A + A.T) @ v, torch.zeros(2), key=key(0)) < 1e-6
    True
    >>> asymmetry(lambda v: A @ v, torch.zeros(2), key=key(0)) > 1e-3
    True
    """
    u, v = (normal(fold_in(key, name), like) for name in ("u", "v"))
    products = Products(matvec)
    au, av = products(u), products(v)
    size = (dot(au, au) * dot(v, v)) ** 0.5 + (dot(av, av) * dot(u, u)) ** 0.5
    return abs(dot(u, av) - dot(v, au)) / size if size else 0.0


def check_symmetric(matvec: Matvec, like: Float[Tensor, " p"], *, key: Key) -> None:
    """Raises ValueError where `asymmetry` is above what rounding explains: the square root of the dtype's epsilon."""
    measured, allowed = asymmetry(matvec, like, key=key), torch.finfo(like.dtype).eps ** 0.5
    if measured > allowed:
        raise ValueError(
            f"the matvec is not symmetric: <u, Av> and <v, Au> differ by {measured:.2g} of their size (rounding explains "
            f"{allowed:.1g}). These algorithms need A = A'; (A + A') / 2 has the same quadratic form."
        )
