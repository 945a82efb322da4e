"""Flatness as documented: a metric over training, and the loss changes of one step as a histogram."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ..core.tables import counted
from .drawing import (
    Z95,
    Column,
    Data,
    arrays,
    band,
    check_lengths,
    curve,
    numbers_of,
    put_on_steps,
    reaches,
    scalar,
    set_scale,
    titled,
)  # fmt: skip
from .names import plain
from .numbers import number, setting, with_error
from .theme import BLUE, GREEN, INK, MUTED, PURPLE, VERMILION, blank, place, round_ticks, set_linear

FLATNESS_METRICS = {
    "mean_delta_loss": "mean loss change",
    "median_delta_loss": "median loss change",
    "max_delta_loss": "largest loss change",
    "flatness_ratio": "flatness ratio",
    "p90_delta_loss": "90th percentile of loss changes",
    "std_delta_loss": "standard deviation of loss changes",
    "p10_delta_loss": "10th percentile of loss changes",
    "pair_mean": "mean loss change of ±d pairs",
    "flatness_fraction": "share of flat directions",
}
"""Metrics of the flatness over training, and their labels."""
SHARES = ("flatness_ratio", "flatness_fraction")
"""Metrics that are shares of directions: higher is flatter. All others are nats: lower is flatter."""
BANDED = ("mean_delta_loss", "median_delta_loss")
MOST_BINS = 30


def render_flatness_trajectory(
    summary_data: Data, current_epoch: int, metric: str = "mean_delta_loss", title: str | None = None, height: int = 400
) -> go.Figure:
    """A flatness metric over training, with its uncertainty, beside the loss itself; the current step is marked.

    summary_data: `step` (n,), `baseline_loss` (n,) in nats, and the metric (n,), a key of FLATNESS_METRICS; where they are
    there, `<metric>_stderr` (n,) as 95 % intervals, and for mean and median the band from `p10_delta_loss` to
    `p90_delta_loss`, which holds 80 % of the directions. The `customdata` of a point is its step.

    Raises ValueError for an unknown metric, a missing key, and arrays of different lengths.

    >>> data = {"step": [0, 10], "baseline_loss": [4.7, 0.1], "mean_delta_loss": [0.2, float("nan")]}
    >>> fig = render_flatness_trajectory(data, 10)
    >>> fig.data[-1].customdata.tolist(), fig.data[-1].y.tolist()
    ([0, 10], [0.2, nan])
    """
    if metric not in FLATNESS_METRICS:
        raise ValueError(f"`metric` must be one of {', '.join(FLATNESS_METRICS)}, got {metric!r}.")
    data = arrays(summary_data, "step", "baseline_loss", metric)
    check_lengths(data, "step", "baseline_loss", metric)
    steps, value, is_share = data["step"], numbers_of(data, metric), metric in SHARES
    label, unit = FLATNESS_METRICS[metric], "" if is_share else "nats"
    half = Z95 * numbers_of(data, f"{metric}_stderr") if f"{metric}_stderr" in data else np.full(value.shape, np.nan)
    banded = metric in BANDED and {"p10_delta_loss", "p90_delta_loss"} <= data.keys()
    around = [numbers_of(data, name) for name in ("p10_delta_loss", "p90_delta_loss") if banded]
    fig, floor = blank(height, label), -math.inf
    if is_share:
        fig.layout.yaxis.update(range=[-0.04, 1.04], tickvals=[0, 0.25, 0.5, 0.75, 1])
    else:
        floor = set_scale(fig.layout.yaxis, label, unit, value, value - half, value + half, *around)
    fig.layout.yaxis.title.text += f"<br>{'higher' if is_share else 'lower'} is flatter"
    fig.layout.yaxis.title.standoff = 6
    fig.update_layout(yaxis2={"overlaying": "y", "side": "right", "showgrid": False, "tickfont": {"color": MUTED}})
    loss = numbers_of(data, "baseline_loss")
    edge = set_scale(fig.layout.yaxis2, "loss", "nats", loss)
    beside = curve(steps, loss, np.full(loss.shape, np.nan), "loss without a step", MUTED, "nats", edge, dash="dash")
    fig.add_traces([trace.update(yaxis="y2") for trace in beside])
    if around:
        fig.add_trace(band(place(steps), around[0], around[1], "10th to 90th percentile", BLUE, floor))
    fig.add_traces(curve(steps, value, half, label, BLUE, unit, floor))
    put_on_steps(fig, steps, current_epoch)
    fig.layout.margin.update(l=78, r=70)
    note = reaches(np.concatenate([value - half, *around]), floor) if np.isfinite(value).any() else "no finite value"
    return titled(fig, plain(title) if title else f"Flatness over training: {label}", note)


def render_perturbation_distribution(
    epoch_data: Data, epoch: int, title: str | None = None, height: int = 350
) -> go.Figure:
    """How the loss changes (nats) of one step are spread over its directions: a histogram with mean and median.

    epoch_data: `delta_losses` (n,) and `baseline_loss`; where they are there, `delta_losses_negative` (n,), the step along
    -d, as an outline, `mean_delta_loss_stderr`, and `expected_delta_loss`, eps^2 tr(H) / 2P. The title has the flatness
    ratio, the share of directions whose loss rises by less than a tenth of the baseline (0.1 nats where that is not
    positive), and counts what is not finite. At most 30 bins, common to both sides. epoch: the step of training.

    Raises ValueError for a missing key.

    >>> fig = render_perturbation_distribution({"baseline_loss": 1.0, "delta_losses": [0.1, 0.2, 0.2]}, 40)
    >>> int(sum(fig.data[0].y))
    3
    """
    data = arrays(epoch_data, "delta_losses", "baseline_loss")
    sides = {"+d": numbers_of(data, "delta_losses")}
    if "delta_losses_negative" in data:
        sides["−d"] = numbers_of(data, "delta_losses_negative")
    marks = _marked(data, sides["+d"])
    finite = np.concatenate([values[np.isfinite(values)] for values in sides.values()])
    seen = np.append(finite, [value for value, *_ in marks if math.isfinite(value)] or [-1.0, 1.0])
    fig = blank(height, "directions").update_layout(bargap=0.04, margin={"l": 58})
    set_linear(fig.layout.xaxis, "loss change", "nats", float(seen.min()), float(seen.max()))
    top = 1.06 * max(1, 0 if not finite.size else _add_counts(fig, sides, _edges(finite, fig.layout.xaxis.range)))
    for value, text, colour, dash in marks:
        line, x = {"color": colour, "width": 2, "dash": dash}, [value, value] if math.isfinite(value) else [None, None]
        upright = go.Scatter(x=x, y=[0, top], mode="lines", line=line, name=text)
        fig.add_trace(upright.update(hovertemplate=f"{text} nats<extra></extra>"))
    fig.layout.yaxis.update(range=[0, top], tickvals=[tick for tick in round_ticks(0.0, top) if tick.is_integer()])
    shown = plain(title) if title else f"Loss change along random directions, step {epoch:,}"
    return titled(fig, shown, _told(data, sides))


def _marked(data: Mapping[str, Any], values: Column) -> list[tuple[float, str, str, str]]:
    """Mean, median and expectation: value, text, colour and dash."""
    finite = values[np.isfinite(values)]
    own = {"mean_delta_loss": finite.mean(), "median_delta_loss": np.median(finite)} if finite.size else {}
    mean, median = (scalar({**own, **data}, name) for name in ("mean_delta_loss", "median_delta_loss"))
    marks = [
        (mean, f"mean {with_error(mean, scalar(data, 'mean_delta_loss_stderr'))}", VERMILION, "solid"),
        (median, f"median {number(median)}", GREEN, "dash"),
    ]
    if "expected_delta_loss" in data:
        expected = scalar(data, "expected_delta_loss")
        said = with_error(expected, scalar(data, "expected_delta_loss_stderr"))
        marks.append((expected, f"ε² tr(H) / 2P = {said}", PURPLE, "dot"))
    return marks


def _edges(finite: Column, ends: Sequence[float]) -> np.ndarray:
    """Of the bins: 2 sqrt(n) of them, 30 at most; a single narrow one where all values are equal."""
    low, high = float(finite.min()), float(finite.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = 0.02 * (ends[1] - ends[0])
        return np.array([low - half, high + half])
    return np.linspace(low, high, min(MOST_BINS, math.ceil(2 * math.sqrt(finite.size))) + 1)


def _add_counts(fig: go.Figure, sides: Mapping[str, np.ndarray], edges: np.ndarray) -> int:
    """A bar per bin for the first side, an outline for the second; returns the largest count."""
    counts = [np.histogram(values[np.isfinite(values)], edges)[0] for values in sides.values()]
    bars = go.Bar(
        x=(edges[1:] + edges[:-1]) / 2, y=counts[0], width=np.diff(edges), name="+d", marker={"color": BLUE},
        opacity=0.6, customdata=np.column_stack([edges[:-1], edges[1:]]),
        hovertemplate="%{customdata[0]:.4g} to %{customdata[1]:.4g} nats<br>%{y} directions<extra></extra>",
    )  # fmt: skip
    fig.add_trace(bars)
    if len(counts) > 1:
        y, line = np.concatenate([[0], np.repeat(counts[1], 2), [0]]), {"color": INK, "width": 1.3}
        fig.add_trace(go.Scatter(x=np.repeat(edges, 2), y=y, mode="lines", line=line, name="−d", hoverinfo="skip"))
    return int(max(side.max() for side in counts))


def _told(data: Mapping[str, Any], sides: Mapping[str, np.ndarray]) -> str:
    values, baseline, ratio = sides["+d"], scalar(data, "baseline_loss"), scalar(data, "flatness_ratio")
    if "flatness_ratio" not in data and values.size:
        ratio = float(np.mean(np.isfinite(values) & (values < 0.1 * (baseline if baseline > 0 else 1.0))))
    parts = [counted(len(values), "direction"), f"flatness ratio {number(ratio)}", f"loss {number(baseline)} nats"]
    parts += [f"ε = {setting(scalar(data, 'epsilon'))}"] if "epsilon" in data else []
    gone = {side: int((~np.isfinite(x)).sum()) for side, x in sides.items()}
    return ", ".join([*parts, *(f"{count} of {side} not finite" for side, count in gone.items() if count)])
