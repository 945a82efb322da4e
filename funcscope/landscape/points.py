"""The loss at many points of a line or a plane: mapped in chunks, or one at a time through one reused buffer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_count, check_device, check_flat, check_positive
from ..core.directions import Direction, stack
from ..core.objective import Loss, Theta
from ..core.running import held_statistics
from ..core.standard_errors import means
from ..curvature import pullbacks
from .along import mapped
from .axes import Axes, Trajectory
from .precision import check_baseline
from .states import USED, Reestimated
from .values import Values

MAPPED_UP_TO = 2**22
"""Larger models are evaluated one point at a time."""
MAPPED_POSITIONS = 256
"""So are batches of more positions: beyond, eight models at once have left the cache."""
MAPPED_WORK = 2**29
"""And so is a product of parameters and positions above this."""
MAPPED_ON_DEVICE = 2**26
"""On an accelerator, one small model leaves most of it idle: only the memory of eight copies counts."""
STEPS = 8
"""Points from one sum base + b d to the next; those between add the step: three streams of memory instead of four."""
Range = tuple[float, float]
Statistics = Literal["fixed", "reestimate"]


class Row(NamedTuple):
    """Points theta + sum of fixed_k d_k + b d_moving, for b in values."""

    fixed: tuple[float, ...]
    """One coefficient per axis; that of the moving one is 0."""
    moving: int
    values: Sequence[float]


@dataclass(frozen=True, eq=False)
class Evaluated:
    """Losses of rows of points, (r, m) each in float64; errors are over sequences, those of differences are paired."""

    baseline: float
    losses: Float[Tensor, "r m"]
    stderr: Float[Tensor, "r m"]
    delta_stderr: Float[Tensor, "r m"]
    num_forwards: int
    """Passes over all batches, two at theta itself among them."""
    chunk: int
    threads: int
    buffers: Literal["none", "fixed", "reestimate"] = "none"
    """Which running statistics the net has at the points; "none" where it tracks none."""

    @property
    def note(self) -> str:
        """Which they are, in words, behind a semicolon; empty where there are none."""
        return USED[self.buffers]


def evaluate(
    loss: Loss,
    theta: Float[Tensor, " p"],
    vectors: Float[Tensor, "k p"],
    rows: Sequence[Row],
    *,
    chunk: int | None,
    buffers: Statistics = "fixed",
) -> Evaluated:
    """The loss at every point of rows of one length, and at theta itself, all on the loss's own batches.

    buffers: "fixed", or running statistics re-estimated at every point, theta itself among them: twice the passes.

    chunk: points per `vmap`; 1 is a plain loop. Default on the CPU: 8 for up to 2^22 parameters and 256 positions a batch
    (2^29 of their product); above, a loop. On an accelerator: 8 for up to 2^26 parameters.
    The loop takes the fused kernels of norms, and makes theta' = (theta + a d_1) + b d_2 in
    one buffer: at most nine roundings per coordinate. A point of coefficients 0 is theta itself there, to the last bit; under
    `vmap` its loss is the baseline up to the rounding of mapped matrix products.

    Raises ValueError where the loss at theta is not finite, or not the same twice.
    """
    check_choice("buffers", buffers, ("fixed", "reestimate"))
    chunk = points_at_once(loss, chunk)
    tracked = bool(held_statistics(loss.net))
    terms: Callable[[Tensor], tuple[Tensor, Tensor]] = loss.terms if chunk > 1 else Values(loss)
    if tracked and buffers == "reestimate":
        terms = Reestimated(loss, mapped=chunk > 1)
    with torch.no_grad():
        centre, weights = terms(theta)
        baseline = float(means(centre[None], weights).value)
        check_baseline(baseline, float(means(terms(theta)[0][None], weights).value), loss.net.unit_roundoff)
        sets = _mapped(terms, theta, vectors, rows, chunk) if chunk > 1 else _looped(terms, theta, vectors, rows)
        found = [_statistics(sums, centre, weights) for sums in sets]
    columns = [torch.cat(column).view(len(rows), -1) for column in zip(*found, strict=True)]
    num = (columns[0].numel() + 2) * (2 if tracked and buffers == "reestimate" else 1)
    used = buffers if tracked else "none"
    return Evaluated(baseline, columns[0], columns[1], columns[2], num, chunk, torch.get_num_threads(), used)


def flat(loss: Loss, theta: Theta) -> Float[Tensor, " p"]:
    """theta as one vector, in float32 at least, on the device of the model."""
    vector = pullbacks.flat(loss, theta)
    check_device("theta", vector.device, "the model", loss.net.device)
    return vector


def check_chunk(chunk: int | None) -> None:
    if chunk is not None:
        check_count("chunk", chunk)


def plane_ranges(span: Any) -> list[Range]:
    """The ranges of both coefficients, from one span for both or one range for each."""
    if isinstance(span, Sequence) and not all(isinstance(x, Real) for x in span):
        if len(span) != 2:
            raise ValueError(f"`span` must be a number, a range (low, high), or two of them, got {span!r}.")
        return [span_range("span", each) for each in span]
    return [span_range("span", span)] * 2


def plane_nums(num: Any) -> tuple[int, int]:
    """The points along both axes."""
    both = tuple(num) if isinstance(num, Sequence) else (num, num)
    if len(both) != 2:
        raise ValueError(f"`num` must be an integer of at least 2, or two of them, got {num!r}.")
    for each in both:
        check_count("num", each, least=2)
    return both


def span_range(name: str, span: Any) -> Range:
    """(low, high) of a span: a number s stands for (-s, s)."""
    if isinstance(span, Real) or not isinstance(span, Sequence):
        check_positive(name, span := float(span) if isinstance(span, Real) else span)
        return -span, span
    numbers = len(span) == 2 and all(isinstance(x, Real) and math.isfinite(x) for x in span)
    if not numbers or not span[0] < span[1]:
        raise ValueError(f"`{name}` must be a number above 0, or a range (low, high) with low < high, got {span!r}.")
    return float(span[0]), float(span[1])


def spaced(ends: Range, num: int) -> Float[Tensor, " n"]:
    """`num` equal steps from end to end in float64; a range that is symmetric around 0 has a centre of exactly 0."""
    i = torch.arange(num, dtype=torch.float64)
    return ((num - 1 - i) * ends[0] + i * ends[1]) / (num - 1)


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
    return Axes(axes.detach(), tuple(f"direction {i + 1}" for i in range(len(axes))), "given")


def coefficients(
    axes: Axes, theta: Tensor, ranges: Sequence[Range], nums: Sequence[int], param_norm: float | None
) -> list[Float[Tensor, " n"]]:
    """Where to go along each axis; the ranges are shares of `param_norm` where one is given. Checks the axes."""
    check_flat("axes[0]", axes.vectors[0], len(theta))
    check_device("the axes", axes.vectors.device, "theta", theta.device)
    norms = axes.norms.tolist()
    if bad := [name for name, norm in zip(axes.names, norms, strict=True) if not 0 < norm < math.inf]:
        raise ValueError(f"the axes {', '.join(bad)} have a norm of 0, or one that is not finite: they lead nowhere.")
    if param_norm == 0:
        raise ValueError("`relative_span` is a share of ||theta||, which is 0 here: leave it out.")
    units = [1.0 if param_norm is None else param_norm / norm for norm in norms]
    cases = zip(ranges, nums, units, strict=True)
    return [spaced((low * unit, high * unit), num) for (low, high), num, unit in cases]


def points_at_once(loss: Loss, chunk: int | None = None) -> int:
    """Points per `vmap`: as told, else by default; 1 where the model cannot be mapped."""
    chunk = default_chunk(loss) if chunk is None else chunk
    return chunk if chunk == 1 or loss.is_mapped() else 1


def default_chunk(loss: Loss) -> int:
    """Points per `vmap` unless told: 8 where that is faster than a loop, else 1."""
    if loss.net.attention == "keep":  # torch maps fused attention by a loop of its own
        return 1
    if loss.net.device.type != "cpu":
        return 8 if loss.layout.num <= MAPPED_ON_DEVICE else 1
    size, positions = loss.layout.num, max(_positions(inputs) for inputs, _ in loss.batches)
    small = size <= MAPPED_UP_TO and positions <= MAPPED_POSITIONS and size * positions <= MAPPED_WORK
    return 8 if small else 1


def _positions(inputs: Any) -> int:
    """Tokens of a batch of ids, else its rows."""
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    sizes = [len(x) if x.is_floating_point() else x.numel() for x in parts if isinstance(x, Tensor) and x.ndim]
    return max(sizes, default=1)


def _looped(terms: Any, theta: Tensor, vectors: Tensor, rows: Sequence[Row]) -> Iterator[Tensor]:
    """One row at a time: (m, n) sums per sequence."""
    base, point = torch.empty_like(theta), torch.empty_like(theta)
    layout, steps = terms.loss.layout, STEPS if _fits(theta, vectors, rows) else 1
    views = layout.unravel(point, cast=False)
    cast = any(leaf.dtype != theta.dtype for leaf in layout.leaves)
    for fixed, moving, values in rows:
        base.copy_(theta)
        for coefficient, vector in zip(fixed, vectors, strict=True):
            if coefficient:
                base.add_(vector, alpha=coefficient)
        found = []
        for j, value in enumerate(values):
            if j % steps and value:
                point.add_(vectors[moving], alpha=value - values[j - 1])
            else:
                torch.add(base, vectors[moving], alpha=value, out=point)
            found.append(terms.of(layout.unravel(point) if cast else views)[0])
        yield torch.stack(found)


def _fits(theta: Tensor, vectors: Tensor, rows: Sequence[Row]) -> bool:
    """No coordinate overflows at any point: from an infinite one, steps would not lead back."""
    reach = [max(max(abs(row.fixed[k]), max(map(abs, row.values))) for row in rows) for k in range(len(vectors))]
    sizes = [max(abs(float(x)) for x in vector.aminmax()) for vector in (theta, *vectors)]
    return sizes[0] + sum(a * size for a, size in zip(reach, sizes[1:], strict=True)) < torch.finfo(theta.dtype).max / 4


def _largest(x: Tensor) -> float:
    """max |x| without a copy of x."""
    low, high = torch.aminmax(x)
    return max(-float(low), float(high))


def _mapped(terms: Any, theta: Tensor, vectors: Tensor, rows: Sequence[Row], chunk: int) -> Iterator[Tensor]:
    """A chunk of points at a time: (c, n) sums per sequence."""
    points = torch.tensor([[row.fixed] * len(row.values) for row in rows], dtype=torch.float64)
    for point, row in zip(points, rows, strict=True):
        point[:, row.moving] = torch.tensor(row.values, dtype=torch.float64)
    buffer = theta.new_empty(min(chunk, points[..., 0].numel()), len(theta))
    for part in points.flatten(0, 1).to(theta).split(chunk):
        moved = torch.addmm(theta, part, vectors, out=buffer[: len(part)])
        yield mapped(lambda t: terms(t)[0], moved, "chunk=1")


def _statistics(sums: Tensor, centre: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value, stderr = means(sums, weights)
    return value, stderr, means(sums - centre, weights).stderr
