"""Figures over two axes: a heat map, and the loss on a plane as contours or as a surface, with a trajectory on it.

The first direction of a plane is the horizontal axis, the second the vertical one. `grid_losses` has the first direction on
its axis 0, and plotly wants rows of equal height, so that what is drawn is its transpose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from scipy.interpolate import RegularGridInterpolator

from .drawing import Data, arrays, check_shape, numbers_of, scalar, spreads
from .names import labels, plain, short
from .numbers import number, setting
from .theme import INK, MUTED, RULE, VERMILION, blank, log_ticks, round_ticks

COLOURS = "Viridis"
"""Even in lightness, so that it reads with a colour vision deficiency and in grey; dark is low."""
HOLE = "#e3e3e3"
LEVELS = 14

Grid = Float[np.ndarray, "n m"]
Limits = tuple[float, float]


class Shades(NamedTuple):
    """The colour scale of planes, and the height of a surface: values, or their logarithms."""

    is_log: bool
    low: float
    high: float
    step: float
    """Between two contours."""
    ticks: dict[float, str]
    unit: str

    def of(self, losses: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """Positions on the scale; nan for what is not finite."""
        finite = np.where(np.isfinite(losses), losses, np.nan)
        return np.log10(np.where(finite > 0, finite, np.nan)) if self.is_log else finite

    @property
    def bar(self) -> dict[str, Any]:
        """Of colours, with ticks in the unit."""
        title = {"text": plain(self.unit) or "value", "font": {"size": 13, "color": MUTED}}
        return {
            "tickvals": list(self.ticks), "ticktext": list(self.ticks.values()), "title": title, "thickness": 13,
            "outlinewidth": 0,
        }  # fmt: skip


def shades(values: Float[np.ndarray, "_"], unit: str, log: bool | None = None) -> Shades:
    """A scale from the smallest to the largest value: about a dozen contours at round steps, ticks in the unit.

    log: None for a logarithmic one where all are positive and spread over two decades. Values of several planes, or the
    ends of a scale, give one that is the same for all of them.
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if log and low <= 0:
        raise ValueError(f"`log=True` needs losses above 0, got one of {low:.4g}: leave it None or False.")
    is_log = bool(low > 0 and spreads(finite)) if log is None else log
    if is_log:
        low, high = math.log10(low), math.log10(high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (0.05 * abs(low) or 0.5), high + (0.05 * abs(high) or 0.5)
    rough = (high - low) / LEVELS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 2.5, 5, 10, 20) if digit * power >= rough * (1 - 1e-9))
    ticks = (
        {math.log10(x): text for x, text in log_ticks(low, high).items()}
        if is_log
        else {x: number(x) for x in round_ticks(low, high)}
    )
    return Shades(is_log, low, high, step, ticks, unit)


class Plane(NamedTuple):
    losses: Grid
    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " m"]
    titles: tuple[str, str]
    """Of the axes: names, and what their unit is."""
    centre: float
    """The loss there; nan where it is not known."""


def plane_of(data: Data) -> Plane:
    """The plane of documented arrays. Raises ValueError for a missing key and shapes that do not fit."""
    data = arrays(data, "grid_losses", "axis_values", "axis_values_2")
    losses, x, y = (numbers_of(data, name) for name in ("grid_losses", "axis_values", "axis_values_2"))
    check_shape("grid_losses", losses, (len(x), len(y)))
    names = [str(name) for name in np.ravel(data.get("axis_names", ("direction 1", "direction 2")))]
    if len(names) != 2:
        raise ValueError(f"`axis_names` must have a name per direction, got {len(names)} for 2.")
    far = np.ravel(numbers_of(data, "relative_displacement")) if "relative_displacement" in data else np.full(2, np.nan)
    ends = [f"<br>(edge: ‖Δθ‖ = {setting(float(f'{at:.2g}'))} ‖θ‖)" if math.isfinite(at) else "" for at in far]
    first, second = (f"{plain(short(name, 28))}, coefficient{end}" for name, end in zip(names, ends, strict=True))
    return Plane(losses, x, y, (first, second), scalar(data, "baseline_loss"))


