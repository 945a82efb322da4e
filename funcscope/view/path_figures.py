"""The loss on paths between two models, each with its chord, and its barrier where it is largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from .curves import Line, lines
from .drawing import Z95, Data, arrays, check_lengths, lost, style, titled
from .names import plain, short
from .numbers import with_error
from .theme import MUTED


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


def barrier(
    paths: Sequence[Data], names: Sequence[str] | None, unit: str, height: int = 420
) -> tuple[go.Figure, list[str]]:
    """The figure, and of every path what is to be said of its barrier."""
    every = [arrays(each, "coefficients", "losses") for each in paths]
    if names is not None and len(names) != len(every):
        raise ValueError(f"`names` must have one name per path, got {len(names)} for {len(every)}.")
    each = []
    for data, given in zip(every, names or [str(data.get("kind", "path")) for data in every], strict=True):
        check_lengths(data, "coefficients", "losses", *({"stderr", "excess", "excess_stderr"} & data.keys()))
        half = Z95 * data.get("stderr", np.full(data["losses"].shape, np.nan))
        each.append(Line(plain(short(given, 30)), data["coefficients"], data["losses"], half))
    fig, notes = lines(each, name="loss", unit=unit, at="position on the path", height=height)
    told = [f"{one.name}: {_barrier(fig, every[i], one.name, style(i)[0], unit)}" for i, one in enumerate(each)]
    return fig.update_layout(showlegend=True), [*told, *notes]


def _barrier(fig: go.Figure, data: Mapping[str, Any], name: str, colour: str, unit: str) -> str:
    """Draw chord and barrier of one path; returns what is to be said of it."""
    x, losses = data["coefficients"], data["losses"]
    if not x.size:
        return "no point"
    chord = (1 - x) * losses[0] + x * losses[-1]
    known = {tuple(trace.y) for trace in fig.data if trace.name == "chord"}
    if tuple(chord) not in known:
        line = {"color": MUTED, "width": 1.2, "dash": "dash"}
        trace = go.Scatter(x=x, y=chord, mode="lines", line=line, name="chord", hoverinfo="skip", legendgroup="chord")
        fig.add_trace(trace.update(legendrank=1001, showlegend=not known))
    excess, gone = data.get("excess", losses - chord), lost(losses, "points")
    if np.isnan(excess).all():
        return ", ".join(filter(None, ["barrier undefined", gone]))
    top = int(np.nanargmax(excess))
    error = data.get("barrier_linear_stderr", data.get("excess_stderr", np.full(x.shape, np.nan))[top])
    told = f"barrier {with_error(float(excess[top]), float(error))} {unit} above the chord"
    if np.isfinite(excess[top]):
        line, mark = {"color": colour, "width": 2, "dash": "dot"}, {"symbol": "line-ew", "size": 12}
        up = go.Scatter(x=[x[top]] * 2, y=[chord[top], losses[top]], mode="lines+markers", line=line, name="barrier")
        mark |= {"line": {"width": 2, "color": colour}}
        fig.add_trace(up.update(marker=mark, showlegend=False, hovertemplate=f"{name}: {told}<extra></extra>"))
    over = [float(data.get(key, np.nan)) for key in ("barrier_max", "barrier_max_stderr")]
    higher = f"{with_error(*over)} above the higher end" if "barrier_max" in data else ""
    return ", ".join(filter(None, [told, higher, gone]))
