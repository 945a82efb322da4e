"""Critical sharpness: two over the smallest learning rate at which a step along an update raises the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ..core.checks import check_count, check_positive
from ..core.objective import Loss, Theta
from ..core.result import Result, quantity
from ..core.standard_errors import ratio_stderr
from ..core.tables import counted
from ..core.vectors import Leaves, inner, moved, norm
from .leafwise import Terms, gradient_at, slope_along, terms_at

Status = Literal["found", "ascent direction", "flat direction", "never rises", "always rises", "not narrowed"]


class CriticalSharpness(Result):
    r"""The critical learning rate of a loss along an update; made by `critical_sharpness`.

    Sharpness is in nats per squared unit of theta where the update is a gradient: $2 / \eta$ for the learning rate $\eta$.
    """

    value: float = quantity("critical sharpness", stderr="stderr")
    r"""$\lambda_c = 2 / \eta_c$; nan where `status` is neither `found` nor `not narrowed`."""
    interval: tuple[float, float] = quantity("interval of the critical sharpness", per="bound")
    """Between these lies the sharpness: the loss has risen at the learning rate of the one and not at that of the other."""
    stderr: float
    """Over sequences, with the update held fixed; nan for one sequence."""
    status: Status
    learning_rate: float = quantity("critical learning rate")
    r"""$\eta_c$."""
    learning_rate_interval: tuple[float, float] = quantity("interval of the critical learning rate", per="bound")
    slope: float = quantity("slope along the update")
    r"""$g^\top u$: how fast the loss falls along the update."""
    loss: float = quantity("loss", unit="loss")
    rounding: float
    """The relative error of the value that rounding of two losses may make."""
    num_forwards: int
    """Passes over all batches, beside the one gradient (or the one `jvp` along a given update)."""

    @property
    def head(self) -> str:
        return f"critical sharpness: {self.status}, {counted(self.num_forwards, 'forward pass', 'forward passes')}"

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"bound": ["low", "high"]}


def critical_sharpness(
    loss: Loss,
    theta: Theta,
    direction: Theta | None = None,
    *,
    start: float | None = None,
    tolerance: float = 0.05,
    max_forwards: int = 24,
) -> CriticalSharpness:
    r"""Two over the smallest learning rate at which one step along the update u raises the loss.

    $$\lambda_c = \frac{2}{\eta_c}, \qquad \eta_c = \inf\{\eta > 0 : L(\theta - \eta u) > L(\theta)\}; \qquad
        \text{quadratic } L: \ \eta_c = \frac{2\, g^\top u}{u^\top H u},\ \ \lambda_c = \frac{u^\top H u}{g^\top u}.$$

    For u = g on a quadratic this is the curvature along the gradient, a mean of the eigenvalues weighted by the gradient's
    squared parts: at most the largest eigenvalue, and equal to it where g is its eigenvector.

    direction: the update u that a learning rate would multiply (theta becomes theta - eta u): the gradient by default; a
    flat vector or a dict, Adam's update for example. start: the first learning rate that is tried; by default the smaller of
    $L / g^\top u$, where the tangent of the loss reaches 0, and a step of 1 % of $\|\theta\|$. tolerance: the interval
    ends at a ratio of 1 + tolerance. max_forwards: passes after which the search ends whatever is known.

    Cost: one gradient (one `jvp` for a given direction) and 3 passes where the loss is a parabola, otherwise 6 to 12. The
    search finds *a* crossing: the loss may have risen and fallen between two trials, above all where `start` is far beyond
    the first crossing. The value is where a secant in the interval crosses.

    Status and nan: `ascent direction`, $g^\top u < 0$, so that any step raises the loss and $\eta_c$ is 0;
    `flat direction`, $g^\top u = 0$; `never rises`, at no learning rate that was tried, up to the upper end of
    `learning_rate_interval`; `always rises`, down to the lower end. `not narrowed` has a value with a wider interval. Where
    `rounding` is not far below `tolerance`, the signs are decided by rounding: compute in a wider dtype.

    `stderr` is about the crossing along this update. Where the update is the gradient of the same data, as by default, the
    value of n sequences differs from that of all in the mean, by a part that falls like 1 / n and that no error here has:
    take the update from more data than the loss, or compare numbers of sequences.

    Raises ValueError for a direction of other shape, and a loss or gradient at theta that is not finite.

    Kalra, Gagnon-Audet, Gromov, Mediratta, Niu, Miller, Shvartsman (2026), arXiv 2601.16979.

    >>> import torch, funcscope as fs
    >>> net, square = fs.functional(torch.nn.Linear(1, 1, bias=False)), fs.custom(lambda out, y: (out - y) ** 2)
    >>> loss = fs.objective(net, [(torch.ones(1, 1), torch.zeros(1, 1))], square)
    >>> result = critical_sharpness(loss, torch.tensor([3.0]))                              # L'' = 2 at every point
    >>> round(result.value, 3), [round(end, 3) for end in result.interval]
    (2.0, [1.956, 2.044])
    """
    if direction is not None:
        search: Any = {"start": start, "tolerance": tolerance, "max_forwards": max_forwards}
        return relative_critical_sharpness(loss, loss, theta, direction, **search)
    at = Loss.wide_leaves(loss, theta)
    update, terms = gradient_at(loss, at)
    return _searched(loss, at, update, inner(update, update), terms, start, tolerance, max_forwards)


def relative_critical_sharpness(
    loss_1: Loss,
    loss_2: Loss,
    theta: Theta,
    direction: Theta | None = None,
    *,
    start: float | None = None,
    tolerance: float = 0.05,
    max_forwards: int = 24,
) -> CriticalSharpness:
    r"""Two over the smallest learning rate at which a step of loss 1's optimiser raises loss 2.

    $$\lambda_c^{1 \to 2} = \frac{2}{\eta_c^{1 \to 2}}, \qquad
        \eta_c^{1 \to 2} = \inf\{\eta > 0 : L_2(\theta - \eta u_1) > L_2(\theta)\},$$

    on a quadratic $u_1^\top H_2 u_1 / g_2^\top u_1$: large where what is learned is soon undone elsewhere, fine-tuning that
    forgets, say. direction: $u_1$, by default the gradient of loss 1. Other arguments, units, cost, assumptions and errors
    are those of `critical_sharpness`, for loss 2; `ascent direction` says that every step for loss 1 raises loss 2.

    Raises ValueError also where the two losses have parameters of other names or shapes.

    Kalra et al. (2026), arXiv 2601.16979.

    >>> import torch, funcscope as fs
    >>> net, square = fs.functional(torch.nn.Linear(1, 1, bias=False)), fs.custom(lambda out, y: (out - y) ** 2)
    >>> one, two = (fs.objective(net, [(torch.ones(1, 1), torch.full((1, 1), y))], square) for y in (0.0, 4.0))
    >>> relative_critical_sharpness(one, two, torch.tensor([3.0])).status
    'ascent direction'
    """
    if loss_1.layout.shapes != loss_2.layout.shapes:
        raise ValueError("`loss_1` and `loss_2` must be losses of the same parameters; their names or shapes differ.")
    at = Loss.wide_leaves(loss_2, theta)
    update = gradient_at(loss_1, at)[0] if direction is None else loss_1.wide_leaves(direction, "direction")
    terms = terms_at(loss_2, at)
    slope = slope_along(loss_2, at, update, float(terms.weights.sum()))
    if not math.isfinite(terms.mean) or not math.isfinite(slope):
        raise ValueError(
            f"the loss at theta is {terms.mean} and its slope along the update {slope}: both must be finite. Check the "
            "weights, the batch and the update."
        )
    result = _searched(loss_2, at, update, slope, terms, start, tolerance, max_forwards - 1)
    return replace(result, num_forwards=result.num_forwards + 1)


def _searched(
    loss: Loss, at: Leaves, update: Leaves, slope: float, terms: Terms, start: float | None, tolerance: float, most: int
) -> CriticalSharpness:
    """The search from known terms at theta, and what its bracket says."""
    check_positive("tolerance", tolerance)
    check_count("max_forwards", most + 1, least=3)
    if start is not None:
        check_positive("start", start)
    nan = math.nan
    status: Status = "ascent direction" if slope < 0 else "flat direction"
    open_ = CriticalSharpness(nan, (nan, nan), nan, status, nan, (nan, nan), slope, terms.mean, nan, 0)
    if slope <= 0:
        return open_
    rises: dict[float, Tensor] = {}

    def rise(eta: float) -> float:
        rises[eta] = terms_at(loss, moved(at, update, -eta)).sums - terms.sums
        return float(rises[eta].sum() / terms.weights.sum())

    first = _start(at, update, slope, terms.mean) if start is None else start
    ends = bracket(rise, slope, first, ratio=1 + tolerance, max_trials=most)
    (low, rate_low), (high, rate_high), eta = ends.low, ends.high, ends.crossing if ends.closed else nan
    if not ends.closed:
        status = "never rises" if low else "always rises"
        return replace(open_, status=status, learning_rate_interval=(low, high), num_forwards=ends.num)
    scored = terms.weights != 0
    spread = float(ratio_stderr(rises[low][scored], terms.weights[scored]))
    return CriticalSharpness(
        value=2 / eta,
        interval=(2 / high, 2 / low),
        stderr=2 / eta**3 * spread * (high - low) / (rate_high - rate_low),  # d eta = d rise / (eta d rate)
        status="found" if high <= (1 + tolerance) * low else "not narrowed",
        learning_rate=eta,
        learning_rate_interval=(low, high),
        slope=slope,
        loss=terms.mean,
        rounding=2 * loss.net.unit_roundoff * abs(terms.mean) / (slope * eta),
        num_forwards=ends.num,
    )


def _start(at: Leaves, update: Leaves, slope: float, level: float) -> float:
    """The smaller of two: where the tangent of the loss reaches 0, and a step of a hundredth of theta's norm."""
    steps = [level / slope, 0.01 * norm(at) / norm(update)]
    return min((step for step in steps if 0 < step < math.inf), default=1.0)


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
