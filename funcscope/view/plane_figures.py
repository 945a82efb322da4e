"""Figures over two axes: a heat map, and the loss on a plane as contours with a trajectory on them, or as a surface.

The first direction of a plane is the horizontal axis, the second the vertical one. `grid_losses` has the first direction on
its axis 0, and plotly wants rows of equal height, so that what is drawn is its transpose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from .drawing import Data, arrays, lost, spreads, titled
from .names import labels, plain, short
from .numbers import number
from .theme import BLUE, INK, MUTED, RULE, VERMILION, blank

COLOURS = "Viridis"
"""Even in lightness, so that it reads with a colour vision deficiency and in grey; dark is low."""
SIGNED = ((0.0, BLUE), (0.5, "#ffffff"), (1.0, VERMILION))
"""Blue below zero, vermilion above: told apart with any colour vision."""
HOLE = "#e3e3e3"
LEVELS = 15
"""At most so many contours, at round values."""
HOVER = "(%{x:.4g}, %{y:.4g})<br>"

Grid = Float[np.ndarray, "n m"]
Limits = tuple[float, float]


class Shades(NamedTuple):
    """The colour scale of planes, and the height of a surface: values, or their logarithms."""

    is_log: bool
    low: float
    high: float
    unit: str

    def of(self, losses: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """Positions on the scale; nan for what is not finite."""
        finite = np.where(np.isfinite(losses), losses, np.nan)
        return np.log10(np.where(finite > 0, finite, np.nan)) if self.is_log else finite

    @property
    def ticks(self) -> dict[str, Any]:
        """In the unit: whole powers of ten of logarithms."""
        powers = {"tickprefix": "10<sup>", "ticksuffix": "</sup>", "tick0": 0}
        return powers | {"dtick": math.ceil((self.high - self.low) / 6)} if self.is_log else {"nticks": 6}

    def colours(self, values: Float[np.ndarray, "n m"]) -> dict[str, Any]:
        """Of a trace: `customdata` are the values themselves."""
        title = {"text": plain(self.unit) or "value", "font": {"size": 13, "color": MUTED}}
        bar = {**self.ticks, "title": title, "thickness": 13, "outlinewidth": 0, "exponentformat": "power"}
        return {"z": self.of(values), "customdata": values, "colorscale": COLOURS, "colorbar": bar}


def shades(values: Float[np.ndarray, "..."], unit: str) -> Shades:
    """A scale from the smallest to the largest value, logarithmic where all are positive and spread over two decades.

    Values of several planes, or the ends of a scale, give one that is the same for all of them.
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    is_log = bool(low > 0 and spreads(finite))
    if is_log:
        low, high = math.log10(low), math.log10(high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (0.05 * abs(low) or 0.5), high + (0.05 * abs(high) or 0.5)
    return Shades(is_log, low, high, unit)


class Plane(NamedTuple):
    losses: Grid
    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " m"]
    titles: tuple[str, str]
    """Of the axes: names, and what their unit is."""
    centre: float
    """The loss there; nan where it is not known."""


def contour(
    plane: Plane, scale: Shades, walk: tuple[Float[np.ndarray, "k 2"], np.ndarray] | None = None, current: int | None = None
) -> go.Figure:  # fmt: skip
    """Filled contours, a star at the centre, crosses where it is not finite, and checkpoints joined in their order.

    walk: coordinates (k, 2) and steps (k,). A unit is equally long on both axes, where neither is more than five times as
    long as the other: circles stay circles.
    """
    fig = blank(480, "").update_layout(plot_bgcolor=HOLE, margin={"l": 84, "r": 20, "b": 74})
    contours = go.Contour(
        x=plane.x, y=plane.y, **scale.colours(plane.losses.T), zmin=scale.low, zmax=scale.high, ncontours=LEVELS,
        name="loss", line={"width": 0.6, "color": "rgba(255,255,255,0.55)"}, connectgaps=False, showlegend=False,
        hovertemplate=HOVER + f"loss %{{customdata:.4g}} {plain(scale.unit)}<extra></extra>",
    )  # fmt: skip
    fig.add_traces([contours, *_marks(plane), *([] if walk is None else _walk(*walk, current))])
    spans = []
    for i, (axis, values) in enumerate(((fig.layout.xaxis, plane.x), (fig.layout.yaxis, plane.y))):
        walked = np.zeros(1) if walk is None else np.append(walk[0][:, i], 0.0)
        known = np.concatenate([values, walked[np.isfinite(walked)]])
        low, high = float(known.min()), float(known.max())
        pad = 0.03 * (high - low) if (low < values.min() or high > values.max()) else 0.0 if high > low else 0.5
        axis.update(range=[low - pad, high + pad], title={"text": plane.titles[i], "standoff": 12}, showgrid=False)
        axis.update(nticks=5, tickangle=0)
        spans.append(high - low)
    if min(spans) > 0 and max(spans) <= 5 * min(spans):
        fig.layout.yaxis.update(scaleanchor="x", constrain="domain")
        fig.layout.xaxis.constrain = "domain"
    return fig


