"""A symmetric matrix that is known by its products: what every algorithm of this room takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.keys import Key, fold_in
from .space import Like, Space, Whole, check_like, space_of

__all__ = ["Matvec", "NonFinite", "Products", "asymmetry", "check_like", "check_symmetric"]

Matvec = Callable[[Float[Tensor, " p"]], Float[Tensor, " p"]]
"""v -> A v, for vectors of one length, dtype and device."""


class NonFinite(ArithmeticError):
    """A product has entries that are not finite: whatever is computed from it would be, too."""


class Products:
    """The products that one call of an algorithm takes: counted, and refused where they are not finite.

    >>> products = Products(lambda v: 2 * v)
    >>> products(torch.ones(3)).tolist(), products.num
    ([2.0, 2.0, 2.0], 1)
    """

    def __init__(self, matvec: Matvec, space: Space | None = None):
        if not callable(matvec):
            raise TypeError(
                f"`matvec` must be a function v -> A v such as `fs.hessian(loss, theta)`, got a {type(matvec).__name__}: "
                "a matrix becomes one by `lambda v: A @ v`."
            )
        own = getattr(matvec, "space", None)
        if isinstance(own, Space) and not isinstance(own, Whole) and own is not space:
            raise ValueError(
                "`like` must be `net.shares` of the functional that the matvec was made with, the space of its vectors: they "
                "are in shares on several ranks, and a rank's own entries are not the whole. `hutchinson_trace`, "
                "`eigenpairs` and `spectral_density` take it; other algorithms need whole parameters, `fs.functional`."
            )
        self.matvec, self.space = matvec, space
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
        if bad := self._over_all(_not_finite(out)):
            size = len(out) if self.space is None else self.space.num
            raise NonFinite(
                f"product {self.num} has {bad} entries of {size} that are not finite, from a vector that has "
                f"{self._over_all(_not_finite(v))}. Look at the loss and its gradient at theta, or compute in a wider dtype."
            )
        return out

    def _over_all(self, num: int) -> int:
        """Of all that hold a part of the vectors."""
        return num if self.space is None else int(self.space.summed(torch.tensor(num, dtype=torch.float64)))


def _not_finite(x: Tensor) -> int:
    """How many entries; one pass where all are finite, as a sum of finite numbers that overflows is looked at again."""
    return 0 if bool(torch.isfinite(x.sum())) else int((~torch.isfinite(x)).sum())


def asymmetry(matvec: Matvec, like: Like, *, key: Key) -> float:
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
    space = space_of(like)
    u, v = (space.draw(fold_in(key, name), "normal") for name in ("u", "v"))
    products, dot = Products(matvec, space), space.dot
    au, av = products(u), products(v)
    size = (dot(au, au) * dot(v, v)) ** 0.5 + (dot(av, av) * dot(u, u)) ** 0.5
    return abs(dot(u, av) - dot(v, au)) / size if size else 0.0


def check_symmetric(matvec: Matvec, like: Like, *, key: Key) -> None:
    """Raises ValueError where `asymmetry` is above what rounding explains: the square root of the dtype's epsilon."""
    measured, allowed = asymmetry(matvec, like, key=key), torch.finfo(space_of(like).like.dtype).eps ** 0.5
    if measured > allowed:
        raise ValueError(
            f"the matvec is not symmetric: <u, Av> and <v, Au> differ by {measured:.2g} of their size (rounding explains "
            f"{allowed:.1g}). These algorithms need A = A'; (A + A') / 2 has the same quadratic form."
        )
