"""Figures of documented arrays: a result, or a mapping of arrays by their documented names, to a plotly `Figure`.

None changes what it is given. Values that are not finite are holes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..linalg.quadrature import SpectralDensity
from .drawing import (
    Z95,
    Column,
    Data,
    arrays,
    band,
    check_lengths,
    curve,
    lost,
    numbers_of,
    put_on_steps,
    reaches,
    scalar,
    set_scale,
    titled,
)  # fmt: skip
from .names import plain
from .numbers import counted, number, setting, with_error
from .path_figures import barrier
from .plane_figures import Plane, Shades, contour, plane_of, shades, surface, walk_of
from .spectrum_figures import spectrum
from .theme import BLUE, GREEN, INK, MUTED, PURPLE, TEMPLATE, VERMILION, blank, place, round_ticks, set_linear, set_log

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

    summary_data: `step` (n,), `baseline_loss` (n,) in nats, and the metric (n,), nan where a step has none: a gap.
    Drawn where they are there: `<metric>_stderr` (n,) as 95 % intervals, and for mean and median the band from
    `p10_delta_loss` to `p90_delta_loss`, which holds 80 % of the directions. metric: a key of FLATNESS_METRICS.
    An axis is logarithmic where its values are positive and spread over two decades or more. The `customdata` of a point is
    its step.

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

    epoch_data: `delta_losses` (n,) and `baseline_loss`. Drawn where they are there: `delta_losses_negative` (n,), the
    step along -d, as an outline; the standard error `mean_delta_loss_stderr`; and `expected_delta_loss`,
    eps^2 tr(H) / 2P. Mean and median are over finite values unless they are given. The title has the flatness ratio,
    the share of directions whose loss rises by less than a tenth of the baseline (0.1 nats where that is not positive),
    and counts what is not finite. At most 30 bins, common to both sides. epoch: the step of training.

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


def render_contour(
    plane: Data, trajectory: Mapping[str, Any] | None = None, title: str | None = None, current: int | None = None,
    height: int = 480, scale: Shades | None = None,
) -> go.Figure:  # fmt: skip
    """The loss (nats) over a plane as filled contours; a star at the centre, crosses where it is not finite.

    plane: `grid_losses` (n, m), `axis_values` (n,) of the first direction (horizontal), `axis_values_2` (m,) of the
    second (vertical), and, shown where they are there, `axis_names`, `relative_displacement` (2,) and `baseline_loss`.
    trajectory: `coordinates` (k, 2) in the unit of the axes and `step` (k,), a line with a dot per step; the step
    `current` is a large dot, where it is among them. scale: of the colours; by itself logarithmic where all finite losses
    are positive and spread over two decades.

    Raises ValueError for a missing key and shapes that do not fit.

    >>> plane = {"grid_losses": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "axis_values": [0, 1], "axis_values_2": [0, 1, 2]}
    >>> render_contour(plane).data[0].z.tolist()                  # rows are values of the second direction
    [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
    """
    seen = plane_of(plane)
    fig = contour(seen, scale or shades(seen.losses, "nats"), walk_of(trajectory), current, height)
    return titled(fig, plain(title) if title else "Loss over a plane", _about(seen))


def render_surface(
    plane: Data, title: str | None = None, trajectory: Mapping[str, Any] | None = None, log: bool | None = None,
    current: int | None = None, height: int = 560,
) -> go.Figure:  # fmt: skip
    """The loss (nats) over a plane as a surface in three dimensions, open where the loss is not finite.

    plane, trajectory, current: as for `render_contour`. The trajectory is drawn at its `losses` (k,) where it has them,
    else on the surface, interpolated between grid points, and not at all outside it. log: whether height and colour
    are logarithmic; None: where all finite losses are positive and spread over two decades.

    Raises ValueError for a missing key, shapes that do not fit, and `log=True` with a loss that is not positive.
    """
    seen, walk = plane_of(plane), walk_of(trajectory)
    heights = None if trajectory is None or trajectory.get("losses") is None else numbers_of(trajectory, "losses")
    fig = surface(seen, shades(seen.losses, "nats", log), walk, heights, current, height)
    return titled(fig, plain(title) if title else "Loss over a plane", _about(seen))


def render_barrier(
    path: Data, *others: Data, names: Sequence[str] | None = None, title: str | None = None, height: int = 420
) -> go.Figure:
    """The loss (nats) along paths between two models, each with its chord, and its barrier where it is largest.

    path, others: `coefficients` (n,), `losses` (n,), and, drawn where they are there, `stderr` (n,) as 95 % intervals, and
    `excess` (n,), the loss minus the chord, with its standard error `excess_stderr` (n,), or that of the barrier,
    `barrier_linear_stderr`. Below the title: the barrier, the largest excess over the chord, and `barrier_max` with its
    error where it is there. Without a number that is not nan the barrier is undefined. names: one per path; its `kind`
    otherwise.

    Raises ValueError for a missing key, arrays of different lengths, and a count of names that differs.
    """
    fig, notes = barrier([path, *others], names, "nats", height)
    return titled(fig, plain(title) if title else "Loss along a path between two models", *notes)


def render_spectrum_density(
    density: SpectralDensity, eigenvalues: Any = None, *, title: str | None = None,
    unit: str = "nats per unit of distance²",
) -> go.Figure:  # fmt: skip
    """The density of a spectrum (share of eigenvalues per decade) with its 95 % interval, and single eigenvalues below.

    density: what `spectral_density` returns. eigenvalues: what `eigenpairs` returns, or anything with `values` and
    `residuals` (k,); without it, the outermost nodes of the quadrature, which lie inside the spectrum. unit: of the
    eigenvalues. Raises ValueError for nodes that are not finite.
    """
    values, residuals = np.array(density.range), None
    if eigenvalues is not None:
        values, residuals = (np.asarray(each, dtype=np.float64) for each in (eigenvalues.values, eigenvalues.residuals))
    told = f"{density.num_parameters:,} eigenvalues, {counted(density.num_probes, 'start')} of {density.steps} products"
    return titled(
        spectrum(density, values, residuals, plain(unit)), plain(title) if title else "Spectral density", told
    )


def render_training_curves(
    curves: Data, current_epoch: int | None = None, title: str | None = None, height: int = 470,
    checkpoints: Sequence[int] | None = None,
) -> go.Figure:  # fmt: skip
    """Loss (nats) above accuracy over training, for train and test; the current step is marked.

    curves: `step` (n,), `train_loss`, `test_loss`, `train_accuracy`, `test_accuracy` (n,), of which one loss must be
    there; nan is a gap. checkpoints: steps that get an open circle. The `customdata` of a point is its step.

    Raises ValueError for a missing key and arrays of different lengths.
    """
    data = arrays(curves, "step")
    loss, accuracy = (
        {
            side: numbers_of(data, f"{side}_{what}")
            for side in ("train", "test")
            if data.get(f"{side}_{what}") is not None
        }
        for what in ("loss", "accuracy")
    )
    if not loss:
        raise ValueError(
            f"the data must have the key 'train_loss' or 'test_loss'; they have {', '.join(map(repr, data))}."
        )
    check_lengths(data, "step", *(f"{side}_loss" for side in loss), *(f"{side}_accuracy" for side in accuracy))
    fig = make_subplots(rows=2, cols=1, row_heights=[0.62, 0.38], vertical_spacing=0.07)
    fig.update_layout(template=TEMPLATE, height=height)
    step, none = data["step"], np.full(len(data["step"]), np.nan)
    floor = set_log(fig.layout.yaxis, *loss.values())
    for row, (unit, columns) in enumerate((("nats", loss), ("", accuracy)), start=1):
        for side, values in columns.items():
            colour = BLUE if side == "train" else VERMILION
            drawn = curve(step, values, none, side, colour, unit, floor if row == 1 else -math.inf)
            for trace in drawn:
                fig.add_trace(trace.update(showlegend=row == 1, legendgroup=trace.name), row=row, col=1)
            drawn[-1].update(mode="lines")
            fig.data[-1].mode = "lines"
    at = np.isin(step, checkpoints or [])
    if at.any():
        circles = curve(step[at], next(iter(loss.values()))[at], none[at], "checkpoint", BLUE, "nats")[-1]
        fig.add_trace(circles.update(mode="markers", marker={"symbol": "circle-open", "size": 7}), row=1, col=1)
    fig.layout.yaxis.title.text = "loss (nats)"
    fig.layout.yaxis2.update(title={"text": "accuracy"}, range=[-0.04, 1.04], tickvals=[0, 0.5, 1])
    put_on_steps(fig, step, current_epoch, rows=(1, 2))
    return titled(fig, plain(title) if title else "Training")


def _marked(data: Mapping[str, Any], values: Column) -> list[tuple[float, str, str, str]]:
    """Mean, median and expectation: value, text, colour and dash."""
    finite = values[np.isfinite(values)]
    mean, median = scalar(data, "mean_delta_loss"), scalar(data, "median_delta_loss")
    if finite.size:
        mean = mean if "mean_delta_loss" in data else float(finite.mean())
        median = median if "median_delta_loss" in data else float(np.median(finite))
    marks = [
        (mean, f"mean {with_error(mean, scalar(data, 'mean_delta_loss_stderr'))}", VERMILION, "solid"),
        (median, f"median {number(median)}", GREEN, "dash"),
    ]
    if "expected_delta_loss" in data:
        expected = scalar(data, "expected_delta_loss")
        said = with_error(expected, scalar(data, "expected_delta_loss_stderr"))
        marks.append((expected, f"ε² tr(H) / 2P = {said}", PURPLE, "dot"))
    return marks


def _edges(finite: Column, ends: Sequence[float]) -> Column:
    """Of the bins: 2 sqrt(n) of them, 30 at most; a single narrow one where all values are equal."""
    low, high = float(finite.min()), float(finite.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = 0.02 * (ends[1] - ends[0])
        return np.array([low - half, high + half])
    return np.linspace(low, high, min(MOST_BINS, math.ceil(2 * math.sqrt(finite.size))) + 1)


def _add_counts(fig: go.Figure, sides: Mapping[str, Column], edges: Column) -> int:
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


def _told(data: Mapping[str, Any], sides: Mapping[str, Column]) -> str:
    values, baseline, ratio = sides["+d"], scalar(data, "baseline_loss"), scalar(data, "flatness_ratio")
    if "flatness_ratio" not in data and values.size:
        ratio = float(np.mean(np.isfinite(values) & (values < 0.1 * (baseline if baseline > 0 else 1.0))))
    parts = [counted(len(values), "direction"), f"flatness ratio {number(ratio)}", f"loss {number(baseline)} nats"]
    parts += [f"ε = {setting(scalar(data, 'epsilon'))}"] if "epsilon" in data else []
    gone = {side: int((~np.isfinite(x)).sum()) for side, x in sides.items()}
    return ", ".join([*parts, *(f"{count} of {side} not finite" for side, count in gone.items() if count)])


def _about(plane: Plane) -> str:
    finite = plane.losses[np.isfinite(plane.losses)]
    told = [f"centre {number(plane.centre)}"] if math.isfinite(plane.centre) else []
    ends = [f"from {number(float(each.min()))} to {number(float(each.max()))} nats" for each in [finite] if each.size]
    return ", ".join([*told, *(ends or ["no finite loss"]), *filter(None, [lost(plane.losses, "points")])])
