"""What a panel is: what it needs, what can be chosen in it, and its plots, each drawn for one variant and step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import plotly.graph_objects as go

from ...core.store import Damaged, Outdated
from ...study.runs import Variant
from ..theme import MUTED, TEMPLATE, set_linear

UNREADABLE = (OSError, ValueError, KeyError, IndexError, TypeError)
"""What a damaged file raises, and a file of another program under one of our names."""


class Drawn(NamedTuple):
    figure: go.Figure
    caption: str = ""
    empty: bool = False
    """A placeholder: there is nothing to save."""


class View(NamedTuple):
    """Where the reader stands."""

    variant: Variant
    step: int
    options: Mapping[str, Any]


class Absent(Exception):
    """There is nothing to draw; the message says why."""


class Option(NamedTuple):
    """Something to choose in a panel: a menu, or a few radio buttons."""

    name: str
    label: str
    choices: Callable[[Variant], Mapping[Any, str]]
    preset: Callable[[Variant], Any]
    radio: bool = False


class Plot(NamedTuple):
    name: str
    label: str
    draw: Callable[[View], Drawn]
    height: int = 400
    """Of its placeholder, in pixels."""
    selects: bool = False
    """A click on a point selects its step."""


@dataclass(frozen=True)
class Panel:
    name: str
    title: str
    needs: Callable[[Variant], bool]
    plots: tuple[Plot, ...]
    options: tuple[Option, ...] = ()
    wide: bool = False

    def plot(self, name: str) -> Plot:
        return next(plot for plot in self.plots if plot.name == name)


def drawn(panel: Panel, name: str, view: View) -> Drawn:
    """One plot of a panel. What cannot be drawn is a message in its place; the page goes on."""
    plot = panel.plot(name)
    try:
        made = plot.draw(view)
    except Absent as err:
        made = placeholder(str(err), plot.height)
    except UNREADABLE as err:
        made = placeholder(_reason(err, view.variant), plot.height)
    made.figure.update_layout(uirevision=plot.name, meta={"file": file_name(view, plot.name)})
    return made


def placeholder(message: str, height: int) -> Drawn:
    """A figure with nothing but a message, of the usual height, so that the page does not jump."""
    fig = go.Figure(layout={"template": TEMPLATE, "height": height, "xaxis": {"visible": False}})
    lines = message.replace(": ", ":<br>", 1).replace("; ", ";<br>", 1)
    fig.add_annotation(
        text=lines, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False, font={"size": 14, "color": MUTED}
    )
    fig.update_layout(yaxis_visible=False)
    return Drawn(fig, message, empty=True)


def share_axes(figures: list[go.Figure]) -> list[go.Figure]:
    """Give distributions one scale: loss changes from the least to the greatest, counts up to the highest."""
    across = [end for fig in figures for end in fig.layout.xaxis.range]
    top = max(fig.layout.yaxis.range[1] for fig in figures)
    for fig in figures:
        set_linear(fig.layout.xaxis, "loss change", "nats", min(across), max(across))
        fig.layout.yaxis.range = [0, top]
    return figures


def file_name(view: View, plot: str) -> str:
    """Of an exported figure, without its ending: variant, plot and step."""
    return f"{view.variant.name}-{plot}-step-{view.step:05d}"


def _reason(err: Exception, variant: Variant) -> str:
    text = str(err).replace(f"{variant.path}/", "")
    if isinstance(err, (Damaged, Outdated, OSError)):
        return f"This file cannot be read: {text}"
    return f"This file does not hold what its analyzer writes: {type(err).__name__}, {text}"
