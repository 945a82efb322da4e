"""The loss on the way from one model to another: one straight path, or those between every two of many models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count, check_device, check_flat, check_params
from ..core.directions import dot
from ..core.objective import Loss, Theta
from ..curvature.pullbacks import flat
from .along import mapped
from .barriers import BarrierMatrix, LossPath
from .points import default_chunk
from .values import Values

Write = Callable[[int, Tensor], Any]
"""(i, row): write the i-th point of the path into the row."""


def linear_path(loss: Loss, start: Theta, end: Theta, *, num: int = 21, chunk: int | None = None) -> LossPath:
    r"""The loss on the straight line between two models: how high is the barrier that separates them?

    $$L(t) = L((1 - t)\,\theta_0 + t\,\theta_1), \qquad
      B_{\max} = \max_t L(t) - \max(L_0, L_1), \qquad B_{\mathrm{lin}} = \max_t \big[L(t) - ((1 - t) L_0 + t L_1)\big].$$

    $B_{\mathrm{lin}}$ is the excess over the chord; $B_{\max}$ does not count a rise towards a worse end point.
    $0 \le B_{\max} \le B_{\mathrm{lin}}$, and both are 0 for a convex loss: proofs/barrier.py.

    start, end: flat vectors of shape (P,) or dicts of parameters, of one layout. num: equally spaced t, both ends
    among them, where the path is exactly `start` and `end`. Losses in nats where the criterion is a cross-entropy.
    chunk: points per `vmap` (then equal models differ by the rounding of mapped products), 1 for a plain loop; the default
    is that of `loss_plane`. Swapping start and end mirrors every number: to the last bit in a plain loop, to rounding in
    chunks.

    Errors are over sequences and paired: of the same linear combination of each sequence's losses that makes the
    number. The errors of the barriers hold for the point where the maximum was found. Noise biases a maximum over t
    up, the more the more points there are; a grid may miss a narrow peak, which biases it down. What `is_connected`
    tests: see `LossPath.connected`.

    Raises ValueError for fewer than 3 points, shapes, names and devices that do not fit, an end point that holds
    non-finite numbers, or where the loss is not finite. Non-finite losses between the ends are kept and counted.

    Frankle, Dziugaite, Roy, Carbin (2020), arXiv:1912.05671; Entezari, Sedghi, Saukh, Neyshabur (2022),
    arXiv:2110.06296.

    >>> from funcscope.core import criterion, model, objective
    >>> net = model.functional(torch.nn.Linear(1, 1, bias=False))
    >>> wells = criterion.custom(lambda out, y: (out**2 - 1) ** 2)                  # minima at -1 and 1
    >>> loss = objective.objective(net, [(torch.ones(2, 1), torch.zeros(2, 1))], wells)
    >>> path = linear_path(loss, torch.tensor([-1.0]), torch.tensor([1.0]), num=5)
    >>> path.losses.tolist(), path.is_connected
    ([0.0, 0.5625, 1.0, 0.5625, 0.0], False)
    """
    check_count("num", num, least=3)
    ends = end_point(loss, start, "start"), end_point(loss, end, "end")
    return measured(loss, *ends, on_line(ends[0].theta, ends[1].theta, num), num=num, chunk=chunk, kind="line")


def barrier_matrix(
    loss: Loss, thetas: Sequence[Theta], *, num: int = 11, names: Sequence[str] | None = None, chunk: int | None = None
) -> BarrierMatrix:
    r"""Barriers on the straight lines between every two of M models: which of them share a basin?

    $B_{\max}$ and $B_{\mathrm{lin}}$ as in `linear_path`, whose assumptions, biases and `chunk` hold here, too: with many
    pairs, some barriers of 0 are above 2 standard errors by chance. Every pair is evaluated once, every model once:
    M + (num - 2) M (M - 1) / 2 passes over the batches.

    thetas: flat vectors of shape (P,) or dicts of parameters. names: one per model; default "0", "1", ...

    Raises ValueError for fewer than two models, names that are not one per model or not different, and as `linear_path`.

    Entezari, Sedghi, Saukh, Neyshabur (2022), arXiv:2110.06296.

    >>> from funcscope.core import criterion, model, objective
    >>> net = model.functional(torch.nn.Linear(1, 1, bias=False))
    >>> wells = criterion.custom(lambda out, y: (out**2 - 1) ** 2)
    >>> loss = objective.objective(net, [(torch.ones(2, 1), torch.zeros(2, 1))], wells)
    >>> found = barrier_matrix(loss, [torch.tensor([-1.0]), torch.tensor([1.0]), torch.tensor([1.0])])
    >>> found.barrier_linear.tolist(), round(float(found.mean_barrier_linear.value), 4)
    ([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], 0.6667)
    """
    check_count("num", num, least=3)
    check_count("the number of models", len(thetas), least=2)
    names = _named(names, len(thetas))
    ends = [end_point(loss, theta, f"thetas[{i}]") for i, theta in enumerate(thetas)]
    table = torch.zeros(5, len(ends), len(ends), dtype=torch.float64)
    totals, forwards = torch.zeros(2, len(ends[0].sums), dtype=torch.float64), len(ends)
    lost = torch.zeros(len(ends), len(ends), dtype=torch.int64)
    for i, j in combinations(range(len(ends)), 2):
        write = on_line(ends[i].theta, ends[j].theta, num)
        path = measured(loss, ends[i], ends[j], write, num=num, chunk=chunk, kind="line", known=True)
        sums = path.barrier_sums
        if bool(path.losses.isnan().any()) and not float(path.barrier_linear.value) > 0:
            sums = torch.full_like(sums, math.nan)  # nothing is seen beside the holes, and nothing is known of them
        found = (path.mean(each) for each in sums)
        numbers = (x for e in found for x in (float(e.value), float(e.stderr)))
        table[:, i, j] = table[:, j, i] = table.new_tensor([*numbers, path.distance])
        totals += sums
        lost[i, j] = lost[j, i] = path.n_nonfinite
        forwards += path.num_forwards
    pairs = len(ends) * (len(ends) - 1) // 2
    highest, linear = (path.mean(total / pairs) for total in totals)  # any path: all have the weights
    top, top_error, over, over_error, distance = table
    return BarrierMatrix(names, top, top_error, over, over_error, distance, highest, linear, num, lost, forwards)


def _named(names: Sequence[str] | None, num: int) -> tuple[str, ...]:
    names = tuple(map(str, range(num))) if names is None else tuple(names)
    if len(names) != num or len(set(names)) != num:
        raise ValueError(f"`names` must be {num} different names, one per model, got {names}.")
    return names


class EndPoint(NamedTuple):
    """A model at an end of a path, evaluated once."""

    theta: Tensor
    sums: Tensor
    weights: Tensor


def end_point(loss: Loss, theta: Theta, name: str) -> EndPoint:
    """Theta checked, flat, and its per-sequence sums."""
    theta = vector(loss, theta, name)
    with torch.no_grad():
        sums, weights = (x.cpu().double() for x in Values(loss)(theta))
    value = float(sums.sum() / weights.sum())
    if not math.isfinite(value):
        raise ValueError(
            f"the loss at `{name}` is {value}: barriers are measured from there; check weights and batches."
        )
    return EndPoint(theta, sums, weights)


def vector(loss: Loss, theta: Theta, name: str) -> Float[Tensor, " p"]:
    """Theta as one finite vector of the model's length, on its device."""
    if isinstance(theta, Mapping):
        check_params(theta, loss.layout.shapes, name)
    else:
        check_flat(name, theta, loss.layout.num)
    some = theta if isinstance(theta, Tensor) else next(iter(theta.values()))
    check_device(f"`{name}`", some.device, "the model", loss.net.device)
    found = flat(loss, theta)
    if bad := int((~found.isfinite()).sum()):
        raise ValueError(f"`{name}` must hold finite numbers, {bad} of {len(found)} are not: no path leads there.")
    return found


