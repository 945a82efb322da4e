"""Figures of the loss along lines, over planes and on paths: results in, a plotly `Figure` out.

The first direction of a plane is the horizontal axis, the second the vertical one. `grid_losses` has the first
direction on its axis 0, and plotly wants rows of equal height, so that what is drawn is its transpose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from scipy.interpolate import RegularGridInterpolator

from .drawing import Data, arrays, check_shape, lost, names_of, numbers_of, scalar, spreads, titled
from .numbers import number, setting
from .result import short
from .samples import plain
from .theme import BLUE, GREEN, INK, MUTED, PURPLE, TEMPLATE, VERMILION, log_ticks, round_ticks
from .theme import blank as _blank

COLOURS = "Viridis"
"""Even in lightness, so that it reads with a colour vision deficiency and in grey; dark is low."""
HOLE = "#e3e3e3"
LEVELS = 14
PALETTE = (BLUE, VERMILION, GREEN, PURPLE)
DASHES = ("solid", "dash", "dot")
FEW_CELLS, MOST_CELLS = 6, 12
"""Models of a barrier matrix up to which its cells show values with errors, and values alone."""

Grid = Float[np.ndarray, "n m"]


class Shades(NamedTuple):
    """The colour scale of one or several planes, and the height of a surface: losses, or their logarithms."""

    is_log: bool
    low: float
    high: float
    step: float
    """Between two contours."""
    ticks: dict[float, str]

    def of(self, losses: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """Positions on the scale; nan for what is not finite."""
        finite = np.where(np.isfinite(losses), losses, np.nan)
        return np.log10(finite) if self.is_log else finite

    @property
    def bar(self) -> dict[str, Any]:
        """Of colours, with ticks in nats."""
        title = {"text": "loss (nats)", "font": {"size": 13, "color": MUTED}}
        return {
            "tickvals": list(self.ticks), "ticktext": list(self.ticks.values()), "title": title, "thickness": 13,
            "outlinewidth": 0,
        }  # fmt: skip


class Plane(NamedTuple):
    losses: Grid
    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " m"]
    names: tuple[str, str]
    titles: tuple[str, str]
    """Of the axes: names, and what their unit is."""
    data: dict[str, Any]


def render_contour(
    plane: Data,
    trajectory: Mapping[str, Any] | None = None,
    title: str | None = None,
    current: int | None = None,
    height: int = 480,
) -> go.Figure:
    """The loss (nats) over a plane as filled contours; a star at the centre, crosses where it is not finite.

    plane: `grid_losses` (n, m), `axis_values` (n,) of the first direction (horizontal), `axis_values_2` (m,) of the
    second (vertical), and, shown where they are there, `axis_names`, `relative_displacement` (2,) and `baseline_loss`.
    trajectory: `coordinates` (k, 2) in the unit of the axes and `step` (k,), a line with a dot per step; the step
    `current` is a large dot, where it is among them. Colours are logarithmic where all finite losses are positive and
    spread over two decades.

    Raises ValueError for a missing key and shapes that do not fit.

    >>> plane = {"grid_losses": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "axis_values": [0, 1], "axis_values_2": [0, 1, 2]}
    >>> render_contour(plane).data[0].z.tolist()                  # rows are values of the second direction
    [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
    """
    seen = _plane(plane)
    shades = _shades([seen.losses])
    fig = _blank(height, "").update_layout(plot_bgcolor=HOLE, margin={"l": 84, "r": 20, "b": 74})
    fig.add_trace(_contour(seen, shades).update(colorbar=shades.bar))
    fig.add_traces(_marks(seen))
    if trajectory is not None:
        fig.add_traces(_walk(trajectory, current))
    _set_axes(fig.layout.xaxis, fig.layout.yaxis, seen, trajectory)
    return titled(fig, plain(title) if title else "Loss over a plane", _about(seen))


def render_surface(
    plane: Data,
    title: str | None = None,
    trajectory: Mapping[str, Any] | None = None,
    log: bool | None = None,
    current: int | None = None,
    height: int = 560,
) -> go.Figure:
    """The loss (nats) over a plane as a surface in three dimensions, open where the loss is not finite.

    plane, trajectory, current: as for `render_contour`. The trajectory is drawn at its `losses` (k,) where it has them,
    else on the surface, interpolated between grid points, and not at all outside it. log: whether height and colour
    are logarithmic; None: where all finite losses are positive and spread over two decades.

    Raises ValueError for a missing key, shapes that do not fit, and `log=True` with a loss that is not positive.
    """
    seen = _plane(plane)
    shades = _shades([seen.losses], log)
    fig = _blank(height, "").update_layout(margin={"l": 26, "r": 10, "b": 8})
    surface = go.Surface(
        x=seen.x, y=seen.y, z=shades.of(seen.losses).T, customdata=seen.losses.T, colorscale=COLOURS, name="loss",
        cmin=shades.low, cmax=shades.high, colorbar={**shades.bar, "len": 0.7}, showlegend=False,
        hovertemplate="(%{x:.4g}, %{y:.4g})<br>loss %{customdata:.4g} nats<extra></extra>",
    )  # fmt: skip
    fig.add_trace(surface)
    if trajectory is not None:
        fig.add_traces(_walk_in_space(seen, shades, trajectory, current))
    style = {"backgroundcolor": "white", "gridcolor": HOLE, "zeroline": False, "showspikes": False}
    axes = {
        f"{name}axis": {
            **style,
            "title": {"text": text, "font": {"size": 12}},
            "tickfont": {"size": 11},
            "nticks": 5,
        }
        for name, text in zip("xyz", (*seen.names, "loss (nats)"), strict=True)
    }
    axes["zaxis"] |= {"tickvals": list(shades.ticks), "ticktext": list(shades.ticks.values())}
    camera = {"eye": {"x": 1.65, "y": -1.7, "z": 1.0}, "center": {"z": -0.22}}
    fig.update_layout(
        scene={**axes, "camera": camera, "aspectmode": "manual", "aspectratio": {"x": 1, "y": 1, "z": 0.75}}
    )
    fig.update_layout(dragmode="orbit")
    note = "horizontal axes: coefficients of the two directions"
    return titled(fig, plain(title) if title else "Loss over a plane", _about(seen), note)


def render_planes_side_by_side(planes: Sequence[Data], titles: Sequence[str], height: int | None = None) -> go.Figure:
    """Contours of several planes, such as two phases of a training, two in a row and with one colour scale for all.

    planes: as for `render_contour`; titles: one per plane.
    Raises ValueError for no plane, a count of titles that differs, a missing key, and shapes that do not fit.
    """
    if not planes or len(planes) != len(titles):
        raise ValueError(f"`planes` needs one plane or more and as many `titles`, got {len(planes)} and {len(titles)}.")
    seen = [_plane(plane) for plane in planes]
    shades = _shades([plane.losses for plane in seen])
    across, down = min(2, len(seen)), math.ceil(len(seen) / 2)
    alike = len({plane.titles[1] for plane in seen}) == 1
    names = [plain(short(text, 26)) for text in titles]
    fig = make_subplots(
        down,
        across,
        subplot_titles=names,
        horizontal_spacing=0.14 if alike else 0.27,
        vertical_spacing=105 / (300 * down - 100),
    )
    fig.update_annotations(font={"size": 12, "color": INK})
    fig.update_layout(
        template=TEMPLATE, height=height or 190 + 300 * down, plot_bgcolor=HOLE, margin={"l": 84, "r": 20, "b": 136}
    )
    for i, plane in enumerate(seen):
        at = {"row": i // 2 + 1, "col": i % 2 + 1}
        fig.add_trace(_contour(plane, shades).update(coloraxis="coloraxis", zmin=None, zmax=None), **at)
        for mark in _marks(plane):
            fig.add_trace(mark.update(legendgroup=mark.name.split(" (")[0], showlegend=i == 0), **at)
        vertical = next(fig.select_yaxes(**at))
        _set_axes(next(fig.select_xaxes(**at)), vertical, plane, None)
        if i % 2 and alike:
            vertical.title.text = None  # its neighbour says it, and there is little room between the two
    bar = shades.bar | {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "ypad": 6}
    bar["title"] = {**bar["title"], "side": "right"}
    fig.update_layout(coloraxis={"colorscale": COLOURS, "cmin": shades.low, "cmax": shades.high, "colorbar": bar})
    titled(
        fig,
        "Loss over planes, one colour scale",
        *[_about(plane, f"{name}: ") for plane, name in zip(seen, map(plain, titles), strict=True)],
    )
    fig.layout.margin.t += 22
    return fig


def _plane(plane: Data) -> Plane:
    data = arrays(plane, "grid_losses", "axis_values", "axis_values_2")
    losses, x, y = (numbers_of(data, name) for name in ("grid_losses", "axis_values", "axis_values_2"))
    check_shape("grid_losses", losses, (len(x), len(y)))
    names = names_of(data, 2)
    far = np.ravel(numbers_of(data, "relative_displacement")) if "relative_displacement" in data else np.full(2, np.nan)
    ends = [f"<br>(edge: ‖Δθ‖ = {setting(float(f'{at:.2g}'))} ‖θ‖)" if math.isfinite(at) else "" for at in far]
    titles = [f"{name}, coefficient{end}" for name, end in zip(names, ends, strict=True)]
    return Plane(losses, x, y, (names[0], names[1]), (titles[0], titles[1]), data)


def _shades(grids: Sequence[Grid], log: bool | None = None) -> Shades:
    """One scale for all grids: about a dozen contours at round steps, ticks in nats."""
    flat = np.concatenate([grid.ravel() for grid in grids])
    finite = flat[np.isfinite(flat)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if log and low <= 0:
        raise ValueError(f"`log=True` needs losses above 0, got one of {low:.4g}: leave it None or False.")
    is_log = bool(low > 0 and spreads(flat)) if log is None else log
    if is_log:
        low, high = math.log10(low), math.log10(high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (0.05 * abs(low) or 0.5), high + (0.05 * abs(high) or 0.5)
    step = _round_step((high - low) / LEVELS)
    ticks = (
        {math.log10(x): text for x, text in log_ticks(low, high).items()}
        if is_log
        else {x: number(x) for x in round_ticks(low, high)}
    )
    return Shades(is_log, low, high, step, ticks)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(digit * power for digit in (1, 2, 2.5, 5, 10, 20) if digit * power >= rough * (1 - 1e-9))


def _contour(plane: Plane, shades: Shades) -> go.Contour:
    levels = {"start": math.ceil(shades.low / shades.step) * shades.step, "end": shades.high, "size": shades.step}
    return go.Contour(
        x=plane.x, y=plane.y, z=shades.of(plane.losses).T, customdata=plane.losses.T, colorscale=COLOURS, name="loss",
        zmin=shades.low, zmax=shades.high, contours=levels, line={"width": 0.6, "color": "rgba(255,255,255,0.55)"},
        connectgaps=False, showlegend=False,
        hovertemplate="(%{x:.4g}, %{y:.4g})<br>loss %{customdata:.4g} nats<extra></extra>",
    )  # fmt: skip


def _marks(plane: Plane) -> list[go.Scatter]:
    """The centre, and the grid points without a finite loss."""
    star = {"symbol": "star", "size": 13, "color": "white", "line": {"width": 1.2, "color": INK}}
    told = f"<br>loss {number(scalar(plane.data, 'baseline_loss'))} nats"
    centre = go.Scatter(
        x=[0], y=[0], mode="markers", marker=star, name="centre", hovertemplate=f"centre{told}<extra></extra>"
    )
    i, j = np.nonzero(~np.isfinite(plane.losses))
    if not i.size:
        return [centre]
    cross = {"symbol": "x-thin", "size": 6, "line": {"width": 1.2, "color": MUTED}}
    holes = go.Scatter(
        x=plane.x[i], y=plane.y[j], mode="markers", marker=cross, name="not finite",
        hovertemplate="(%{x:.4g}, %{y:.4g})<br>loss not finite<extra></extra>",
    )  # fmt: skip
    return [holes, centre]


def _trajectory(trajectory: Mapping[str, Any]) -> tuple[Float[np.ndarray, "k 2"], np.ndarray]:
    data = arrays(trajectory, "coordinates", "step")
    at, steps = numbers_of(data, "coordinates"), np.array(data["step"])
    check_shape("coordinates", at, (len(steps), 2))
    return at, steps


def _walk(trajectory: Mapping[str, Any], current: int | None) -> list[go.Scatter]:
    """A white line with a dark rim, its dots, and the current one."""
    at, steps = _trajectory(trajectory)
    dots = {"color": "white", "size": 6, "line": {"width": 1.2, "color": INK}}
    hover = "step %{customdata:,}<br>(%{x:.4g}, %{y:.4g})<extra></extra>"
    rim = go.Scatter(
        x=at[:, 0], y=at[:, 1], mode="lines", line={"color": INK, "width": 3.5}, hoverinfo="skip", showlegend=False
    )
    line = rim.to_plotly_json() | {
        "mode": "lines+markers", "line": {"color": "white", "width": 1.8}, "marker": dots, "customdata": steps,
        "hovertemplate": hover, "name": "training", "showlegend": True, "hoverinfo": None,
    }  # fmt: skip
    now = steps == current
    big = {"color": VERMILION, "size": 13, "line": {"width": 1.5, "color": "white"}}
    here = go.Scatter(
        x=at[now, 0], y=at[now, 1], customdata=steps[now], mode="markers", marker=big, hovertemplate=hover,
        name=f"step {current:,}" if current is not None else "",
    )  # fmt: skip
    return [rim, go.Scatter(line), *([here] if now.any() else [])]


def _walk_in_space(
    plane: Plane, shades: Shades, trajectory: Mapping[str, Any], current: int | None
) -> list[go.Scatter3d]:
    at, steps = _trajectory(trajectory)
    z = shades.of(plane.losses)
    if trajectory.get("losses") is not None:
        height = shades.of(numbers_of(trajectory, "losses"))
    else:
        height = RegularGridInterpolator((plane.x, plane.y), z, bounds_error=False, fill_value=np.nan)(at)
    height = height + 0.01 * (shades.high - shades.low)  # above the surface, which would hide half of it
    line, dots = {"color": "white", "width": 6}, {"color": "white", "size": 3.5, "line": {"width": 1, "color": INK}}
    hover = "step %{customdata:,}<br>(%{x:.4g}, %{y:.4g})<extra></extra>"
    walk = go.Scatter3d(
        x=at[:, 0], y=at[:, 1], z=height, customdata=steps, mode="lines+markers", line=line, marker=dots,
        hovertemplate=hover, name="training", connectgaps=False,
    )  # fmt: skip
    now = steps == current
    if not now.any():
        return [walk]
    big = {"color": VERMILION, "size": 7, "line": {"width": 1, "color": "white"}}
    here = go.Scatter3d(
        x=at[now, 0], y=at[now, 1], z=height[now], customdata=steps[now], mode="markers", marker=big,
        hovertemplate=hover, name=f"step {current:,}",
    )  # fmt: skip
    return [walk, here]


def _set_axes(x: go.layout.XAxis, y: go.layout.YAxis, plane: Plane, trajectory: Mapping[str, Any] | None) -> None:
    """Ranges that hold the plane, the centre and the trajectory."""
    walked = np.zeros((1, 2)) if trajectory is None else np.concatenate([np.zeros((1, 2)), _trajectory(trajectory)[0]])
    for axis, values, title, at in zip((x, y), (plane.x, plane.y), plane.titles, walked.T, strict=True):
        known = np.concatenate([values, at[np.isfinite(at)]])
        low, high = float(known.min()), float(known.max())
        pad = 0.03 * (high - low) if (low < values.min() or high > values.max()) else 0.0
        pad = pad if high > low else 0.5
        axis.update(
            range=[low - pad, high + pad], title={"text": title, "standoff": 12}, showgrid=False, nticks=5, tickangle=0
        )


def _about(plane: Plane, before: str = "") -> str:
    finite = plane.losses[np.isfinite(plane.losses)]
    told = [f"centre {number(scalar(plane.data, 'baseline_loss'))}"] if "baseline_loss" in plane.data else []
    told += (
        [f"from {number(float(finite.min()))} to {number(float(finite.max()))} nats"]
        if finite.size
        else ["no finite loss"]
    )
    return before + ", ".join([*told, *filter(None, [lost(plane.losses, "points")])])
