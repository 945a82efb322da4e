"""Figures of numbers along one axis: over training or along a numbered axis as lines, by names as bars or points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from .drawing import Z95, Column, curve, put_on_steps, reaches, set_scale, style
from .names import labels, plain
from .numbers import with_error
from .theme import BLUE, INK, RULE, blank, log_ticks, set_linear


class Line(NamedTuple):
    """A curve: its name as plotly takes it, where it is known, and half of its 95 % interval."""

    name: str
    x: np.ndarray
    value: Column
    half: Column


def lines(
    each: Sequence[Line], *, name: str, unit: str, at: str = "step", current: int | None = None, height: int = 350
) -> tuple[go.Figure, list[str]]:
    """Lines with their intervals; along steps on the axis of training, along what is far apart on a logarithmic one."""
    fig = blank(height, "").update_layout(showlegend=len(each) > 1)
    ends = [edge[np.isfinite(edge)] for one in each for edge in (one.value - one.half, one.value + one.half)]
    floor = set_scale(fig.layout.yaxis, name, unit, np.concatenate([one.value for one in each]), *ends)
    for i, one in enumerate(each):
        colour, dash = style(i)
        fig.add_traces(curve(one.x, one.value, one.half, one.name, colour, unit, floor, at=at, dash=dash, what=name))
    x = np.concatenate([np.asarray(one.x) for one in each])
    if at == "step":
        put_on_steps(fig, x, current)
    elif x.size and x.min() > 0 and x.max() >= 1000 * x.min():
        low, high = np.log10(x.min()), np.log10(x.max())
        ticks = log_ticks(low, high)
        fig.layout.xaxis.update(type="log", tickvals=list(ticks), ticktext=list(ticks.values()), title={"text": at})
        fig.layout.xaxis.range = [low - 0.04 * (high - low), high + 0.04 * (high - low)]
    else:
        set_linear(fig.layout.xaxis, at, "", float(x.min(initial=np.inf)), float(x.max(initial=-np.inf)))
    note = reaches(np.concatenate(ends), floor)
    return fig, [note] if note else []


def points(names: Sequence[str], values: Column, half: Column, *, name: str, unit: str) -> go.Figure:
    """A number of every model with its 95 % interval, the first on top. names: as plotly takes them."""
    ends = np.concatenate([values - np.nan_to_num(half), values + np.nan_to_num(half)])
    finite = ends[np.isfinite(ends)]
    fig = blank(120 + 30 * len(names), "").update_layout(showlegend=False)
    set_linear(fig.layout.xaxis, name, unit, float(finite.min()), float(finite.max()))
    rows, told = list(range(len(names))), [with_error(v, h / Z95) for v, h in zip(values, half, strict=True)]
    error = {"type": "data", "array": half, "color": BLUE, "thickness": 1.5, "width": 0}
    marks = go.Scatter(
        x=values, y=rows, mode="markers", marker={"color": BLUE, "size": 9}, customdata=told, error_x=error
    )
    fig.add_trace(marks.update(hovertemplate=f"{name} %{{customdata}} {unit}<extra></extra>"))
    fig.layout.yaxis.update(tickvals=rows, ticktext=list(names), range=[len(rows) - 0.4, -0.6], automargin=True)
    return fig


def bars(places: Sequence[str], each: Sequence[Line], *, name: str, unit: str) -> go.Figure:
    """A bar per name along the axis for every subject, the first on top, each with its 95 % interval."""
    edges = [
        edge for one in each for edge in (one.value - np.nan_to_num(one.half), one.value + np.nan_to_num(one.half))
    ]
    ends = np.concatenate([*edges, [0.0]])
    ends = ends[np.isfinite(ends)]
    fig = blank(122 + (10 + 14 * len(each)) * len(places), "").update_layout(showlegend=len(each) > 1, bargap=0.3)
    set_linear(fig.layout.xaxis, name, unit, float(ends.min()), float(ends.max()))
    rows = np.arange(len(places))
    for i, one in enumerate(each):
        told = [[plain(full), with_error(v, h / Z95)] for full, v, h in zip(places, one.value, one.half, strict=True)]
        error = {"type": "data", "array": one.half, "color": INK, "thickness": 1.3, "width": 3}
        hover = f"%{{customdata[0]}}<br>{name} %{{customdata[1]}} {unit}<extra></extra>"
        bar = go.Bar(
            x=one.value, y=rows, orientation="h", error_x=error, name=one.name, customdata=told, hovertemplate=hover
        )
        fig.add_trace(bar.update(marker={"color": style(i)[0], "opacity": 0.75}))
    ticks = [plain(label) for label in labels(places)]
    fig.layout.yaxis.update(
        tickvals=rows, ticktext=ticks, range=[len(places) - 0.4, -0.6], showgrid=False, automargin=True
    )
    return fig.add_vline(x=0, line={"color": RULE, "width": 1}, layer="below")
