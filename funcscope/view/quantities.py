"""A figure of any quantity: what it is per decides how it is drawn.

A number over several steps is a trajectory, over several models a row of points; a sample a distribution; what has names
along its axis bars, what has numbers there a line; two axes a heat map, x and y a plane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from ..core.estimate import interval
from ..core.tables import Entry, is_estimate, numbers
from ..study.cache import Outcome
from .curvature_figures import bars, labels
from .drawing import lost, over_training, put_on_steps, set_scale, titled
from .figures import Z95
from .numbers import with_error
from .result import short
from .samples import Mark, plain, strips
from .theme import BLUE, GREEN, MUTED, PURPLE, RULE, VERMILION, blank, set_linear

PALETTE = (BLUE, VERMILION, GREEN, PURPLE)
MOST_LINES = 4
"""Subjects that are told apart by colour; of more, the first and the last are drawn where a figure holds one each."""
MOST_BARS = 60
DRAWS = ("direction", "probe", "sequence", "pair", "micro-batch", "parameter", "vector")
"""Axes along which a quantity is a sample: their order says nothing."""
COLOURS, HOLE = "Viridis", "#e3e3e3"


class Drawn(NamedTuple):
    figure: go.Figure
    caption: str


class Seen(NamedTuple):
    """One quantity of one subject."""

    subject: str
    step: int | None
    entry: Entry
    value: Float[np.ndarray, "*shape"]
    stderr: Float[np.ndarray, "*shape"]
    places: tuple[list[Any] | None, ...]
    """Names or numbers along each axis, where it has any."""
    unit: str

    @property
    def half(self) -> Float[np.ndarray, "*shape"]:
        """Half of the 95 % interval: Student's t for an estimate."""
        if is_estimate(self.entry.value):
            low, high = interval(self.entry.value)
            return np.array((high - low) / 2)
        return np.asarray(Z95 * self.stderr)


CUSTOM: dict[tuple[str, str], Callable[[Sequence[Outcome]], Drawn]] = {}
"""By class of result and name of a quantity: figures that the axes do not say how to draw."""


def figures(outcomes: Sequence[Outcome], chosen: Sequence[str] = ()) -> Iterator[Drawn]:
    """Of the chosen quantities, or of all; of single numbers where there are several subjects."""
    ok = [outcome for outcome in outcomes if outcome.result is not None]
    for name in chosen or dict.fromkeys(each.name for outcome in ok for each in _drawable(outcome)):
        seen = [one for outcome in ok if (one := _seen(outcome, name)) is not None]
        if seen and (drawn := draw(seen)):
            yield drawn


def draw(seen: Sequence[Seen]) -> Drawn | None:
    """One quantity of some subjects; None where a table says all of it."""
    per = seen[0].entry.quantity.per
    if not any(np.isfinite(one.value).any() for one in seen):
        return None
    if not per:
        return None if len(seen) < 2 else _trajectory(seen) if _has_steps(seen) else _estimates(seen)
    if len(per) == 2:
        return _heat(seen[-1])
    if len(per) > 2:
        return None
    places = seen[0].places[0]
    if places is None and per[0] in DRAWS:
        return _distribution(seen)
    if places is not None and not _are_numbers(places):
        return _bars(seen[-1]) if 1 < len(places) <= MOST_BARS else None
    return _lines(seen) if seen[0].value.size > 1 else None


def _drawable(outcome: Outcome) -> Iterator[Entry]:
    assert outcome.result is not None
    return (each for each in outcome.result.entries() if each.quantity.shown or each.quantity.per)


def _seen(outcome: Outcome, name: str) -> Seen | None:
    result = outcome.result
    assert result is not None
    for entry in result.entries():
        if entry.name == name and (values := numbers(entry)) is not None:
            value = values["value"]
            if value.ndim != len(entry.quantity.per):  # a range
                return None
            known = (result.coords.get(axis) for axis in entry.quantity.per)
            places = tuple(None if each is None else np.asarray(each).tolist() for each in known)
            stderr = values.get("stderr_total", values.get("stderr", np.full(value.shape, math.nan)))
            unit = outcome.in_unit(entry.quantity.unit)
            if name in result.unresolved:  # a hole, that is counted: a mark would be believed
                value = np.full(value.shape, math.nan)
            return Seen(outcome.subject, outcome.step, entry, value, stderr, places, unit)
    return None


