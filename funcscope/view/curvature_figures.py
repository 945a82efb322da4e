"""Figures of a spectrum and of its blocks: plain arrays in, a plotly `Figure` out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from .figures import Z95
from .numbers import power_of_ten
from .result import short
from .samples import plain
from .theme import BLUE, INK, MUTED, RULE, TEMPLATE, VERMILION, blank, set_linear, set_log

Column = Float[np.ndarray, " n"]


def place(values: Float[np.ndarray, "*shape"], threshold: float) -> Float[np.ndarray, "*shape"]:
    """Positions on a scale with a zero and both signs: linear within the threshold, a decade per unit far beyond it.

    >>> place(np.array([-1e3, 0.0, 1e3, 1e4]), 1.0).round(3).tolist()
    [-3.0, 0.0, 3.0, 4.0]
    """
    return np.asarray(np.arcsinh(values / (2 * threshold)) / math.log(10))


def spectrum(
    points: Float[np.ndarray, " g"], mean: Float[np.ndarray, " g"], stderr: Float[np.ndarray, " g"], values: Column,
    residuals: Column, *, threshold: float, least: float, unit: str,
) -> go.Figure:  # fmt: skip
    """A spectral density (log axis) with its error band, above the eigenvalues that were found, each with its residual.

    points: on the scale of `place`; mean, stderr: per unit of it. values: in `unit`, with the norms of their residuals.
    least: the lower end of the density's axis.
    """
    fig = make_subplots(rows=2, cols=1, row_heights=[0.8, 0.2], vertical_spacing=0.04, shared_xaxes=True)
    fig.update_layout(template=TEMPLATE, height=440, margin={"l": 76})
    floor = set_log(fig.layout.yaxis, np.maximum(mean, least), np.maximum(mean + Z95 * np.nan_to_num(stderr), least))
    for trace in _density(points, mean, stderr, floor, threshold, unit):
        fig.add_trace(trace, row=1, col=1)
    fig.add_trace(_ritz(values, residuals, threshold, unit), row=2, col=1)
    edges = place(np.concatenate([values - residuals, values + residuals]), threshold)
    low, high = min(points[0], edges.min()), max(points[-1], edges.max())
    pad = 0.03 * (high - low)
    ticks = _signed_ticks(low, high, threshold)
    for axis in (fig.layout.xaxis, fig.layout.xaxis2):
        axis.update(range=[low - pad, high + pad], tickvals=list(ticks), ticktext=list(ticks.values()), tickangle=0)
        axis.matches = None
    fig.layout.xaxis.update(showticklabels=False)
    fig.layout.xaxis2.title.text = f"eigenvalue ({unit})"
    fig.layout.yaxis.title.text = "share of eigenvalues<br>per decade"
    fig.layout.yaxis2.update(range=[-1, 1], showticklabels=False, showgrid=False, title={"text": "found"})
    fig.add_vline(x=0, line={"color": RULE, "width": 1}, layer="below")
    return fig


def bars(
    names: Sequence[str], values: Column, errors: Column, *, name: str, unit: str, error: str, colour: str = BLUE,
    line: tuple[float, str] | None = None,
) -> go.Figure:  # fmt: skip
    """A bar per block, the first on top, with an interval of `errors` on each side. line: a value and its name."""
    ends = np.concatenate([values - np.nan_to_num(errors), values + np.nan_to_num(errors), [0.0]])
    ends = ends if line is None else np.append(ends, line[0])
    fig = blank(122 + 24 * len(names), "").update_layout(showlegend=False, bargap=0.35, margin={"t": 34})
    set_linear(fig.layout.xaxis, name, unit, float(ends.min()), float(ends.max()))
    fig.layout.xaxis.title.text = fig.layout.xaxis.title.text.replace(" (", "<br>(")  # narrow screens cut a long line
    rows = np.arange(len(names))
    found = {"type": "data", "array": errors, "color": INK, "thickness": 1.3, "width": 3}
    hover = f"%{{customdata[0]}}<br>{name} %{{x:.4g}} ± %{{customdata[1]:.2g}}{error} {unit}<extra></extra>"
    told = [[plain(full), value] for full, value in zip(names, errors, strict=True)]
    fig.add_trace(
        go.Bar(x=values, y=rows, orientation="h", error_x=found, marker={"color": colour, "opacity": 0.75},
               customdata=told, hovertemplate=hover)
    )  # fmt: skip
    fig.layout.yaxis.update(
        tickvals=rows,
        ticktext=[plain(label) for label in labels(names)],
        range=[len(names) - 0.4, -0.6],
        showgrid=False,
        automargin=True,
    )
    fig.add_vline(x=0, line={"color": RULE, "width": 1}, layer="below")
    if line is not None:
        _add_line(fig, *line)
    return fig


def labels(names: Sequence[str], most: int = 30) -> list[str]:
    """Names for an axis: without the first word where most have it in common, and shortened.

    >>> labels(["model.layers.0", "model.layers.1", "lm_head"])
    ['layers.0', 'layers.1', 'lm_head']
    """
    first = Counter(name.partition(".")[0] for name in names if "." in name).most_common(1)
    common = f"{first[0][0]}." if first and 2 * first[0][1] > len(names) > 1 else ""
    found = [short(name.removeprefix(common), most) for name in names]
    return found if len(set(found)) == len(set(names)) else [short(name, most) for name in names]


def _add_line(fig: go.Figure, value: float, text: str) -> None:
    fig.add_vline(x=value, line={"color": INK, "width": 1, "dash": "dot"})
    right = value > np.mean(fig.layout.xaxis.range)
    fig.add_annotation(
        x=value, y=1, yref="paper", text=text, showarrow=False, xanchor="right" if right else "left", yanchor="bottom",
        font={"size": 12, "color": MUTED},
    )  # fmt: skip


def _density(
    points: Column, mean: Column, stderr: Column, floor: float, threshold: float, unit: str
) -> tuple[go.Scatter, ...]:
    """The band of 1.96 standard errors, and the mean; below the floor neither is drawn."""
    high, low = (np.maximum(mean + sign * Z95 * np.nan_to_num(stderr), floor) for sign in (1, -1))
    seen = mean > floor
    band = go.Scatter(
        x=np.concatenate([points, points[::-1]]), y=np.concatenate([high, low[::-1]]), fill="toself", mode="lines",
        fillcolor="rgba(0,114,178,0.22)", line={"width": 0, "color": "rgba(0,114,178,0.22)"},
        name="95 % interval", hoverinfo="skip",
    )  # fmt: skip
    at = 2 * threshold * np.sinh(points * math.log(10))
    line = go.Scatter(
        x=points, y=np.where(seen, mean, np.nan), mode="lines", line={"color": BLUE, "width": 1.8}, name="density",
        customdata=np.column_stack([at, stderr]),
        hovertemplate=f"eigenvalue %{{customdata[0]:.3g}} {unit}<br>%{{y:.3g}} ± %{{customdata[1]:.2g}}<extra></extra>",
    )  # fmt: skip
    return band, line


def _ritz(values: Column, residuals: Column, threshold: float, unit: str) -> go.Scatter:
    """A tick per eigenvalue that was found; its bar is the interval that must hold an eigenvalue."""
    at = place(values, threshold)
    error = {
        "type": "data", "symmetric": False, "array": place(values + residuals, threshold) - at,
        "arrayminus": at - place(values - residuals, threshold), "color": VERMILION, "thickness": 1.5, "width": 5,
    }  # fmt: skip
    return go.Scatter(
        x=at, y=np.zeros(len(values)), error_x=error, mode="markers", name="eigenvalue found, with its residual",
        marker={"symbol": "line-ns", "size": 22, "line": {"width": 1.5, "color": VERMILION}},
        customdata=np.column_stack([values, residuals]),
        hovertemplate=f"%{{customdata[0]:.5g}} {unit}<br>residual %{{customdata[1]:.1g}}<extra></extra>",
    )  # fmt: skip


def _signed_ticks(low: float, high: float, threshold: float, most: int = 3) -> dict[float, str]:
    """Zero, and whole powers of ten of both signs that are well outside the linear part."""
    ticks = {0.0: "0"}
    first = math.ceil(math.log10(threshold) + 0.45)
    last = math.floor(math.log10(threshold) + max(high, -low, 0.5))
    stride = max(1, math.ceil((last - first + 1) / most))
    for power in range(last, first - 1, -stride):
        for sign, text in ((1, ""), (-1, "−")):
            x = float(place(np.array(sign * 10.0**power), threshold))
            if low <= x <= high:
                ticks[x] = text + power_of_ten(power)
    return ticks
