"""Curves between two models: a quadratic Bezier curve whose middle control point is trained to keep the loss low."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad_and_value

from ..core.checks import check_count, check_flat, check_positive
from ..core.directions import dot
from ..core.estimate import Estimate
from ..core.keys import Key, check_key, fold_in, uniform
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.tables import Entry, counted
from .barriers import LossPath
from .evaluator import over_points, points_at_once
from .path import Point, measured, on_line
from .states import Buffers, End, EndPoint, States
from .terms import Metric

RATE = 0.1
"""The default learning rate over the root mean square of the coordinates of end - start."""


def bezier(
    start: Float[Tensor, " p"], midpoint: Float[Tensor, " p"], end: Float[Tensor, " p"], t: float
) -> Float[Tensor, " p"]:
    r"""The point $(1 - t)^2 \theta_0 + 2 t (1 - t)\, m + t^2\, \theta_1$ of a quadratic Bezier curve.

    The curve passes the straight line at $2 t (1 - t) (m - (\theta_0 + \theta_1) / 2)$, so that with the midpoint of the
    end points it is the straight line: proofs/bezier_midpoint.py. It does not pass through m.

    >>> bezier(torch.tensor([0.0]), torch.tensor([4.0]), torch.tensor([2.0]), 0.5)
    tensor([2.5000])
    """
    check_flat("midpoint", midpoint, len(start))
    check_flat("end", end, len(start))
    row = torch.empty_like(
        start, dtype=torch.promote_types(torch.promote_types(start.dtype, end.dtype), midpoint.dtype)
    )
    return _write(start, midpoint, end, t, row)


def bezier_path(
    loss: Loss,
    start: End,
    midpoint: Theta,
    end: End,
    *,
    num: int = 21,
    chunk: int | None = None,
    buffers: Buffers = "interpolate",
    metric: Mapping[str, Metric] | None = None,
) -> LossPath:
    r"""The loss on a quadratic Bezier curve between two models, with its barriers over them.

    $$\varphi(t) = (1 - t)^2 \theta_0 + 2 t (1 - t)\, m + t^2\, \theta_1, \qquad L(t) = L(\varphi(t)).$$

    A curve trained by `connect` looks better on the data that it was trained on than on others: here it can be measured
    on any. midpoint: m, a flat vector of shape (P,) or a dict of parameters; start, end: such, or nets. Barriers, errors,
    biases, the other arguments and errors raised: see `linear_path`; the chord is taken in t. Interpolated running
    statistics are linear in t, as m has none; Garipov et al. re-estimate them.

    Garipov, Izmailov, Podoprikhin, Vetrov, Wilson (2018), arXiv:1802.10026.

    >>> from funcscope.core import criterion, model, objective
    >>> net = model.functional(torch.nn.Linear(2, 1, bias=False))
    >>> ring = criterion.custom(lambda out, y: ((out**2).sum() - 1).square()[None])          # (|theta|^2 - 1)^2
    >>> loss = objective.objective(net, [(torch.eye(2), torch.zeros(2, 1))], ring)
    >>> start, corner, end = (torch.tensor(x) for x in ([1.0, 0.0], [1.0, 1.0], [0.0, 1.0]))
    >>> path = bezier_path(loss, start, corner, end, num=3)
    >>> [round(x, 4) for x in path.losses.tolist()]                                          # at (3/4, 3/4): 1/64
    [0.0, 0.0156, 0.0]
    """
    check_count("num", num, least=3)
    states = States.of(loss, buffers, metric)
    ends = states.end(start, "start"), states.end(end, "end")
    m, middle = states.vector(midpoint, "midpoint"), (ends[0].state + ends[1].state) / 2
    m = torch.cat([m, middle[len(m) :]])
    return measured(states, *ends, _on_curve(*ends, m, num), num=num, chunk=chunk, kind="bezier")


def connect(
    loss: Loss,
    start: End,
    end: End,
    *,
    key: Key,
    steps: int = 200,
    learning_rate: float | None = None,
    points: int = 4,
    num: int = 21,
    chunk: int | None = None,
    buffers: Buffers = "interpolate",
    metric: Mapping[str, Metric] | None = None,
) -> Connection:
    r"""A curve of low loss between two models, looked for by training: are they connected though the line is blocked?

    $$\min_m\; \mathbb{E}_{t \sim U(0, 1)}\, L\big((1 - t)^2 \theta_0 + 2 t (1 - t)\, m + t^2\, \theta_1\big).$$

    Adam on m alone, from the straight midpoint $(\theta_0 + \theta_1) / 2$, where the curve is the line
    (proofs/bezier_midpoint.py). Step k averages over `points` values of t, one
    drawn in each of as many equal parts of [0, 1], from `fold_in(key, k)`; all batches are used at every step. The
    midpoint is the last one: no step is picked by its noisy loss. A barrier on the result is an upper bound of what
    better training, or a curve of more control points, may find; a curve without one shows that the models are connected.

    start, end: nets, flat vectors of shape (P,) or dicts of parameters; they are not changed. buffers: as in `bezier_path`;
    where they are re-estimated, m is trained on the statistics of each batch, as in train mode, and the gradient is taken
    through them.
    learning_rate: of the first step, in units of the parameters, falling linearly to 0 over the steps. Default 0.1 times
    the root mean square coordinate of end - start: an Adam step moves a coordinate by about the rate, so that `steps`
    of them may move m by some 0.05 steps ||end - start|| at the most.
    num: points of `path` and `line`, at the same t. chunk: models per `vmap`, see `linear_path`; in training at most
    `points`, each with its gradient. metric: measured on `path` and `line`, see `loss_plane`; training does not look at it.

    The loss of `path` is on the data that m was trained on, and biased down as any training loss is: measure on other
    data with `bezier_path`. Cost: steps x points gradients and 2 num - 2 forwards.

    Raises ValueError as `linear_path`, for equal end points (there is nothing to connect), a count or a rate that is not
    positive, and where a loss or a gradient in training is not finite.

    Garipov, Izmailov, Podoprikhin, Vetrov, Wilson (2018), Loss surfaces, mode connectivity, and fast ensembling of DNNs,
    arXiv:1802.10026; Draxler, Veschgini, Salmhofer, Hamprecht (2018), arXiv:1803.00885.

    >>> from funcscope.core import criterion, keys, model, objective
    >>> net = model.functional(torch.nn.Linear(2, 1, bias=False))
    >>> ring = criterion.custom(lambda out, y: ((out**2).sum() - 1).square()[None])            # (|theta|^2 - 1)^2
    >>> loss = objective.objective(net, [(torch.eye(2), torch.zeros(2, 1))], ring)
    >>> start, end = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> curve = connect(loss, start, end, key=keys.key(0))
    >>> float(curve.line.barrier_max.value), bool(curve.path.barrier_max.value < 0.01)          # the line cuts the ring
    (0.25, True)
    """
    check_key(key)
    for name, count, least in (("steps", steps, 1), ("points", points, 1), ("num", num, 3)):
        check_count(name, count, least)
    chunk = points_at_once(loss, chunk)
    states, p = States.of(loss, buffers, metric), loss.layout.num
    a, b = states.end(start, "start"), states.end(end, "end")
    gap = b.state[:p] - a.state[:p]
    distance = dot(gap, gap) ** 0.5
    if distance == 0:
        raise ValueError("`start` and `end` are equal: there is nothing to connect. Pass two different models.")
    rate = RATE * distance / math.sqrt(len(gap)) if learning_rate is None else learning_rate
    check_positive("learning_rate", rate)
    m, history = _train(states, a, b, key, steps, rate, points, chunk)
    line = measured(states, a, b, on_line(a.state, b.state, num), num=num, chunk=chunk, kind="line")
    path = measured(states, a, b, _on_curve(a, b, m, num), num=num, chunk=chunk, kind="bezier", known=True)
    gap, m = (m - (a.state + b.state) / 2)[:p], m[:p].clone()
    return Connection(m, path, line, history, dot(gap, gap) ** 0.5, rate, points, key)


class Connection(Result):
    """A trained curve between two models beside the straight line; made by `connect`, whose docstring has the formulas.

    The curve's quantities have their names in `LossPath`, the line's `line_` before them.
    """

    midpoint: Float[Tensor, " p"] = internal()
    """The trained control point, in the dtype and on the device of the end points."""
    path: LossPath = internal()
    line: LossPath = internal()
    history: Float[Tensor, " steps"] = quantity(
        "mean loss at the points of a step", unit="loss", per="step", shown=False
    )
    """Before each step: noisy, as t differs from step to step."""
    displacement: float = quantity("distance of the control point from the straight midpoint")
    learning_rate: float
    points: int
    key: Key

    @derived("fall of the highest loss from the line to the curve", unit="loss")
    def reduction(self) -> Estimate:
        """With its paired error."""
        return self.line.mean(self.line.barrier_sums[0] - self.path.barrier_sums[0])

    steps = derived("steps", shown=False)(lambda self: len(self.history))
    num_forwards = derived("forward passes", shown=False)(lambda self: self.line.num_forwards + self.path.num_forwards)
    num_gradients = derived("gradients", shown=False)(lambda self: len(self.history) * self.points)

    def entries(self, only: str | None = None) -> Iterator[Entry]:
        yield from super().entries(only)
        for before, path in (("", self.path), ("line_", self.line)):
            yield from (entry._replace(name=before + entry.name) for entry in path.entries())

    def asdict(self) -> dict[str, Any]:
        """As of every result, without the midpoint, which is as long as the model."""
        line = {f"line_{name}": value for name, value in self.line.asdict().items()}
        return self.path.asdict() | line | super().asdict()

    @property
    def head(self) -> str:
        return (
            f"trained for {counted(self.steps, 'step')} of {self.points} points at {self.learning_rate:.3g}, {self.key!r}\n"
            f"{self.path.head}\n{self.line.head}"
        )

    @property
    def notes(self) -> list[str]:
        return self.path.notes

    @property
    def coords(self) -> dict[str, list[float]]:
        return self.path.coords


def _train(
    states: States, a: EndPoint, b: EndPoint, key: Key, steps: int, rate: float, points: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """The last midpoint, and the losses on the way."""
    m = (a.state + b.state) / 2
    optimizer = torch.optim.Adam([m], lr=rate)
    history = torch.empty(steps, dtype=torch.float64)
    buffer = m.new_empty(min(chunk, points), len(m))
    for step in range(steps):
        drawn = uniform(fold_in(key, step), torch.zeros(points, dtype=torch.float64))
        t = ((torch.arange(points) + drawn) / points).tolist()
        m.grad, history[step] = _slope(states, a, m, b, t, buffer)
        if not (math.isfinite(history[step]) and bool(m.grad.isfinite().all())):
            raise ValueError(
                f"the loss on the curve is {float(history[step])}, or its gradient is not finite, at step {step} of {steps} "
                f"(t between {t[0]:.3f} and {t[-1]:.3f}). Pass a `learning_rate` below {rate:.3g}, and look at "
                "`linear_path`: where it is not finite, training has no start."
            )
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
    m.grad = None
    return m, history


def _slope(states: States, a: EndPoint, m: Tensor, b: EndPoint, t: list[float], buffer: Tensor) -> tuple[Tensor, float]:
    """The gradient in m, and the value, of the mean loss at the t: each point moves by 2 t (1 - t) with m."""
    gradient, value, rest = torch.zeros_like(m), 0.0, iter(t)

    def write(first: int, rows: Tensor) -> None:
        for at, row in zip(t[first:], rows, strict=False):
            _write(a.state, m, b.state, at, row)

    for slopes, losses in over_points(grad_and_value(states), write, len(t), buffer):
        for slope, at in zip(slopes, rest, strict=False):
            gradient.add_(slope, alpha=2 * at * (1 - at) / len(t))
        value += float(losses.double().sum()) / len(t)
    return gradient, value


def _on_curve(a: EndPoint, b: EndPoint, m: Tensor, num: int) -> Point:
    return lambda i, row: _write(a.state, m, b.state, i / (num - 1), row)


def _write(start: Tensor, midpoint: Tensor, end: Tensor, t: float, row: Tensor) -> Tensor:
    s = 1 - t
    return torch.mul(start, s * s, out=row).add_(midpoint, alpha=2 * s * t).add_(end, alpha=t * t)
