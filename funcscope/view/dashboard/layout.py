"""The page: a head with the variant, a bar with the step that stays in sight, panels in two columns, run times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dash import dcc, html

from ...study.runs import Runs, Variant
from . import reading
from .panels import Option, Panel, Plot, placeholder

INDEX = """<!DOCTYPE html>
<html lang="en">
<head>
{%metas%}
<title>{%title%}</title>
<link rel="icon" href="data:,">
{%css%}
</head>
<body>
{%app_entry%}
<footer>
{%config%}
{%scripts%}
{%renderer%}
</footer>
</body>
</html>
"""
_CONFIG: Any = {"displayModeBar": False, "scrollZoom": False}
_NOTHING = "–"


def shell(runs: Runs) -> html.Main:
    """What every variant has in common; the panels are put in by a callback."""
    return html.Main(
        [
            dcc.Location(id="url", refresh=False),
            dcc.Store(id="request"),
            dcc.Store(id="steps"),
            dcc.Store(id="here"),
            html.Header(
                [
                    html.Div([html.P("funcscope", className="kicker"), html.H1(runs.path.resolve().name)]),
                    html.Div(
                        [
                            html.Label("Variant", htmlFor="variant", id="variant-label"),
                            html.Div(dcc.Dropdown([], id="variant", clearable=False, placeholder="choose one")),
                            html.Button("Reload", id="reload", title="Look for what was written since"),
                        ],
                        className="choice",
                    ),
                ]
            ),
            html.Div(id="message", role="alert"),
            html.Div(id="facts"),
            html.Section(_step_bar(), id="bar", hidden=True, **_named("Step")),
            html.Div(id="panels"),
            html.Div(id="times"),
        ]
    )


def _step_bar() -> list[html.Div]:
    slider = dcc.Slider(
        id="step",
        min=0,
        max=1,
        step=1,
        value=0,
        marks=None,
        included=False,
        allow_direct_input=False,
        updatemode="mouseup",
    )
    return [html.Div(id="now", role="status"), html.Div(slider, id="slide")]


def facts(variant: Variant) -> html.Details:
    """Family and configuration of a variant."""
    rows = [html.Div([html.Dt(name), html.Dd(str(value))]) for name, value in variant.config.items()]
    return html.Details([html.Summary([html.B(variant.family), " configuration"]), html.Dl(rows)])


def card(panel: Panel, variant: Variant) -> html.Section:
    """A panel with its options; the figures come by callback."""
    choices = [_option(panel, option, variant) for option in panel.options]
    return html.Section(
        [
            html.Div([html.H2(panel.title, className=None if panel.wide else "unseen"), *choices], className="top"),
            html.Div([_plot(panel, plot) for plot in panel.plots], className="plots"),
        ],
        className="panel wide" if panel.wide else "panel",
        id=f"panel-{panel.name}",
    )


def _plot(panel: Panel, plot: Plot) -> html.Figure:
    def name(kind: str) -> dict[str, str]:
        return {"type": kind, "panel": panel.name, "plot": plot.name}

    saves = [
        html.Button(kind.upper(), id=name(kind), title=f"Save “{plot.label}” as {kind.upper()}")
        for kind in ("png", "svg", "html")
    ]
    return html.Figure(
        [
            dcc.Graph(id=name("figure"), figure=placeholder("…", plot.height).figure, config=_CONFIG),
            html.Figcaption(
                [
                    html.Span(id=name("caption"), role="status"),
                    html.Span(saves, className="saves"),
                    html.Span(id=name("saved"), role="status", className="unseen"),
                ]
            ),
            dcc.Download(id=name("download")),
        ],
        id=f"plot-{plot.name}",
        className="selects" if plot.selects else None,
        **_named(plot.label),
    )


def _option(panel: Panel, option: Option, variant: Variant) -> html.Div:
    made = dcc.RadioItems if option.radio else dcc.Dropdown
    more = {"inline": True} if option.radio else {"clearable": False, "optionHeight": 32}
    control = made(
        options=[{"label": label, "value": value} for value, label in option.choices(variant).items()],
        value=option.preset(variant),
        id={"type": "option", "panel": panel.name, "name": option.name},
        persistence=variant.name,
        persistence_type="memory",
        **more,
    )
    return html.Div(
        [html.Span(option.label), html.Div(control, role="group", **_named(option.label))],
        className="choice",
    )


def _named(label: str) -> dict[str, Any]:
    """What a screen reader calls an element."""
    return {"aria-label": label}


def marks(steps: Sequence[int], most: int = 6) -> dict[int, str]:
    """Labels of the slider, which counts the stored steps: the first, the last and some between.

    >>> marks([0, 10, 50])
    {0: '0', 1: '10', 2: '50'}
    >>> marks(range(0, 1000, 10))
    {0: '0', 20: '200', 40: '400', 59: '590', 79: '790', 99: '990'}
    """
    last = len(steps) - 1
    places = {round(i * last / (most - 1)) for i in range(most)} if last >= most else range(last + 1)
    return {place: f"{steps[place]:,}" for place in sorted(places)}


def times(costs: Sequence[reading.Cost]) -> html.Section | None:
    """The table of run times, an analyzer a row."""
    heads = ("analyzer", "steps stored", "expected per step", "measured per step", "so far", "left")
    rows = [
        html.Tr(
            [
                html.Th(cost.analyzer.replace("_", " "), scope="row"),
                html.Td(f"{cost.stored:,} of {cost.total:,}" if cost.total else "the whole run"),
                *(html.Td(duration(value)) for value in (cost.expected, cost.actual, cost.spent, cost.left)),
            ]
        )
        for cost in costs
    ]
    if not rows:
        return None
    table = html.Table([html.Thead(html.Tr([html.Th(head, scope="col") for head in heads])), html.Tbody(rows)])
    note = (
        "Expected: the number of forward passes times the time of one, measured at the same step. Measured: the median. "
        "Left: the checkpoints that it looks at and that have no artifact yet, at the median."
    )
    return html.Section(
        [html.H2("Run time"), html.Div(table, className="scroll", tabIndex="0"), html.P(note, className="note")],
        className="panel wide",
        id="run-time",
    )


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(0.0123), duration(4.25), duration(95.0), duration(7300.0), duration(0.0), duration(math.nan)
    ('12 ms', '4.2 s', '1 min 35 s', '2 h 2 min', '0 s', '–')
    """
    if not math.isfinite(seconds):
        return _NOTHING
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms" if seconds else "0 s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if (whole := round(seconds)) < 3600:
        return f"{whole // 60} min {whole % 60} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"