def measured(
    loss: Loss,
    start: EndPoint,
    end: EndPoint,
    write: Write,
    *,
    num: int,
    chunk: int | None,
    kind: Literal["line", "bezier"],
    known: bool = False,
) -> LossPath:
    """The path through the points that `write` makes; its end points are not evaluated again, nor counted if `known`."""
    chunk = chunk_size(loss, chunk)
    dtype = torch.promote_types(start.theta.dtype, end.theta.dtype)
    buffer = start.theta.new_empty(min(chunk, num - 2), len(start.theta), dtype=dtype)
    gap = torch.sub(end.theta, start.theta, out=buffer[0])
    distance = dot(gap, gap) ** 0.5
    sums = torch.cat([start.sums[None], sums_at(loss, write, range(1, num - 1), buffer), end.sums[None]])
    roundoff = max(loss.net.unit_roundoff, torch.finfo(dtype).eps / 2)
    return LossPath(kind, sums, start.weights, distance, roundoff, chunk, num - 2 * known)


def sums_at(loss: Loss, write: Write, points: range, buffer: Float[Tensor, "k p"]) -> Float[Tensor, "m s"]:
    """Per-sequence sums at some points of a path, as many at a time as the buffer has rows."""
    parts = []
    terms = loss.terms if len(buffer) > 1 else Values(loss)
    with torch.no_grad():
        for first in range(0, len(points), len(buffer)):
            chosen = points[first : first + len(buffer)]
            for i, row in zip(chosen, buffer, strict=False):
                write(i, row)
            parts.append(one_or_mapped(lambda row: terms(row)[0], buffer[: len(chosen)]).cpu().double())
    return torch.cat(parts)


def one_or_mapped(function: Callable[[Tensor], Any], rows: Float[Tensor, "k p"]) -> Any:
    """`vmap` over the rows, a plain call for a single one."""
    if len(rows) == 1:
        out = function(rows[0])
        return tuple(part[None] for part in out) if isinstance(out, tuple) else out[None]
    return mapped(function, rows, "chunk=1")


def on_line(start: Tensor, end: Tensor, num: int) -> Write:
    """From the nearer end: exact at both ends, the same point from either side, and still where they are equal."""

    def write(i: int, row: Tensor) -> None:
        if 2 * i == num - 1:
            torch.add(start, end, out=row).mul_(0.5)
            return
        near, far, steps = (start, end, i) if 2 * i < num - 1 else (end, start, num - 1 - i)
        torch.sub(far, near, out=row).mul_(steps / (num - 1)).add_(near)

    return write


def chunk_size(loss: Loss, chunk: int | None) -> int:
    if chunk is not None:
        check_count("chunk", chunk)
        return chunk
    return default_chunk(loss)