def contour(
    plane: Plane, scale: Shades, walk: tuple[Float[np.ndarray, "k 2"], np.ndarray] | None = None,
    current: int | None = None, height: int = 480, *, equal: bool = True,
) -> go.Figure:  # fmt: skip
    """Filled contours, a star at the centre, crosses where it is not finite, and checkpoints joined in their order.

    walk: coordinates (k, 2) and steps (k,). equal: a unit is equally long on both axes, where neither is more than five
    times as long as the other: circles stay circles.
    """
    fig = blank(height, "").update_layout(plot_bgcolor=HOLE, margin={"l": 84, "r": 20, "b": 74})
    levels = {"start": math.ceil(scale.low / scale.step) * scale.step, "end": scale.high, "size": scale.step}
    contours = go.Contour(
        x=plane.x, y=plane.y, z=scale.of(plane.losses).T, customdata=plane.losses.T, colorscale=COLOURS, name="loss",
        zmin=scale.low, zmax=scale.high, contours=levels, line={"width": 0.6, "color": "rgba(255,255,255,0.55)"},
        connectgaps=False, showlegend=False, colorbar=scale.bar,
        hovertemplate=f"(%{{x:.4g}}, %{{y:.4g}})<br>loss %{{customdata:.4g}} {plain(scale.unit)}<extra></extra>",
    )  # fmt: skip
    fig.add_traces([contours, *_marks(plane), *([] if walk is None else _walk(*walk, current))])
    spans = []
    for axis, values, title, i in zip(
        (fig.layout.xaxis, fig.layout.yaxis), (plane.x, plane.y), plane.titles, (0, 1), strict=True
    ):
        walked = np.zeros(1) if walk is None else np.append(walk[0][:, i], 0.0)
        known = np.concatenate([values, walked[np.isfinite(walked)]])
        low, high = float(known.min()), float(known.max())
        pad = 0.03 * (high - low) if (low < values.min() or high > values.max()) else 0.0
        spans.append(high - low)
        ends = [low - (pad if high > low else 0.5), high + (pad if high > low else 0.5)]
        axis.update(range=ends, title={"text": title, "standoff": 12}, showgrid=False, nticks=5, tickangle=0)
    if equal and min(spans) > 0 and max(spans) <= 5 * min(spans):
        fig.layout.yaxis.update(scaleanchor="x", constrain="domain")
        fig.layout.xaxis.constrain = "domain"
    return fig


def surface(
    plane: Plane, scale: Shades, walk: tuple[Float[np.ndarray, "k 2"], np.ndarray] | None = None,
    heights: Float[np.ndarray, " k"] | None = None, current: int | None = None, height: int = 560,
) -> go.Figure:  # fmt: skip
    """In three dimensions, open where the loss is not finite. heights: losses of the checkpoints, if not those there."""
    fig = blank(height, "").update_layout(margin={"l": 26, "r": 10, "b": 8}, dragmode="orbit")
    fig.add_trace(
        go.Surface(
            x=plane.x, y=plane.y, z=scale.of(plane.losses).T, customdata=plane.losses.T, colorscale=COLOURS, name="loss",
            cmin=scale.low, cmax=scale.high, colorbar={**scale.bar, "len": 0.7}, showlegend=False,
            hovertemplate=f"(%{{x:.4g}}, %{{y:.4g}})<br>loss %{{customdata:.4g}} {plain(scale.unit)}<extra></extra>",
        )
    )  # fmt: skip
    if walk is not None:
        fig.add_traces(_walk_in_space(plane, scale, walk, heights, current))
    look = {"backgroundcolor": "white", "gridcolor": HOLE, "zeroline": False, "showspikes": False, "nticks": 5}
    names = [title.partition(",")[0] for title in plane.titles]
    axes: dict[str, Any] = {
        f"{letter}axis": {**look, "title": {"text": text, "font": {"size": 12}}, "tickfont": {"size": 11}}
        for letter, text in zip("xyz", (*names, f"loss ({plain(scale.unit)})"), strict=True)
    }
    axes["zaxis"] |= {"tickvals": list(scale.ticks), "ticktext": list(scale.ticks.values())}
    camera = {"eye": {"x": 1.65, "y": -1.7, "z": 1.0}, "center": {"z": -0.22}}
    ratio = {"x": 1, "y": 1, "z": 0.75}
    return fig.update_layout(scene={**axes, "camera": camera, "aspectmode": "manual", "aspectratio": ratio})


