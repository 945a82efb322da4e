"""The loss on the way from one model to another: one straight path, or those between every two of many models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.checks import check_count, check_instance
from ..core.directions import dot
from ..core.objective import Loss
from ..core.standard_errors import Means, means
from .barriers import BarrierMatrix, LossPath
from .evaluator import over_points, points_at_once
from .states import Buffers, End, EndPoint, States
from .terms import Metric, by_ending, estimate

Point = Callable[[int, Tensor], Any]
"""(i, row): write the i-th point of the path into the row."""


def linear_path(
    loss: Loss,
    start: End,
    end: End,
    *,
    num: int = 21,
    chunk: int | None = None,
    buffers: Buffers = "interpolate",
    metric: Mapping[str, Metric] | None = None,
) -> LossPath:
    r"""The loss on the straight line between two models: how high is the barrier that separates them?

    $$L(t) = L((1 - t)\,\theta_0 + t\,\theta_1), \qquad
      B_{\max} = \max_t L(t) - \max(L_0, L_1), \qquad B_{\mathrm{lin}} = \max_t \big[L(t) - ((1 - t) L_0 + t L_1)\big].$$

    $B_{\mathrm{lin}}$ is the excess over the chord; $B_{\max}$ does not count a rise towards a worse end point.
    $0 \le B_{\max} \le B_{\mathrm{lin}}$, and both are 0 for a convex loss: proofs/barrier.py.

    start, end: nets, flat vectors of shape (P,) or dicts of parameters, of one layout. num: equally spaced t, both ends
    among them, where the path is exactly `start` and `end`. Losses in nats where the criterion is a cross-entropy.
    buffers: which running statistics (BatchNorm; InstanceNorm that tracks) the net has at t. They belong to the weights
    that they were trained with, so that ends are passed as nets, `fs.functional(model)`, whose losses are then their own:

    - `interpolate`: $(1 - t) s_0 + t s_1$, each end exactly its own. Of the weights' mixture the statistics are others:
      what they are off by is part of the barrier. A bare theta that is not `loss.net`'s own is refused.
    - `reestimate`: between the ends, those that the loss's data have at t (`running_statistics`: reset as `update_bn` of
      SWA does before a network of averaged weights is judged; units are not rescaled to interpolated statistics, as REPAIR
      does). An end that is a net keeps its own, and `start_reestimation`, `end_reestimation` say what re-estimating would
      change there: as much of a barrier may be the change of statistics alone. At a bare theta they are re-estimated.
    - `fixed`: those of `loss.net` everywhere, right for one end at the most.

    Other buffers and frozen parameters are those of `loss.net`, and must be the same in a net that is passed. Where nothing
    is tracked, the modes are one.
    chunk: points per `vmap` (then equal models differ by the rounding of mapped products), 1 for a plain loop; the default
    is that of `loss_plane`. Swapping start and end mirrors every number: to the last bit in a plain loop, to rounding in
    chunks. metric: measured beside the loss, by name, see `loss_plane`: `path.metrics["accuracy"]`.

    Errors are over sequences and paired: of the same linear combination of each sequence's losses that makes the
    number. The errors of the barriers hold for the point where the maximum was found. Noise biases a maximum over t
    up, the more the more points there are; a grid may miss a narrow peak, which biases it down. What `is_connected`
    tests: see `LossPath.connected`.

    Raises ValueError for fewer than 3 points, shapes, names and devices that do not fit, an end point that holds
    non-finite numbers, lacks its statistics, or has other constants, or where the loss is not finite. Non-finite losses
    between the ends are kept and counted.

    Frankle, Dziugaite, Roy, Carbin (2020), arXiv:1912.05671; Entezari, Sedghi, Saukh, Neyshabur (2022),
    arXiv:2110.06296. Statistics: Izmailov et al. (2018), arXiv:1803.05407; Jordan, Sedghi, Saukh, Entezari, Neyshabur
    (2023), REPAIR, arXiv:2211.08403.

    >>> from funcscope.core import criterion, model, objective
    >>> net = model.functional(torch.nn.Linear(1, 1, bias=False))
    >>> wells = criterion.custom(lambda out, y: (out**2 - 1) ** 2)                  # minima at -1 and 1
    >>> loss = objective.objective(net, [(torch.ones(2, 1), torch.zeros(2, 1))], wells)
    >>> path = linear_path(loss, torch.tensor([-1.0]), torch.tensor([1.0]), num=5)
    >>> path.losses.tolist(), path.is_connected
    ([0.0, 0.5625, 1.0, 0.5625, 0.0], False)
    """
    check_count("num", num, least=3)
    states = States.of(loss, buffers, metric)
    ends = states.end(start, "start"), states.end(end, "end")
    return measured(states, *ends, on_line(ends[0].state, ends[1].state, num), num=num, chunk=chunk, kind="line")


def barrier_matrix(
    loss: Loss,
    thetas: Sequence[End],
    *,
    num: int = 11,
    names: Sequence[str] | None = None,
    chunk: int | None = None,
    buffers: Buffers = "interpolate",
    metric: Mapping[str, Metric] | None = None,
) -> BarrierMatrix:
    r"""Barriers on the straight lines between every two of M models: which of them share a basin?

    $B_{\max}$ and $B_{\mathrm{lin}}$ as in `linear_path`, whose assumptions, biases, `chunk` and `buffers` hold here, too:
    with many pairs, some barriers of 0 are above 2 standard errors by chance. Every pair is evaluated once, every model
    once: M + (num - 2) M (M - 1) / 2 passes over the batches; with statistics re-estimated, up to
    2 (num - 2) passes a pair and 3 a model.

    thetas: nets, flat vectors of shape (P,) or dicts of parameters. names: one per model; default "0", "1", ...
    metric: measured in the same forward passes, see `loss_plane`: `metrics` has the models' own on the diagonal, and beside
    it those at the point of each path where its loss is highest over the chord; `metrics_excess` what they are over their
    own chord there (an accuracy: below 0 where it falls).

    Raises ValueError for fewer than two models, names that are not one per model or not different, and as `linear_path`.

    Entezari, Sedghi, Saukh, Neyshabur (2022), arXiv:2110.06296.

    >>> from funcscope.core import criterion, model, objective
    >>> net = model.functional(torch.nn.Linear(1, 1, bias=False))
    >>> wells = criterion.custom(lambda out, y: (out**2 - 1) ** 2)
    >>> loss = objective.objective(net, [(torch.ones(2, 1), torch.zeros(2, 1))], wells)
    >>> matrix = barrier_matrix(loss, [torch.tensor([-1.0]), torch.tensor([1.0]), torch.tensor([1.0])])
    >>> matrix.barrier_linear.tolist(), round(float(matrix.mean_barrier_linear.value), 4)
    ([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], 0.6667)
    """
    check_count("num", num, least=3)
    check_instance("thetas", thetas, Sized, "a list of the models, `[fs.functional(model), ...]`")
    check_count("the number of models", len(thetas), least=2)
    names = _named(names, len(thetas))
    states = States.of(loss, buffers, metric)
    ends = [states.end(theta, f"thetas[{i}]") for i, theta in enumerate(thetas)]
    weights, m, k = ends[0].weights, len(ends), len(states.metrics)
    values, errors = torch.zeros(2, 2 + 2 * k, m, m, dtype=torch.float64)
    distance, lost = torch.zeros(m, m, dtype=torch.float64), torch.zeros(m, m, dtype=torch.int64)
    totals, forwards = torch.zeros(2, len(weights), dtype=torch.float64), sum(end.passes for end in ends)
    for i, j in combinations(range(m), 2):
        write = on_line(ends[i].state, ends[j].state, num)
        path = measured(states, ends[i], ends[j], write, num=num, chunk=chunk, kind="line", known=True)
        sums = torch.cat([path.barrier_sums, *path.metric_barrier_sums])
        if bool(path.losses.isnan().any()) and not float(path.barrier_linear.value) > 0:
            sums = torch.full_like(sums, math.nan)  # nothing is seen beside the holes, and nothing is known of them
        values[:, i, j], errors[:, i, j] = means(sums, weights)
        distance[i, j], lost[i, j] = path.distance, path.n_nonfinite
        totals += sums[:2]
        forwards += path.num_forwards
    values, errors, distance, lost = (table + table.mT for table in (values, errors, distance, lost))
    for i, end in enumerate(ends):
        values[2:, i, i].view(k, 2)[:, 0], errors[2:, i, i].view(k, 2)[:, 0] = means(end.sums[1:], weights)
    plain, over = (dict(zip(states.metrics, map(Means, values[i::2], errors[i::2]), strict=True)) for i in (2, 3))
    highest, linear = (estimate(total / (m * (m - 1) // 2), weights) for total in totals)
    tables = values[0], errors[0], values[1], errors[1], distance, highest, linear
    return BarrierMatrix(
        names, *tables, num, lost, forwards, by_ending(plain) | by_ending(over, "_excess"), states.buffers
    )


def _named(names: Sequence[str] | None, num: int) -> tuple[str, ...]:
    names = tuple(map(str, range(num))) if names is None else tuple(names)
    if len(names) != num or len(set(names)) != num:
        raise ValueError(f"`names` must be {num} different names, one per model, got {names}.")
    return names


def measured(
    states: States,
    start: EndPoint,
    end: EndPoint,
    point: Point,
    *,
    num: int,
    chunk: int | None,
    kind: Literal["line", "bezier"],
    known: bool = False,
) -> LossPath:
    """The path through the points that `point` makes; its end points are not evaluated again, nor counted if `known`."""
    chunk, p = points_at_once(states.loss, chunk), states.loss.layout.num
    dtype = torch.promote_types(start.state.dtype, end.state.dtype)
    buffer = start.state.new_empty(min(chunk, num - 2), len(start.state), dtype=dtype)
    gap = torch.sub(end.state[:p], start.state[:p], out=buffer[0, :p])
    distance, terms = dot(gap, gap) ** 0.5, states.terms(buffer)

    def write(first: int, rows: Tensor) -> None:
        for i, row in enumerate(rows, first + 1):
            point(i, row)

    with torch.no_grad():
        between = over_points(lambda row: terms(row)[0], write, num - 2, buffer)
        rows = torch.cat([start.sums[None], *(part.cpu().double() for part in between), end.sums[None]])
    sums, *metrics = rows.unbind(1)
    roundoff = max(states.loss.net.unit_roundoff, torch.finfo(dtype).eps / 2)
    passes = (num - 2) * states.passes + (0 if known else start.passes + end.passes)
    ends, names = (start.reestimated, end.reestimated), tuple(states.metrics)
    plan = (roundoff, chunk, passes, states.buffers)
    return LossPath(kind, sums, start.weights, distance, *plan, *ends, names, tuple(metrics))


def on_line(start: Tensor, end: Tensor, num: int) -> Point:
    """From the nearer end: exact at both ends, the same point from either side, and still where they are equal."""

    def write(i: int, row: Tensor) -> None:
        if 2 * i == num - 1:
            torch.add(start, end, out=row).mul_(0.5)
            return
        near, far, steps = (start, end, i) if 2 * i < num - 1 else (end, start, num - 1 - i)
        torch.sub(far, near, out=row).mul_(steps / (num - 1)).add_(near)

    return write
