"""Where a function along a line rises above its value at 0: trials that close in on it from both sides."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Trial(NamedTuple):
    """A learning rate, and how far the loss has risen there over that rate: -slope at 0, and 0 at the crossing."""

    eta: float
    rate: float


class Bracket(NamedTuple):
    """The largest trial below and the smallest above; (0, -slope) and (inf, nan) where there was none."""

    low: Trial
    high: Trial
    third: Trial
    """The end that the last trial took the place of; the origin where there was none."""
    num: int

    @property
    def closed(self) -> bool:
        return self.low.eta > 0 and math.isfinite(self.high.eta)

    @property
    def crossing(self) -> float:
        """Where the secant of the rate crosses 0, exact for a parabola; the ends' geometric mean where one is infinite."""
        share = -self.low.rate / (self.high.rate - self.low.rate)
        if not math.isfinite(self.high.rate) or not math.isfinite(share):
            return math.sqrt(self.low.eta) * math.sqrt(self.high.eta)
        return self.low.eta + (self.high.eta - self.low.eta) * share


def bracket(rise: Callable[[float], float], slope: float, start: float, *, ratio: float, max_trials: int) -> Bracket:
    r"""Trials until `high / low <= ratio`: none of them above at low, one above at high. A rise of nan counts as above.

    slope: how fast the function falls at 0. While all trials are on one side, the next is where a parabola through 0 and the
    last one crosses, further by a factor of 3, 9, ... after each failure; a step of 10 where it hardly bends. Between two
    sides, it is where a secant puts the crossing, or, once there are three trials around it, inverse quadratic interpolation
    if Chandrupatla's test trusts it, or else the middle in log space;
    moved by a factor of about $\sqrt{ratio}$ to the far side, so that the bracket closes from both ends.

    Chandrupatla (1997), doi:10.1016/S0965-9978(96)00051-8.

    >>> ends = bracket(lambda x: x**2 - 3 * x, 3.0, 100.0, ratio=1.1, max_trials=9)
    >>> ends.num, round(ends.low.eta, 2), round(ends.high.eta, 2), round(ends.crossing, 12)
    (3, 2.87, 3.13, 3.0)
    """
    origin = Trial(0.0, -slope)
    ends = Bracket(origin, Trial(math.inf, math.nan), origin, 0)
    eta, same_side, was_below = start, 0, None
    while ends.num < max_trials and 0 < eta < math.inf:
        trial = Trial(eta, rise(eta) / eta)
        below = trial.rate <= 0
        same_side, was_below = same_side + 1 if below == was_below else 0, below
        third = ends.low if below else ends.high if math.isfinite(ends.high.eta) else origin
        ends = Bracket(*((trial, ends.high) if below else (ends.low, trial)), third, ends.num + 1)
        if ends.closed and ends.high.eta <= ratio * ends.low.eta:
            break
        eta = (_between if ends.closed else _beyond)(ends, below, same_side, ratio**0.45, slope)
    return ends


def _beyond(ends: Bracket, below: bool, failures: int, beside: float, slope: float) -> float:
    """Where to look for the other side."""
    factor = max(beside, 3.0**failures) if failures else beside
    if below:
        guess = max(_parabola(slope, ends.low), ends.low.eta)
        return factor * (guess if guess < 1000 * ends.low.eta else 10 * ends.low.eta)  # a small bend may be rounding
    return max(_parabola(slope, ends.high) / factor, ends.high.eta / 1000)


def _between(ends: Bracket, below: bool, failures: int, beside: float, _: float) -> float:
    """Where to cut the bracket: on the far side of the crossing from the last trial."""
    low, high = ends.low.eta, ends.high.eta
    middle = math.sqrt(low) * math.sqrt(high)
    last, other = (ends.low, ends.high) if below else (ends.high, ends.low)
    root = _inverse_quadratic(last, other, ends.third) if ends.third.eta else ends.crossing
    if root is None or failures > 2:
        return middle
    wide = beside**2.0**failures
    places = (root * wide, root / beside) if below else (root / wide, root * beside)
    return next((eta for eta in places if low < eta < high), middle)  # the bracket may already end on the far side


def _inverse_quadratic(a: Trial, b: Trial, c: Trial) -> float | None:
    """The crossing between a and b with the help of c; None where the three do not lie on a monotone parabola."""
    if not all(math.isfinite(x.rate) for x in (a, b, c)) or len({a.rate, b.rate, c.rate}) < 3:
        return None
    place, size = (a.eta - b.eta) / (c.eta - b.eta), (a.rate - b.rate) / (c.rate - b.rate)
    if not (size * size < place and (1 - size) * (1 - size) < 1 - place):
        return None
    first = a.rate / (b.rate - a.rate) * (c.rate / (b.rate - c.rate))
    second = (c.eta - a.eta) / (b.eta - a.eta) * (a.rate / (c.rate - a.rate)) * (b.rate / (c.rate - b.rate))
    return a.eta + (first + second) * (b.eta - a.eta)


def _parabola(slope: float, at: Trial) -> float:
    """Where the parabola with this slope at 0 through a trial crosses 0; inf where it never does, 0 for an infinite rise."""
    bend = at.rate + slope
    if math.isnan(bend):
        return 0.0
    return at.eta * (slope / bend) if bend > 0 else math.inf


def doubling(rise: Callable[[float], float], slope: float, start: float, *, ratio: float, max_trials: int) -> Bracket:
    r"""As `bracket`, by fixed steps: factors of two up or down to the other side, then middles in log space.

    From a start within a factor of $2^k$ of the crossing, k + 1 trials or one more find two sides, and each further one takes
    the root of the bracket's ratio, which is 2 at first: 5 or 6 in all for k = 2 and a ratio of $\sqrt 2$.

    >>> ends = doubling(lambda x: x**2 - 3 * x, 3.0, 1.0, ratio=1.5, max_trials=9)
    >>> ends.num, round(ends.low.eta, 2), round(ends.high.eta, 2), round(ends.crossing, 12)          # 1, 2, 4; 2.83
    (4, 2.83, 4.0, 3.0)
    """
    origin = Trial(0.0, -slope)
    ends, eta = Bracket(origin, Trial(math.inf, math.nan), origin, 0), start
    while ends.num < max_trials and 0 < eta < math.inf:
        trial = Trial(eta, rise(eta) / eta)
        below = trial.rate <= 0
        ends = Bracket(*((trial, ends.high) if below else (ends.low, trial)), origin, ends.num + 1)
        if ends.closed:
            if ends.high.eta <= ratio * ends.low.eta * (1 + 1e-12):  # the middles are rounded
                break
            eta = math.sqrt(ends.low.eta) * math.sqrt(ends.high.eta)
        else:
            eta = 2 * eta if below else eta / 2
    return ends
