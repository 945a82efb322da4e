"""Figures of the loss along lines through one point, and on paths between models: results in, a plotly `Figure` out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from .drawing import (
    Data,
    arrays,
    band,
    check_lengths,
    check_shape,
    lost,
    names_of,
    numbers_of,
    scalar,
    set_scale,
    titled,
)
from .figures import Z95
from .numbers import number, with_error
from .plane_figures import COLOURS, HOLE
from .result import short
from .samples import plain
from .theme import BLUE, GREEN, MUTED, PURPLE, RULE, VERMILION, set_linear
from .theme import blank as _blank

PALETTE = (BLUE, VERMILION, GREEN, PURPLE)
DASHES = ("solid", "dash", "dot")
FEW_CELLS, MOST_CELLS = 6, 12
"""Models of a barrier matrix up to which its cells show values with errors, and values alone."""


def render_slices(lines: Data, title: str | None = None, height: int = 400) -> go.Figure:
    """The loss (nats) along lines through one point, each with the 95 % interval of its change from that point.

    lines: `losses` (k, n) or (n,), `axis_values` (n,), `baseline_loss`; drawn where they are there: `delta_stderr`,
    of the shape of the losses (1.96 of them are the band), `axis_names` and `relative_displacement` (k,). The axis of
    the loss is logarithmic where it spreads over two decades.

    Raises ValueError for a missing key and shapes that do not fit.
    """
    data = arrays(lines, "losses", "axis_values", "baseline_loss")
    x, losses = numbers_of(data, "axis_values"), np.atleast_2d(numbers_of(data, "losses"))
    check_shape("losses", losses, (len(losses), len(x)))
    error = np.full(losses.shape, np.nan)
    if data.get("delta_stderr") is not None:
        error = Z95 * np.atleast_2d(numbers_of(data, "delta_stderr"))
        check_shape("delta_stderr", error, losses.shape)
    names = names_of(data, len(losses))
    fig = _blank(height, "loss (nats)")
    floor = set_scale(
        fig.layout.yaxis, "loss", "nats", losses.ravel(), (losses - error).ravel(), (losses + error).ravel()
    )
    for i, (values, half) in enumerate(zip(losses, error, strict=True)):
        colour = PALETTE[i % 4]
        if np.isfinite(half).any():
            fig.add_trace(band(x, values - half, values + half, names[i], colour, floor).update(showlegend=False))
        fig.add_trace(_curve(x, values, half / Z95, names[i], colour, DASHES[i // 4 % 3], floor, "coefficient"))
    baseline = scalar(data, "baseline_loss")
    if math.isfinite(baseline) and baseline > floor:
        fig.add_hline(y=baseline, line={"color": RULE, "width": 1, "dash": "dot"}, layer="below")
    ends = x if x.size else np.array([-1.0, 1.0])
    set_linear(fig.layout.xaxis, "coefficient of the direction", "", float(ends.min()), float(ends.max()))
    note = "bands: mean ± 1.96 standard errors of the change" if np.isfinite(error).any() else ""
    gone = lost(losses, "points")
    heading = (
        plain(title)
        if title
        else "Loss along " + ("one direction" if len(losses) == 1 else f"{len(losses)} directions")
    )
    return titled(fig, heading, ", ".join(filter(None, [f"centre {number(baseline)} nats", gone, note])))


def render_barrier(
    path: Data, *others: Data, names: Sequence[str] | None = None, title: str | None = None, height: int = 420
) -> go.Figure:
    """The loss (nats) along paths between two models, each with its chord, and its barrier where it is largest.

    path, others: `coefficients` (n,), `losses` (n,), and, drawn where they are there, `stderr` (n,) as a band of 1.96
    standard errors, and `excess` (n,), the loss minus the chord, with its standard error `excess_stderr` (n,), or that
    of the barrier, `barrier_linear_stderr`. Below the title: the barrier, the largest excess over the chord, and
    `barrier_max` with its error where it is there. Without a number that is not nan the barrier is undefined.
    names: one per path; its `kind` otherwise.

    Raises ValueError for a missing key, arrays of different lengths, and a count of names that differs.
    """
    paths = [arrays(each, "coefficients", "losses") for each in (path, *others)]
    if names is not None and len(names) != len(paths):
        raise ValueError(f"`names` must have one name per path, got {len(names)} for {len(paths)}.")
    given = names or [str(data.get("kind", "path")) for data in paths]
    for data in paths:
        check_lengths(data, "coefficients", "losses", *({"stderr", "excess", "excess_stderr"} & data.keys()))
    fig = _blank(height, "loss (nats)")
    floor = set_scale(
        fig.layout.yaxis, "loss", "nats", np.concatenate([numbers_of(data, "losses") for data in paths]), *_ends(paths)
    )
    notes = [
        note for i, data in enumerate(paths) for note in _add_path(fig, data, plain(short(given[i], 30)), i, floor)
    ]
    fig.layout.xaxis.update(
        title={"text": "position on the path"}, range=[-0.03, 1.03], tickvals=[0, 0.25, 0.5, 0.75, 1]
    )
    return titled(fig, plain(title) if title else "Loss along a path between two models", *notes)


def render_barrier_matrix(matrix: Data, definition: str = "barrier_max", title: str | None = None) -> go.Figure:
    """Barriers (nats) between all pairs of models, the value and its standard error in each cell.

    matrix: `barrier_max` (M, M), the loss above the higher end, or `barrier_linear`, above the chord; with
    `<definition>_stderr` and `names` where they are there. Cells that are not finite are empty. Beyond 12 models
    values show only when pointed at.

    Raises ValueError for another definition, a missing key, and an array that is not square.
    """
    if definition not in ("barrier_max", "barrier_linear"):
        raise ValueError(f"`definition` must be 'barrier_max' or 'barrier_linear', got {definition!r}.")
    data = arrays(matrix, definition)
    values = numbers_of(data, definition)
    num = len(values)
    check_shape(definition, values, (num, num))
    stderr = numbers_of(data, f"{definition}_stderr") if f"{definition}_stderr" in data else np.full((num, num), np.nan)
    names = [plain(short(str(name), 16)) for name in data.get("names", range(1, num + 1))]
    said = [
        [with_error(v, e) if math.isfinite(v) else "" for v, e in zip(*row, strict=True)]
        for row in zip(values, stderr, strict=True)
    ]
    apart = "<br>± " if num <= FEW_CELLS else "<!"  # then only the value has room
    cells = [[text.replace(" ± ", apart).split("<!")[0] for text in row] for row in said]
    fig = _blank(160 + max(220, min(52 * num, 560)), "").update_layout(plot_bgcolor=HOLE)
    finite = values[np.isfinite(values)]
    low, high = float(finite.min(initial=0.0)), float(finite.max(initial=0.0))
    heading = {"text": "barrier (nats)", "font": {"size": 13, "color": MUTED}}
    heat = go.Heatmap(
        z=np.where(np.isfinite(values), values, np.nan), colorscale=COLOURS, zmin=low, zmax=high if high > low else low + 1,
        xgap=1, ygap=1, text=cells if num <= MOST_CELLS else said, customdata=said,
        hovertemplate="%{y} and %{x}<br>barrier %{customdata} nats<extra></extra>",
        colorbar={"title": heading, "thickness": 13, "outlinewidth": 0},
    )  # fmt: skip
    if num <= MOST_CELLS:
        heat.update(texttemplate="%{text}", textfont={"size": 12 if num <= 6 else 10})
    fig.add_trace(heat)
    for axis, ends in ((fig.layout.xaxis, [-0.5, num - 0.5]), (fig.layout.yaxis, [num - 0.5, -0.5])):
        axis.update(tickvals=list(range(num)), ticktext=names, range=ends, showgrid=False, automargin=True, ticks="")
    meaning = {
        "barrier_max": "above the higher of the two models",
        "barrier_linear": "above the chord between the two models",
    }
    gone = lost(values, "cells")
    return titled(
        fig,
        plain(title) if title else "Barriers between models",
        f"largest loss on the line {meaning[definition]}{f', {gone}' if gone else ''}",
    )


def _curve(
    x: np.ndarray, values: np.ndarray, stderr: np.ndarray, name: str, colour: str, dash: str, floor: float, at: str
) -> go.Scatter:
    text = [with_error(value, error) for value, error in zip(values.tolist(), stderr.tolist(), strict=True)]
    return go.Scatter(
        x=x, y=np.where(values > floor, values, np.nan), text=text, mode="lines+markers", name=name, connectgaps=False,
        line={"color": colour, "width": 1.8, "dash": dash}, marker={"color": colour, "size": 4},
        hovertemplate=f"{name}<br>{at} %{{x:.4g}}<br>loss %{{text}} nats<extra></extra>",
    )  # fmt: skip


def _ends(paths: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """Of the bands."""
    known = [(numbers_of(data, "losses"), Z95 * numbers_of(data, "stderr")) for data in paths if "stderr" in data]
    return [losses + sign * half for losses, half in known for sign in (-1, 1)]


def _add_path(fig: go.Figure, data: Mapping[str, Any], name: str, i: int, floor: float) -> list[str]:
    """Band, curve, chord and barrier of one path; returns what is to be said of it."""
    x, losses = numbers_of(data, "coefficients"), numbers_of(data, "losses")
    stderr = numbers_of(data, "stderr") if "stderr" in data else np.full(x.shape, np.nan)
    colour, half = PALETTE[i % 4], Z95 * stderr
    if np.isfinite(half).any():
        fig.add_trace(band(x, losses - half, losses + half, name, colour, floor).update(showlegend=False))
    fig.add_trace(_curve(x, losses, stderr, name, colour, DASHES[i // 4 % 3], floor, "position"))
    if not x.size:
        return [f"{name}: no point"]
    chord = (1 - x) * losses[0] + x * losses[-1]
    style = {"color": MUTED, "width": 1.2, "dash": "dash"}
    drawn = {tuple(trace.y) for trace in fig.data if trace.name == "chord"}
    if tuple(chord) not in drawn:
        fig.add_trace(
            go.Scatter(
                x=x,
                y=chord,
                mode="lines",
                line=style,
                name="chord",
                hoverinfo="skip",
                legendgroup="chord",
                legendrank=1001,
                showlegend=not drawn,
            )
        )
    excess = numbers_of(data, "excess") if "excess" in data else losses - chord
    gone = lost(losses, "points")
    if np.isnan(excess).all():
        return [f"{name}: barrier undefined{f', {gone}' if gone else ''}"]
    top = int(np.nanargmax(excess))
    if np.isfinite(excess[top]):
        _add_barrier(fig, float(x[top]), float(chord[top]), float(losses[top]), name, colour)
    error = scalar(data, "barrier_linear_stderr")
    if "barrier_linear_stderr" not in data and "excess_stderr" in data:
        error = float(numbers_of(data, "excess_stderr")[top])
    parts = [f"barrier {with_error(float(excess[top]), error)} nats above the chord"]
    if "barrier_max" in data:
        said = with_error(scalar(data, "barrier_max"), scalar(data, "barrier_max_stderr"))
        parts.append(f"{said} above the higher end")
    return [f"{name}: {', '.join([*parts, *filter(None, [gone])])}"]


def _add_barrier(fig: go.Figure, x: float, low: float, high: float, name: str, colour: str) -> None:
    mark = {"symbol": "line-ew", "size": 12, "line": {"width": 2, "color": colour}}
    fig.add_trace(
        go.Scatter(
            x=[x, x], y=[low, high], mode="lines+markers", line={"color": colour, "width": 2, "dash": "dot"}, marker=mark,
            name="barrier", legendgroup="barrier", showlegend=False,
            hovertemplate=f"{name}: barrier {number(high - low)} nats<extra></extra>",
        )
    )  # fmt: skip
