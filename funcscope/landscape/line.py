"""The loss on lines through theta: `loss_lines`."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from tabulate import tabulate
from torch import Tensor

from ..core.checks import check_count
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
    spaced,
    span_range,
)
from .precision import warn_of_small_steps


@dataclass(frozen=True, eq=False, repr=False)
class LossLines:
    """The loss along k axes, n points each; made by `loss_lines`. Float64 tensors on the CPU, not finite ones included."""

    evaluated: Evaluated
    axes: Axes
    axis_values: Float[Tensor, " n"]
    """The common scale: coefficients, or shares of ||theta|| where the span was relative."""
    coefficients: Float[Tensor, "k n"]
    """The coefficients themselves."""
    param_norm: float
    span: float | Range
    relative_span: bool
    num_batches: int

    @property
    def losses(self) -> Float[Tensor, "k n"]:
        return self.evaluated.losses

    @property
    def delta_losses(self) -> Float[Tensor, "k n"]:
        """Loss minus the loss at theta."""
        return self.losses - self.baseline_loss

    @property
    def delta_stderr(self) -> Float[Tensor, "k n"]:
        """Paired standard error of `delta_losses` over the sequences."""
        return self.evaluated.delta_stderr

    @property
    def baseline_loss(self) -> float:
        """The loss at theta, coefficient 0."""
        return self.evaluated.baseline

    @property
    def displacement(self) -> Float[Tensor, " k"]:
        """The largest distance from theta along each axis."""
        return self.coefficients.abs().amax(1) * self.axes.norms.cpu()

    @property
    def n_nonfinite(self) -> int:
        """Points whose loss is infinite or nan."""
        return int((~self.losses.isfinite()).sum())

    def asdict(self) -> dict[str, Any]:
        """The documented dictionary: plain numbers and strings, arrays of shape (k, n), (k,) and (n,)."""
        return {
            "losses": self.losses.numpy().copy(),
            "losses_stderr": self.evaluated.stderr.numpy().copy(),
            "delta_losses": self.delta_losses.numpy().copy(),
            "delta_stderr": self.delta_stderr.numpy().copy(),
            "axis_values": self.axis_values.numpy().copy(),
            "coefficients": self.coefficients.numpy().copy(),
            "baseline_loss": self.baseline_loss,
            "direction_norms": self.axes.norms.cpu().numpy(),
            "param_norm": self.param_norm,
            "span": self.span,
            "relative_span": self.relative_span,
            "displacement": self.displacement.numpy().copy(),
            "relative_displacement": (self.displacement / (self.param_norm or math.nan)).numpy(),
            "orthogonality_check": self.axes.cosine,
            "axis_names": list(self.axes.names),
            "axis_kind": self.axes.kind,
            "n_batches_used": self.num_batches,
            "n_nonfinite": self.n_nonfinite,
            "num_forwards": self.evaluated.num_forwards,
            "chunk": self.evaluated.chunk,
            "threads": self.evaluated.threads,
            "buffers": self.evaluated.buffers,
        } | {f"axes_{name}": value for name, value in self.axes.settings.items()}

    def __str__(self) -> str:
        head = f"{len(self.axes)} lines of {len(self.axis_values)} points, loss {self.baseline_loss:.6g} at theta"
        columns = ("", "displacement", "loss at start", "lowest", "loss at end", "not finite")
        return f"{head}; {self.n_nonfinite} points not finite{self.evaluated.note}\n" + tabulate(
            [self._row(i) for i in range(len(self.axes))], headers=columns, disable_numparse=True
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same table, for notebooks."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def _row(self, i: int) -> tuple[str, ...]:
        line = self.losses[i]
        finite = line[line.isfinite()]
        lowest = float(finite.min()) if len(finite) else math.nan
        numbers = (float(self.displacement[i]), float(line[0]), lowest, float(line[-1]))
        return (self.axes.names[i], *(f"{x:.5g}" for x in numbers), str(len(line) - len(finite)))


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
) -> LossLines:
    r"""The loss along each of k axes through theta, with the paired standard error of its change.

    One-dimensional sections of the loss around theta, on the same batches at every point.

    $$L_i(t) = L(\theta + t d_i), \qquad \Delta_i(t) = L_i(t) - L(\theta).$$

    Losses in the criterion's unit. Errors are over sequences, nan for a single one; `delta_stderr` is that of the difference
    on the same sequences. A one-dimensional section through a minimum of a curved valley may miss the valley.

    axes: any `Axes`, or a tensor (k, P). num: points along each. span: the largest coefficient, from -span to span, or a
    range (low, high). relative_span: in shares of ||theta||, so that the displacement is span x ||theta|| along every axis.
    chunk: points per `vmap`, 1 a plain loop; buffers: which running statistics the net has; see `loss_plane` for both.
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
    check_chunk(chunk)
    ends = span_range("span", span)
    vector, axes = flat(loss, theta), given(axes)
    param_norm = math.sqrt(dot(vector, vector))
    k = len(axes)
    values = coefficients(axes, vector, [ends] * k, [num] * k, param_norm if relative_span else None)
    rows = [Row((0.0,) * k, i, values[i].tolist()) for i in range(k)]
    found = evaluate(loss, vector, axes.vectors.to(vector), rows, chunk=chunk, buffers=buffers)
    scale = torch.stack(values)
    warn_of_small_steps(loss, float(((scale[:, 1] - scale[:, 0]) * axes.norms.cpu()).min()), param_norm)
    span = ends[1] if -ends[0] == ends[1] else ends
    return LossLines(found, axes, spaced(ends, num), scale, param_norm, span, relative_span, len(loss.batches))
