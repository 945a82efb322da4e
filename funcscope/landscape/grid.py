"""The loss at rows of points around theta: where lines and planes lie, and how their points are made and evaluated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_count, check_device, check_finite_loss, check_flat, check_positive
from ..core.directions import Direction, dot, stack
from ..core.objective import Loss
from ..core.standard_errors import means
from .axes import Axes, Trajectory
from .evaluator import Write, over_points, points_at_once
from .sampling import check_baseline
from .states import States
from .terms import Metric, estimate

Range = tuple[float, float]
Statistics = Literal["fixed", "reestimate"]

STEPS = 8
"""Points from one sum base + b d to the next; those between add the step: three streams of memory instead of four."""

SLAB = 32
"""Chunks of points whose sums per sequence are kept together until they are averaged."""


class Row(NamedTuple):
    """Points theta + sum of fixed_k d_k + b d_moving, for b in values."""

    fixed: tuple[float, ...]
    """One coefficient per axis; that of the moving one is 0."""
    moving: int
    values: list[float]


def evaluate(
    loss: Loss,
    theta: Float[Tensor, " p"],
    axes: Axes,
    rows: Sequence[Row],
    *,
    chunk: int | None,
    buffers: Statistics,
    metric: Mapping[str, Metric] | None,
) -> dict[str, Any]:
    """The loss at theta itself, and at every point of rows of one length: the fields that lines and planes have in common.

    In chunks, theta is a point of the first one, so that its loss has the rounding of the others. In the loop, points are
    (theta + a d_1) + b d_2 in one buffer: at most nine roundings per coordinate, none for coefficients of 0.

    Raises ValueError where the loss at theta is not finite, or not the same twice.
    """
    check_choice("buffers", buffers, ("fixed", "reestimate"))
    check_device("theta", theta.device, "the model", loss.net.device)
    states, chunk = States.of(loss, buffers, metric), points_at_once(loss, chunk)
    num = 1 + sum(len(row.values) for row in rows)
    buffer, vectors = theta.new_empty(min(chunk, num), len(theta)), axes.vectors.to(theta)
    is_mapped = len(buffer) > 1
    write = (_combined if is_mapped else _stepped)(theta, vectors, rows)
    terms = states.terms(buffer)
    with torch.no_grad():
        again, weights = states.terms(theta[None])(theta)
        sums = over_points(lambda row: terms(row)[0], write, num, buffer)
        centre, first = (part := next(sums))[0], part[1:]
        at_theta = tuple(estimate(each, weights) for each in centre)
        baseline, second = (float(each.value) for each in (at_theta[0], estimate(again[0], weights)))
        check_finite_loss(baseline, loss.net.params)
        check_baseline(baseline, second, loss.net.unit_roundoff)
        parts = [_statistics(first, centre, weights)]
        while slab := list(islice(sums, SLAB)):
            parts.append(_statistics(torch.cat(slab), centre, weights))
    tables = (torch.cat(each, -1).unflatten(-1, (len(rows), -1)) for each in zip(*parts, strict=True))
    return dict(zip(("values", "stderr", "change_stderr"), tables, strict=True)) | {
        "at_theta": at_theta,
        "metric_names": tuple(states.metrics),
        "num_batches": len(loss.batches),
        "num_forwards": (num + 1) * states.passes,
        "chunk": chunk,
        "threads": torch.get_num_threads(),
        "buffers": states.buffers,
    }


def _statistics(sums: Float[Tensor, "c k n"], centre: Float[Tensor, "k n"], weights: Tensor) -> tuple[Tensor, ...]:
    """Means, their errors, and the errors of changes from theta, (k, c) each."""
    columns = [
        (*means(each, weights), means(each - at, weights).stderr)
        for each, at in zip(sums.unbind(1), centre, strict=True)
    ]
    return tuple(torch.stack(column) for column in zip(*columns, strict=True))


def _stepped(theta: Tensor, vectors: Tensor, rows: Sequence[Row]) -> Write:
    """One point at a time, theta the first."""
    base, points = torch.empty_like(theta), [(row, j) for row in rows for j in range(len(row.values))]
    steps = STEPS if _fits(theta, vectors, rows) else 1

    def write(number: int, buffer: Tensor) -> None:
        if number == 0:
            buffer.copy_(theta)
            return
        (fixed, moving, values), j = points[number - 1]
        if j == 0:
            base.copy_(theta)
            for coefficient, vector in zip(fixed, vectors, strict=True):
                if coefficient:
                    base.add_(vector, alpha=coefficient)
        if j % steps and values[j]:
            buffer[0].add_(vectors[moving], alpha=values[j] - values[j - 1])
        else:
            torch.add(base, vectors[moving], alpha=values[j], out=buffer[0])

    return write


def _fits(theta: Tensor, vectors: Tensor, rows: Sequence[Row]) -> bool:
    """No coordinate overflows at any point: from an infinite one, steps would not lead back."""
    reach = [max(max(abs(row.fixed[k]), max(map(abs, row.values))) for row in rows) for k in range(len(vectors))]
    sizes = [max(abs(float(x)) for x in vector.aminmax()) for vector in (theta, *vectors)]
    return sizes[0] + sum(a * size for a, size in zip(reach, sizes[1:], strict=True)) < torch.finfo(theta.dtype).max / 4


def _combined(theta: Tensor, vectors: Tensor, rows: Sequence[Row]) -> Write:
    """A chunk of points at a time, theta the first of all."""
    points = torch.tensor([[row.fixed] * len(row.values) for row in rows], dtype=torch.float64)
    for point, row in zip(points, rows, strict=True):
        point[:, row.moving] = torch.tensor(row.values, dtype=torch.float64)
    coefficients = torch.nn.functional.pad(points.flatten(0, 1), (0, 0, 1, 0)).to(theta)
    return lambda first, out: torch.addmm(theta, coefficients[first : first + len(out)], vectors, out=out)


def given(axes: Any) -> Axes:
    """Axes as they are, those of a trajectory; directions and rows of a matrix with names by number."""
    if isinstance(axes, Axes | Trajectory):
        return axes if isinstance(axes, Axes) else axes.axes
    if isinstance(axes, tuple | list) and axes and all(isinstance(each, Direction) for each in axes):
        axes = stack(axes)
    if not isinstance(axes, Tensor) or axes.ndim != 2 or not len(axes) or not axes.is_floating_point():
        got = f"{axes.dtype} of shape {tuple(axes.shape)}" if isinstance(axes, Tensor) else f"a {type(axes).__name__}"
        raise ValueError(
            "`axes` must be made by `plane_directions`, `principal_directions`, `eigenvector_axes` or `directions`, or be a "
            f"floating matrix (k, p), got {got}. Flat vectors become one with `torch.stack`."
        )
    return Axes(axes.detach(), tuple(f"direction {i + 1}" for i in range(len(axes))), "given", {})


def coefficients(
    axes: Axes, theta: Tensor, ranges: Sequence[Range], nums: Sequence[int], relative: bool
) -> list[Float[Tensor, " n"]]:
    """Where to go along each axis; the ranges are shares of ||theta|| where they are relative. Checks the axes."""
    check_flat("axes[0]", axes.vectors[0], len(theta))
    check_device("the axes", axes.vectors.device, "theta", theta.device)
    norms, units = axes.norms.tolist(), [1.0] * len(axes)
    if bad := [name for name, norm in zip(axes.names, norms, strict=True) if not 0 < norm < math.inf]:
        raise ValueError(f"the axes {', '.join(bad)} have a norm of 0, or one that is not finite: they lead nowhere.")
    if relative:
        param_norm = math.sqrt(dot(theta, theta))
        if param_norm == 0:
            raise ValueError("`relative_span` is a share of ||theta||, which is 0 here: leave it out.")
        units = [param_norm / norm for norm in norms]
    cases = zip(ranges, nums, units, strict=True)
    return [spaced((low * unit, high * unit), num) for (low, high), num, unit in cases]


def spaced(ends: Range, num: int) -> Float[Tensor, " n"]:
    """`num` equal steps from end to end in float64; a range that is symmetric around 0 has a centre of exactly 0."""
    i = torch.arange(num, dtype=torch.float64)
    return ((num - 1 - i) * ends[0] + i * ends[1]) / (num - 1)


def span_range(span: Any) -> Range:
    """(low, high) of a span: a number s stands for (-s, s)."""
    if isinstance(span, Real) or not isinstance(span, Sequence):
        check_positive("span", span := float(span) if isinstance(span, Real) else span)
        return -span, span
    numbers = len(span) == 2 and all(isinstance(x, Real) and math.isfinite(x) for x in span)
    if not numbers or not span[0] < span[1]:
        raise ValueError(f"`span` must be a number above 0, or a range (low, high) with low < high, got {span!r}.")
    return float(span[0]), float(span[1])


def span_ranges(span: Any) -> list[Range]:
    """The ranges of both coefficients, from one span for both or one range for each."""
    if isinstance(span, Sequence) and not all(isinstance(x, Real) for x in span):
        if len(span) != 2:
            raise ValueError(f"`span` must be a number, a range (low, high), or two of them, got {span!r}.")
        return [span_range(each) for each in span]
    return [span_range(span)] * 2


def point_nums(num: Any) -> tuple[int, int]:
    """The points along both axes."""
    both = tuple(num) if isinstance(num, Sequence) else (num, num)
    if len(both) != 2:
        raise ValueError(f"`num` must be an integer of at least 2, or two of them, got {num!r}.")
    for each in both:
        check_count("num", each, least=2)
    return both