def _trajectory(seen: Sequence[Seen]) -> Drawn:
    """A number at every step, with its 95 % interval."""
    ordered = sorted(seen, key=lambda one: one.step or 0)
    steps, value = np.array([one.step for one in ordered]), np.array([float(one.value) for one in ordered])
    half = np.array([float(one.half) for one in ordered])
    label, unit = _label(ordered[0]), ordered[0].unit
    fig = blank(330, "").update_layout(showlegend=False)
    floor = set_scale(fig.layout.yaxis, label, unit, value, value - half, value + half)
    fig.add_traces(over_training(steps, value, half, label, BLUE, unit, floor))
    put_on_steps(fig, steps, None)
    return _captioned(
        fig, ordered[0], "at every step, with 95 % intervals where there are errors", lost(value, "values")
    )


def _estimates(seen: Sequence[Seen]) -> Drawn:
    """A number of every model, with its 95 % interval."""
    values, half = (
        np.array([float(one) for one in each]) for each in zip(*((s.value, s.half) for s in seen), strict=True)
    )
    name, unit = _label(seen[0]), seen[0].unit
    ends = np.concatenate([values - np.nan_to_num(half), values + np.nan_to_num(half)])
    fig = blank(120 + 30 * len(seen), "").update_layout(showlegend=False)
    finite = ends[np.isfinite(ends)]
    set_linear(fig.layout.xaxis, name, unit, float(finite.min()), float(finite.max()))
    rows = list(range(len(seen)))
    told = [with_error(v, h / Z95) for v, h in zip(values, half, strict=True)]
    fig.add_trace(
        go.Scatter(
            x=values, y=rows, mode="markers", marker={"color": BLUE, "size": 9}, customdata=told,
            error_x={"type": "data", "array": half, "color": BLUE, "thickness": 1.5, "width": 0},
            hovertemplate=f"{name} %{{customdata}} {unit}<extra></extra>",
        )
    )  # fmt: skip
    names = [plain(short(one.subject, 30)) for one in seen]
    fig.layout.yaxis.update(tickvals=rows, ticktext=names, range=[len(rows) - 0.4, -0.6], automargin=True)
    return _captioned(fig, seen[0], "of every model, with 95 % intervals where there are errors")


def _distribution(seen: Sequence[Seen]) -> Drawn:
    """Every sample of the first and the last subject, or of the few there are."""
    shown = seen if len(seen) <= MOST_LINES else (seen[0], seen[-1])
    samples = {_name(one): one.value for one in shown}
    name, unit = _label(seen[0]), seen[0].unit
    fig = strips(samples, {key: _mean(value) for key, value in samples.items()}, name=name, unit=unit)
    axis = seen[0].entry.quantity.per[0]
    return _captioned(
        fig, seen[0], f"per {axis}, a dot each, with the middle half and the mean", lost(shown[-1].value, "dots")
    )


def _bars(one: Seen) -> Drawn:
    """A bar for every name along the axis."""
    quantity = one.entry.quantity
    fig = bars(
        [str(place) for place in one.places[0] or ()],
        one.value,
        one.half,
        name=_label(one),
        unit=one.unit,
        error=" (95 %)",
    )
    return _captioned(fig, one, f"per {quantity.per[0]} of {_name(one)}", lost(one.value, "bars"))


