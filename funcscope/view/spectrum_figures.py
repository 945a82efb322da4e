"""The density of a spectrum with its error band, above the eigenvalues that are known, each with its residual."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots

from ..linalg.quadrature import SpectralDensity
from .drawing import Z95, Column, band
from .numbers import power_of_ten
from .theme import BLUE, RULE, TEMPLATE, VERMILION, set_log

WIDTH = 0.15
"""Standard deviation of a node's bump in a density, in decades."""


def place(values: Float[np.ndarray, "*shape"], threshold: float) -> Float[np.ndarray, "*shape"]:
    """Positions on a scale with a zero and both signs: linear within the threshold, a decade per unit far beyond it.

    >>> place(np.array([-1e3, 0.0, 1e3, 1e4]), 1.0).round(3).tolist()
    [-3.0, 0.0, 3.0, 4.0]
    """
    return np.asarray(np.arcsinh(values / (2 * threshold)) / math.log(10))


def spectrum(density: SpectralDensity, values: Column | None = None, residuals: Column | None = None) -> go.Figure:
    """Share of eigenvalues per decade (log axis) with its 95 % interval, and single eigenvalues below.

    The scale is linear within what rounding may make of a zero, logarithmic beyond on both sides. Below half an eigenvalue
    nothing is drawn. values, residuals: of the eigenvalues; None for the outermost nodes of the quadrature, which lie
    inside the spectrum. Raises ValueError for nodes not finite.
    """
    values = np.array(density.range) if values is None else values
    nodes = density.nodes.double().cpu().numpy()
    if not np.isfinite(nodes).all():
        raise ValueError(f"`density` must have finite nodes, got {int((~np.isfinite(nodes)).sum())} others.")
    tie, least = density.rounding * float(np.abs(nodes).max()) or 1.0, 0.5 / density.num_parameters
    moved = replace(density, nodes=torch.from_numpy(place(nodes, tie)))
    grid = moved.grid(400, WIDTH)
    points, (mean, stderr) = grid.numpy(), (x.numpy() for x in moved.density(grid, WIDTH))
    fig = make_subplots(rows=2, cols=1, row_heights=[0.8, 0.2], vertical_spacing=0.04, shared_xaxes=True)
    fig.update_layout(template=TEMPLATE, height=440, margin={"l": 76})
    half = Z95 * np.nan_to_num(stderr)
    floor = set_log(fig.layout.yaxis, np.maximum(mean, least), np.maximum(mean + half, least))
    hover = "eigenvalue %{customdata[0]:.3g}<br>%{y:.3g} ± %{customdata[1]:.2g}<extra></extra>"
    line = go.Scatter(
        x=points, y=np.where(mean > floor, mean, np.nan), mode="lines", line={"color": BLUE, "width": 1.8}, name="density",
        customdata=np.column_stack([2 * tie * np.sinh(points * math.log(10)), stderr]), hovertemplate=hover,
    )  # fmt: skip
    fig.add_traces([band(points, mean - half, mean + half, "95 % interval", BLUE, floor), line], rows=1, cols=1)
    fig.add_trace(_ritz(values, residuals, tie), row=2, col=1)
    apart = np.zeros(len(values)) if residuals is None else residuals
    edges = place(np.concatenate([values - apart, values + apart]), tie)
    low, high = min(points[0], edges.min(initial=0)), max(points[-1], edges.max(initial=0))
    pad, ticks = 0.03 * (high - low), _signed_ticks(low, high, tie)
    for axis in (fig.layout.xaxis, fig.layout.xaxis2):
        axis.update(range=[low - pad, high + pad], tickvals=list(ticks), ticktext=list(ticks.values()), tickangle=0)
        axis.matches = None
    fig.layout.xaxis.update(showticklabels=False)
    fig.layout.xaxis2.title.text = "eigenvalue"
    fig.layout.yaxis.title.text = "share of eigenvalues<br>per decade"
    told = "nodes" if residuals is None else "Ritz"
    fig.layout.yaxis2.update(range=[-1, 1], showticklabels=False, showgrid=False, title={"text": told})
    return fig.add_vline(x=0, line={"color": RULE, "width": 1}, layer="below")


def _ritz(values: Column, residuals: Column | None, threshold: float) -> go.Scatter:
    """A tick per value; its bar is the interval that must hold an eigenvalue."""
    at, told = place(values, threshold), "eigenvalue, with its residual"
    hover = "%{customdata[0]:.5g}<br>residual %{customdata[1]:.1g}<extra></extra>"
    error = None
    if residuals is None:
        told, hover, residuals = "outermost node", "node %{customdata[0]:.5g}<extra></extra>", 0 * values
    else:
        ends = place(values + residuals, threshold) - at, at - place(values - residuals, threshold)
        error = {"symmetric": False, "array": ends[0], "arrayminus": ends[1], "thickness": 1.5, "width": 5}
    return go.Scatter(
        x=at, y=np.zeros(len(values)), error_x=error, mode="markers", name=told, hovertemplate=hover,
        marker={"symbol": "line-ns", "size": 22, "color": VERMILION, "line": {"width": 1.5, "color": VERMILION}},
        customdata=np.column_stack([values, residuals]),
    )  # fmt: skip


def _signed_ticks(low: float, high: float, threshold: float, most: int = 3) -> dict[float, str]:
    """Zero, and whole powers of ten of both signs that are well outside the linear part."""
    ticks = {0.0: "0"}
    first, last = math.ceil(math.log10(threshold) + 0.45), math.floor(math.log10(threshold) + max(high, -low, 0.5))
    for power in range(last, first - 1, -max(1, math.ceil((last - first + 1) / most))):
        for sign, text in ((1, ""), (-1, "−")):
            x = float(place(np.array(sign * 10.0**power), threshold))
            if low <= x <= high:
                ticks[x] = text + power_of_ten(power)
    return ticks
