"""Block Krylov spaces of a symmetric matrix, with full orthogonalisation and thick restart.

The basis is the memory and the passes over it the time, beside the products: each new block costs two readings of the
basis (project, subtract), and two more only where the first removed a noticeable part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.keys import Key, fold_in
from ..core.vectors import dot
from .matvec import Products
from .space import Like, Space, space_of

SLAB = 2**16
"""Columns that are multiplied at a time: partial sums stay short, so that their float64 sum is exact to rounding."""
PANEL = 16
"""Rows that are allocated at a time, 4 where a row is longer than 64 million: growth copies nothing."""
NOTICEABLE = 0.7
"""A pass that leaves less than this share of a vector is followed by another one."""


class Basis:
    """Rows of one length in panels; `remove` is the pass that everything else is made of."""

    def __init__(self, space: Space):
        self.space, self.like = space, space.like
        self.num = 0
        self._panels: list[Tensor] = []
        self._rows = PANEL if len(self.like) <= 2**26 else 4
        self._slab = SLAB if self.like.device.type == "cpu" else 64 * SLAB

    def __getitem__(self, index: int) -> Tensor:
        return self._panels[index // self._rows][index % self._rows]

    def append(self, vector: Float[Tensor, " p"], size: float) -> None:
        """The vector divided by `size` becomes the last row."""
        if self.num == len(self._panels) * self._rows:
            self._panels.append(self.like.new_empty(self._rows, len(self.like)))
        self.num += 1
        torch.div(vector, size, out=self[self.num - 1])

    def swap(self, one: int, other: int) -> None:
        """Two rows change places."""
        if one != other:
            row = self[one].clone()
            self[one].copy_(self[other])
            self[other].copy_(row)

    def remove(self, W: Float[Tensor, "b p"], first: int, last: int) -> tuple[Tensor, list[float]]:
        """W - (W Q') Q in place, for rows `first` to `last` of Q; returns Q W' in float64 and the norms that are left."""
        parts = list(self._between(first, last))
        shares = []
        for rows in parts:  # classical: every projection is of the same W
            sums = [rows[:, at] @ W[:, at].T for at in self._slabs(self._slab)]
            shares.append(torch.stack(sums).cpu().double().sum(0))
        total = self.space.summed(torch.cat(shares))
        for rows, share in zip(parts, total.split([len(rows) for rows in parts]), strict=True):
            weights = share.T.to(W).contiguous()
            for at in self._slabs(self._slab):
                W[:, at].addmm_(weights, rows[:, at], alpha=-1)
        return total, self.norms(W)

    def norms(self, W: Float[Tensor, "b p"]) -> list[float]:
        """The norm of every row, summed in float64."""
        squares = torch.tensor([dot(w, w) if len(w) else 0.0 for w in W], dtype=torch.float64)
        return self.space.summed(squares).sqrt().tolist()

    def combined(self, M: Float[Tensor, "k m"]) -> Float[Tensor, "m p"]:
        """M' Q of the first k rows, new in memory."""
        out = self.like.new_empty(M.shape[1], len(self.like))
        for at, part in self._rotated(M):
            out[:, at] = part
        return out

    def rotate(self, M: Float[Tensor, "k m"]) -> None:
        """Q becomes M' Q, slab by slab in place: there is no second copy of the basis."""
        for at, part in self._rotated(M):
            for panel, rows in zip(self._panels, part.split(self._rows), strict=False):
                panel[: len(rows), at] = rows
        self.num = M.shape[1]

    def _rotated(self, M: Tensor) -> Iterator[tuple[slice, Tensor]]:
        weights = M.T.to(self.like)
        for at in self._slabs(self._slab // 8):  # all rows of a slab are in the cache at a time
            yield at, weights @ torch.cat([rows[:, at] for rows in self._between(0, len(M))])

    def _between(self, first: int, last: int) -> Iterator[Tensor]:
        for index, panel in enumerate(self._panels):
            rows = panel[max(0, first - index * self._rows) : max(0, last - index * self._rows)]
            if len(rows):
                yield rows

    def _slabs(self, width: int) -> list[slice]:
        return [slice(start, start + width) for start in range(0, max(1, len(self.like)), width)]


class Krylov:
    r"""The space spanned by a random block B, A B, A^2 B, ..., and the matrix T = Q A Q' of A on it.

    `expand` takes the products of the newest rows, completes T by their full projections (in float64: rows and
    columns need no special form, also after a restart), and appends what is left, orthonormalised:
    $A Q^\top = Q^\top T + Q_{new}^\top R$ with the rows $Q_{new}$ whose products are not known, so that the residual of a
    Ritz pair is $\|R\,s\|$.

    A vector of which nothing but rounding is left closes an invariant space. A new random one, orthogonal to the basis,
    takes its place with coupling 0: an eigenvalue then appears again only if it is a multiple one.
    Daniel, Gragg, Kaufman and Stewart (1976), doi:10.2307/2005398, on the second pass; Wu and Simon (2000),
    doi:10.1137/S0895479898334605, on the restart.
    """

    def __init__(self, products: Products, like: Like, *, key: Key, block: int = 1):
        self.products = products
        self.key = key
        space = space_of(like)
        self.basis = Basis(space)
        self.num = space.num
        self._work = space.like.new_empty(min(block, self.num), len(space.like))
        self.begin()
        for _ in range(min(block, self.num)):
            self._append_random()

    def begin(self, start: Float[Tensor, " p"] | None = None) -> None:
        """Forget everything but the memory; the space of one start vector, where one is given."""
        self.basis.num = self._drawn = self.size = self._before = 0
        self.scale = 0.0
        """The largest ||A q|| or |theta| seen: a lower bound of the norm of A."""
        self.T = torch.zeros(0, 0, dtype=torch.float64)
        self.R = torch.zeros(0, 0, dtype=torch.float64)
        if start is not None:
            self.basis.append(start, *self.basis.norms(start[None]))

    @property
    def whole(self) -> bool:
        """The products of a basis of the whole space are known: T has all eigenvalues."""
        return self.size == self.num

    @property
    def rounding(self) -> float:
        """Norms up to this one are rounding."""
        return 4 * torch.finfo(self.basis.like.dtype).eps * self.scale

    @property
    def residual(self) -> float:
        """Norm of R: a bound on all residuals; 0 where the space is invariant."""
        return float(torch.linalg.matrix_norm(self.R)) if self.R.numel() else 0.0

    def expand(self, width: int | None = None) -> None:
        """One product for each of the first `width` rows that have none (the block's, unless given); the basis grows by
        as many, as far as the space has them."""
        first, last = self.size, self.basis.num
        size = min(last, first + (width or len(self._work)))
        W = self._work[: size - first]
        for w, row in zip(W, range(first, size), strict=True):
            w.copy_(self.products(self.basis[row]).detach())  # its own memory: a product may be its argument
        sizes = self.basis.norms(W)
        self.scale = max(self.scale, *sizes)
        H = torch.zeros(last, size - first, dtype=torch.float64)
        near = max(0, first - self._before)
        if near:  # in exact arithmetic all there is to remove: a cheap pass, after which one full pass is enough
            shares, sizes = self.basis.remove(W, near, last)
            H[near:] += shares
        shares, rests = self.basis.remove(W, 0, last)
        H += shares
        new = self._append(W, sizes, rests, H)
        T, R = (
            torch.zeros(size, size, dtype=torch.float64),
            torch.zeros(self.basis.num - size, size, dtype=torch.float64),
        )
        T[:first, :first] = self.T
        T[:first, first:], T[first:, :first] = H[:first], H[:first].T
        T[first:, first:] = (H[first:size] + H[first:size].T) / 2
        R[: last - size, :first], R[: last - size, first:], R[last - size :, first:] = (
            self.R[size - first :],
            H[size:],
            new,
        )
        self.T, self.R, self.size, self._before = T, R, size, size - first

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values in ascending order, their vectors in the basis as columns, and their residuals."""
        values, S = torch.linalg.eigh(self.T)
        self.scale = max(self.scale, float(values.abs().max()))
        return values, S, (self.R @ S).square().sum(0).sqrt()

    def admit(self) -> None:
        """A new random row, orthogonal to all others, is the next one whose product is taken.

        Nothing couples it to the rows before: its space is that of A restricted to what they leave out, and its Ritz
        values stand beside theirs. It shows what one start cannot: further copies of a multiple eigenvalue.
        """
        if self.basis.num < self.num:
            self._append_random()
            self.R = torch.cat([self.R, self.R.new_zeros(1, self.size)])
            self.advance(self.basis.num - self.size - 1)

    def advance(self, row: int) -> None:
        """The row of this index among those without a product becomes the first of them."""
        self.basis.swap(self.size, self.size + row)
        self.R[[0, row]] = self.R[[row, 0]]

    def restart(self, values: Float[Tensor, " m"], S: Float[Tensor, "k m"]) -> None:
        """Keep these Ritz pairs and the rows whose products are not known yet; give up the rest of the space."""
        num, new = len(values), self.basis.num - self.size
        self.basis.rotate(torch.block_diag(S, torch.eye(new, dtype=torch.float64)))
        self.T, self.R = torch.diag(values), self.R @ S
        self.size = self._before = num  # the new rows couple to every pair

    def _append(self, W: Tensor, sizes: list[float], rests: list[float], H: Tensor) -> Tensor:
        """Append what is left of W, orthonormalised; returns R and adds to H what further passes removed."""
        last, width = H.shape
        R = torch.zeros(width, width, dtype=torch.float64)
        for i in range(width):
            w, size, rest, new = W[i : i + 1], sizes[i], rests[i], self.basis.num - last
            if new:
                shares, (rest,) = self.basis.remove(w, last, last + new)
                R[:new, i] += shares[:, 0]
            while self.rounding < rest < NOTICEABLE * size:
                size = rest
                shares, (rest,) = self.basis.remove(w, 0, last + new)
                H[:, i] += shares[:last, 0]
                R[:new, i] += shares[last:, 0]
            if self.basis.num == self.num:
                continue
            if rest > self.rounding:
                R[new, i] = rest
                self.basis.append(w[0], rest)
            else:
                self._append_random()
        return R[: self.basis.num - last]

    def _append_random(self) -> None:
        if self.basis.num == self.num:
            return
        w = self.basis.space.draw(fold_in(self.key, self._drawn), "normal")[None]
        self._drawn += 1
        (size,), before = self.basis.norms(w), math.inf
        while self.basis.num and size < NOTICEABLE * before:
            before = size
            _, (size,) = self.basis.remove(w, 0, self.basis.num)
        if size == 0:  # a draw is an exact 0 once in 2^24: in a space of one dimension, once in 2^24 times
            self._append_random()
        else:
            self.basis.append(w[0], size)
