"""The loss on paths between two models, each with its chord, and its barrier where it is largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from .drawing import Z95, Data, arrays, check_lengths, curve, lost, numbers_of, scalar, set_scale, style
from .names import plain, short
from .numbers import with_error
from .theme import MUTED, blank


def barrier(
    paths: Sequence[Data], names: Sequence[str] | None, unit: str, height: int = 420
) -> tuple[go.Figure, list[str]]:
    """The figure, and of every path what is to be said of its barrier; `renderers.render_barrier` says what is drawn."""
    every = [arrays(each, "coefficients", "losses") for each in paths]
    if names is not None and len(names) != len(every):
        raise ValueError(f"`names` must have one name per path, got {len(names)} for {len(every)}.")
    given = names or [str(data.get("kind", "path")) for data in every]
    for data in every:
        check_lengths(data, "coefficients", "losses", *({"stderr", "excess", "excess_stderr"} & data.keys()))
    halves = [Z95 * _column(data, "stderr") for data in every]
    losses = [numbers_of(data, "losses") for data in every]
    ends = [loss + sign * half for loss, half in zip(losses, halves, strict=True) for sign in (-1, 1)]
    fig = blank(height, "loss")
    floor = set_scale(fig.layout.yaxis, "loss", unit, np.concatenate(losses), *ends)
    notes = []
    for i, (data, half) in enumerate(zip(every, halves, strict=True)):
        name, (colour, dash) = plain(short(given[i], 30)), style(i)
        line = curve(
            numbers_of(data, "coefficients"), losses[i], half, name, colour, unit, floor, at="position", dash=dash
        )
        fig.add_traces([trace.update(marker={"size": 4}) for trace in line])
        notes.append(f"{name}: {_barrier(fig, data, name, colour, unit)}")
    ticks = [0, 0.25, 0.5, 0.75, 1]
    fig.layout.xaxis.update(title={"text": "position on the path"}, range=[-0.03, 1.03], tickvals=ticks)
    return fig, notes


def _column(data: Mapping[str, Any], name: str) -> np.ndarray:
    return numbers_of(data, name) if name in data else np.full(np.shape(data["coefficients"]), np.nan)


def _barrier(fig: go.Figure, data: Mapping[str, Any], name: str, colour: str, unit: str) -> str:
    """Draw chord and barrier of one path; returns what is to be said of it."""
    x, losses = numbers_of(data, "coefficients"), numbers_of(data, "losses")
    if not x.size:
        return "no point"
    chord = (1 - x) * losses[0] + x * losses[-1]
    known = {tuple(trace.y) for trace in fig.data if trace.name == "chord"}
    if tuple(chord) not in known:
        line = {"color": MUTED, "width": 1.2, "dash": "dash"}
        trace = go.Scatter(x=x, y=chord, mode="lines", line=line, name="chord", hoverinfo="skip", legendgroup="chord")
        fig.add_trace(trace.update(legendrank=1001, showlegend=not known))
    excess, gone = numbers_of(data, "excess") if "excess" in data else losses - chord, lost(losses, "points")
    if np.isnan(excess).all():
        return ", ".join(filter(None, ["barrier undefined", gone]))
    top = int(np.nanargmax(excess))
    error = scalar(data, "barrier_linear_stderr")
    if "barrier_linear_stderr" not in data:
        error = float(_column(data, "excess_stderr")[top])
    told = f"barrier {with_error(float(excess[top]), error)} {unit} above the chord"
    if np.isfinite(excess[top]):
        mark = {"symbol": "line-ew", "size": 12, "line": {"width": 2, "color": colour}}
        up = go.Scatter(
            x=[x[top]] * 2, y=[chord[top], losses[top]], mode="lines+markers", marker=mark, showlegend=False
        )
        hover = f"{name}: {told}<extra></extra>"
        fig.add_trace(up.update(line={"color": colour, "width": 2, "dash": "dot"}, name="barrier", hovertemplate=hover))
    over = [f"{with_error(scalar(data, 'barrier_max'), scalar(data, 'barrier_max_stderr'))} above the higher end"]
    return ", ".join([told, *(over if "barrier_max" in data else []), *filter(None, [gone])])