def _lines(seen: Sequence[Seen]) -> Drawn:
    """A line along a numbered axis for every subject, or for the first and the last."""
    shown = seen if len(seen) <= MOST_LINES else (seen[0], seen[-1])
    quantity, label = seen[0].entry.quantity, _label(seen[0])
    fig = blank(330, "").update_layout(showlegend=len(shown) > 1)
    every = np.concatenate([one.value for one in shown])
    ends = [
        edge for one in shown if np.isfinite(one.half).any() for edge in (one.value - one.half, one.value + one.half)
    ]
    floor = set_scale(fig.layout.yaxis, label, seen[0].unit, every, *ends)
    across = []
    for one, colour in zip(shown, PALETTE, strict=False):
        places = one.places[0] if one.places[0] is not None else range(1, len(one.value) + 1)
        x = np.asarray(list(places), dtype=np.float64)
        across.append(x)
        y = np.where(one.value > floor, one.value, np.nan)
        error = {"type": "data", "array": one.half, "color": colour, "thickness": 1, "width": 0}
        fig.add_trace(
            go.Scatter(
                x=x, y=y, error_y=error, mode="lines+markers", name=plain(_name(one)), line={"color": colour, "width": 1.6},
                marker={"color": colour, "size": 5 if len(x) < 60 else 3}, connectgaps=False,
                hovertemplate=f"{quantity.per[0]} %{{x:.4g}}<br>{label} %{{y:.4g}} {one.unit}<extra></extra>",
            )
        )  # fmt: skip
    x = np.concatenate(across)
    set_linear(fig.layout.xaxis, quantity.per[0], "", float(x.min()), float(x.max()))
    return _captioned(fig, seen[0], f"along {quantity.per[0]}", lost(every, "values"))


def _heat(one: Seen) -> Drawn | None:
    """A cell for every pair of places; on x and y a plane of equal units."""
    quantity, (rows, columns) = one.entry.quantity, one.value.shape
    if min(rows, columns) < 2:
        return None
    is_plane = quantity.per == ("x", "y")
    z = one.value.T if is_plane else one.value
    x, y = one.places if is_plane else one.places[::-1]
    heading = {"text": one.unit or "value", "font": {"size": 13, "color": MUTED}}
    fig = blank(160 + max(240, min(26 * len(z), 460)), "").update_layout(plot_bgcolor=HOLE)
    fig.add_trace(
        go.Heatmap(
            x=_along(x, z.shape[1]), y=_along(y, z.shape[0]), z=np.where(np.isfinite(z), z, np.nan), colorscale=COLOURS,
            hovertemplate=f"%{{x}}, %{{y}}<br>{_label(one)} %{{z:.4g}} {one.unit}<extra></extra>",
            colorbar={"title": heading, "thickness": 13, "outlinewidth": 0},
        )
    )  # fmt: skip
    names = quantity.per if is_plane else quantity.per[::-1]
    for axis, name in zip((fig.layout.xaxis, fig.layout.yaxis), names, strict=True):
        axis.update(title={"text": name}, showgrid=False, automargin=True, ticks="", linecolor=RULE)
    if is_plane:
        fig.layout.yaxis.update(scaleanchor="x", constrain="domain")
        fig.layout.xaxis.constrain = "domain"
    else:
        fig.layout.yaxis.autorange = "reversed"
    return _captioned(fig, one, f"per {' and '.join(quantity.per)} of {_name(one)}", lost(z, "cells"))


def _along(places: Sequence[Any] | None, size: int) -> list[Any]:
    if places is None:
        return list(range(size))
    return (
        list(map(float, places)) if _are_numbers(places) else [plain(name) for name in labels(list(map(str, places)))]
    )


def _captioned(fig: go.Figure, one: Seen, how: str, gone: str = "") -> Drawn:
    label = _label(one)
    return Drawn(titled(fig, plain(label[:1].upper() + label[1:])), f"The {label} {how}{f'; {gone}' if gone else ''}.")


def _label(one: Seen) -> str:
    return one.entry.quantity.label if one.entry.quantity.name != "*" else one.entry.name


def _name(one: Seen) -> str:
    if one.step is None or str(one.step) in one.subject:
        return short(one.subject, 30)
    return f"{short(one.subject, 20)}, step {one.step:,}"


def _mean(sample: Float[np.ndarray, " n"]) -> Mark:
    finite = sample[np.isfinite(sample)]
    if not finite.size:
        return Mark(math.nan, math.nan, math.nan)
    half = Z95 * finite.std(ddof=1) / math.sqrt(finite.size) if finite.size > 1 else math.nan
    return Mark(float(finite.mean()), float(finite.mean() - half), float(finite.mean() + half))


def _has_steps(seen: Sequence[Seen]) -> bool:
    steps = [one.step for one in seen]
    return None not in steps and len(set(steps)) == len(steps)


def _are_numbers(places: Sequence[Any]) -> bool:
    return all(isinstance(place, (int, float, np.number)) for place in np.asarray(places).ravel().tolist())
