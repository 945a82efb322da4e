"""The search for eigenvalues at the ends of a spectrum: when each is near enough, and when none can have been missed."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .krylov import Krylov

Which = Literal["magnitude", "largest", "smallest", "both"]

CHEAP = 2**15
"""Up to this P a look at the projected matrix may cost more than a product: it is taken every few products."""
PATIENCE = 1.4
"""Without a stated budget: products in all, over those after which all residuals are small for the whole spectrum."""
LOOSE = 1e-2
"""A larger `tol` does not shorten that time: what a fresh start would show takes products whatever residuals may be."""
STEADY = 10
"""One in so many products is taken once more after all is near enough: a tight cluster may look like one value until then."""
PROBING = 0.2
"""Products, over those before, that are held back for a fresh start where time runs out."""
CHANCE = 0.01
"""Of a more wanted eigenvalue that stays unseen, at most, where its absence is called certain."""
NOISE = 4
"""Times rounding: a residual above it is told to a quarter by the recurrence, one below is measured at the end."""
APART = 16
"""Residuals that a value is away from its neighbour, where no other is taken to hide beside it."""
SIGNS: dict[str, tuple[tuple[int, ...], ...]] = {
    "magnitude": ((1, -1),),
    "largest": ((1,),),
    "smallest": ((-1,),),
    "both": ((1,), (-1,)),
}
"""By end, on which sides of zero its values are wanted."""


class Look(NamedTuple):
    """Ritz values, vectors (columns) and residuals, the most wanted first."""

    values: Tensor
    S: Tensor
    residuals: Tensor


class Search:
    """Looks at the Ritz values of a growing space, and says which of the wanted ones are found.

    One start shows one copy of a multiple eigenvalue, and one value for a tight cluster: the values after it have too
    high a rank then, at residuals as small as one likes. Where residuals are small, the search goes on for a little while,
    and then gives a fresh random start to what the space leaves out, until that would have shown what was missed.
    """

    def __init__(self, space: Krylov, num: int, which: Which, tol: float, block: int, *, limit: int, patient: bool):
        self.space, self.num, self.which, self.tol, self.block = space, num, which, tol, block
        self.bound = 0.0
        """The largest |theta| seen."""
        self.limit, self.patient = limit, patient
        """Rows of the basis; and whether the whole budget may be used."""
        self.probe: Probe | None = None
        """The fresh start that is under way (`probing`), or the last one, as long as nothing contradicts it."""
        self.probing = False
        self.beside = 0
        """Rows beside the fresh start whose products are still to be taken: what hides in them is seen then."""
        self.next = num
        self.doubtful = 0
        """Products that are held back to measure residuals which may be rounding."""
        self.coarse: int | None = None
        self.steady: int | None = None

    def over(self, budget: int) -> bool:
        space = self.space
        if space.whole:
            return True
        if space.size >= self.next:
            self.next = space.size + (1 if space.num > CHEAP else 1 + space.size // 64)
            if self._settled(self._allowed(budget)):
                return True
        return space.products.num + min(self._width, space.basis.num - space.size) > self._allowed(budget)

    def step(self) -> None:
        """A product of each row of the block, or of the fresh start; before it a restart, where the basis is full."""
        space = self.space
        beside = max(0, space.basis.num - space.size - self.block)
        if min(space.basis.num + self._width, space.num) > self.limit + beside:
            self._restart()
        before = space.basis.num
        space.expand(self._width)
        if self.probe and not self.probing:
            self.beside = max(0, self.beside - 1)
        elif self.probe:
            grown = space.basis.num > before
            self.probe.grow(space, closed=not grown or not space.R[-1].any())
            if grown:
                space.advance(space.basis.num - space.size - 1)

    def look(self, num: int) -> Look:
        """The first `num` Ritz values, the most wanted first; no residual is below rounding."""
        values, S, residuals = self.space.ritz()
        self.bound = max(self.bound, float(values.abs().max()))
        first = order(values, self.which)[:num]
        return Look(values[first], S[:, first], residuals[first].clamp_min(self.space.rounding))

    def converged(self, look: Look) -> Tensor:
        """Which of the wanted values have a small residual, and none before them that may have been missed."""
        near = self.near(look)
        if self.space.whole:
            return near
        if self.probe is None or self.beside or self.probe.contradicts(look):
            return torch.zeros_like(near)
        return near & self.probe.certain

    @property
    def _width(self) -> int:
        return 1 if self.probing or self.beside else self.block

    def near(self, look: Look) -> Tensor:
        """Which of the wanted residuals are at most `tol` times the largest wanted |theta| at their end, or rounding."""
        near = torch.zeros(self.num, dtype=torch.bool)
        for end in ends(self.num, self.which):
            allowed = max(self.tol * float(look.values[end].abs().max()), self.space.rounding)
            near[end] = look.residuals[end] <= allowed
        return near

    def _allowed(self, budget: int) -> int:
        """The budget less what is held back; all of it where it lasts to the whole space, in which all is exact."""
        whole = self.space.products.num + self.space.num - self.space.size <= budget
        return budget if whole else budget - self.doubtful

    def _settled(self, budget: int) -> bool:
        """All is found, or the time is up; starts the fresh start, and chooses the row that comes next."""
        look, spent = self.look(self.space.size), self.space.products.num
        self.doubtful = max(1, int((look.residuals[: self.num] <= NOISE * self.space.rounding).sum()))
        if self.probe and self.probe.contradicts(look):
            self.probe, self.probing, self.beside, self.coarse, self.steady = None, False, 0, None, None
        limit = self._limit(look, spent, budget)
        if self.probe and self.probing:
            if not self.probe.over(self.space, look, self.which) and spent < limit - self.beside:
                return False
            self.probing = False
        if self.probe and self.beside and len(self.space.R) and spent < limit:
            self.space.advance(min(1, len(self.space.R) - 1))  # behind the row that the fresh start would go on with
            self.next = self.space.size + 1
            return False
        near = self.near(look)
        done = bool(near.all())
        self.steady = (self.steady or spent + 1 + spent // STEADY) if done else None
        steady = self.steady is not None and (spent >= self.steady or not self.space.residual)
        ripe = steady or spent >= limit / (1 + PROBING)
        if self.probe is None and ripe and bool(near.any()):
            if 2 * self.space.size > self.limit + self.num:  # the fresh start needs room
                self._restart()
            self.probe, self.probing = Probe(look, near, self.space), True
            self.beside = self.space.basis.num - self.space.size - 1
            return False
        self._turn(look, ~near)
        return spent >= limit or (done and self.probe is not None)

    def _limit(self, look: Look, spent: int, budget: int) -> int:
        """Products at which the search ends, found or not."""
        if self.coarse is None and bool((look.residuals[: self.num] <= min(self.tol, LOOSE) * self.bound).all()):
            self.coarse = spent
        return budget if self.patient or self.coarse is None else min(budget, int(PATIENCE * self.coarse) + 3)

    def _turn(self, look: Look, far: Tensor) -> None:
        """The row that comes next is the one to which the residuals that are still large owe most."""
        R, S = self.space.R, look.S[:, : self.num][:, far]
        if len(R) > 1 and S.shape[1]:
            self.space.advance(int((R @ S).abs().amax(1).argmax()))

    def _restart(self) -> None:
        look, num = self.look(self.space.size), self.num + (self.limit - 2 * self.block - self.num) // 2
        first = list(range(num))
        if self.probe and self.probing:  # the ends of what the fresh start has seen are its memory
            first = list(dict.fromkeys([*first[: self.num], *self.probe.extremes(look), *first]))[:num]
            self.probe.rotate(look.S[:, first])
        self.space.restart(look.values[first], look.S[:, first])
        self.next = 0


class Probe:
    """A fresh random start beside the space: what it finds, and what it would have found if it were there."""

    def __init__(self, look: Look, claims: Tensor, space: Krylov):
        closed = [row for row in range(len(space.R)) if not space.R[row].any()]
        if closed:  # the space has gone on from a random vector by itself
            space.advance(closed[0])
        else:
            space.admit()
        self.before, self.claims, self.certain = look, claims, torch.zeros_like(claims)
        self.num, self.most, self.closed = 0, max(20, space.products.num // 2), False
        self.rest = space.num - space.size
        self.diagonal: list[float] = []
        self.beside: list[float] = []
        self.restarted = False
        self.share = torch.zeros(space.size, dtype=torch.float64)
        """Of every row of the basis, how much of it belongs to the fresh start."""

    def grow(self, space: Krylov, closed: bool) -> None:
        self.num, self.closed = self.num + 1, closed
        self.diagonal.append(float(space.T[-1, -1]))
        self.beside.append(float(space.R[-1, -1]) if len(space.R) else 0.0)
        self.share = torch.cat([self.share, self.share.new_ones(1)])

    def rotate(self, S: Tensor) -> None:
        self.share = S.square().T @ self.share
        self.restarted = True

    def extremes(self, look: Look) -> list[int]:
        """Where the least and the largest value are that the fresh start has found."""
        own = (self.share @ look.S.square() > 0.5).nonzero()[:, 0]
        values = look.values[own]
        return [int(own[values.argmin()]), int(own[values.argmax()])] if len(own) else []

    def contradicts(self, look: Look) -> bool:
        """A claimed value has moved by more than its residual: more wanted ones exist than were seen."""
        num = len(self.claims)
        moved = (look.values[:num] - self.before.values[:num]).abs() > 4 * self.before.residuals[:num]
        return bool((moved & self.claims).any())

    def over(self, space: Krylov, look: Look, which: Which) -> bool:
        """Every claim is certain, or the fresh start has shown all that it has, or has cost half of what came before."""
        num = len(self.claims)
        apart = (look.values[:num, None] - look.values).abs().sort(1).values[:, 1]
        for end, signs in zip(ends(num, which), SIGNS[which], strict=True):
            sizes = look.values[end].abs() if len(signs) == 2 else signs[0] * look.values[end]
            residuals = look.residuals[end]
            alone, before = sizes - 2 * residuals, (sizes - residuals)[:-1]
            none = self._none(torch.cat([alone, before]), signs, space, look)
            lonely = residuals * APART <= apart[end]
            self.certain[end] = none[: len(end)] | (lonely & torch.cat([lonely.new_ones(1), none[len(end) :]]))
        if self.closed:
            self.certain[:] = True
        return self.closed or bool(self.certain[self.claims].all()) or self.num >= self.most

    def _none(self, at: Tensor, signs: tuple[int, ...], space: Krylov, look: Look) -> Tensor:
        """No eigenvalue that the space leaves out is beyond `at`, but for a chance of `CHANCE`.

        The share of the fresh start beyond t is at most 1 / (p_0(t)^2 + ... + p_{j-1}(t)^2), p its orthonormal polynomials
        (Chebyshev, Markov, Stieltjes), and its share along one eigenvector is below x with a chance of at most
        sqrt(2 n x / pi). After a restart, which breaks the recurrence: its own largest value is found, and is smaller.
        """
        none = torch.ones(len(at), dtype=torch.bool)
        own = self.share @ look.S.square() > 0.5
        if not own.any():
            return ~none
        for sign in signs:
            sizes = sign * look.values[own]
            gap = at - sizes.max()
            if self.restarted:
                near = (space.R[0] @ look.S[:, own])[sizes.argmax()].abs() * APART <= gap
            else:
                near = 2 * self.rest <= math.pi * CHANCE**2 * self._squares(sign * at)
            none &= (gap > 0) & near
        return none

    def _squares(self, at: Tensor) -> Tensor:
        """p_0^2 + ... + p_{j-1}^2."""
        old, new, beta = torch.zeros_like(at), torch.ones_like(at), 0.0
        squares = new.square()
        for alpha, coupled in zip(self.diagonal[:-1], self.beside[:-1], strict=True):
            old, new, beta = new, ((at - alpha) * new - beta * old) / coupled, coupled
            squares = squares + new.square()
        return squares


def ends(num: int, which: Which) -> list[Tensor]:
    """Where the wanted values of each end are among all wanted ones, which are in turns."""
    every = torch.arange(num)
    return [every[::2], every[1::2]] if which == "both" else [every]


def order(values: Tensor, which: Which) -> Tensor:
    """Indices of ascending values, the most wanted first; for both ends in turns."""
    if which == "magnitude":
        return values.abs().argsort(descending=True, stable=True)
    up = torch.arange(len(values))
    if which == "smallest":
        return up
    if which == "largest":
        return up.flip(0)
    return torch.stack([up.flip(0), up], 1).flatten()[: len(values)]
