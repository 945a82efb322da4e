"""Figures of flatness: a metric over training, and the loss changes of one step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from .drawing import (
    Column,
    Data,
    arrays,
    band,
    check_lengths,
    numbers_of,
    over_training,
    put_on_steps,
    scalar,
    set_scale,
    titled,
)
from .figures import Z95
from .numbers import counted, number, setting, with_error
from .samples import plain
from .theme import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    PURPLE,
    VERMILION,
    blank,
    place,
    round_ticks,
    set_linear,
)

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
    summary_data: Data,
    current_epoch: int,
    metric: str = "mean_delta_loss",
    title: str | None = None,
    height: int = 400,
) -> go.Figure:
    """A flatness metric over training, with its uncertainty, beside the loss itself; the current step is marked.

    summary_data: `step` (n,), `baseline_loss` (n,) in nats, and the metric (n,), nan where a step has none: a gap.
    Drawn where they are there: `<metric>_stderr` (n,) as bars of 1.96 standard errors, and for mean and median the band
    from `p10_delta_loss` to `p90_delta_loss`, which holds 80 % of the directions. metric: a key of FLATNESS_METRICS.
    height in pixels. An axis is logarithmic where its values are positive and spread over two decades or more. The
    `customdata` of a point is its step.

    Raises ValueError for an unknown metric, a missing key, and arrays of different lengths.

    >>> data = {"step": [0, 10], "baseline_loss": [4.7, 0.1], "mean_delta_loss": [0.2, float("nan")]}
    >>> fig = render_flatness_trajectory(data, 10)
    >>> fig.data[-1].customdata.tolist(), fig.data[-1].y.tolist()
    ([0, 10], [0.2, nan])
    """
    if metric not in FLATNESS_METRICS:
        raise ValueError(f"`metric` must be one of {', '.join(FLATNESS_METRICS)}, got {metric!r}.")
    data = arrays(summary_data, "step", "baseline_loss", metric)
    steps, value = data["step"], numbers_of(data, metric)
    check_lengths(data, "step", "baseline_loss", metric)
    is_share = metric in SHARES
    label, unit = FLATNESS_METRICS[metric], "" if is_share else "nats"
    ends = numbers_of(data, f"{metric}_stderr") * Z95 if f"{metric}_stderr" in data else np.full(value.shape, np.nan)
    banded = metric in BANDED and {"p10_delta_loss", "p90_delta_loss"} <= data.keys()
    around = [numbers_of(data, name) for name in ("p10_delta_loss", "p90_delta_loss") if banded]
    fig = blank(height, label)
    if is_share:
        fig.layout.yaxis.update(range=[-0.04, 1.04], tickvals=[0, 0.25, 0.5, 0.75, 1])
    floor = (
        -math.inf if is_share else set_scale(fig.layout.yaxis, label, unit, value, value - ends, value + ends, *around)
    )
    fig.layout.yaxis.title.text += f"<br>{'higher' if is_share else 'lower'} is flatter"
    _add_baseline(fig, steps, numbers_of(data, "baseline_loss"))
    if around:
        fig.add_trace(band(place(steps), around[0], around[1], "10th to 90th percentile", BLUE, floor))
    fig.add_traces(over_training(steps, value, ends, label, BLUE, unit, floor))
    put_on_steps(fig, steps, current_epoch)
    fig.layout.yaxis.title.standoff = 6
    fig.layout.margin.update(l=78, r=70)
    shown = plain(title) if title else f"Flatness over training: {label}"
    return titled(fig, shown, "" if np.isfinite(value).any() else "no finite value at any step")


def render_perturbation_distribution(
    epoch_data: Data, step: int, title: str | None = None, height: int = 350
) -> go.Figure:
    """How the loss changes (nats) of one step are spread over its directions: a histogram with mean and median.

    epoch_data: `delta_losses` (n,) and `baseline_loss`. Drawn where they are there: `delta_losses_negative` (n,), the
    step along -d, as an outline; the standard error `mean_delta_loss_stderr`; and `expected_delta_loss`,
    eps^2 tr(H) / 2P. Mean and median are over finite values unless they are given. The title has the flatness ratio,
    the share of directions whose loss rises by less than a tenth of the baseline (0.1 nats where that is not positive),
    and counts what is not finite. At most 30 bins, common to both sides.

    Raises ValueError for a missing key.

    >>> fig = render_perturbation_distribution({"baseline_loss": 1.0, "delta_losses": [0.1, 0.2, 0.2]}, 40)
    >>> int(sum(fig.data[0].y))
    3
    """
    data = arrays(epoch_data, "delta_losses", "baseline_loss")
    sides = {"+d": numbers_of(data, "delta_losses")}
    if "delta_losses_negative" in data:
        sides["−d"] = numbers_of(data, "delta_losses_negative")
    lines = _marked(data, sides["+d"])
    finite = np.concatenate([values[np.isfinite(values)] for values in sides.values()])
    places = np.array([value for value, *_ in lines if math.isfinite(value)])
    fig = blank(height, "directions").update_layout(bargap=0.04, margin={"l": 58})
    seen = np.concatenate([finite, places, np.empty(0) if finite.size or places.size else np.array([-1.0, 1.0])])
    set_linear(fig.layout.xaxis, "loss change", "nats", float(seen.min()), float(seen.max()))
    top = 0 if not finite.size else _add_counts(fig, sides, _edges(finite, fig.layout.xaxis.range))
    for value, text, colour, dash in lines:
        fig.add_trace(_upright(value, 1.06 * max(top, 1), text, colour, dash))
    whole = [tick for tick in round_ticks(0.0, float(max(top, 1))) if tick.is_integer()]
    fig.layout.yaxis.update(range=[0, 1.06 * max(top, 1)], tickvals=whole)
    shown = plain(title) if title else f"Loss change along random directions, step {step:,}"
    return titled(fig, shown, _told(data, sides))


def _add_baseline(fig: go.Figure, steps: np.ndarray, loss: Column) -> None:
    fig.update_layout(yaxis2={"overlaying": "y", "side": "right", "showgrid": False, "tickfont": {"color": MUTED}})
    floor = set_scale(fig.layout.yaxis2, "loss", "nats", loss)
    *below, line = over_training(steps, loss, np.full(loss.shape, np.nan), "loss without a step", MUTED, "nats", floor)
    line.update(line={"dash": "dash", "width": 1.4}, marker={"size": 4})
    fig.add_traces([trace.update(yaxis="y2") for trace in (*below, line)])


def _marked(data: Mapping[str, Any], values: Column) -> list[tuple[float, str, str, str]]:
    """Mean, median and expectation: value, text, colour and dash."""
    finite = values[np.isfinite(values)]
    mean, median = scalar(data, "mean_delta_loss"), scalar(data, "median_delta_loss")
    if finite.size:
        mean = mean if "mean_delta_loss" in data else float(finite.mean())
        median = median if "median_delta_loss" in data else float(np.median(finite))
    lines = [
        (mean, f"mean {with_error(mean, scalar(data, 'mean_delta_loss_stderr'))}", VERMILION, "solid"),
        (median, f"median {number(median)}", GREEN, "dash"),
    ]
    if "expected_delta_loss" in data:
        expected = scalar(data, "expected_delta_loss")
        said = with_error(expected, scalar(data, "expected_delta_loss_stderr"))
        lines.append((expected, f"ε² tr(H) / 2P = {said}", PURPLE, "dot"))
    return lines


def _edges(finite: Column, ends: Sequence[float]) -> Float[np.ndarray, " e"]:
    """Of the bins: 2 sqrt(n) of them, 30 at most; a single narrow one where all values are equal."""
    low, high = float(finite.min()), float(finite.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = 0.02 * (ends[1] - ends[0])
        return np.array([low - half, high + half])
    return np.linspace(low, high, min(MOST_BINS, math.ceil(2 * math.sqrt(finite.size))) + 1)


def _add_counts(fig: go.Figure, sides: Mapping[str, Column], edges: Float[np.ndarray, " e"]) -> int:
    """A bar per bin for the first side, an outline for the second; returns the largest count."""
    counts = [np.histogram(values[np.isfinite(values)], edges)[0] for values in sides.values()]
    hover = "%{customdata[0]:.4g} to %{customdata[1]:.4g} nats<br>%{y} directions<extra></extra>"
    bars = go.Bar(
        x=(edges[1:] + edges[:-1]) / 2, y=counts[0], width=np.diff(edges), name="+d", marker={"color": BLUE},
        opacity=0.6, customdata=np.column_stack([edges[:-1], edges[1:]]), hovertemplate=hover,
    )  # fmt: skip
    fig.add_trace(bars)
    if len(counts) > 1:
        y, style = np.concatenate([[0], np.repeat(counts[1], 2), [0]]), {"color": INK, "width": 1.3}
        fig.add_trace(go.Scatter(x=np.repeat(edges, 2), y=y, mode="lines", line=style, name="−d", hoverinfo="skip"))
    return int(max(side.max() for side in counts))


def _upright(value: float, top: float, name: str, colour: str, dash: str) -> go.Scatter:
    line = {"color": colour, "width": 2, "dash": dash}
    x = [value, value] if math.isfinite(value) else [None, None]
    hover = f"{name} nats<extra></extra>"
    return go.Scatter(x=x, y=[0, top], mode="lines", line=line, name=name, hovertemplate=hover)


def _told(data: Mapping[str, Any], sides: Mapping[str, Column]) -> str:
    values, baseline, ratio = sides["+d"], scalar(data, "baseline_loss"), scalar(data, "flatness_ratio")
    if "flatness_ratio" not in data and values.size:
        ratio = np.mean(np.isfinite(values) & (values < 0.1 * (baseline if baseline > 0 else 1.0)))
    parts = [f"{counted(len(values), 'direction')}", f"flatness ratio {number(float(ratio))}"]
    parts += [f"loss {number(baseline)} nats"]
    parts += [f"ε = {setting(scalar(data, 'epsilon'))}"] if "epsilon" in data else []
    lost = {side: int((~np.isfinite(x)).sum()) for side, x in sides.items()}
    parts += [f"{count} of {side} not finite" for side, count in lost.items() if count]
    return ", ".join(parts)
