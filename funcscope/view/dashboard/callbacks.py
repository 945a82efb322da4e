"""What happens when: plain functions of what the page holds, and their registration.

The address is read once, when the page opens. From then on the slider says where the reader stands; the script in `assets/`
writes group, step and metric back to the address, and every card follows the store `here`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dash
import plotly.graph_objects as go
from dash import ALL, MATCH, ClientsideFunction, Input, Output, State, ctx, dcc, no_update

from ..export import export
from ..section import heading
from . import cards, reading


def arrival(folder: Path, search: str | None) -> tuple[Any, ...]:
    """What the address asks for, the choices and their values, and what is to be said of it."""
    asked, (groups, stamp, message) = reading.requested(search), reading.study(folder)
    metrics = dict.fromkeys(metric for group in groups.values() for metric in group.outcomes)
    options = [{"label": heading(metric), "value": metric} for metric in metrics]
    place = reading.admitted(groups, asked)
    if place is None and groups:
        message = f"There is no “{asked.get('group', '')[:80]}” in this study: choose one above. {message}".rstrip()
    name, _, metric, said = place or reading.Place(None, None, None)
    return asked, list(groups), name, options, metric, stamp, f"{said} {message}".strip()


def choice(
    groups: Mapping[str, reading.Group], name: str | None, metric: str | None, step: Any, stamp: str
) -> tuple[dict[str, Any], list[Any]]:
    """What the slider counts, and the cards. step: the one to stand at, where the group has it or a near one."""
    if name is None or name not in groups:
        return {}, []
    group = groups[name]
    shown = {m: outcomes for m, outcomes in group.outcomes.items() if metric in (None, m)}
    made = [cards.card(m, outcomes) for m, outcomes in shown.items()]
    place = reading.admitted(groups, {"group": name} | ({} if step is None else {"step": str(step)}))
    assert place is not None
    follows = [[m, list(reading.singles(outcomes))] for m, outcomes in shown.items()]
    index = 0 if place.step is None else group.steps.index(place.step)
    known = {"group": name, "steps": list(group.steps), "metric": metric, "stamp": stamp, "cards": follows}
    return known | {"index": index}, made


def clicked(click: Mapping[str, Any] | None, steps: Sequence[int]) -> int | None:
    """Place on the slider of the step that a clicked point carries; None for a click on something else.

    A point with a height belongs to a contour plot or a heat map, and carries its value.
    """
    point: Mapping[str, Any] = next(iter((click or {}).get("points", ())), {})
    data = point.get("customdata")
    if "z" in point or not isinstance(data, (int, float)) or not steps:
        return None
    return list(steps).index(reading.nearest(steps, round(data)))


def page(figure: Mapping[str, Any]) -> str:
    """A figure as one HTML file with plotly.js inside."""
    with TemporaryDirectory() as folder:
        return export(go.Figure(figure), Path(folder) / "figure.html").read_text(encoding="utf-8")


def register(app: dash.Dash, folder: Path) -> None:
    """Connect the functions to the page of a study, which is read again when it has changed."""
    _register_choices(app, folder)
    _register_cards(app, folder)

    def client(name: str, *given: Any, late: bool = False) -> None:
        app.clientside_callback(ClientsideFunction("funcscope", name), *given, prevent_initial_call=late)

    client("follow", Output("here", "data"), Input("step", "value"), Input("known", "data"))
    client("say", Output("now", "children"), Input("step", "drag_value"), Input("here", "data"), State("known", "data"))
    for kind in ("png", "svg"):
        saved = Output(_one("saved"), "children", allow_duplicate=True)
        client(f"save_{kind}", saved, Input(_one(kind), "n_clicks"), State(_one("figure"), "id"), late=True)


def _one(kind: str) -> dict[str, Any]:
    return {"type": kind, "metric": MATCH, "index": MATCH}


def _register_choices(app: dash.Dash, folder: Path) -> None:
    @app.callback(
        Output("request", "data"), Output("group", "options"), Output("group", "value"), Output("metric", "options"),
        Output("metric", "value"), Output("stamp", "data"), Output("message", "children"),
        Input("url", "search"), Input("look", "n_intervals"), State("stamp", "data"), State("group", "value"),
    )  # fmt: skip
    def arrive(search: str | None, _: int | None, stamp: str | None, name: str | None) -> Sequence[Any]:
        arrived = arrival(folder, search)
        if ctx.triggered_id != "look":
            return arrived
        if stamp == arrived[5]:
            return (no_update,) * len(arrived)
        values = (0, 2, 4) if name else ()  # where the reader stands stays
        return [no_update if i in values else each for i, each in enumerate(arrived)]

    @app.callback(
        Output("known", "data"), Output("cards", "children"), Output("step", "max"), Output("step", "marks"),
        Output("step", "value"), Output("bar", "hidden"),
        Input("group", "value"), Input("metric", "value"), Input("stamp", "data"), State("request", "data"),
        State("here", "data"), State("known", "data"),
    )  # fmt: skip
    def choose(
        name: str | None, metric: str | None, stamp: str | None, asked: Any, here: Any, before: Any
    ) -> tuple[Any, ...]:
        step = here["step"] if here and here["step"] is not None else (asked or {}).get("step")
        known, made = choice(reading.study(folder).groups, name, metric, step, stamp or "")
        steps = known.get("steps", [])
        same = bool(before) and all(before.get(each) == known.get(each) for each in ("group", "cards"))
        shown = no_update if same else made
        return known, shown, max(len(steps) - 1, 1), cards.marks(steps), known.get("index", 0), len(steps) < 2

    @app.callback(
        Output("step", "value", allow_duplicate=True),
        Input({"type": "figure", "metric": ALL, "index": ALL}, "clickData"),
        Input({"type": "go", "metric": ALL, "step": ALL}, "n_clicks"), State("known", "data"),
        prevent_initial_call=True,
    )  # fmt: skip
    def select(_: list[Any], __: list[Any], known: dict[str, Any] | None) -> Any:
        source, value = ctx.triggered_id, ctx.triggered[0]["value"]
        if not source or not value:  # a card that has just come
            return no_update
        click = {"points": [{"customdata": source["step"]}]} if source["type"] == "go" else value
        index = clicked(click, (known or {}).get("steps", []))
        return no_update if index is None else index


def _register_cards(app: dash.Dash, folder: Path) -> None:
    @app.callback(
        Output({"type": "body", "metric": MATCH}, "children"), Input("here", "data"),
        Input({"type": "quantity", "metric": MATCH}, "value"), State({"type": "body", "metric": MATCH}, "id"),
    )  # fmt: skip
    def draw(here: dict[str, Any] | None, followed: str | None, own: dict[str, str]) -> Any:
        groups = reading.study(folder).groups
        group = groups.get((here or {}).get("group", ""))
        if not here or group is None or own["metric"] not in group.outcomes:
            return no_update
        known = reading.singles(group.outcomes[own["metric"]])
        place = reading.admitted(groups, {"group": group.name, "step": str(here["step"])})
        return cards.body(group, own["metric"], place and place.step, followed if followed in known else None)

    @app.callback(
        Output(_one("download"), "data"), Input(_one("html"), "n_clicks"), State(_one("figure"), "figure"),
        prevent_initial_call=True,
    )  # fmt: skip
    def save(clicks: int | None, figure: dict[str, Any]) -> Any:
        if not clicks:
            return no_update
        return dcc.send_string(page(figure), f"{figure['layout']['meta']['file']}.html", type="text/html")
