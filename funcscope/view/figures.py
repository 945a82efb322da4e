"""Figures of training and of the loss landscape: plain arrays in, a plotly `Figure` out.

Values that are not finite are holes. What is zero or negative has no place on a logarithmic axis: such a point becomes
a triangle at the lower edge, with its value when pointed at; such an interval runs down to that edge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Real
from plotly.subplots import make_subplots

from .theme import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    PURPLE,
    RULE,
    TEMPLATE,
    VERMILION,
    Timeline,
    blank,
    place,
    put_on_timeline,
    set_log,
)

Z95 = 1.96
"""Standard errors on each side of a 95 % interval."""

Column = Float[np.ndarray, " n"]
Steps = Real[np.ndarray, " n"]


def curves(
    step: Steps, loss: Mapping[str, Column], accuracy: Mapping[str, Column], checkpoints: Real[np.ndarray, " k"],
    timeline: Timeline,
) -> go.Figure:  # fmt: skip
    """Loss (nats, log axis) above accuracy (a share) over training, one line per split; checkpoints as open circles.

    loss, accuracy: a name and an array of shape (n,) per split. checkpoints: steps, circled on the first split.
    """
    fig = make_subplots(rows=2, cols=1, row_heights=[0.62, 0.38], vertical_spacing=0.07)
    fig.update_layout(template=TEMPLATE, height=470)
    floors = {"nats": set_log(fig.layout.yaxis, *loss.values()), "": -math.inf}
    for row, (unit, columns) in enumerate({"nats": loss, "": accuracy}.items(), start=1):
        for colour, (name, values) in zip((BLUE, VERMILION, GREEN, PURPLE), columns.items(), strict=False):
            line = _line(step, values, name, colour, unit, floor=floors[unit])
            fig.add_trace(line.update(mode="lines", showlegend=row == 1, legendgroup=name), row=row, col=1)
    values = next(iter(loss.values()))
    kept = np.isin(step, checkpoints)
    circles = _line(step[kept], values[kept], "checkpoint", BLUE, "nats")
    fig.add_trace(circles.update(mode="markers", marker={"symbol": "circle-open", "size": 7}), row=1, col=1)
    fig.layout.yaxis.title.text = "loss (nats)"
    fig.layout.yaxis2.update(title={"text": "accuracy"}, range=[-0.04, 1.04], tickvals=[0, 0.5, 1])
    put_on_timeline(fig, timeline, rows=(1, 2))
    return fig


def trajectory_with_error(
    step: Steps, value: Column, stderr: Column, timeline: Timeline, *,
    name: str, y_title: str, log: bool = False, chance: Column | None = None,
) -> go.Figure:  # fmt: skip
    """A number over training, with its 95 % interval (1.96 standard errors) at every checkpoint.

    value, stderr: shape (n,), in the unit that `y_title` names. chance: half-width of a grey band around 0.
    """
    fig = blank(320, y_title)
    floor = set_log(fig.layout.yaxis, value, value - Z95 * stderr, value + Z95 * stderr) if log else -math.inf
    if chance is not None:
        fig.add_trace(_band(step, -chance, chance, "95 % of values by chance", "rgba(120,120,120,0.18)", -math.inf))
    _add_estimate(fig, step, value, stderr, name, floor)
    put_on_timeline(fig, timeline)
    return fig


def curvature_trajectory(
    step: Steps, mean: Column, stderr: Column, p10: Column, p90: Column, timeline: Timeline, *,
    noise_floor: Column | None = None, y_title: str = "curvature (nats per relative step²)",
) -> go.Figure:  # fmt: skip
    """Curvature over training on a log axis: mean with 95 % interval, and the band that holds 80 % of directions.

    All arrays have shape (n,). noise_floor: what rounding alone can do to one curvature; a dotted line where finite.
    """
    fig = blank(360, y_title)
    extent = [mean, mean - Z95 * stderr, mean + Z95 * stderr, p10, p90, *([] if noise_floor is None else [noise_floor])]
    floor = set_log(fig.layout.yaxis, *extent)
    fig.add_trace(_band(step, p10, p90, "10th to 90th percentile of directions", "rgba(0,114,178,0.2)", floor))
    _add_estimate(fig, step, mean, stderr, "mean", floor)
    if noise_floor is not None:
        dots = {"line": {"dash": "dot", "width": 1.5}, "marker": {"symbol": "line-ew-open", "size": 9}}
        fig.add_trace(_line(step, noise_floor, "rounding", INK, "", floor=floor).update(dots))
    put_on_timeline(fig, timeline)
    return fig


def hessian_and_sharpness(
    step: Steps, values: tuple[Column, Column, Column], errors: tuple[Column, Column, Column], timeline: Timeline
) -> go.Figure:
    """Largest eigenvalue and trace of a Hessian above a relative sharpness, all on log axes, over training.

    values, errors: of the largest eigenvalue, the trace and the sharpness; errors are half-widths of their bars.
    """
    fig = make_subplots(rows=2, cols=1, row_heights=[0.6, 0.4], vertical_spacing=0.07)
    fig.update_layout(template=TEMPLATE, height=470)
    told = (("largest eigenvalue", VERMILION, 1), ("trace", BLUE, 1), ("relative sharpness", GREEN, 2))
    for row, axis in enumerate((fig.layout.yaxis, fig.layout.yaxis2), start=1):
        shown = [i for i, (_, _, at) in enumerate(told) if at == row]
        floor = set_log(axis, *(values[i] + sign * errors[i] for i in shown for sign in (-1, 0, 1)))
        for i in shown:
            name, colour, _ = told[i]
            low, high = values[i] - errors[i], values[i] + errors[i]
            bars = _whiskers(step, low, high, f"{name}, bar", colour, 1.5, floor).update(showlegend=False)
            drawn = [bars, _line(step, values[i], name, colour, "", errors[i], floor)]
            drawn += [_below(step, values[i], floor, colour)] if floor > 0 else []
            fig.add_traces(drawn, rows=row, cols=1)
    fig.layout.yaxis.title.text = "nats per unit<br>of distance²"
    fig.layout.yaxis2.title.text = "rise of the loss<br>/ loss"
    put_on_timeline(fig, timeline, rows=(1, 2))
    return fig


def line_profiles(
    alpha: Float[np.ndarray, " m"], losses: Float[np.ndarray, "k n m"], titles: Sequence[str], *,
    span: float | None = None, level: tuple[float, str] | None = None,
) -> go.Figure:  # fmt: skip
    """Loss (nats) on lines through k checkpoints, n directions each, in panels that share one axis.

    alpha: relative steps. span: the band |alpha| <= span is shaded. level: a loss and its name, a dotted line.
    """
    count = len(losses)
    fig = make_subplots(rows=1, cols=count, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=list(titles))
    fig.update_layout(template=TEMPLATE, height=340, showlegend=False, margin={"t": 52})
    fig.update_annotations(font={"size": 13, "color": INK})
    hover = "relative step %{x:.3f}<br>loss %{y:.4g} nats<extra></extra>"
    for panel, lines in enumerate(losses, start=1):
        for values in lines:
            line = {"color": BLUE, "width": 1.2}
            trace = go.Scatter(x=alpha, y=values, mode="lines", line=line, opacity=0.65, hovertemplate=hover)
            fig.add_trace(trace, row=1, col=panel)
        if span is not None:
            fig.add_vrect(x0=-span, x1=span, fillcolor="#f0f0f0", line_width=0, layer="below", row=1, col=panel)
        if level is not None:
            fig.add_hline(y=level[0], line={"color": RULE, "width": 1, "dash": "dot"}, row=1, col=panel)
    edge = float(np.abs(alpha).max())
    near = 0.8 * edge  # labels at the ends would run into those of the next panel
    fig.update_xaxes(tickvals=[-near, 0, near], ticktext=[f"−{near:g}", "0", f"{near:g}"], tickangle=0)
    fig.update_xaxes(range=[-edge, edge])
    fig.update_xaxes(title_text="relative step α", col=count // 2 + 1)
    fig.update_yaxes(rangemode="tozero")
    fig.update_yaxes(title_text="loss (nats)", col=1)
    if level is not None:
        fig.add_annotation(
            x=edge, y=level[0], text=level[1], showarrow=False, xanchor="right", yanchor="bottom",
            font={"size": 12, "color": MUTED}, row=1, col=count,
        )  # fmt: skip
    return fig


def delta_distribution(
    step: Steps, deltas: Mapping[str, Float[np.ndarray, "n k"]], timeline: Timeline, *, y_title: str
) -> go.Figure:
    """How a change of loss (nats, log axis) is spread over k directions at n checkpoints, side by side per name.

    Thin line: all directions; thick line: the middle half; dot: the median. Quantiles are over the finite directions.
    """
    fig = blank(380, y_title)
    floor = set_log(fig.layout.yaxis, *deltas.values())
    shift = 0.0035 * math.sqrt(timeline.last)
    sides = np.linspace(-shift, shift, len(deltas)) if len(deltas) > 1 else np.zeros(1)
    for side, colour, (name, values) in zip(sides, (BLUE, GREEN, VERMILION), deltas.items(), strict=False):
        low, lower, middle, upper, high = quantiles(values, (0.0, 0.25, 0.5, 0.75, 1.0))
        dots = _line(step, middle, name, colour, "nats", floor=floor)
        dots.update(mode="markers", marker={"size": 6, "line": {"width": 1, "color": "white"}})
        shown = [
            _whiskers(step, bottom, top, name, colour, width, floor)
            for bottom, top, width in ((low, high, 1.0), (lower, upper, 4.0))
        ]
        shown += [dots, *([_below(step, middle, floor, colour)] if floor > 0 else [])]
        for trace in shown:
            trace.update(x=trace.x + side, legendgroup=name, showlegend=trace is dots)
            fig.add_trace(trace)
    put_on_timeline(fig, timeline)
    return fig


def quantiles(values: Float[np.ndarray, "n k"], at: Sequence[float]) -> Float[np.ndarray, "q n"]:
    """Quantiles of the finite values of every row; nan for a row without any.

    >>> quantiles(np.array([[1.0, 3.0, np.nan], [np.nan] * 3]), (0.5,)).tolist()
    [[2.0, nan]]
    """
    rows = [row[np.isfinite(row)] for row in values]
    return np.array([np.quantile(row, at) if row.size else np.full(len(at), np.nan) for row in rows]).T


def _add_estimate(fig: go.Figure, step: Steps, value: Column, stderr: Column, name: str, floor: float) -> None:
    low, high = value - Z95 * stderr, value + Z95 * stderr
    fig.add_trace(_whiskers(step, low, high, "95 % interval", BLUE, 1.5, floor).update(showlegend=False))
    fig.add_trace(_line(step, value, name, BLUE, "", stderr, floor).update(name=f"{name} and 95 % interval"))
    if floor > 0:
        fig.add_trace(_below(step, value, floor, BLUE))


def _line(
    step: Steps, values: Column, name: str, colour: str, unit: str, stderr: Column | None = None,
    floor: float = -math.inf,
) -> go.Scatter:  # fmt: skip
    """A line, open where a value is not finite or not above the floor; pointed at, it shows step, value and error."""
    columns = [step, values] + ([] if stderr is None else [stderr])
    error = "" if stderr is None else " ± %{customdata[2]:.2g}"
    return go.Scatter(
        x=place(step),
        y=np.where(values > floor, values, np.nan),
        customdata=np.column_stack(columns),
        mode="lines+markers",
        line={"color": colour, "width": 1.8},
        marker={"color": colour, "size": 5},
        connectgaps=False,
        name=name,
        hovertemplate=f"step %{{customdata[0]:,}}<br>{name} %{{customdata[1]:.4g}}{error} {unit}<extra></extra>",
    )


def _whiskers(step: Steps, low: Column, high: Column, name: str, colour: str, width: float, floor: float) -> go.Scatter:
    """A vertical segment from low to high at every step; what lies below the floor is not drawn."""
    seen = np.isfinite(low) & np.isfinite(high) & (high > floor)
    x, gap = place(step[seen]), np.full(int(seen.sum()), np.nan)
    y = np.stack([np.maximum(low[seen], floor), high[seen], gap], axis=1).ravel()
    line = {"color": colour, "width": width}
    return go.Scatter(x=np.repeat(x, 3), y=y, mode="lines", line=line, name=name, hoverinfo="skip")


def _band(step: Steps, low: Column, high: Column, name: str, fill: str, floor: float) -> go.Scatter:
    """The area between low and high, a piece for every run without holes."""
    seen = np.isfinite(low) & np.isfinite(high) & (high > floor)
    x, y = [np.empty(0)], [np.empty(0)]
    for run in np.split(np.arange(len(step)), np.flatnonzero(np.diff(seen.astype(int))) + 1):
        if seen[run].all():
            at = place(step[run])
            x.append(np.concatenate([at, at[::-1], [np.nan]]))
            y.append(np.concatenate([high[run], np.maximum(low[run], floor)[::-1], [np.nan]]))
    line = {"width": 0.5, "color": fill}
    return go.Scatter(
        x=np.concatenate(x), y=np.concatenate(y), fill="toself", fillcolor=fill, mode="lines", line=line, name=name,
        hoverinfo="skip",
    )  # fmt: skip


def _below(step: Steps, values: Column, floor: float, colour: str) -> go.Scatter:
    """Triangles at the floor for values that a log axis cannot hold."""
    low = values <= 0
    marks = _line(step[low], values[low], "zero or below", colour, "")
    return marks.update(
        y=np.full(int(low.sum()), floor), mode="markers", showlegend=bool(low.any()), cliponaxis=False,
        marker={"symbol": "triangle-down-open", "size": 9},
    )  # fmt: skip
