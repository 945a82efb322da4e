"""Every renderer in one place: a result, or a mapping of arrays by their documented names, to a plotly `Figure`.

The ones defined here put results into figures of other modules, or are about one number over training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float

from ..linalg.quadrature import SpectralDensity
from . import curvature_figures, figures
from .drawing import (
    Data,
    arrays,
    check_lengths,
    faint,
    numbers_of,
    over_training,
    put_on_steps,
    scalar,
    set_scale,
    titled,
)
from .figures import Z95
from .flatness_figures import FLATNESS_METRICS, render_flatness_trajectory, render_perturbation_distribution
from .numbers import counted, with_error
from .path_figures import render_barrier, render_barrier_matrix, render_slices
from .plane_figures import render_contour, render_planes_side_by_side, render_surface
from .result import short
from .samples import plain, swarm
from .theme import BLUE, GREEN, INK, PURPLE, RULE, VERMILION, Timeline, blank, set_linear

__all__ = [
    "FLATNESS_METRICS",
    "render_barrier",
    "render_barrier_matrix",
    "render_contour",
    "render_curvature_trajectory",
    "render_dimensionality_trajectory",
    "render_directional_violin",
    "render_flatness_trajectory",
    "render_perturbation_distribution",
    "render_planes_side_by_side",
    "render_slices",
    "render_spectrum_density",
    "render_surface",
    "render_training_curves",
]

WIDTH = 0.15
"""Standard deviation of a node's bump in a density, in decades."""
FEW = 100
"""Samples up to which the dots of a violin are opaque."""
MEASURES = {"participation_ratio": "participation ratio", "effective_rank": "effective rank"}


def render_training_curves(
    curves: Data,
    current_epoch: int | None = None,
    title: str | None = None,
    height: int = 470,
    checkpoints: Sequence[int] | None = None,
) -> go.Figure:
    """Loss (nats, log axis) above accuracy over training, for train and test; the current step is marked.

    curves: `step` (n,), `train_loss`, `test_loss`, `train_accuracy`, `test_accuracy` (n,), of which one loss must be
    there; nan is a gap. checkpoints: steps that get an open circle. The first `customdata` of a point is its step.

    Raises ValueError for a missing key and arrays of different lengths.
    """
    data = arrays(curves, "step")
    loss, accuracy = (
        {
            side: numbers_of(data, f"{side}_{what}")
            for side in ("train", "test")
            if data.get(f"{side}_{what}") is not None
        }
        for what in ("loss", "accuracy")
    )
    if not loss:
        raise ValueError(
            f"the data must have the key 'train_loss' or 'test_loss'; they have {', '.join(map(repr, data))}."
        )
    check_lengths(data, "step", *(f"{side}_loss" for side in loss), *(f"{side}_accuracy" for side in accuracy))
    step = np.asarray(data["step"])
    last = int(step.max(initial=current_epoch or 0)) or 1
    fig = figures.curves(step, loss, accuracy, np.array(checkpoints or [], dtype=np.int64), Timeline(last))
    fig.data = tuple(trace for trace in fig.data if trace.name != "checkpoint" or len(trace.x))
    fig.update_layout(height=height)
    put_on_steps(fig, step, current_epoch, rows=(1, 2))
    return titled(fig, plain(title) if title else "Training")


def render_curvature_trajectory(
    summary_data: Data, current_epoch: int | None = None, title: str | None = None, height: int = 470
) -> go.Figure:
    """Largest Hessian eigenvalue and trace (nats per unit of distance²) above the relative sharpness, over training.

    summary_data: `step`, `hessian_max_eigenvalue` with `hessian_max_eigenvalue_residual` (its bar), `hessian_trace`
    and `sam_relative` with `..._stderr` (bars of 1.96), all (n,). Log axes; what is not positive is a triangle at the
    lower edge. The first `customdata` of a point is its step.

    Raises ValueError for a missing key and arrays of different lengths.
    """
    names = ("hessian_max_eigenvalue", "hessian_trace", "sam_relative")
    errors = ("hessian_max_eigenvalue_residual", "hessian_trace_stderr", "sam_relative_stderr")
    data = arrays(summary_data, "step", *names, *errors)
    check_lengths(data, "step", *names, *errors)
    top, trace, sharpness = (numbers_of(data, name) for name in names)
    residual, trace_half, sharpness_half = (
        scale * numbers_of(data, name) for scale, name in zip((1, Z95, Z95), errors, strict=True)
    )
    values, halves = (top, trace, sharpness), (residual, trace_half, sharpness_half)
    steps = data["step"]
    fig = figures.hessian_and_sharpness(steps, values, halves, Timeline(int(steps.max(initial=1)) or 1))
    fig.update_layout(height=height, margin={"l": 84})
    put_on_steps(fig, steps, current_epoch, rows=(1, 2))
    note = "bars: residual of the eigenvalue, 95 % interval of trace and sharpness"
    return titled(fig, plain(title) if title else "Curvature over training", note)


