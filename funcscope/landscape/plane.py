"""The loss on a plane through theta: `loss_plane`."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from tabulate import tabulate
from torch import Tensor

from ..core.directions import Direction, dot
from ..core.objective import Loss, Theta
from .axes import Axes, Trajectory
from .points import (
    Evaluated,
    Range,
    Row,
    Statistics,
    check_chunk,
    coefficients,
    evaluate,
    flat,
    given,
    plane_nums,
    plane_ranges,
)
from .precision import warn_of_small_steps
from .surface import quadratic_residual, slopes

Ranges = tuple[Range, Range]


@dataclass(frozen=True, eq=False, repr=False)
class LossPlane:
    """The loss on a grid; made by `loss_plane`, whose docstring has the formulas. `asdict()` gives the documented names.

    Grids are float64 tensors (n, m) on the CPU; axis 0 is the first direction. Losses that are not finite stay as they are
    and are left out of the statistics, edges that touch one too.
    """

    evaluated: Evaluated
    axes: Axes
    axis_values: Float[Tensor, " n"]
    """Coefficients along the first direction."""
    axis_values_2: Float[Tensor, " m"]
    param_norm: float
    span: float | Ranges
    relative_span: bool
    num_batches: int

    @property
    def grid_losses(self) -> Float[Tensor, "n m"]:
        return self.evaluated.losses

    @property
    def grid_stderr(self) -> Float[Tensor, "n m"]:
        """Standard error of each loss over the sequences."""
        return self.evaluated.stderr

    @property
    def grid_delta_stderr(self) -> Float[Tensor, "n m"]:
        """That of each loss minus the baseline, on the same sequences."""
        return self.evaluated.delta_stderr

    @property
    def baseline_loss(self) -> float:
        """The loss at theta, coefficients (0, 0)."""
        return self.evaluated.baseline

    @property
    def n_nonfinite(self) -> int:
        """Points whose loss is infinite or nan."""
        return int((~self.grid_losses.isfinite()).sum())

    @property
    def actual_span(self) -> Float[Tensor, " 2"]:
        """The largest |coefficient| along each direction."""
        return torch.stack([self.axis_values.abs().max(), self.axis_values_2.abs().max()])

    @property
    def displacement(self) -> Float[Tensor, " 2"]:
        """The largest distance from theta along each direction: span x ||d||."""
        return self.actual_span * self.axes.norms.cpu()

    @property
    def relative_displacement(self) -> Float[Tensor, " 2"]:
        """The same over ||theta||; nan where that is 0."""
        return self.displacement / (self.param_norm or math.nan)

    @cached_property
    def statistics(self) -> dict[str, float]:
        """Statistics of the finite losses, by their documented names; see `loss_plane`."""
        finite = self.grid_losses[self.grid_losses.isfinite()]
        nan = math.nan
        edges = slopes(self.grid_losses, self.axis_values, self.axis_values_2)
        mean, low, high = (float(f(finite)) if len(finite) else nan for f in (torch.mean, torch.min, torch.max))
        roughness = float(edges.mean()) if len(edges) else nan
        return {
            "loss_mean": mean,
            "loss_std": float(finite.std()) if len(finite) > 1 else nan,
            "loss_min": low,
            "loss_max": high,
            "roughness": roughness,
            "normalized_roughness": roughness / abs(mean) if mean else nan,
            "normalized_roughness_range": roughness / (high - low) if high > low else nan,
            "quad_residual": quadratic_residual(self.grid_losses, self.axis_values, self.axis_values_2),
        }

    def asdict(self) -> dict[str, Any]:
        """The documented dictionary: plain numbers and strings, grids as numpy arrays."""
        found = self.evaluated
        return {
            "grid_losses": found.losses.numpy().copy(),
            "axis_values": self.axis_values.numpy().copy(),
            "axis_values_2": self.axis_values_2.numpy().copy(),
            "grid_stderr": found.stderr.numpy().copy(),
            "grid_delta_stderr": found.delta_stderr.numpy().copy(),
            "baseline_loss": self.baseline_loss,
            **self.statistics,
            "orthogonality_check": self.axes.cosine,
            "n_batches_used": self.num_batches,
            "n_nonfinite": self.n_nonfinite,
            "direction_norms": self.axes.norms.cpu().numpy(),
            "param_norm": self.param_norm,
            "span": self.span,
            "relative_span": self.relative_span,
            "actual_span": self.actual_span.numpy(),
            "displacement": self.displacement.numpy(),
            "relative_displacement": self.relative_displacement.numpy(),
            "axis_names": list(self.axes.names),
            "axis_kind": self.axes.kind,
            "num_forwards": found.num_forwards,
            "chunk": found.chunk,
            "threads": found.threads,
            "buffers": found.buffers,
        } | {f"axes_{name}": value for name, value in self.axes.settings.items()}

    def __str__(self) -> str:
        return "\n".join([self._head(), tabulate(self._rows(), disable_numparse=True)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table = tabulate(self._rows(), tablefmt="html", disable_numparse=True)
        return f"<p>{html.escape(self._head())}</p>\n{table}"

    def _head(self) -> str:
        n, m = self.grid_losses.shape
        first, second = (f"{float(x):.3g}" for x in self.relative_displacement)
        return (
            f"{n} x {m} losses along {' and '.join(self.axes.names)}, up to {first} and {second} of ||theta||; "
            f"{self.n_nonfinite} not finite{self.evaluated.note}"
        )

    def _rows(self) -> list[tuple[str, str]]:
        numbers = {"baseline_loss": self.baseline_loss, **self.statistics, "orthogonality_check": self.axes.cosine}
        return [(name, f"{value:.5g}") for name, value in numbers.items()]


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
) -> LossPlane:
    r"""The loss on a grid of the plane through theta that two axes span, with its roughness.

    A picture of the loss around theta, or along a trajectory, on the given batches: the same ones at every point, so that
    what they have in common cancels in differences. Two directions of P: a plane that looks convex does not make the loss so.

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
    num: points along each axis; odd numbers put theta itself on a symmetric grid.
    span: the largest coefficient, for both axes from -span to span; or a range for each, ((low, high), (low, high)), which
    may leave theta out. relative_span: in shares of ||theta||: coefficients are span x ||theta|| / ||d||, so that
    displacement is span x ||theta|| along every axis.
    chunk: points per `vmap`; 1 is a plain loop. Default: 8 for small models and batches, where that is faster. In the loop,
    the point (0, 0) has the baseline loss to the last bit. Two forward passes more than grid points.
    buffers: running statistics (BatchNorm) belong to the weights that they were trained with. `fixed` keeps those of
    `loss.net` at every point, which far from its theta (a trajectory, a large span) describe another network;
    `reestimate` takes those that the data have at each point, theta among them (`running_statistics`), at twice the
    passes. For another network's theta, take its loss: `loss.with_buffers(other.buffers)`.

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
    num_1, num_2 = plane_nums(num)
    check_chunk(chunk)
    ranges = plane_ranges(span)
    vector, axes = flat(loss, theta), given(axes)
    if len(axes) != 2:
        raise ValueError(f"a plane has two axes, got {len(axes)}: choose two with `axes.pick(0, 1)`.")
    param_norm = math.sqrt(dot(vector, vector))
    a, b = coefficients(axes, vector, ranges, (num_1, num_2), param_norm if relative_span else None)
    rows = [Row((float(x), 0.0), 1, b.tolist()) for x in a]
    found = evaluate(loss, vector, axes.vectors.to(vector), rows, chunk=chunk, buffers=buffers)
    gaps = (float(each[1] - each[0]) * norm for each, norm in zip((a, b), axes.norms.tolist(), strict=True))
    warn_of_small_steps(loss, min(gaps), param_norm)
    shown = ranges[0][1] if ranges[0] == ranges[1] and -ranges[0][0] == ranges[0][1] else (ranges[0], ranges[1])
    return LossPlane(found, axes, a, b, param_norm, shown, relative_span, len(loss.batches))
