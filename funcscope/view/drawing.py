"""What figures share: scales that suit the values, curves with intervals, the axis of steps, titles, readers of results.

Texts that are passed here are plotly's: names from outside go through `names.plain` before. Values that are not finite are
holes, and counted where they are not visible as such.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float

from .numbers import with_error
from .theme import BLUE, GREEN, INK, MUTED, PURPLE, VERMILION, place, set_linear, set_log, step_ticks, wrapped

Z95 = 1.96
"""Standard errors on each side of a 95 % interval."""
DECADES = 2
"""Values that spread over so many powers of ten are shown on a logarithmic scale."""
NEAR = 2.0
"""Zero is put on a linear axis where it is at most so many times the extent of what is drawn away."""
CROWD = 12
"""Points of a curve from which on its intervals are a band, and no bars."""
PALETTE, DASHES = (BLUE, VERMILION, GREEN, PURPLE), ("solid", "dash", "dot", "dashdot")

Column = Float[np.ndarray, " n"]


@runtime_checkable
class Documented(Protocol):
    """Anything with the documented dictionary."""

    def asdict(self) -> dict[str, Any]: ...


Data = Mapping[str, Any] | Documented


def arrays(result: Data, *names: str) -> dict[str, Any]:
    """The result's dictionary, its numbers as arrays in float64 and never views; ValueError for a name that it lacks.

    None, which is nan after a round trip through JSON, is nan again.

    >>> arrays({"x": None, "kind": "line"})
    {'x': array(nan), 'kind': 'line'}
    >>> arrays({"x": 1}, "x", "losses")
    Traceback (most recent call last):
    ValueError: the data must have the key 'losses'; they have 'x'.
    """
    values = dict(result if isinstance(result, Mapping) else result.asdict())
    for name in names:
        if name not in values:
            there = ", ".join(repr(key) for key in values) or "none"
            raise ValueError(f"the data must have the key {name!r}; they have {there}.")
    texts = {name for name, value in values.items() if np.asarray(value).dtype.kind not in "biufO"}
    return {name: value if name in texts else np.array(value, np.float64) for name, value in values.items()}


def check_lengths(data: Mapping[str, Any], *names: str) -> None:
    """ValueError where arrays over the same axis differ in length."""
    lengths = {name: np.shape(data[name])[:1] for name in names}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {shape[0] if shape else 'a scalar'}" for name, shape in lengths.items())
        raise ValueError(f"arrays over one axis must be equally long, got {said}.")


def style(i: int) -> tuple[str, str]:
    """Colour and dash of the i-th of several curves."""
    return PALETTE[i % 4], DASHES[i // 4 % 4]


def spreads(values: Float[np.ndarray, "*shape"]) -> bool:
    """Whether a logarithmic scale shows the values better: two decades, and what is not positive is rare and no larger."""
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    if not positive.size or 10 * positive.size < 9 * finite.size:
        return False
    return bool(positive.max() >= 10**DECADES * positive.min() and -finite.min() <= positive.max())


def tells_decades(value: Float[np.ndarray, "*shape"], half: Float[np.ndarray, "*shape"] | None) -> bool:
    """Whether values spread so, and those that their intervals tell from zero do so, too."""
    return spreads(value) and (half is None or spreads(value[~(np.abs(value) <= half)]))


def set_scale(
    axis: go.layout.YAxis,
    name: str,
    unit: str,
    value: Column,
    *ends: Float[np.ndarray, "_"],
    half: Column | None = None,
    is_linear: bool = False,
) -> float:
    """Name the axis, and make it logarithmic where the value spreads, else linear; returns its lower end, or -inf.

    A linear axis has zero where that is near (`with_zero`).

    The ends, of bars and bands, have room, on a logarithmic axis down to a tenth of the smallest value. half: of the
    intervals; values that these do not tell from zero make no axis logarithmic. is_linear: nothing does.
    """
    if not is_linear and tells_decades(value, half):
        axis.update(title={"text": wrapped(f"{name} ({unit})" if unit else name)}, automargin=True)
        least = value[np.isfinite(value) & (value > 0)].min() / 10
        return set_log(axis, value, *(np.maximum(end, least) for end in ends))
    every = np.concatenate([part[np.isfinite(part)] for part in (value, *ends)])
    low, high = with_zero(float(every.min()), float(every.max())) if every.size else (0.0, 1.0)
    set_linear(axis, name, unit, low, high if high > low else 1.0)
    return -math.inf


def with_zero(low: float, high: float) -> tuple[float, float]:
    """The ends of an axis, and zero where it is near; far off it would leave no room for what differs.

    >>> with_zero(1.0, 2.0), with_zero(3.13, 3.14), with_zero(2.0, 2.0)
    ((0.0, 2.0), (3.13, 3.14), (0.0, 2.0))
    """
    return (min(low, 0.0), max(high, 0.0)) if max(low, -high) <= NEAR * (high - low) or low == high else (low, high)


def band(x: Column, low: Column, high: Column, name: str, colour: str, floor: float = -math.inf) -> go.Scatter:
    """The area between low and high, a piece for every run without holes; what is below the floor lies on it."""
    seen = np.isfinite(low) & np.isfinite(high)
    across, up = [np.empty(0)], [np.empty(0)]
    for run in np.split(np.arange(len(x)), np.flatnonzero(np.diff(seen.astype(int))) + 1):
        if seen[run].all():
            across.append(np.concatenate([x[run], x[run][::-1], [np.nan]]))
            up.append(np.maximum(np.concatenate([high[run], low[run][::-1], [np.nan]]), floor))
    fill = faint(colour)
    return go.Scatter(
        x=np.concatenate(across), y=np.concatenate(up), fill="toself", fillcolor=fill, mode="lines", name=name,
        line={"width": 0.5, "color": fill}, hoverinfo="skip",
    )  # fmt: skip


def faint(colour: str, opacity: float = 0.2) -> str:
    """
    >>> faint("#0072B2")
    'rgba(0,114,178,0.2)'
    """
    return f"rgba({','.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))},{opacity:g})"


def curve(
    x: np.ndarray, value: Column, half: Column, name: str, colour: str, unit: str, floor: float = -math.inf, *,
    at: str = "step", dash: str = "solid", what: str = "",
) -> list[go.Scatter]:  # fmt: skip
    """A line with its intervals of half-width `half`, open where a value is not finite or not above the floor.

    Intervals are bars, or a band where points are many. Values that a logarithmic axis cannot hold are triangles at its
    lower edge. The line itself is the last one; the `customdata` of its points are `x`. what: the quantity, if not `name`.
    """
    across = place(x) if at == "step" else np.asarray(x, dtype=np.float64)
    hover = f"{at} %{{customdata:{',' if at == 'step' else '.4g'}}}<br>{what or name} %{{text}} {unit}<extra></extra>"
    text = [with_error(one, end / Z95) for one, end in zip(value.tolist(), half.tolist(), strict=True)]
    line = go.Scatter(
        x=across, y=np.where(value > floor, value, np.nan), customdata=x, text=text, hovertemplate=hover, name=name,
        mode="lines+markers", line={"color": colour, "width": 1.8, "dash": dash}, connectgaps=False,
        marker={"color": colour, "size": 6 if len(x) < 60 else 3},
    )  # fmt: skip
    drawn = []
    if np.isfinite(half).any() and len(x) > CROWD:
        drawn = [band(across, value - half, value + half, "95 % interval", colour, floor).update(showlegend=False)]
    elif np.isfinite(half).any():
        line.error_y = {"array": half, "color": colour, "thickness": 1.5, "width": 0}
    low: Bool[np.ndarray, " n"] = value <= (0 if floor > 0 else -math.inf)
    if low.any():
        mark = {"symbol": "triangle-down-open", "size": 9, "color": colour}
        at_edge = {"x": across[low], "y": np.full(int(low.sum()), floor), "customdata": np.asarray(x)[low]}
        below = go.Scatter(at_edge, text=np.array(text)[low], hovertemplate=hover, mode="markers", marker=mark)
        drawn.append(below.update(name="zero or below", cliponaxis=False))
    return [*drawn, line]


def reaches(low: Float[np.ndarray, "_"], floor: float) -> str:
    """A note where intervals go below what a logarithmic axis shows."""
    return "intervals that reach the lower edge go below it" if bool((low[np.isfinite(low)] < floor).any()) else ""


def put_on_steps(fig: go.Figure, steps: np.ndarray, current: int | None) -> None:
    """Give the panels one axis of training steps from 0 on, its title below the last, and mark the current step in all.

    A square-root scale has a zero and gives early steps room.
    """
    known = [*steps.ravel().tolist(), *([] if current is None else [current])]
    if min(known, default=0) < 0:
        raise ValueError(f"steps must be 0 or more, got {min(known):g}.")
    last = int(max(known, default=1)) or 1
    ticks, right = step_ticks(last), math.sqrt(last)
    for axis in fig.select_xaxes():
        axis.update(range=[-0.02 * right, 1.02 * right], showticklabels=False)
        axis.update(tickvals=[math.sqrt(step) for step in ticks], ticktext=[f"{step:,}" for step in ticks])
    axis.update(title={"text": "training step (square-root scale)"}, showticklabels=True)
    if current is not None:
        x, is_last = math.sqrt(current), current > 0.75 * last
        fig.add_vline(x=x, line={"color": VERMILION, "width": 1.5}, opacity=0.8, layer="below", name="current step")
        side = {"xanchor": "right" if is_last else "left", "xshift": 4 if is_last else -4}
        at = {"x": x, "y": 1, "yref": "paper", "showarrow": False, "yanchor": "bottom", "yshift": -2, **side}
        fig.add_annotation(at, text=f"step {current:,}", font={"size": 12, "color": VERMILION})


def titled(fig: go.Figure, title: str, *notes: str) -> go.Figure:
    """Put a title, smaller notes, and the legend above the panels, in rows that fit a width of 340 pixels.

    title, notes: with plotly's markup; empty notes are left out.
    """
    head = [line for part in title.split("<br>") for line in textwrap.wrap(part, 46)]
    under = [line for note in notes for line in textwrap.wrap(note, 58)]
    small = [f'<span style="font-size:12px;color:{MUTED}">{line}</span>' for line in under]
    lines = [*head, *small]
    top, pad = 12 + 19.5 * len(lines), 10 if len(lines) == 1 else 20  # plotly lifts several lines by half of one
    rows = _legend_rows(fig)
    fig.update_layout(
        title={
            "text": "<br>".join(lines), "font": {"size": 15, "color": INK}, "x": 0, "xref": "container",
            "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top", "pad": {"l": 14, "t": pad},
        },
        legend={"xref": "container", "x": 0.015, "y": 1 - top / fig.layout.height, "font": {"size": 12}},
    )  # fmt: skip
    fig.layout.margin.t = top + 19 * rows + 20
    return fig


def _legend_rows(fig: go.Figure, width: int = 360) -> int:
    """Rows of a legend in columns as wide as the longest of its entries, on the narrowest page."""
    names = {t.legendgroup or t.name: t.name for t in fig.data if t.name and t.showlegend is not False}
    if (len(names) < 2 and not any(t.showlegend for t in fig.data)) or fig.layout.showlegend is False:
        return 0
    lengths = [46 + 6.4 * len(name) for name in names.values()]
    return 1 if sum(lengths) <= width else math.ceil(len(lengths) / max(1, width // max(lengths)))


def lost(values: np.ndarray, what: str) -> str:
    """How many values are holes; empty for none."""
    gone = int((~np.isfinite(values)).sum())
    return f"{gone:,} of {values.size:,} {what} not finite" if gone else ""
