"""Figures of documented arrays: a result, or a mapping of arrays by their documented names, to a plotly `Figure`.

None changes what it is given. Values that are not finite are holes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..core.tables import counted
from ..linalg.quadrature import SpectralDensity
from .drawing import (
    Data,
    arrays,
    check_lengths,
    curve,
    lost,
    numbers_of,
    put_on_steps,
    titled,
)  # fmt: skip
from .flatness_figures import FLATNESS_METRICS, render_flatness_trajectory, render_perturbation_distribution
from .names import plain
from .numbers import number
from .path_figures import barrier
from .plane_figures import Plane, Shades, contour, plane_of, shades, surface, walk_of
from .spectrum_figures import spectrum
from .theme import BLUE, TEMPLATE, VERMILION, set_log

__all__ = [
    "FLATNESS_METRICS", "render_barrier", "render_contour", "render_flatness_trajectory", "render_perturbation_distribution",
    "render_spectrum_density", "render_surface", "render_training_curves",
]  # fmt: skip


def render_contour(
    plane: Data, trajectory: Mapping[str, Any] | None = None, title: str | None = None, current: int | None = None,
    height: int = 480, scale: Shades | None = None,
) -> go.Figure:  # fmt: skip
    """The loss (nats) over a plane as filled contours; a star at the centre, crosses where it is not finite.

    plane: `grid_losses` (n, m), `axis_values` (n,) of the first direction (horizontal), `axis_values_2` (m,) of the
    second (vertical), and, shown where they are there, `axis_names`, `relative_displacement` (2,) and `baseline_loss`.
    trajectory: `coordinates` (k, 2) in the unit of the axes and `step` (k,), a line with a dot per step; the step
    `current` is a large dot, where it is among them. scale: of the colours; by itself logarithmic where all finite losses
    are positive and spread over two decades.

    Raises ValueError for a missing key and shapes that do not fit.

    >>> plane = {"grid_losses": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "axis_values": [0, 1], "axis_values_2": [0, 1, 2]}
    >>> render_contour(plane).data[0].z.tolist()                  # rows are values of the second direction
    [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
    """
    seen = plane_of(plane)
    fig = contour(seen, scale or shades(seen.losses, "nats"), walk_of(trajectory), current, height)
    return titled(fig, plain(title) if title else "Loss over a plane", _about(seen))


def render_surface(
    plane: Data, title: str | None = None, trajectory: Mapping[str, Any] | None = None, log: bool | None = None,
    current: int | None = None, height: int = 560,
) -> go.Figure:  # fmt: skip
    """The loss (nats) over a plane as a surface in three dimensions, open where the loss is not finite.

    plane, trajectory, current: as for `render_contour`. The trajectory is drawn at its `losses` (k,) where it has them,
    else on the surface, interpolated between grid points, and not at all outside it. log: whether height and colour
    are logarithmic; None: where all finite losses are positive and spread over two decades.

    Raises ValueError for a missing key, shapes that do not fit, and `log=True` with a loss that is not positive.
    """
    seen, walk = plane_of(plane), walk_of(trajectory)
    heights = None if trajectory is None or trajectory.get("losses") is None else numbers_of(trajectory, "losses")
    fig = surface(seen, shades(seen.losses, "nats", log), walk, heights, current, height)
    return titled(fig, plain(title) if title else "Loss over a plane", _about(seen))


def render_barrier(
    path: Data, *others: Data, names: Sequence[str] | None = None, title: str | None = None, height: int = 420
) -> go.Figure:
    """The loss (nats) along paths between two models, each with its chord, and its barrier where it is largest.

    path, others: `coefficients` (n,), `losses` (n,), and, where they are there, `stderr` (n,) as 95 % intervals, `excess`
    (n,) over the chord with `excess_stderr` (n,) or `barrier_linear_stderr`, and `barrier_max`. Without a number that is
    not nan the barrier is undefined. names: one per path; its `kind` otherwise.

    Raises ValueError for a missing key, arrays of different lengths, and a count of names that differs.
    """
    fig, notes = barrier([path, *others], names, "nats", height)
    return titled(fig, plain(title) if title else "Loss along a path between two models", *notes)


def render_spectrum_density(
    density: SpectralDensity, eigenvalues: Any = None, *, title: str | None = None,
    unit: str = "nats per unit of distance²",
) -> go.Figure:  # fmt: skip
    """The density of a spectrum (share of eigenvalues per decade) with its 95 % interval, and single eigenvalues below.

    density: what `spectral_density` returns. eigenvalues: what `eigenpairs` returns, or anything with `values` and
    `residuals` (k,); without it, the outermost nodes of the quadrature, which lie inside the spectrum. unit: of the
    eigenvalues. Raises ValueError for nodes that are not finite.
    """
    values, residuals = np.array(density.range), None
    if eigenvalues is not None:
        values, residuals = (np.asarray(each, dtype=np.float64) for each in (eigenvalues.values, eigenvalues.residuals))
    starts = f"{counted(density.num_probes, 'start')} of {counted(density.steps, 'product')}"
    told = f"{density.num_parameters:,} eigenvalues, {starts}"
    return titled(
        spectrum(density, values, residuals, plain(unit)), plain(title) if title else "Spectral density", told
    )


def render_training_curves(
    curves: Data, current_epoch: int | None = None, title: str | None = None, height: int = 470,
    checkpoints: Sequence[int] | None = None,
) -> go.Figure:  # fmt: skip
    """Loss (nats) above accuracy over training, for train and test; the current step is marked.

    curves: `step` (n,), `train_loss`, `test_loss`, `train_accuracy`, `test_accuracy` (n,), of which one loss must be
    there; nan is a gap. checkpoints: steps that get an open circle. The `customdata` of a point is its step.

    Raises ValueError for a missing key and arrays of different lengths.
    """
    data = arrays(curves, "step")
    there = [
        [side for side in ("train", "test") if data.get(f"{side}_{what}") is not None] for what in ("loss", "accuracy")
    ]
    loss = {side: numbers_of(data, f"{side}_loss") for side in there[0]}
    accuracy = {side: numbers_of(data, f"{side}_accuracy") for side in there[1]}
    if not loss:
        raise ValueError(
            f"the data must have the key 'train_loss' or 'test_loss'; they have {', '.join(map(repr, data))}."
        )
    check_lengths(data, "step", *(f"{side}_loss" for side in loss), *(f"{side}_accuracy" for side in accuracy))
    fig = make_subplots(rows=2, cols=1, row_heights=[0.62, 0.38], vertical_spacing=0.07)
    fig.update_layout(template=TEMPLATE, height=height)
    step, none = data["step"], np.full(len(data["step"]), np.nan)
    floor = set_log(fig.layout.yaxis, *loss.values())
    for row, (unit, columns) in enumerate((("nats", loss), ("", accuracy)), start=1):
        for side, values in columns.items():
            colour = BLUE if side == "train" else VERMILION
            *below, line = curve(step, values, none, side, colour, unit, floor if row == 1 else -math.inf)
            for trace in (*below, line.update(mode="lines")):
                fig.add_trace(trace.update(showlegend=row == 1, legendgroup=trace.name), row=row, col=1)
    at = np.isin(step, checkpoints or [])
    if at.any():
        circles = curve(step[at], next(iter(loss.values()))[at], none[at], "checkpoint", BLUE, "nats")[-1]
        fig.add_trace(circles.update(mode="markers", marker={"symbol": "circle-open", "size": 7}), row=1, col=1)
    fig.layout.yaxis.title.text = "loss (nats)"
    fig.layout.yaxis2.update(title={"text": "accuracy"}, range=[-0.04, 1.04], tickvals=[0, 0.5, 1])
    put_on_steps(fig, step, current_epoch, rows=(1, 2))
    return titled(fig, plain(title) if title else "Training")


def _about(plane: Plane) -> str:
    finite = plane.losses[np.isfinite(plane.losses)]
    told = [f"centre {number(plane.centre)}"] if math.isfinite(plane.centre) else []
    ends = [f"from {number(float(each.min()))} to {number(float(each.max()))} nats" for each in [finite] if each.size]
    return ", ".join([*told, *(ends or ["no finite loss"]), *filter(None, [lost(plane.losses, "points")])])
