"""What happens when: plain functions of what the page holds, and their registration.

The address is read once, when the page opens. From then on the slider says where the reader stands; the script in
`assets/` writes variant and step back to the address, and every figure follows the store `here`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dash
import numpy as np
import plotly.graph_objects as go
from dash import ALL, MATCH, ClientsideFunction, Input, Output, State, ctx, dcc, no_update

from ...study.runs import Runs, Variant
from ..export import export
from . import layout, reading
from .catalogue import PANELS
from .opening import admitted, opened, requested
from .panels import Drawn, Panel, View, drawn

SELECTING = tuple((panel.name, plot.name) for panel in PANELS for plot in panel.plots if plot.selects)


def figure(runs: Runs, here: Mapping[str, Any], panel: str, plot: str, options: Mapping[str, Any]) -> Drawn:
    """One figure at the step where the reader stands. Raises ValueError for a variant or panel that is not there."""
    known = {each.name: each for each in PANELS}
    if panel not in known:
        raise ValueError(f"no panel {panel!r}: there are {', '.join(known)}.")
    variant = runs.variant(here["variant"])
    return drawn(known[panel], plot, View(variant, int(here["step"]), _valid(known[panel], variant, options)))


def _valid(panel: Panel, variant: Variant, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the panel offers; anything else is left to its preset."""
    offered = {option.name: option.choices(variant) for option in panel.options}
    return {name: value for name, value in options.items() if name in offered and value in offered[name]}


def clicked(click: Mapping[str, Any] | None, steps: Sequence[int]) -> int | None:
    """Place on the slider of the step that a clicked point carries; None for a click on something else.

    A point with a height belongs to a contour plot or a surface, and carries a loss.
    """
    point: Mapping[str, Any] = next(iter((click or {}).get("points", ())), {})
    data = point.get("customdata")
    while isinstance(data, list) and data:
        data = data[0]
    if "z" in point or not isinstance(data, (int, float)) or not steps:
        return None
    return list(steps).index(reading.nearest(tuple(steps), round(data)))


def unpacked(made: go.Figure) -> dict[str, Any]:
    """A figure for the page, with `customdata` as lists: Dash does not find a clicked point's entry in a packed array."""
    figure = made.to_dict()
    for plain, trace in zip(figure["data"], made.data, strict=True):
        if trace.customdata is not None:
            plain["customdata"] = np.asarray(trace.customdata).tolist()
    return figure


def page(made: go.Figure) -> str:
    """A figure as one HTML file with plotly.js inside."""
    with TemporaryDirectory() as folder:
        return export(made, Path(folder) / "figure.html").read_text(encoding="utf-8")


def register(app: dash.Dash, root: Path) -> None:
    """Connect the functions to the page of a run folder, which is listed anew at every question."""
    _register_choices(app, root)
    _register_figures(app, root)


def _register_choices(app: dash.Dash, root: Path) -> None:
    @app.callback(
        Output("request", "data"), Output("variant", "options"), Output("variant", "value"), Input("url", "search")
    )
    def arrive(search: str | None) -> tuple[dict[str, str], list[str], str | None]:
        runs, asked = Runs(root), requested(search)
        return asked, list(runs.variants()), admitted(runs, asked)

    @app.callback(
        Output("message", "children"), Output("panels", "children"), Output("facts", "children"),
        Output("times", "children"), Output("steps", "data"), Output("step", "max"), Output("step", "marks"),
        Output("step", "value"), Output("bar", "hidden"),
        Input("request", "data"), Input("variant", "value"), Input("reload", "n_clicks"), State("here", "data"),
    )  # fmt: skip
    def choose(
        asked: dict[str, str], name: str | None, clicks: int | None, here: dict[str, Any] | None
    ) -> tuple[Any, ...]:
        at_once = {each["prop_id"] for each in ctx.triggered}
        made = opened(Runs(root), asked or {}, name, None if "request.data" in at_once else here, clicks or 0)
        steps = made.steps.get("steps", [])
        panels = no_update if made.panels is None else made.panels
        marks = layout.marks(steps) if steps else None
        return (
            made.message, panels, made.facts, made.times, made.steps, max(len(steps) - 1, 1), marks, made.place,
            not steps,
        )  # fmt: skip

    app.clientside_callback(
        ClientsideFunction("funcscope", "follow"),
        Output("here", "data"),
        Input("step", "value"),
        Input("steps", "data"),
    )
    app.clientside_callback(
        ClientsideFunction("funcscope", "say"),
        Output("now", "children"), Input("step", "drag_value"), Input("here", "data"), State("steps", "data"),
    )  # fmt: skip

    @app.callback(
        Output("step", "value", allow_duplicate=True),
        Input({"type": "figure", "panel": ALL, "plot": ALL}, "clickData"), State("steps", "data"),
        prevent_initial_call=True,
    )  # fmt: skip
    def select(_: list[Any], steps: dict[str, Any] | None) -> Any:
        source = ctx.triggered_id
        if not source or (source["panel"], source["plot"]) not in SELECTING:
            return no_update
        index = clicked(ctx.triggered[0]["value"], (steps or {}).get("steps", []))
        return no_update if index is None else index


def _register_figures(app: dash.Dash, root: Path) -> None:
    def one(kind: str) -> dict[str, Any]:
        return {"type": kind, "panel": MATCH, "plot": MATCH}

    options = {"type": "option", "panel": MATCH, "name": ALL}

    @app.callback(
        Output(one("figure"), "figure"), Output(one("caption"), "children"), Output(one("caption"), "className"),
        Input("here", "data"), Input(options, "value"), State(options, "id"), State(one("figure"), "id"),
    )  # fmt: skip
    def draw(here: dict[str, Any] | None, values: list[Any], names: list[Any], own: dict[str, str]) -> Any:
        if not here:
            return no_update, no_update, no_update
        chosen = {each["name"]: value for each, value in zip(names, values, strict=True)}
        made = figure(Runs(root), here, own["panel"], own["plot"], chosen)
        return unpacked(made.figure), made.caption, "unseen" if made.empty else ""  # the placeholder says it already

    @app.callback(
        Output(one("download"), "data"), Input(one("html"), "n_clicks"),
        State("here", "data"), State(options, "value"), State(options, "id"), State(one("figure"), "id"),
        prevent_initial_call=True,
    )  # fmt: skip
    def save(
        clicks: int | None, here: dict[str, Any] | None, values: list[Any], names: list[Any], own: dict[str, str]
    ) -> Any:
        if not clicks or not here:
            return no_update
        chosen = {each["name"]: value for each, value in zip(names, values, strict=True)}
        made = figure(Runs(root), here, own["panel"], own["plot"], chosen)
        return dcc.send_string(page(made.figure), f"{made.figure.layout.meta['file']}.html", type="text/html")

    for kind in ("png", "svg"):
        app.clientside_callback(
            ClientsideFunction("funcscope", f"save_{kind}"),
            Output(one("saved"), "children", allow_duplicate=True),
            Input(one(kind), "n_clicks"), State(one("figure"), "id"),
            prevent_initial_call=True,
        )  # fmt: skip