def render_dimensionality_trajectory(
    summary_data: Data,
    current_epoch: int | None,
    names: Sequence[str],
    metric: str = "participation_ratio",
    title: str | None = None,
    height: int = 420,
) -> go.Figure:
    """Dimension of every weight matrix over training: its participation ratio, or its effective rank.

    summary_data: `step` (n,) and the metric (n, k) in dimensions; names: k matrices. A colour, and a dash beyond
    four, per matrix; the `customdata` of a point is its step.

    Raises ValueError for another metric, a missing key, and a count of names that differs.
    """
    if metric not in MEASURES:
        raise ValueError(f"`metric` must be one of {', '.join(MEASURES)}, got {metric!r}.")
    data = arrays(summary_data, "step", metric)
    check_lengths(data, "step", metric)
    values = numbers_of(data, metric)
    if values.ndim != 2 or values.shape[1] != len(names):
        raise ValueError(f"`{metric}` must have a column for each of the {len(names)} names, got {values.shape}.")
    fig = blank(height, "")
    floor = set_scale(fig.layout.yaxis, MEASURES[metric], "dimensions", values.ravel())
    for i, name in enumerate(curvature_figures.labels(names, 20)):
        colour, dash = (BLUE, VERMILION, GREEN, PURPLE)[i % 4], ("solid", "dash", "dot", "dashdot")[i // 4 % 4]
        nothing = np.full(len(values), np.nan)
        *below, line = over_training(data["step"], values[:, i], nothing, plain(name), colour, "", floor)
        fig.add_traces([*below, line.update(line={"dash": dash}, marker={"size": 4})])
    put_on_steps(fig, data["step"], current_epoch)
    return titled(fig, plain(title) if title else f"{MEASURES[metric].capitalize()} of the weight matrices")


def render_spectrum_density(
    density: SpectralDensity, eigenvalues: Any = None, *, title: str | None = None,
    unit: str = "nats per unit of distance²",
) -> go.Figure:  # fmt: skip
    """The density of a spectrum (share of eigenvalues per decade) with its 95 % interval, and single eigenvalues below.

    density: what `spectral_density` returns. eigenvalues: what `eigenpairs` returns, or anything with `values` and
    `residuals` (k,); without it, the outermost nodes of the quadrature, which lie inside the spectrum. The scale is
    linear within what rounding may make of a zero, and logarithmic beyond on both sides. Below half an eigenvalue
    nothing is drawn; gaps between bumps are those of the quadrature.

    unit: of the eigenvalues. Raises ValueError for nodes that are not finite.
    """
    nodes = density.nodes.double().cpu().numpy()
    if not np.isfinite(nodes).all():
        raise ValueError(f"`density` must have finite nodes, got {int((~np.isfinite(nodes)).sum())} others.")
    tie = density.rounding * float(np.abs(nodes).max()) or 1.0
    moved = replace(density, nodes=torch.from_numpy(curvature_figures.place(nodes, tie)))
    points = moved.grid(600, WIDTH)
    mean, stderr = (x.numpy() for x in moved.density(points, WIDTH))
    values = np.array(density.range) if eigenvalues is None else np.asarray(eigenvalues.values, dtype=np.float64)
    residuals = np.zeros(2) if eigenvalues is None else np.asarray(eigenvalues.residuals, dtype=np.float64)
    least = 0.5 / density.num_parameters
    fig = curvature_figures.spectrum(
        points.numpy(), mean, stderr, values, residuals, threshold=tie, least=least, unit=unit
    )
    if eigenvalues is None:
        fig.data[-1].update(name="outermost node", error_x=None, hovertemplate=f"node %{{x:.5g}} {unit}<extra></extra>")
        fig.data[-1].update(hovertemplate=f"node %{{customdata[0]:.5g}} {unit}<extra></extra>")
        fig.layout.yaxis2.title.text = "nodes"
    told = f"{density.num_parameters:,} eigenvalues, {counted(density.num_probes, 'start')} of {density.steps} products"
    return titled(fig, plain(title) if title else "Spectral density", told)


def render_directional_violin(
    results: Data | Sequence[Data], names: Sequence[str] | None = None, title: str | None = None
) -> go.Figure:
    """How the loss changes (nats) along random directions are spread, a violin per result, with its mean.

    results: one or several mappings with `losses` (n,) and `baseline_loss`; `losses_negative` (n,), the step along
    -d, is the lower half of the violin where it is there. Every direction is a dot. The diamond is the mean with 1.96
    standard errors. names: one per result. Values that are not finite are counted below the name.

    Raises ValueError for no result, a missing key, and a count of names that differs.
    """
    every = [results] if isinstance(results, Mapping) or hasattr(results, "asdict") else list(results)
    if not every or (names is not None and len(names) != len(every)):
        raise ValueError(f"there must be a result, and one name for each, got {len(every)} and {names!r}.")
    deltas = [_changes(arrays(each, "losses", "baseline_loss")) for each in every]
    labels = [plain(short(str(name), 24)) for name in names or [f"result {i + 1}" for i in range(len(every))]]
    if names is None and len(every) == 1:
        labels = [""]
    fig = blank(150 + 130 * len(every), "").update_layout(violinmode="overlay", margin={"l": 24})
    ends = np.concatenate([side for sides in deltas for side in sides.values()])
    ends = ends[np.isfinite(ends)]
    low, high = (min(float(ends.min()), 0.0), max(float(ends.max()), 0.0)) if ends.size else (-1.0, 1.0)
    set_linear(fig.layout.xaxis, "loss change", "nats", low, high)
    fig.add_vline(x=0, line={"color": RULE, "width": 1}, layer="below")
    for row, sides in enumerate(deltas):
        for sign, values in sides.items():
            fig.add_traces(_violin(values, -row, sign, split=len(sides) > 1, first=row == 0))
    counts = [", ".join(_not_finite(sides)) for sides in deltas]
    text = [
        f"{label}<br>{count}".strip("<br>") if count else label for label, count in zip(labels, counts, strict=True)
    ]
    fig.layout.yaxis.update(
        tickvals=[-row for row in range(len(every))], ticktext=text, showgrid=False, automargin=True
    )
    fig.layout.yaxis.range = [-len(every) + 0.45, 0.55]
    told = (
        f"{counted(len(next(iter(deltas[0].values()))), 'direction')}, mean with 95 % interval"
        if len(every) == 1
        else ""
    )
    return titled(
        fig, plain(title) if title else "Loss changes along random directions", told or "mean with 95 % interval"
    )


def _changes(data: Mapping[str, Any]) -> dict[str, Float[np.ndarray, " n"]]:
    sides = {"+d": "losses", "−d": "losses_negative"}
    baseline = scalar(data, "baseline_loss")
    return {sign: numbers_of(data, name) - baseline for sign, name in sides.items() if data.get(name) is not None}


def _violin(values: Float[np.ndarray, " n"], row: int, sign: str, *, split: bool, first: bool) -> list[Any]:
    """A violin of the finite values, a dot for each, and the mean; above the row for +d, below it for -d, if split."""
    finite = values[np.isfinite(values)]
    colour, up, half = (BLUE, 1, "positive") if sign == "+d" else (GREEN, -1, "negative")
    shape = go.Violin(
        x=finite, y=np.full(finite.size, float(row)), orientation="h", side=half if split else "both", width=0.86,
        name=sign, legendgroup=sign, showlegend=first and split, line={"color": colour, "width": 1.2},
        fillcolor=faint(colour, 0.25), spanmode="hard", points=False, scalemode="width", hoverinfo="skip",
    )  # fmt: skip
    if not finite.size:
        return [shape]
    ends = (float(finite.min()), float(finite.max()) + 1e-12 + 1e-9 * abs(float(finite.max())))
    height = swarm(finite, *ends)
    dots = go.Scatter(
        x=finite, y=row + (up * (0.2 + height / 3) if split else height / 2), mode="markers", legendgroup=sign,
        name=f"directions {sign}", showlegend=False, customdata=np.flatnonzero(np.isfinite(values)),
        marker={"color": colour, "size": 4 if finite.size > 10 else 7, "opacity": 0.6 if finite.size <= FEW else 0.25},
        hovertemplate="direction %{customdata}<br>loss change %{x:.4g} nats<extra></extra>",
    )  # fmt: skip
    return [shape, dots, _mean(finite, float(row) + (0.05 * up if split else 0.0), sign)]


def _mean(finite: Float[np.ndarray, " n"], height: float, sign: str) -> go.Scatter:
    mean = float(finite.mean())
    error = Z95 * float(finite.std(ddof=1)) / math.sqrt(finite.size) if finite.size > 1 else math.nan
    bar = {"type": "data", "array": [error], "color": INK, "thickness": 1.6, "width": 4}
    return go.Scatter(
        x=[mean], y=[height], error_x=bar, mode="markers", showlegend=False, name=f"mean {sign}",
        marker={"symbol": "diamond", "size": 7, "color": INK},
        hovertemplate=f"mean {with_error(mean, error / Z95)} nats<extra></extra>",
    )  # fmt: skip


def _not_finite(sides: Mapping[str, Float[np.ndarray, " n"]]) -> list[str]:
    lost = {sign: int((~np.isfinite(values)).sum()) for sign, values in sides.items()}
    return [f"{count} of {sign} not finite" for sign, count in lost.items() if count]
