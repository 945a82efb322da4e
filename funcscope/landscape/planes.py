"""The loss on a plane through theta, and on lines, which are planes with one axis: `loss_plane`, `loss_lines`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count
from ..core.directions import Direction, dot
from ..core.estimate import Estimate
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from .axes import Axes, Trajectory
from .grid import Range, Row, Statistics, coefficients, evaluate, given, point_nums, spaced, span_range, span_ranges
from .precision import warn_of_small_steps
from .roughness import GridStatistics
from .states import USED
from .terms import Measured, Metric

Ranges = tuple[Range, Range]
PLANE, LINES = ("x", "y"), ("axis", "t")


class _Grid(Measured, Result):
    """What was evaluated at rows of points around theta, and where; losses that are not finite stay as they are."""

    axes: Axes = internal()
    places: tuple[Tensor, ...] = internal()
    """Coefficients along each axis, in float64."""
    param_norm: float = quantity("norm of theta", shown=False)
    span: float | Range | Ranges
    relative_span: bool
    values: Float[Tensor, "q r m"] = internal()
    """Means of the loss and of q - 1 metrics at rows of points, in float64 on the CPU; errors are over sequences."""
    stderr: Float[Tensor, "q r m"] = internal()
    change_stderr: Float[Tensor, "q r m"] = internal()
    """Of changes from theta, on the same sequences."""
    at_theta: tuple[Estimate, ...] = internal()
    metric_names: tuple[str, ...] = internal()
    num_batches: int = quantity("batches", name="n_batches_used", shown=False)
    num_forwards: int = quantity("passes over all batches", shown=False)
    """Two at theta itself among them."""
    chunk: int = quantity("points at once", shown=False)
    threads: int = quantity("threads", shown=False)
    buffers: Literal["none", "interpolate", "reestimate", "fixed"] = quantity("running statistics", shown=False)
    """Which the net has at the points; "none" where it tracks none."""

    baseline_loss = derived("loss at theta", unit="loss")(lambda self: float(self.at_theta[0].value))
    direction_norms = derived("norm of the direction", per="axis", shown=False)(lambda self: self.axes.norms.cpu())
    orthogonality_check = derived("largest |cosine| of two axes")(attrgetter("axes.cosine"))
    axis_names = derived("name of the axis", per="axis", shown=False)(lambda self: list(self.axes.names))
    axis_kind = derived("kind of the axes", shown=False)(attrgetter("axes.kind"))

    @derived("points whose loss is infinite or nan", unit="points")
    def n_nonfinite(self) -> int:
        return int((~self.values[0].isfinite()).sum())

    @derived("largest |coefficient|", per="axis", shown=False)
    def actual_span(self) -> Float[Tensor, " k"]:
        return torch.stack([values.abs().max() for values in self.places])

    @derived("largest distance from theta", per="axis")
    def displacement(self) -> Float[Tensor, " k"]:
        return self.actual_span * self.direction_norms

    @derived("largest distance from theta, over the norm of theta", per="axis")
    def relative_displacement(self) -> Float[Tensor, " k"]:
        """nan where theta is 0."""
        return self.displacement / (self.param_norm or math.nan)

    @cached_property
    def _beside(self) -> dict[str, dict[str, Tensor]]:
        every = {"": self.values, "_stderr": self.stderr, "_delta_stderr": self.change_stderr}
        return {end: dict(zip(self.metric_names, each[1:], strict=True)) for end, each in every.items()}

    @property
    def metrics_baseline(self) -> dict[str, Estimate]:
        """At theta."""
        return dict(zip(self.metric_names, self.at_theta[1:], strict=True))

    @derived("metric at theta", name="*")
    def _at_theta(self) -> dict[str, Estimate]:
        return {f"metric_{name}_baseline": value for name, value in self.metrics_baseline.items()}

    @property
    def notes(self) -> list[str]:
        return USED[self.buffers]

    def asdict(self) -> dict[str, Any]:
        return super().asdict() | {f"axes_{name}": value for name, value in self.axes.settings.items()}


def _of_points(label: str, **what: Any) -> Any:
    return derived(label, unit="loss", shown=False, **what)


class LossPlane(GridStatistics, _Grid):
    """The loss on a grid; made by `loss_plane`, whose docstring has the formulas. `asdict()` gives the documented names.

    Grids are float64 tensors (n, m) on the CPU; axis 0 is the first direction. Losses that are not finite are left out of
    the statistics, edges that touch one too.
    """

    grid_losses = _of_points("loss", per=PLANE, stderr="grid_stderr")(lambda self: self.values[0])
    grid_stderr = _of_points("standard error of the loss", per=PLANE)(lambda self: self.stderr[0])
    grid_delta_stderr = _of_points("standard error of the change", per=PLANE)(lambda self: self.change_stderr[0])
    axis_values = derived("coefficient along the first direction", per="x", shown=False)(lambda self: self.places[0])
    axis_values_2 = derived("coefficient along the second direction", per="y", shown=False)(lambda self: self.places[1])
    _metrics = derived("metric", per=PLANE, name="*", stderr="_metric_errors", shown=False)(Measured.documented)
    _metric_errors = property(Measured.documented_errors)

    @property
    def head(self) -> str:
        return f"{' x '.join(map(str, self.grid_losses.shape))} losses along {' and '.join(self.axes.names)}"

    @property
    def coords(self) -> dict[str, Any]:
        return {"axis": self.axes.names, "x": self.axis_values, "y": self.axis_values_2}


class LossLines(_Grid):
    """The loss along k axes, n points each; made by `loss_lines`. Float64 tensors on the CPU, not finite ones included."""

    losses = _of_points("loss", per=LINES, stderr="losses_stderr")(lambda self: self.values[0])
    losses_stderr = _of_points("standard error of the loss", per=LINES)(lambda self: self.stderr[0])
    delta_losses = _of_points("change of the loss from theta", per=LINES, stderr="delta_stderr")(
        lambda self: self.losses - self.baseline_loss
    )
    delta_stderr = _of_points("paired standard error of the change", per=LINES)(lambda self: self.change_stderr[0])
    coefficients = derived("coefficient", per=LINES, shown=False)(lambda self: torch.stack(self.places))
    loss_start = derived("loss at the start", unit="loss", per="axis")(lambda self: self.losses[:, 0])
    loss_end = derived("loss at the end", unit="loss", per="axis")(lambda self: self.losses[:, -1])
    _metrics = derived("metric", per=LINES, name="*", stderr="_metric_errors", shown=False)(Measured.documented)
    _metric_errors = property(Measured.documented_errors)

    @derived("coefficient, or share of the norm of theta where the span is relative", per="t", shown=False)
    def axis_values(self) -> Float[Tensor, " n"]:
        return spaced(span_range(self.span), self.losses.shape[1])

    @derived("lowest finite loss", unit="loss", per="axis")
    def loss_min(self) -> Float[Tensor, " k"]:
        finite = torch.where(self.losses.isfinite(), self.losses, math.inf).amin(1)
        return torch.where(finite.isfinite(), finite, math.nan)

    @property
    def head(self) -> str:
        return f"{counted(len(self.axes), 'line')} of {counted(self.losses.shape[1], 'point')}"

    @property
    def coords(self) -> dict[str, Any]:
        return {"axis": self.axes.names, "t": self.axis_values}

    @property
    def axis_titles(self) -> dict[str, str]:
        return {"t": "step over the norm of theta" if self.relative_span else "coefficient of the direction"}


def loss_plane(
    loss: Loss,
    theta: Theta,
    axes: Axes | Trajectory | Tensor | Sequence[Direction],
    *,
    num: int | tuple[int, int] = 25,
    span: float | Ranges = 0.1,
    relative_span: bool = False,
    chunk: int | None = None,
    buffers: Statistics = "fixed",
    metric: Mapping[str, Metric] | None = None,
) -> LossPlane:
    r"""The loss on a grid of the plane through theta that two axes span, with its roughness.

    A picture of the loss around theta, or along a trajectory, on the same batches at every point, so that what they have
    in common cancels in differences. Two directions of P: a plane that looks convex does not make the loss so.

    $$G_{ij} = L(\theta + a_i d_1 + b_j d_2), \qquad
      \text{roughness} = \frac{1}{|E|} \sum_{(u,v) \in E} \frac{|G_u - G_v|}{h_{uv}}, \qquad
      \text{quad_residual} = \sqrt{\frac{\sum (G - Q)^2}{\sum (G - \bar G)^2}}.$$

    E are the edges of the grid whose two ends are finite, h their length in the coefficient: the mean slope along the axes,
    which does not depend on the resolution where the loss is linear, and tends to its integral elsewhere. Q is the best
    quadratic in (a, b), six coefficients: 0 on a quadratic, 1 where it explains nothing. `normalized_roughness` is
    roughness / |mean G|, `normalized_roughness_range` is roughness / (max - min): per unit of coefficient both, and
    relative to the level of the loss or to its range. sd is the sample value (n - 1) over grid points. nan where undefined:
    all for no finite point; roughness without a finite edge; `normalized_roughness` for a mean of 0, the other for a plane
    that is flat; `quad_residual` too, and with no more finite points than the coefficients that they determine.

    Losses in the criterion's unit (nats for cross-entropy), roughness in that per unit of coefficient.
    `grid_stderr` is the standard error of each loss over the sequences, `grid_delta_stderr` that of its difference to the
    baseline on the same sequences: often far smaller. Both are nan for a single sequence. They say how far other data of
    the same kind may move the picture, and nothing about other directions.

    axes: `plane_directions`, `principal_directions(...).axes`, `eigenvector_axes`, or a tensor (2, P). They may be parallel:
    `orthogonality_check`, |cos| of the two, says so. Distances on the grid are those of parameter space only at 0.
    num: points along each axis; odd numbers put theta itself on a symmetric grid. span: the largest coefficient, for both
    axes from -span to span; or a range for each, ((low, high), (low, high)), which may leave theta out. relative_span:
    coefficients are span x ||theta|| / ||d||, so that displacement is span x ||theta|| along every axis.
    chunk: points per `vmap`, the baseline among them; 1 is a plain loop, in which (0, 0) has the baseline loss to the last
    bit. Default on the CPU: 8 for up to 2^22 parameters and 256 positions a batch (2^29 of their product), on an
    accelerator for up to 2^26 parameters; above, a loop. Two forward passes more than grid points.
    buffers: running statistics (BatchNorm) belong to the weights that they were trained with. `fixed` keeps those of
    `loss.net` at every point, which far from its theta (a trajectory, a large span) describe another network;
    `reestimate` takes those that the data have at each point, theta among them (`running_statistics`), at twice the
    passes. For another network's theta, take its loss: `loss.with_buffers(other.buffers)`.
    metric: functions of (output, targets) by name, measured in the same forward passes; each gives one value for every
    position, `{"accuracy": lambda out, labels: out.argmax(-1) == labels}`. Their means have the loss's weights:
    `plane.metrics["accuracy"]`, `metrics_stderr` and `metrics_delta_stderr` (paired, of the change from theta) have the
    shape of the grid; `metric_accuracy`, `metric_accuracy_stderr`, ... in `asdict()`.

    Raises ValueError for a span that is not positive or a range that is empty, fewer than two points along an axis, axes of
    another model, of norm 0 or not finite, other than two of them, and where the loss at theta is not finite or not the
    same twice.

    Li, Xu, Taylor, Studer, Goldstein (2018), Visualizing the loss landscape of neural nets.

    >>> from funcscope.core import criterion, model, objective
    >>> net = model.functional(torch.nn.Linear(2, 1, bias=False))
    >>> half_square = criterion.custom(lambda out, y: (out - y) ** 2 / 2)
    >>> loss = objective.objective(net, [(torch.eye(2) * 2**0.5, torch.zeros(2, 1))], half_square)    # L = |theta|^2 / 2
    >>> plane = loss_plane(loss, torch.tensor([3.0, 4.0]), torch.eye(2), num=3, span=1.0)
    >>> [[round(x, 3) for x in row] for row in plane.grid_losses.tolist()]
    [[6.5, 10.0, 14.5], [9.0, 12.5, 17.0], [12.5, 16.0, 20.5]]
    """
    nums, ranges, axes = point_nums(num), span_ranges(span), given(axes)
    if len(axes) != 2:
        raise ValueError(f"a plane has two axes, got {len(axes)}: choose two with `axes.pick(0, 1)`.")
    vector = Loss.vector(loss, theta)
    a, b = values = coefficients(axes, vector, ranges, nums, relative_span)
    rows = [Row((x, 0.0), 1, b.tolist()) for x in a.tolist()]
    both = ranges[0][1] if ranges[0] == ranges[1] and -ranges[0][0] == ranges[0][1] else (ranges[0], ranges[1])
    evaluated = evaluate(loss, vector, axes, rows, chunk=chunk, buffers=buffers, metric=metric)
    return LossPlane(axes, tuple(values), _norm(loss, vector, axes, values), both, relative_span, **evaluated)


def loss_lines(
    loss: Loss,
    theta: Theta,
    axes: Axes | Trajectory | Tensor | Sequence[Direction],
    *,
    num: int = 41,
    span: float | Range = 0.1,
    relative_span: bool = False,
    chunk: int | None = None,
    buffers: Statistics = "fixed",
    metric: Mapping[str, Metric] | None = None,
) -> LossLines:
    r"""The loss along each of k axes through theta, with the paired standard error of its change.

    One-dimensional sections of the loss around theta, on the same batches at every point.

    $$L_i(t) = L(\theta + t d_i), \qquad \Delta_i(t) = L_i(t) - L(\theta).$$

    Losses in the criterion's unit. Errors are over sequences, nan for a single one; `delta_stderr` is that of the difference
    on the same sequences. A one-dimensional section through a minimum of a curved valley may miss the valley.

    axes: any `Axes`, or a tensor (k, P). num: points along each. span: the largest coefficient, from -span to span, or a
    range (low, high). relative_span: in shares of ||theta||, so that the displacement is span x ||theta|| along every axis.
    chunk: points per `vmap`, 1 a plain loop; buffers: which running statistics the net has; metric: what to
    measure beside the loss; see `loss_plane` for all three.
    Losses that are not finite stay as they are and are counted.

    Raises ValueError as `loss_plane` does.

    Goodfellow, Vinyals, Saxe (2015), Qualitatively characterizing neural network optimization problems.

    >>> from funcscope.core import criterion, model, objective
    >>> net = model.functional(torch.nn.Linear(1, 1, bias=False))
    >>> square = criterion.custom(lambda out, y: (out - y) ** 2)
    >>> loss = objective.objective(net, [(torch.ones(2, 1), torch.zeros(2, 1))], square)
    >>> loss_lines(loss, torch.tensor([3.0]), torch.tensor([[1.0]]), num=3, span=1.0).delta_losses.tolist()     # (3 + t)^2
    [[-5.0, 0.0, 7.0]]
    """
    check_count("num", num, least=2)
    ends, vector, axes = span_range(span), Loss.vector(loss, theta), given(axes)
    k = len(axes)
    values = coefficients(axes, vector, [ends] * k, [num] * k, relative_span)
    rows = [Row((0.0,) * k, i, each.tolist()) for i, each in enumerate(values)]
    span = ends[1] if -ends[0] == ends[1] else ends
    evaluated = evaluate(loss, vector, axes, rows, chunk=chunk, buffers=buffers, metric=metric)
    return LossLines(axes, tuple(values), _norm(loss, vector, axes, values), span, relative_span, **evaluated)


def _norm(loss: Loss, theta: Tensor, axes: Axes, values: list[Tensor]) -> float:
    """||theta||; warns where the points are nearer to each other than half precision tells apart."""
    param_norm = math.sqrt(dot(theta, theta))
    gaps = [float(each[1] - each[0]) * norm for each, norm in zip(values, axes.norms.tolist(), strict=True)]
    warn_of_small_steps(loss, min(gaps), param_norm)
    return param_norm