def heat(
    z: Grid, x: Sequence[Any], y: Sequence[Any], names: tuple[str, str], *, label: str, unit: str,
    limits: Limits | None = None,
) -> go.Figure:  # fmt: skip
    """A cell for every pair of places, its rows from the top; what is not finite is open. limits: of the colours."""
    fig = blank(170 + max(200, min(26 * len(z), 560)), "").update_layout(plot_bgcolor=HOLE)
    scale = shades(z if limits is None else np.array(limits), unit)
    across, down = (_along(each) for each in (x, y))
    fig.add_trace(
        go.Heatmap(
            x=across, y=down, z=scale.of(z), customdata=z, colorscale=COLOURS, zmin=scale.low, zmax=scale.high,
            hovertemplate=f"%{{y}}, %{{x}}<br>{label} %{{customdata:.4g}} {plain(unit)}<extra></extra>", colorbar=scale.bar,
        )
    )  # fmt: skip
    for axis, name in zip((fig.layout.xaxis, fig.layout.yaxis), names, strict=True):
        axis.update(title={"text": name}, showgrid=False, automargin=True, ticks="", linecolor=RULE)
    fig.layout.yaxis.autorange = "reversed"
    return fig


def _along(places: Sequence[Any]) -> list[Any]:
    """Numbers as they are where they are even, else as names: cells are equally wide."""
    if all(isinstance(place, (int, float)) for place in places):
        gaps = np.diff(np.asarray(places, dtype=np.float64))
        return list(places) if np.allclose(gaps, gaps[:1]) else [f"{place:,.6g}" for place in places]
    return [plain(name) for name in labels([str(place) for place in places])]


def _marks(plane: Plane) -> list[go.Scatter]:
    """The centre, and the grid points without a finite loss."""
    star = {"symbol": "star", "size": 13, "color": "white", "line": {"width": 1.2, "color": INK}}
    hover = f"centre<br>loss {number(plane.centre)}<extra></extra>"
    centre = go.Scatter(x=[0], y=[0], mode="markers", marker=star, name="centre", hovertemplate=hover)
    i, j = np.nonzero(~np.isfinite(plane.losses))
    if not i.size:
        return [centre]
    cross = {"symbol": "x-thin", "size": 6, "line": {"width": 1.2, "color": MUTED}}
    hover = "(%{x:.4g}, %{y:.4g})<br>loss not finite<extra></extra>"
    return [
        go.Scatter(x=plane.x[i], y=plane.y[j], mode="markers", marker=cross, name="not finite", hovertemplate=hover),
        centre,
    ]


def walk_of(trajectory: Mapping[str, Any] | None) -> tuple[Float[np.ndarray, "k 2"], np.ndarray] | None:
    """Coordinates and steps of documented arrays."""
    if trajectory is None:
        return None
    data = arrays(trajectory, "coordinates", "step")
    at, steps = numbers_of(data, "coordinates"), np.array(data["step"])
    check_shape("coordinates", at, (len(steps), 2))
    return at, steps


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


def _walk_in_space(
    plane: Plane, scale: Shades, walk: tuple[Float[np.ndarray, "k 2"], np.ndarray], heights: Any, current: int | None
) -> list[go.Scatter3d]:
    at, steps = walk
    grid = RegularGridInterpolator((plane.x, plane.y), scale.of(plane.losses), bounds_error=False, fill_value=np.nan)
    z = grid(at) if heights is None else scale.of(heights)
    z = z + 0.01 * (scale.high - scale.low)  # above the surface, which would hide half of it
    now = steps == current
    drawn = []
    for shown, colour, size, name in (
        (steps == steps, "white", 3.5, "training"),
        (now, VERMILION, 7, f"step {current}"),
    ):
        marker = {"color": colour, "size": size, "line": {"width": 1, "color": INK}}
        drawn.append(
            go.Scatter3d(
                x=at[shown, 0], y=at[shown, 1], z=z[shown], customdata=steps[shown], mode="lines+markers", name=name,
                line={"color": colour, "width": 6}, marker=marker, connectgaps=False,
                hovertemplate="step %{customdata:,}<br>(%{x:.4g}, %{y:.4g})<extra></extra>",
            )
        )  # fmt: skip
    return drawn if now.any() else drawn[:1]
