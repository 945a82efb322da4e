"""Critical sharpness: two over the smallest learning rate at which a step along an update raises the loss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from ..core.checks import check_choice, check_count, check_positive
from ..core.objective import Loss, Theta, check_shapes
from ..core.restrict import LeafDirection
from ..core.result import Result, quantity
from ..core.standard_errors import ratio_stderr
from ..core.tables import counted
from .crossing import bracket, doubling
from .leaf_lines import LeafLine
from .leafwise import Terms, gradient_at
from .lines import Line
from .stored_gradient import StoredGradient, gradient_line

Search = Literal["interpolate", "double"]
SEARCHES = {"interpolate": bracket, "double": doubling}
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
    def unresolved(self) -> list[str]:
        """Where rounding may be all of the fall that is expected, it decides where the loss rises."""
        return ["value", "interval", "learning_rate", "learning_rate_interval"] if self.rounding >= 1 else []

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"bound": ["low", "high"]}


def critical_sharpness(
    loss: Loss,
    theta: Theta,
    direction: Theta | LeafDirection | None = None,
    *,
    start: float | None = None,
    tolerance: float = 0.05,
    max_forwards: int = 24,
    search: Search = "interpolate",
) -> CriticalSharpness:
    r"""Two over the smallest learning rate at which one step along the update u raises the loss.

    $$\lambda_c = \frac{2}{\eta_c}, \qquad \eta_c = \inf\{\eta > 0 : L(\theta - \eta u) > L(\theta)\}; \qquad
        \text{quadratic } L: \ \eta_c = \frac{2\, g^\top u}{u^\top H u},\ \ \lambda_c = \frac{u^\top H u}{g^\top u}.$$

    For u = g on a quadratic this is the curvature along the gradient, a mean of the eigenvalues weighted by the gradient's
    squared parts: at most the largest eigenvalue, and equal to it where g is its eigenvector.

    direction: the update u that a learning rate would multiply (theta becomes theta - eta u): the gradient by default; a
    flat vector or a dict, Adam's update for example; or one that exists a leaf at a time, with points that do so, too, for
    models that fill the memory: `stored_gradient`, one of `directions`. start: the first learning rate that is tried; by
    default the smaller of $L / g^\top u$, where the tangent of the loss reaches 0, and a step of 1 % of $\|\theta\|$.
    tolerance: the interval ends at a ratio of 1 + tolerance. max_forwards: passes after which the search ends whatever is
    known.

    search: `interpolate` by parabolas and secants; `double` by factors of two and then middles in log space, Kalra's way,
    which costs 5 or 6 passes where `start` is within a factor of four and `tolerance` is 0.41 (`crossing.doubling`), as the
    learning rate of a training often is.

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
    how: Any = {"start": start, "tolerance": tolerance, "max_forwards": max_forwards, "search": search}
    if direction is None or (isinstance(direction, StoredGradient) and direction.is_of(loss, theta)):
        line, terms = gradient_line(loss, theta, direction)
        return _searched(line, line.inner(line), terms, **how)
    return relative_critical_sharpness(loss, loss, theta, direction, **how)


def relative_critical_sharpness(
    loss_1: Loss,
    loss_2: Loss,
    theta: Theta,
    direction: Theta | LeafDirection | None = None,
    *,
    start: float | None = None,
    tolerance: float = 0.05,
    max_forwards: int = 24,
    search: Search = "interpolate",
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
    line = _line(loss_1, loss_2, theta, direction)
    terms = line.terms(0.0)
    slope = line.slope(float(terms.weights.sum()))
    if not math.isfinite(terms.mean) or not math.isfinite(slope):
        raise ValueError(
            f"the loss at theta is {terms.mean} and its slope along the update {slope}: both must be finite. Check the "
            "weights, the batch and the update."
        )
    result = _searched(line, slope, terms, start, tolerance, max_forwards - 1, search)
    return replace(result, num_forwards=result.num_forwards + 1)


def _line(loss_1: Loss, loss_2: Loss, theta: Theta, direction: Theta | LeafDirection | None) -> Line | LeafLine:
    """The line of loss 2 along an update, or along the gradient of loss 1."""
    if isinstance(direction, LeafDirection):
        check_shapes(loss_2, theta)
        return LeafLine(loss_2, loss_2.leaves(theta), direction)
    at = Loss.wide_leaves(loss_2, theta)
    return Line(
        loss_2, at, gradient_at(loss_1, at)[0] if direction is None else loss_1.wide_leaves(direction, "direction")
    )


def _searched(
    line: Line | LeafLine,
    slope: float,
    terms: Terms,
    start: float | None,
    tolerance: float,
    max_forwards: int,
    search: Search,
) -> CriticalSharpness:
    """The search from known terms at theta, and what its bracket says."""
    _check_search(search, tolerance, max_forwards, start)
    nan = math.nan
    status: Status = "ascent direction" if slope < 0 else "flat direction"
    open_ = CriticalSharpness(nan, (nan, nan), nan, status, nan, (nan, nan), slope, terms.mean, nan, 0)
    if slope <= 0:
        return open_
    rises: dict[float, Tensor] = {}

    def rise(eta: float) -> float:
        rises[eta] = line.terms(-eta).sums - terms.sums
        return float(rises[eta].sum() / terms.weights.sum())

    first = _start(line, slope, terms.mean) if start is None else start
    ends = SEARCHES[search](rise, slope, first, ratio=1 + tolerance, max_trials=max_forwards)
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
        status="found" if high <= (1 + tolerance) * low * (1 + 1e-12) else "not narrowed",
        learning_rate=eta,
        learning_rate_interval=(low, high),
        slope=slope,
        loss=terms.mean,
        rounding=2 * line.loss.net.unit_roundoff * abs(terms.mean) / (slope * eta),
        num_forwards=ends.num,
    )


def _check_search(search: Search, tolerance: float, most: int, start: float | None) -> None:
    check_choice("search", search, SEARCHES)
    check_positive("tolerance", tolerance)
    check_count("max_forwards", most + 1, least=3)
    if start is not None:
        check_positive("start", start)


def _start(line: Line | LeafLine, slope: float, level: float) -> float:
    """The smaller of two: where the tangent of the loss reaches 0, and a step of a hundredth of theta's norm."""
    steps = [level / slope, 0.01 * line.base_norm / line.norm]
    return min((step for step in steps if 0 < step < math.inf), default=1.0)
