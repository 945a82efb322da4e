"""Figures of numbers along one axis: over training or along a numbered axis as lines, by names as bars or points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .drawing import Z95, Column, curve, put_on_steps, reaches, set_scale, style, with_zero
from .names import labels, plain
from .numbers import with_error
from .theme import BLUE, INK, RULE, TEMPLATE, VERMILION, blank, set_linear, set_log


class Line(NamedTuple):
    """A curve: its name as plotly takes it, where it is known, and half of its 95 % interval."""

    name: str
    x: np.ndarray
    value: Column
    half: Column


def lines(
    each: Sequence[Line], *, name: str, unit: str, at: str = "step", current: int | None = None, height: int = 350,
    is_linear: bool = False,
) -> tuple[go.Figure, list[str]]:  # fmt: skip
    """Lines with their intervals; along steps on the axis of training, along what is far apart on a logarithmic one.

    is_linear: the values are on a linear axis, however far they spread.
    """
    fig = blank(height, "").update_layout(showlegend=len(each) > 1)
    ends = [edge[np.isfinite(edge)] for one in each for edge in (one.value - one.half, one.value + one.half)]
    value, half = (np.concatenate(parts) for parts in zip(*((one.value, one.half) for one in each), strict=True))
    floor = set_scale(fig.layout.yaxis, name, unit, value, *ends, half=half, is_linear=is_linear)
    for i, one in enumerate(each):
        colour, dash = style(i)
        fig.add_traces(curve(one.x, one.value, one.half, one.name, colour, unit, floor, at=at, dash=dash, what=name))
    x = np.concatenate([np.asarray(one.x) for one in each])
    if at == "step":
        put_on_steps(fig, x, current)
    elif x.size and x.min() > 0 and x.max() >= 1000 * x.min():
        set_log(fig.layout.xaxis, x)
        fig.layout.xaxis.title.text = at
    else:
        set_linear(fig.layout.xaxis, at, "", float(x.min(initial=np.inf)), float(x.max(initial=-np.inf)))
    note = reaches(np.concatenate(ends), floor)
    return fig, [note] if note else []


def training(curves: Mapping[str, np.ndarray], current: int | None) -> go.Figure:
    """Loss (nats) above accuracy over training, for train and test: columns `step`, `train_loss`, ...; nan is a gap."""
    fig = make_subplots(rows=2, cols=1, row_heights=[0.62, 0.38], vertical_spacing=0.07)
    fig.update_layout(template=TEMPLATE, height=470)
    step, sides = curves["step"], {"train": BLUE, "test": VERMILION}
    floors = set_log(fig.layout.yaxis, *(curves[f"{side}_loss"] for side in sides)), -math.inf
    for row, (what, unit, floor) in enumerate(zip(("loss", "accuracy"), ("nats", ""), floors, strict=True), start=1):
        for side, colour in sides.items():
            value = curves[f"{side}_{what}"]
            for trace in curve(step, value, np.full(value.shape, np.nan), side, colour, unit, floor, what=what):
                trace.update(showlegend=row == 1, legendgroup=trace.name, mode=trace.mode.removesuffix("+markers"))
                fig.add_trace(trace, row=row, col=1)
    fig.layout.yaxis.title.text = "loss (nats)"
    fig.layout.yaxis2.update(title={"text": "accuracy"}, range=[-0.04, 1.04], tickvals=[0, 0.5, 1])
    put_on_steps(fig, step, current)
    return fig


def bars(places: Sequence[str], each: Sequence[Line], *, name: str, unit: str, dots: bool = False) -> go.Figure:
    """A bar per place along the axis for every subject, the first on top, each with its 95 % interval.

    Bars begin at zero; where that is far from all values, dots are in their place. dots: dots in any case; names of places
    as plotly takes them.
    """
    shown = list(places) if dots else [plain(label) for label in labels(places)]
    edges = [one.value + sign * np.nan_to_num(one.half) for one in each for sign in (-1, 1)]
    ends = np.concatenate(edges)
    ends = ends[np.isfinite(ends)]
    low, high = (float(ends.min()), float(ends.max())) if ends.size else (0.0, 0.0)
    dots = dots or not min(with_zero(low, high)) <= 0 <= max(with_zero(low, high))
    if not dots:
        low, high = min(low, 0.0), max(high, 0.0)
    fig = blank(122 + (10 + max(20 if dots else 0, 14 * len(each))) * len(places), "")
    fig.update_layout(showlegend=len(each) > 1, bargap=0.3)
    set_linear(fig.layout.xaxis, name, unit, low, high)
    apart = 0.7 / len(each) * (np.arange(len(each)) - (len(each) - 1) / 2) * dots
    for i, one in enumerate(each):
        rows = np.arange(len(places)) + apart[i]
        told = [
            f"{place}<br>{name} {with_error(v, h / Z95)}"
            for place, v, h in zip(shown, one.value, one.half, strict=True)
        ]
        hover = f"%{{customdata}} {unit}<extra></extra>"
        error = {"array": one.half, "color": style(i)[0] if dots else INK, "thickness": 1.4, "width": 0 if dots else 3}
        data = {"x": one.value, "y": rows, "error_x": error, "name": one.name, "customdata": told}
        mark = {"color": style(i)[0], "size": 9} if dots else {"color": style(i)[0], "opacity": 0.75}
        trace = go.Scatter(data, mode="markers") if dots else go.Bar(data, orientation="h")
        fig.add_trace(trace.update(marker=mark, hovertemplate=hover))
    axis = {
        "tickvals": np.arange(len(places)),
        "ticktext": shown,
        "range": [len(places) - 0.4, -0.6],
        "automargin": True,
    }
    fig.layout.yaxis.update(axis, showgrid=dots)
    return fig if dots else fig.add_vline(x=0, line={"color": RULE, "width": 1}, layer="below")
