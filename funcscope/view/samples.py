"""Figures of samples: a distribution as dots, and two quantities of the same draws against each other.

Every sample is a mark; values that are not finite are not drawn: whoever shows the figure counts them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float
from plotly.subplots import make_subplots

from .drawing import Z95, Column, with_zero
from .theme import BLUE, GREEN, INK, MUTED, PURPLE, RULE, TEMPLATE, VERMILION, blank, set_linear

FAR = 12.0
"""Samples that lie so many interquartile ranges off stand at the edge, where the others would else be one point."""
EMPTIES = 12.0
"""A distribution so many times narrower than the common axis has an axis of its own."""
MOST_DOTS = 1500
_COLUMNS, _HEIGHT = 56, 0.6


class Row(NamedTuple):
    """A distribution on its axis: what is drawn, where it ends, and which samples lie beyond."""

    values: Column
    low: float
    high: float
    num_far: int
    num_samples: int


def distribution(samples: Mapping[str, Column], *, name: str, unit: str, axis: str) -> tuple[go.Figure, list[str]]:
    """A row of dots per name with the middle half, the median, and the mean with its 95 % interval; and notes on it.

    The rows have one axis, or one each where a row would be empty or a point on that of the others. Zero is a line, where
    it is on the axis. axis: what a dot is.
    """
    rows = {label: _row(values) for label, values in samples.items()}
    ends = np.array([(row.low, row.high) for row in rows.values() if np.isfinite(row.values).any()] or [(-1.0, 1.0)])
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
    wide = ends[:, 1] - ends[:, 0]
    own = bool(len(ends) > 1 and ((wide > 0) & (EMPTIES * wide < high - low)).any())
    fig = make_subplots(len(rows), 1, vertical_spacing=(0.34 if own else 0.06) / len(rows))
    fig.update_layout(template=TEMPLATE, height=122 + (136 if own else 104) * len(rows), legend={"xref": "container"})
    colours = (BLUE, GREEN, VERMILION, PURPLE)
    for i, (label, row) in enumerate(rows.items()):
        at = {"row": i + 1, "col": 1}
        x, y = next(fig.select_xaxes(**at)), next(fig.select_yaxes(**at))
        set_linear(x, name, unit, *with_zero(*((row.low, row.high) if own else (low, high))))
        last = i == len(rows) - 1
        x.update(showgrid=False, showticklabels=own or last, title={"text": x.title.text if last or own else ""})
        y.update(tickvals=[0], ticktext=[label], showgrid=False, automargin=True, range=[-0.8, 0.44])
        if x.range[0] <= 0 <= x.range[1]:
            fig.add_vline(x=0, line={"color": RULE, "width": 1}, layer="below", exclude_empty_subplots=False, **at)
        for trace in _traces(row, x.range, colours[i % 4], f"{axis} %{{customdata}}<br>{name}", unit):
            fig.add_trace(trace.update(showlegend=i == 0 and trace.name in _EXPLAINED), **at)
    return fig, [*(["every row has a scale of its own"] if own else []), *_notes(rows, axis)]


def scatter(
    sides: Mapping[str, tuple[Column, Column]], line: tuple[float, str], *, names: tuple[str, str], units: tuple[str, str],
    axis: str, square: bool = False,
) -> go.Figure:  # fmt: skip
    """One quantity against another, a dot per draw, a colour per side, with the line through zero that both may lie on.

    line: its slope, and what it says. square: both axes have the same range and unit of length.
    """
    seen = {label: np.isfinite(x) & np.isfinite(y) for label, (x, y) in sides.items()}
    every = [np.concatenate([pair[i][seen[label]] for label, pair in sides.items()]) for i in (0, 1)]
    if square:
        every = [np.concatenate(every)] * 2
    edges = _ends(every[0])
    ends = np.array(_ends(np.append(edges, 0.0)) if not square else edges)
    fig = blank(430, "")
    set_linear(fig.layout.xaxis, names[0], units[0], *edges)
    set_linear(fig.layout.yaxis, names[1], units[1], *_ends(np.append(every[1], [] if square else line[0] * ends)))
    for each in (fig.layout.xaxis, fig.layout.yaxis):
        each.update(zeroline=True, zerolinecolor=RULE, zerolinewidth=1, tickcolor=MUTED)
    if square:
        fig.layout.xaxis.constrain = "domain"
        fig.layout.yaxis.update(scaleanchor="x", constrain="domain")
        ends = np.array(fig.layout.xaxis.range)
    along = {"color": INK, "width": 1.3}
    fig.add_trace(go.Scatter(x=ends, y=line[0] * ends, mode="lines", line=along, name=line[1], hoverinfo="skip"))
    hover = (
        f"{axis} %{{customdata}}<br>{names[0]} %{{x:.4g}} {units[0]}<br>{names[1]} %{{y:.4g}} {units[1]}<extra></extra>"
    )
    for colour, (label, (x, y)) in zip((BLUE, VERMILION, GREEN, PURPLE), sides.items(), strict=False):
        fig.add_trace(_dots(x, y, seen[label], label, hover, colour))
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


def thinned(values: Column, most: int = MOST_DOTS) -> Column:
    """Of many samples some, evenly by rank with both ends; the others are holes.

    >>> thinned(np.arange(5.0), 3).tolist()
    [0.0, nan, 2.0, nan, 4.0]
    """
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) <= most:
        return values
    chosen = finite[np.argsort(values[finite], kind="stable")][np.linspace(0, len(finite) - 1, most).astype(int)]
    return np.where(np.isin(np.arange(len(values)), chosen), values, np.nan)


_EXPLAINED = ("middle half, median", "mean and 95 % interval", "beyond the axis")


def _row(values: Column) -> Row:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return Row(values, -1.0, 1.0, 0, 0)
    low, high = float(finite.min()), float(finite.max())
    lower, upper = np.quantile(finite, (0.25, 0.75))
    fences = lower - FAR * (upper - lower), upper + FAR * (upper - lower)
    far = (finite < fences[0]) | (finite > fences[1])
    if upper > lower and 10 * far.sum() <= finite.size and high - low > 4 * FAR * (upper - lower):
        low, high = float(finite[~far].min()), float(finite[~far].max())
    elif finite.size > 1:  # room for the mean's interval
        half = Z95 * float(finite.std(ddof=1)) / math.sqrt(finite.size)
        low, high = min(low, float(finite.mean()) - half), max(high, float(finite.mean()) + half)
    return Row(values, low, high, int(((finite < low) | (finite > high)).sum()), int(finite.size))


def _notes(rows: Mapping[str, Row], axis: str) -> list[str]:
    far, many = (
        sum(row.num_far for row in rows.values()),
        [row for row in rows.values() if row.num_samples > MOST_DOTS],
    )
    notes = [f"{far} beyond the axis stand at its edge"] if far else []
    notes += [f"{MOST_DOTS:,} of {many[0].num_samples:,} drawn, evenly by rank"] if many else []
    flat = any(row.num_samples > 1 and row.high - row.low <= 1e-9 * abs(row.high) for row in rows.values())
    return [*notes, *([f"all equal for every {axis} where there is one column of dots"] if flat else [])]


def _traces(row: Row, edges: tuple[float, float], colour: str, what: str, unit: str) -> list[go.Scatter]:
    values = thinned(row.values)
    seen = np.isfinite(values)
    inside = seen & (values >= row.low) & (values <= row.high)
    dots = _dots(values, values, inside, "dots", f"{what} %{{x:.4g}} {unit}<extra></extra>", colour)
    dots.update(y=swarm(values[inside], *edges), marker={"opacity": 0.75 if seen.sum() <= 200 else 0.4})
    drawn = [dots, *_middle_half(row.values, colour), *_mean(row, edges, unit)]
    if (far := seen & ~inside).any():
        out = values[far]
        hover = f"{what} %{{text}} {unit}<extra></extra>"
        marks = _dots(np.clip(out, *edges), 0 * out, np.ones(len(out), bool), "beyond the axis", hover, colour)
        symbol = np.where(out > row.high, "triangle-right-open", "triangle-left-open")
        drawn.append(
            marks.update(text=[f"{x:.4g}" for x in out], marker={"symbol": symbol, "size": 9}, cliponaxis=False)
        )
    return drawn


def _middle_half(values: Column, colour: str) -> list[go.Scatter]:
    """A bar between the quartiles, and a tick at the median; nothing below 2 finite values."""
    finite = values[np.isfinite(values)]
    if finite.size < 2:
        return []
    lower, middle, upper = np.quantile(finite, (0.25, 0.5, 0.75))
    line = {"color": colour, "width": 7}
    bar = go.Scatter(x=[lower, upper], y=[-0.46, -0.46], mode="lines", line=line, opacity=0.35, hoverinfo="skip")
    tick = {"symbol": "line-ns", "size": 11, "line": {"width": 2, "color": colour}}
    mark = go.Scatter(
        x=[middle], y=[-0.46], mode="markers", marker=tick, hovertemplate="median %{x:.4g}<extra></extra>"
    )
    return [bar.update(name="middle half, median"), mark]


def _mean(row: Row, edges: tuple[float, float], unit: str) -> list[go.Scatter]:
    """The mean with its interval; not where it lies beyond the axis."""
    finite = row.values[np.isfinite(row.values)]
    if not finite.size or not edges[0] <= finite.mean() <= edges[1]:
        return []
    half = Z95 * float(finite.std(ddof=1)) / math.sqrt(finite.size) if finite.size > 1 else math.nan
    error = {"type": "data", "array": [half], "color": INK, "thickness": 1.5, "width": 4}
    mark = {"symbol": "diamond", "size": 7, "color": INK}
    return [
        go.Scatter(
            x=[float(finite.mean())], y=[-0.63], error_x=error, mode="markers", name="mean and 95 % interval", marker=mark,
            hovertemplate=f"mean %{{x:.4g}} ± {half / Z95:.2g} {unit}<extra></extra>",
        )
    ]  # fmt: skip


def _dots(x: Column, y: Column, seen: Bool[np.ndarray, " n"], name: str, hover: str, colour: str) -> go.Scatter:
    """A dot for every draw that is seen; pointed at, it shows its number, from 0."""
    return go.Scatter(
        x=x[seen], y=y[seen], customdata=np.flatnonzero(seen), mode="markers", name=name, hovertemplate=hover,
        marker={"size": 6, "line": {"width": 0.5, "color": "white"}, "color": colour, "opacity": 0.75},
    )  # fmt: skip


def _ends(values: Float[np.ndarray, "_"]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (-1.0, 1.0)