def render_surface(plane: Data, title: str | None = None, height: int = 560) -> go.Figure:
    """The loss (nats) over a plane as a surface in three dimensions, open where the loss is not finite.

    plane: `grid_losses` (n, m), `axis_values` (n,) of the first direction, `axis_values_2` (m,) of the second, and, where
    they are there, `axis_names`. Height and colour are logarithmic where all finite losses are positive and spread over
    two decades.

    Raises ValueError for a missing key and shapes that do not fit.

    >>> plane = {"grid_losses": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "axis_values": [0, 1], "axis_values_2": [0, 1, 2]}
    >>> render_surface(plane).data[0].z.tolist()                  # rows are values of the second direction
    [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
    """
    data = arrays(plane, "grid_losses", "axis_values", "axis_values_2")
    losses, x, y = (data[name] for name in ("grid_losses", "axis_values", "axis_values_2"))
    if losses.shape != (len(x), len(y)):
        raise ValueError(f"`grid_losses` must have the shape {(len(x), len(y))} of its axes, got {losses.shape}.")
    scale = shades(losses, "nats")
    fig = blank(height, "").update_layout(margin={"l": 26, "r": 10, "b": 8}, dragmode="orbit")
    hover = HOVER + "loss %{customdata:.4g} nats<extra></extra>"
    fig.add_surface(
        x=x, y=y, **scale.colours(losses.T), cmin=scale.low, cmax=scale.high, name="loss", hovertemplate=hover
    )
    names = [plain(short(str(name), 28)) for name in data.get("axis_names", ("direction 1", "direction 2"))]
    look = {"backgroundcolor": "white", "gridcolor": HOLE, "zeroline": False, "showspikes": False, "nticks": 5}
    scene: dict[str, Any] = {
        f"{letter}axis": {**look, "title": {"text": text, "font": {"size": 12}}, "tickfont": {"size": 11}}
        for letter, text in zip("xyz", (*names, "loss (nats)"), strict=True)
    }
    scene["zaxis"] |= scale.ticks
    camera = {"eye": {"x": 1.65, "y": -1.7, "z": 1.0}, "center": {"z": -0.22}}
    fig.update_layout(scene={**scene, "camera": camera, "aspectratio": {"x": 1, "y": 1, "z": 0.75}})
    return titled(fig, plain(title) if title else "Loss over a plane", lost(losses, "points"))


def heat(
    z: Grid, x: Sequence[Any], y: Sequence[Any], names: tuple[str, str], *, label: str, unit: str,
    limits: Limits | None = None,
) -> go.Figure:  # fmt: skip
    """A cell for every pair of places, its rows from the top; what is not finite is open. limits: of the colours.

    Values of both signs have a scale that is the same on both sides of zero, which is white.
    """
    fig = blank(170 + max(200, min(26 * len(z), 560)), "").update_layout(plot_bgcolor=HOLE)
    scale = shades(z if limits is None else np.array(limits), unit)
    hover = f"%{{y}}, %{{x}}<br>{label} %{{customdata:.4g}} {plain(unit)}<extra></extra>"
    colours = scale.colours(z) | {"zmin": scale.low, "zmax": scale.high}
    if scale.low < 0 < scale.high and not scale.is_log:
        most = max(-scale.low, scale.high)
        colours |= {"zmin": -most, "zmax": most, "colorscale": [list(stop) for stop in SIGNED]}
    fig.add_heatmap(x=_along(x), y=_along(y), **colours, hovertemplate=hover)
    for axis, name in zip((fig.layout.xaxis, fig.layout.yaxis), names, strict=True):
        axis.update(title={"text": name}, showgrid=False, automargin=True, ticks="", linecolor=RULE, type="category")
    fig.layout.yaxis.autorange = "reversed"
    return fig


def _along(places: Sequence[Any]) -> list[str]:
    shown = zip(places, labels([str(place) for place in places]), strict=True)
    return [f"{place:,.6g}" if isinstance(place, (int, float)) else plain(name) for place, name in shown]


def _marks(plane: Plane) -> list[go.Scatter]:
    """The centre, and the grid points without a finite loss."""
    star = {"symbol": "star", "size": 13, "color": "white", "line": {"width": 1.2, "color": INK}}
    hover = f"centre<br>loss {number(plane.centre)}<extra></extra>"
    centre = go.Scatter(x=[0], y=[0], mode="markers", marker=star, name="centre", hovertemplate=hover)
    i, j = np.nonzero(~np.isfinite(plane.losses))
    if not i.size:
        return [centre]
    cross = {"symbol": "x-thin", "size": 6, "line": {"width": 1.2, "color": MUTED}}
    hover = HOVER + "loss not finite<extra></extra>"
    holes = go.Scatter(x=plane.x[i], y=plane.y[j], mode="markers", marker=cross, name="not finite", hovertemplate=hover)
    return [holes, centre]


def _walk(at: Float[np.ndarray, "k 2"], steps: np.ndarray, current: int | None) -> list[go.Scatter]:
    """A white line with a dark rim, its dots, and the current one."""
    dots = {"color": "white", "size": 6, "line": {"width": 1.2, "color": INK}}
    hover = "step %{customdata:,}<br>(%{x:.4g}, %{y:.4g})<extra></extra>"
    x, y = at.T
    rim = go.Scatter(x=x, y=y, mode="lines", line={"color": INK, "width": 3.5}, hoverinfo="skip", showlegend=False)
    line = go.Scatter(
        x=x, y=y, mode="lines+markers", line={"color": "white", "width": 1.8}, marker=dots, customdata=steps,
        hovertemplate=hover, name="training", showlegend=True,
    )  # fmt: skip
    now = steps == current
    big = {"color": VERMILION, "size": 13, "line": {"width": 1.5, "color": "white"}}
    here = go.Scatter(x=x[now], y=y[now], customdata=steps[now], mode="markers", marker=big, hovertemplate=hover)
    return [rim, line, *([here.update(name=f"step {current:,}")] if now.any() else [])]
