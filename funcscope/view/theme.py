"""How figures look: a colour-blind-safe palette, a plain template, and the axis of training steps they share."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Real

from .numbers import power_of_ten

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
"""Of Okabe and Ito (2008), Color universal design."""
INK, MUTED, RULE, GRID = "#1b1b1b", "#666666", "#9a9a9a", "#ebebeb"

_AXIS = {
    "linecolor": RULE, "linewidth": 1, "showline": True, "ticks": "outside", "ticklen": 4, "tickcolor": RULE,
    "zeroline": False, "fixedrange": True, "title": {"standoff": 10, "font": {"size": 13, "color": MUTED}},
}  # fmt: skip

TEMPLATE = go.layout.Template(
    layout={
        "font": {
            "family": "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif",
            "size": 13,
            "color": INK,
        },
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 62, "r": 24, "t": 70, "b": 52},
        "xaxis": {**_AXIS, "showgrid": False},
        "yaxis": {**_AXIS, "gridcolor": GRID, "showline": False, "ticks": ""},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"},
        "hoverlabel": {"bgcolor": "white", "bordercolor": RULE, "font": {"color": INK}},
        "hovermode": "closest",
        "dragmode": False,
    }
)


def place(steps: Real[np.ndarray, " n"]) -> Real[np.ndarray, " n"]:
    """Positions of training steps on their axis.

    >>> place(np.array([0, 25, 100])).tolist()
    [0.0, 5.0, 10.0]
    """
    return np.sqrt(steps.astype(np.float64))


def step_ticks(last: int, gap: float = 0.1) -> list[int]:
    """0, then round steps (1, 2 or 5 times a power of ten) at least a `gap` of the axis apart.

    >>> step_ticks(5000)
    [0, 50, 200, 500, 1000, 2000, 5000]
    """
    rounds = (digit * 10**power for power in range(int(math.log10(max(last, 1))) + 1) for digit in (1, 2, 5))
    ticks = [0]
    for step in rounds:
        if step <= last and math.sqrt(step) - math.sqrt(ticks[-1]) >= gap * math.sqrt(last):
            ticks.append(step)
    return ticks


def blank(height: int, y_title: str) -> go.Figure:
    """An empty figure in this style; height in pixels, the width is that of the page."""
    return go.Figure(layout={"template": TEMPLATE, "height": height, "yaxis": {"title": {"text": y_title}}})


def set_log(axis: go.layout.XAxis | go.layout.YAxis, *values: Real[np.ndarray, "..."]) -> float:
    """Make an axis logarithmic over the positive finite values, and return its lower end.

    Without such a value the axis stays linear, and -inf is returned.
    """
    flat = np.concatenate([value.ravel() for value in values])
    positive = np.log10(flat[np.isfinite(flat) & (flat > 0)])
    if not positive.size:
        return -math.inf
    low, high = float(positive.min()), float(positive.max())
    pad = 0.05 * max(high - low, 1)
    stride = "D2" if high - low < 1.5 else math.ceil((high - low) / 6)  # 1, 2, 5, or powers of ten
    axis.update(type="log", range=[low - pad, high + pad], dtick=stride, tick0=0, exponentformat="power")
    axis.tickfont.size = 10.5  # plotly writes powers a quarter larger
    return float(10 ** (low - pad))


def set_linear(axis: go.layout.XAxis | go.layout.YAxis, name: str, unit: str, low: float, high: float) -> None:
    """Give an axis the range from low to high with some air, round ticks, and a title with its unit.

    Where the ticks would be very large or small, the title has their power of ten.
    """
    wide = high - low > 1e-9 * max(abs(low), abs(high))
    pad = 0.05 * (high - low) if wide else 0.05 * abs(high) or 1.0
    ticks = round_ticks(low - pad, high + pad)
    power = _common_power(ticks)
    decimals = max(0, power - math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    labels = [f"{tick / 10.0**power:.{decimals}f}".replace("-", "−") for tick in ticks]
    unit = unit if power == 0 else f"{power_of_ten(power)} {unit}".rstrip()
    title = f"{name} ({unit})" if unit else name
    axis.update(
        range=[low - pad, high + pad], tickvals=ticks, ticktext=labels, title={"text": wrapped(title)}, automargin=True
    )


def wrapped(title: str) -> str:
    """A title in lines that a narrow figure has room for.

    >>> wrapped("share of directions in which the loss rises (share)")
    'share of directions in which the<br>loss rises (share)'
    """
    return "<br>".join(line for part in title.split("<br>") for line in textwrap.wrap(part, 34))


def round_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between low and high: at most `most`, and two at least.

    >>> round_ticks(-0.13, 0.31), round_ticks(2e7, 9e7)
    ([-0.1, 0.0, 0.1, 0.2, 0.3], [20000000.0, 40000000.0, 60000000.0, 80000000.0])
    """
    power = math.floor(math.log10((high - low) / most))
    for step in (digit * 10.0 ** (power + more) for more in (0, 1) for digit in (1, 2, 5)):
        places = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        if len(places) <= most:
            break
    return [float(f"{place * step:.12g}") for place in places]


def _common_power(ticks: Sequence[float]) -> int:
    power = math.floor(math.log10(max(map(abs, ticks))))
    return 0 if -3 < power < 5 else power
