"""The least information that two sources can have about a target, given what each of them has: a convex programme."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy

ROUNDING = 1e-13
"""Of the merit: a smaller gain cannot be seen."""


class Coupling(NamedTuple):
    """A joint distribution with the given pairs of margins whose conditional entropy of the target is the largest."""

    q: np.ndarray
    """(x, y, z)."""
    gap: float
    """Nats by which the conditional entropy may be below the largest one, at most: by a bound, whatever the solver did."""


def least_informative(p: np.ndarray, *, tolerance: float = 1e-8, most: int = 100) -> Coupling:
    r"""The joint distribution q with the margins (x, z) and (y, z) of p that has the least I(X, Y; Z).

    Minimises the convex $f(q) = \sum q_{xyz} \log (q_{xyz} / q_{xy})$, the negative conditional entropy of z, over cells
    where both margins are positive, by Newton's method with a barrier $-t \sum \log q$ and falling t. Any
    $\lambda_{xz}, \mu_{yz}$ with $\sum_z e^{\lambda_{xz} + \mu_{yz}} \le 1$ for all x, y is feasible in the dual and has
    $f \ge \sum p_{xz} \lambda_{xz} + \sum p_{yz} \mu_{yz}$: the multipliers of each step, shifted until they are, give `gap`.

    Dense matrices in the number of cells of the margins: for small alphabets.

    Bertschinger, Rauh, Olbrich, Jost, Ay (2014), doi:10.3390/e16042161; as a cone programme with this dual: Makkeh, Theis,
    Vicente (2017), doi:10.3390/e19100530.
    """
    cells = _Cells.of(p)
    q, num, best = cells.start, len(cells.start), None
    t = 0.1 / num
    for _ in range(most):
        q, multipliers, decrement = cells.newton(q, t)
        gap = cells.value(q) - cells.bound(multipliers)
        if best is None or gap < best[1]:
            best = (q, gap)
        if best[1] <= tolerance or t < tolerance / (1000 * num):  # further down there is rounding
            break
        t *= 0.2 if decrement < num * t else 1.0
    assert best is not None
    whole = np.zeros(p.shape)
    whole[cells.x, cells.y, cells.z] = best[0]
    return Coupling(whole, max(float(best[1]), 0.0))


class _Cells(NamedTuple):
    """Cells that may be positive, with the margins that they add up to."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    pair: np.ndarray
    """Of x and y, counted from 0."""
    start: np.ndarray
    margins: np.ndarray
    """0 and 1, (constraint, cell): without those that follow from the others."""
    sums: np.ndarray

    @classmethod
    def of(cls, p: np.ndarray) -> _Cells:
        xz, yz = p.sum(1), p.sum(0)
        x, y, z = np.nonzero((xz[:, None] > 0) & (yz[None] > 0))
        start = xz[x, z] * yz[y, z] / p.sum((0, 1))[z]  # independent given z
        _, pair = np.unique(x * p.shape[1] + y, return_inverse=True)
        rows = [(x == i) & (z == k) for i, k in np.argwhere(xz > 0)]
        for k in np.unique(z):
            rows += [(y == j) & (z == k) for j in np.flatnonzero(yz[:, k])[1:]]  # the first follows from the total of z
        margins = np.array(rows, dtype=np.float64)
        return cls(x, y, z, pair, start, margins, margins @ start)

    def pairs(self, values: np.ndarray) -> np.ndarray:
        """Sums over z."""
        return np.bincount(self.pair, values)

    def value(self, q: np.ndarray) -> float:
        return float(scipy.special.rel_entr(q, self.pairs(q)[self.pair]).sum())

    def bound(self, multipliers: np.ndarray) -> float:
        """The dual's value, by multipliers shifted until they are feasible."""
        terms = self.margins.T @ multipliers
        over = np.log(self.pairs(np.exp(np.minimum(terms, 700))).max())
        return float(multipliers @ self.sums - over)

    def newton(self, q: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray, float]:
        """One step towards the centre of t; the multipliers there; twice what is left to gain, to second order."""
        total = self.pairs(q)
        gradient = np.log(q / total[self.pair]) - t / q
        inverse = q * q / (q + t)  # of the diagonal 1 / q + t / q^2; the Hessian has -1 / total beside it in each pair
        rest = self.pairs(q * t / (q + t))

        def solve(v: np.ndarray) -> np.ndarray:
            scaled = inverse[:, None] * v
            inner = np.zeros((len(total), v.shape[1]))
            np.add.at(inner, self.pair, scaled)
            return scaled + inverse[:, None] * (inner / rest[:, None])[self.pair]

        moved = solve(np.column_stack([self.margins.T, gradient]))
        schur, missing = self.margins @ moved[:, :-1], self.sums - self.margins @ q
        multipliers = np.linalg.lstsq(schur, self.margins @ moved[:, -1] + missing, rcond=1e-15)[0]
        step = moved[:, :-1] @ multipliers - moved[:, -1]
        decrement = float(-gradient @ step)
        falling = step < 0
        size = min(1.0, 0.95 * float(np.min(q[falling] / -step[falling]))) if falling.any() else 1.0
        at = self._merit(q, t)
        while decrement > ROUNDING and self._merit(q + size * step, t) > at - 1e-4 * size * decrement:
            size /= 2
            if size < 1e-10:
                return q, multipliers, 0.0
        return self.fitted(q + size * step), multipliers, decrement

    def fitted(self, q: np.ndarray) -> np.ndarray:
        """With the margins that rounding took it away from, each cell moved in proportion to itself."""
        for _ in range(3):
            missing = self.sums - self.margins @ q
            moved = q * (
                1 + self.margins.T @ np.linalg.lstsq((self.margins * q) @ self.margins.T, missing, rcond=1e-13)[0]
            )
            if not (moved > 0).all():
                return q
            q = moved
        return q

    def _merit(self, q: np.ndarray, t: float) -> float:
        return self.value(q) - t * float(np.log(q).sum())
