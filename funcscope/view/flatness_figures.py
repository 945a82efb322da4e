"""Flatness as documented: a metric over training, and the loss changes of one step as a histogram."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    lost,
    put_on_steps,
    reaches,
    set_scale,
    titled,
)
from .names import plain
from .numbers import number, setting, with_error
from .theme import BLUE, GREEN, INK, MUTED, PURPLE, VERMILION, blank, place, set_linear

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
    ([0.0, 10.0], [0.2, nan])
    """
    if metric not in FLATNESS_METRICS:
        raise ValueError(f"`metric` must be one of {', '.join(FLATNESS_METRICS)}, got {metric!r}.")
    data = arrays(summary_data, "step", "baseline_loss", metric)
    check_lengths(data, "step", "baseline_loss", metric)
    steps, value, is_share = data["step"], data[metric], metric in SHARES
    label, unit, none = FLATNESS_METRICS[metric], "" if is_share else "nats", np.full(len(steps), np.nan)
    ends = ("p10_delta_loss", "p90_delta_loss")
    around = [data[name] for name in ends if metric in BANDED and set(ends) <= data.keys()]
    half = Z95 * data.get(f"{metric}_stderr", none)
    fig, floor = blank(height, label), -math.inf
    if is_share:
        fig.layout.yaxis.update(range=[-0.04, 1.04], tickvals=[0, 0.25, 0.5, 0.75, 1])
    else:
        floor = set_scale(fig.layout.yaxis, label, unit, value, value - half, value + half, *around)
    fig.layout.yaxis.title.update(
        text=f"{fig.layout.yaxis.title.text}<br>{'higher' if is_share else 'lower'} is flatter", standoff=6
    )
    fig.update_layout(yaxis2={"overlaying": "y", "side": "right", "showgrid": False, "tickfont": {"color": MUTED}})
    loss = data["baseline_loss"]
    edge = set_scale(fig.layout.yaxis2, "loss", "nats", loss)
    beside = curve(steps, loss, none, "loss without a step", MUTED, "nats", edge, dash="dash")
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

    >>> data = {"baseline_loss": 1.0, "delta_losses": [0.1, 0.2, 0.2]}
    >>> render_perturbation_distribution(data, 40).data[0].x.tolist()
    [0.1, 0.2, 0.2]
    """
    data = arrays(epoch_data, "delta_losses", "baseline_loss")
    sides = {"+d": data["delta_losses"], "−d": data.get("delta_losses_negative", np.empty(0))}
    finite = {side: values[np.isfinite(values)] for side, values in sides.items()}
    marks, every = _marked(data, finite["+d"]), np.concatenate(list(finite.values()))
    seen = np.append(every, [value for value, *_ in marks if math.isfinite(value)] or [-1.0, 1.0])
    fig = blank(height, "directions").update_layout(bargap=0.04, barmode="overlay", margin={"l": 58})
    set_linear(fig.layout.xaxis, "loss change", "nats", float(seen.min()), float(seen.max()))
    low, high = (float(every.min()), float(every.max())) if every.size else (0.0, 0.0)
    width = (high - low) / min(MOST_BINS - 1, math.ceil(2 * math.sqrt(every.size)) or 1)
    width = width if high - low > 1e-9 * max(abs(low), abs(high)) else 0.04 * float(np.ptp(fig.layout.xaxis.range))
    bins = {"start": low - width / 2, "end": high + width / 2, "size": width}
    looks = {"color": BLUE, "opacity": 0.6}, {"color": "rgba(0,0,0,0)", "line": {"color": INK, "width": 1.3}}
    for (side, values), look in zip(finite.items(), looks, strict=True):
        hover = f"{side}: %{{x}} nats<br>%{{y}} directions<extra></extra>"
        fig.add_histogram(x=values, xbins=bins, name=side, marker=look, hovertemplate=hover, visible=values.size > 0)
    for value, text, colour, dash in marks:
        line, x = {"color": colour, "width": 2, "dash": dash}, [value, value] if math.isfinite(value) else [None, None]
        upright = go.Scatter(x=x, y=[0, 1], yaxis="y2", mode="lines", line=line, name=text)
        fig.add_trace(upright.update(hovertemplate=f"{text} nats<extra></extra>"))
    fig.update_layout(yaxis={"nticks": 4}, yaxis2={"overlaying": "y", "visible": False, "range": [0, 1]})
    shown = plain(title) if title else f"Loss change along random directions, step {epoch:,}"
    return titled(fig, shown, _told(data, sides))


def _marked(data: Mapping[str, Any], finite: Column) -> list[tuple[float, str, str, str]]:
    """Mean, median and expectation: value, text, colour and dash."""
    own = {"mean_delta_loss": finite.mean(), "median_delta_loss": np.median(finite)} if finite.size else {}
    mean, median, expected = (
        (float({**own, **data}.get(name, np.nan)), float(data.get(f"{name}_stderr", np.nan)))
        for name in ("mean_delta_loss", "median_delta_loss", "expected_delta_loss")
    )
    marks = [
        (mean[0], f"mean {with_error(*mean)}", VERMILION, "solid"),
        (median[0], f"median {number(median[0])}", GREEN, "dash"),
        (expected[0], f"ε² tr(H) / 2P = {with_error(*expected)}", PURPLE, "dot"),
    ]
    return marks if "expected_delta_loss" in data else marks[:2]


def _told(data: Mapping[str, Any], sides: Mapping[str, Column]) -> str:
    values, baseline = sides["+d"], float(data["baseline_loss"])
    flat = np.isfinite(values) & (values < 0.1 * (baseline if baseline > 0 else 1.0))
    ratio = float(data.get("flatness_ratio", flat.mean() if values.size else np.nan))
    parts = [counted(len(values), "direction"), f"flatness ratio {number(ratio)}", f"loss {number(baseline)} nats"]
    parts += [f"ε = {setting(float(data['epsilon']))}"] if "epsilon" in data else []
    return ", ".join([*parts, *filter(None, (lost(x, f"of {side}") for side, x in sides.items()))])
