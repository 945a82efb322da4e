"""Figures of samples over random directions: plain arrays in, a plotly `Figure` out.

Every direction is a mark; values that are not finite are not drawn: whoever shows the figure counts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float

from .theme import BLUE, GREEN, INK, MUTED, PURPLE, RULE, VERMILION, blank, set_linear

Column = Float[np.ndarray, " n"]

NEAR = 2.0
"""Zero is put on the axis of a distribution where it is at most so many times its extent away."""
_COLUMNS, _HEIGHT = 56, 0.6
_DOT = {"size": 6, "line": {"width": 0.5, "color": "white"}}


class Mark(NamedTuple):
    """A mean, and the ends of its interval; nan where undefined."""

    value: float
    low: float
    high: float


def strips(
    samples: Mapping[str, Column], means: Mapping[str, Mark], *, name: str, unit: str, interval: str = "95 % interval",
    band: float | None = None,
) -> go.Figure:  # fmt: skip
    """Distributions over directions on one linear axis, a row per name: every sample, the middle half, the mean.

    samples, means: in `unit`, by the same names. band: the values within this distance of 0 are shaded. Zero is a
    line, where it is on the axis: see `shows_zero`.
    """
    low, high = extent(samples, means)
    fig = blank(122 + 124 * len(samples), "").update_layout(legend={"xref": "container"})
    set_linear(fig.layout.xaxis, name, unit, low, high)
    fig.layout.xaxis.showgrid = False
    edges = fig.layout.xaxis.range
    _add_zero(fig, edges, band)
    explained = next((row for row, values in enumerate(samples.values()) if np.isfinite(values).any()), 0)
    for row, (colour, (label, values)) in enumerate(
        zip((BLUE, GREEN, VERMILION, PURPLE), samples.items(), strict=False)
    ):
        for trace in (
            _swarm(values, -row, edges, name, unit, colour),
            *_middle_half(values, -row, colour),
            _mean(means[label], -row, interval),
        ):
            fig.add_trace(trace.update(showlegend=row == explained and trace.name is not None))
    places = [-float(row) for row in range(len(samples))]
    fig.layout.yaxis.update(
        tickvals=places, ticktext=[plain(label) for label in samples], showgrid=False, automargin=True
    )
    fig.layout.yaxis.range = [places[-1] - 0.76, 0.42]
    return fig


def extent(samples: Mapping[str, Column], means: Mapping[str, Mark]) -> tuple[float, float]:
    """Ends of the axis that `strips` draws: the finite samples and intervals, and zero where it is near."""
    everything = np.concatenate([*samples.values(), *(np.array(mark) for mark in means.values())])
    finite = everything[np.isfinite(everything)]
    if not finite.size:
        return -1.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if max(low, -high) <= NEAR * (high - low) or low == high:
        return min(low, 0.0), max(high, 0.0)
    return low, high


def shows_zero(samples: Mapping[str, Column], means: Mapping[str, Mark]) -> bool:
    low, high = extent(samples, means)
    return low <= 0 <= high


def predictions(
    slope: Column, change: Column, step: float, *, quadratic: Column | None = None, slope_unit: str
) -> go.Figure:
    """Loss change (nats) against slope, a dot per direction, with the line change = step x slope.

    quadratic: what slope and curvature together predict, a ring per direction.
    """
    both = np.isfinite(slope) & np.isfinite(change)
    edges = _ends(slope[both])
    line = step * np.array(edges)
    near = [change[both], line] + ([] if quadratic is None else [quadratic[both]])
    fig = blank(400, "").update_layout(legend={"xref": "container"})
    set_linear(fig.layout.xaxis, "slope", slope_unit, *edges)
    set_linear(fig.layout.yaxis, "loss change", "nats", *_ends(np.concatenate(near)))
    _add_axes(fig)
    style = {"color": INK, "width": 1.3}
    fig.add_trace(go.Scatter(x=edges, y=line, mode="lines", line=style, name="slope alone", hoverinfo="skip"))
    hover = "direction %{customdata}<br>slope %{x:.4g}<br>loss change %{y:.4g} nats<extra></extra>"
    fig.add_trace(_dots(slope, change, both, "measured", hover))
    if quadratic is not None:
        ring = {"symbol": "circle-open", "size": 10, "color": VERMILION, "line": {"width": 1.2}}
        hover = "direction %{customdata}<br>predicted %{y:.4g} nats<extra></extra>"
        known = both & np.isfinite(quadratic)
        fig.add_trace(_dots(slope, quadratic, known, "slope and curvature", hover).update(marker=ring))
    return fig


def pairs(first: Column, second: Column, names: tuple[str, str], *, name: str, unit: str) -> go.Figure:
    """A quantity of one model against that of another, a dot per direction, with the diagonal on which they are equal.

    Both axes have the same range.
    """
    both = np.isfinite(first) & np.isfinite(second)
    edges = _ends(np.concatenate([first[both], second[both]]))
    fig = blank(420, "").update_layout(showlegend=False, margin={"t": 20})
    for axis, whose in zip((fig.layout.xaxis, fig.layout.yaxis), names, strict=True):
        set_linear(axis, f"{plain(whose)}<br>{name}", unit, *edges)
    fig.layout.xaxis.constrain = "domain"
    fig.layout.yaxis.update(scaleanchor="x", constrain="domain")
    _add_axes(fig)
    line = {"color": INK, "width": 1.3}
    ends = list(fig.layout.xaxis.range)
    fig.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line=line, name="equal", hoverinfo="skip"))
    hover = f"direction %{{customdata}}<br>%{{x:.4g}} and %{{y:.4g}} {unit}<extra></extra>"
    fig.add_trace(_dots(first, second, both, "a direction", hover))
    return fig


def swarm(values: Column, low: float, high: float) -> Column:
    """Heights that keep dots apart: the values that share a column of the axis are stacked around 0, in their order.

    >>> swarm(np.array([1.0, 5.0, 1.0]), 0.0, 10.0).round(3).tolist()
    [-0.035, 0.0, 0.035]
    """
    column = np.floor((values - low) / (high - low) * _COLUMNS)
    height = np.zeros(len(values))
    _, counts = np.unique(column, return_counts=True)
    gap = min(0.07, _HEIGHT / counts.max(initial=1))
    for place in np.unique(column):
        here = np.flatnonzero(column == place)
        height[here] = gap * (np.arange(len(here)) - (len(here) - 1) / 2)
    return height


def plain(text: str) -> str:
    """Text that plotly shows as it is: it takes tags for markup otherwise, and what is between dollars for TeX."""
    return escape(text, quote=False).replace("$", "&#36;")


def _swarm(values: Column, row: int, edges: tuple[float, float], name: str, unit: str, colour: str) -> go.Scatter:
    seen = np.isfinite(values)
    hover = f"direction %{{customdata}}<br>{name} %{{x:.4g}} {unit}<extra></extra>"
    dots = _dots(values, values, seen, "a direction", hover)
    opacity = 0.75 if seen.sum() <= 200 else 0.4
    return dots.update(y=row + swarm(values[seen], *edges), marker={"color": colour, "opacity": opacity})


def _middle_half(values: Column, row: int, colour: str) -> list[go.Scatter]:
    """A bar between the quartiles, and a tick at the median; nothing below 2 finite values."""
    finite = values[np.isfinite(values)]
    if finite.size < 2:
        return []
    lower, middle, upper = np.quantile(finite, (0.25, 0.5, 0.75))
    y = row - 0.44
    style = {"color": colour, "width": 7}
    bar = go.Scatter(x=[lower, upper], y=[y, y], mode="lines", line=style, opacity=0.35, name="middle half, median")
    tick = {"symbol": "line-ns", "size": 11, "line": {"width": 2, "color": colour}}
    hover = "median %{x:.4g}<extra></extra>"
    return [
        bar.update(hoverinfo="skip", legendgroup="quartiles"),
        go.Scatter(x=[middle], y=[y], mode="markers", marker=tick, hovertemplate=hover),
    ]


def _mean(mark: Mark, row: int, interval: str) -> go.Scatter:
    error = {
        "type": "data", "symmetric": False, "array": [mark.high - mark.value], "arrayminus": [mark.value - mark.low],
        "color": INK, "thickness": 1.5, "width": 4,
    }  # fmt: skip
    return go.Scatter(
        x=[mark.value], y=[row - 0.58], error_x=error, mode="markers", name=f"mean and {interval}",
        marker={"symbol": "diamond", "size": 7, "color": INK},
        customdata=[[mark.low, mark.high]],
        hovertemplate="mean %{x:.4g}<br>%{customdata[0]:.4g} to %{customdata[1]:.4g}<extra></extra>",
    )  # fmt: skip


def _dots(x: Column, y: Column, seen: Bool[np.ndarray, " n"], name: str, hover: str) -> go.Scatter:
    """A dot for every direction that is seen; pointed at, it shows its number, from 0."""
    return go.Scatter(
        x=x[seen], y=y[seen], customdata=np.flatnonzero(seen), mode="markers", name=name, hovertemplate=hover,
        marker={**_DOT, "color": BLUE, "opacity": 0.75},
    )  # fmt: skip


def _add_zero(fig: go.Figure, edges: tuple[float, float], band: float | None) -> None:
    low, high = edges
    if band is not None:
        ends = {"x0": max(low, -band), "x1": min(high, band)}
        if ends["x0"] < ends["x1"]:
            fig.add_vrect(**ends, fillcolor="rgba(120,120,120,0.16)", line_width=0, layer="below")
    if low <= 0 <= high:
        fig.add_vline(x=0, line={"color": RULE, "width": 1}, layer="below")


def _add_axes(fig: go.Figure) -> None:
    """Thin lines at zero, where it is in sight."""
    fig.layout.xaxis.update(zeroline=True, zerolinecolor=RULE, zerolinewidth=1)
    fig.layout.yaxis.update(zeroline=True, zerolinecolor=RULE, zerolinewidth=1, tickcolor=MUTED)


def _ends(values: Column) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (-1.0, 1.0)
