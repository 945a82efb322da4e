"""The page: a head with the choices, a bar with the step that stays in sight, a card per metric that fills itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import plotly.graph_objects as go
from dash import dcc, html

from ...study.cache import Outcome
from ...study.metric import CATALOGUE
from ..page import Block, Chart, Quote, Table, joined
from ..quantities import drawable, figures, limits_of
from ..reading import DRAWS
from ..samples import EMPTIES
from ..section import entries, heading, on, tables, tried
from ..theme import set_linear
from .reading import Group, nearest, singles

MOST_BUTTONS = 12
_CONFIG: Any = {"displayModeBar": False, "scrollZoom": False}


def shell(title: str) -> html.Main:
    """What every group has in common; the cards are put in by a callback."""
    slider = dcc.Slider(
        id="step", min=0, max=1, step=1, value=0, marks=None, included=False, allow_direct_input=False, updatemode="mouseup"
    )  # fmt: skip
    choices = [
        html.Div([html.Label(label, htmlFor=name), html.Div(dcc.Dropdown([], id=name, **more))], className="choice")
        for name, label, more in (
            ("group", "Run or model", {"clearable": False, "placeholder": "choose one"}),
            ("metric", "Metric", {"placeholder": "all"}),
        )
    ]
    now, name = html.Div(id="now", role="status"), dict[str, Any]({"aria-label": "Step"})
    return html.Main(
        [
            dcc.Location(id="url", refresh=False),
            *(dcc.Store(id=name) for name in ("request", "known", "here", "stamp")),
            dcc.Interval(id="look", interval=3000),
            html.Header([html.Div([html.P("funcscope", className="kicker"), html.H1(title)]), *choices]),
            html.Div(id="message", role="alert"),
            html.Section([now, html.Div(slider)], id="bar", hidden=True, **name),
            html.Div(id="cards"),
        ]
    )


def marks(steps: Sequence[int], most: int = 6) -> dict[int, str]:
    """Labels of the slider, which counts the steps: the first, the last and some between.

    >>> marks([0, 10, 50])
    {0: '0', 1: '10', 2: '50'}
    >>> marks(range(0, 1000, 10))
    {0: '0', 20: '200', 40: '400', 59: '590', 79: '790', 99: '990'}
    """
    last = len(steps) - 1
    places = {round(i * last / (most - 1)) for i in range(most)} if last >= most else range(last + 1)
    return {place: f"{steps[place]:,}" for place in sorted(places)}


def card(metric: str, outcomes: Sequence[Outcome]) -> html.Section:
    """Of one metric: its title, what it measures, and the choice of what is followed over training; the rest comes later."""
    followed, one = singles(outcomes), CATALOGUE.get(metric)
    options = [{"label": label, "value": name} for name, label in followed.items()]
    own, first = {"type": "quantity", "metric": metric}, next(iter(followed), None)
    choice = html.Div(dcc.Dropdown(options, first, id=own, clearable=False, optionHeight=48))
    picked = html.Div([html.Span("Over training"), choice], className="choice", hidden=len(followed) < 2)
    head = html.Div([html.H2(heading(metric)), picked], className="top")
    note = html.P(one.summary.replace("`", "") if one else "", className="note")
    look = "panel wide" if _is_wide(outcomes) else "panel"
    return html.Section(
        [head, note, html.Div(id={"type": "body", "metric": metric})], className=look, id=f"card-{metric}"
    )


def _is_wide(outcomes: Sequence[Outcome]) -> bool:
    """Whether numbers stand in a table of more columns than half of the page has room for."""
    quantities = [q for one in outcomes[:1] if one.result is not None for q in one.result.quantities().values()]
    columns = Counter(q.per for q in quantities if q.shown and len(q.per) == 1 and q.per[0] not in DRAWS)
    return max(columns.values(), default=0) > 4


def body(group: Group, metric: str, step: int | None, followed: str | None) -> list[Any]:
    """What a card shows at a step: what failed, its trajectory, its figures, and its numbers."""
    outcomes = group.outcomes[metric]
    is_still = step is None or on(outcomes[0]) not in ("model", "tasks")
    ok = [outcome for outcome in outcomes if outcome.ok]
    near = None if is_still else nearest([o.step for o in ok if o.step is not None] or [step or 0], step or 0)
    shown = [one for one in ok if is_still or one.step == near]
    parts = [_failure(one) for one in outcomes if not one.ok and (is_still or one.step == step)]
    parts += [_elsewhere(metric, step or 0, ok)] if shown and near not in (None, step) else []
    each = [[one] for one in shown] if on(outcomes[0]) in ("pair", "tasks", "experts") else [shown] if shown else []
    charts = tried(lambda: _drawn(ok, [followed], step), metric) if followed and not is_still else []
    charts += [made for few in each for made in _charts(few, few if is_still else ok, step)]
    numbers = [one for few in each for one in tried(lambda few=few: tables(few), metric)]
    file = re.sub(r"[^\w.-]+", "-", f"{group.name}-{metric}" + ("" if step is None else f"-step-{step:05d}"))
    drawn, rows = ([_block(one, metric, i, file) for i, one in enumerate(some)] for some in (charts, numbers))
    under = [html.Details([html.Summary("Numbers"), *rows], open=not charts)] if rows else []
    return [*parts, html.Div(drawn, className="plots"), *under]


def _drawn(outcomes: Sequence[Outcome], names: Sequence[str], step: int | None, **more: Any) -> Iterator[Chart]:
    yield from (Chart(*drawn) for drawn in figures(outcomes, names, current=step, **more))


def _charts(shown: Sequence[Outcome], every: Sequence[Outcome], step: int | None) -> list[Block | str]:
    """The figures of some outcomes, on the scales of all; where one cannot be made, its error."""
    metric = shown[0].metric

    def drawn(name: str) -> Iterator[Chart]:
        limits = limits_of(every, name) if len(every) > 1 else None
        per = next((e.quantity.per for o in shown if (e := entries(o).get(name))), ())
        is_sample = len(shown) == len(per) == 1 and per[0] in DRAWS
        for chart in _drawn(shown, [name], step, limits={name: limits} if limits and len(per) == 2 else {}):
            scale = _common(chart.figure, *limits) if limits and is_sample else ""
            yield replace(chart, caption=chart.caption + scale)

    own = CATALOGUE[metric].drawn if metric in CATALOGUE else ()
    names = own or tried(lambda: dict.fromkeys(name for one in shown for name in drawable(one.result)), metric)
    each = (tried(partial(drawn, name), metric) if isinstance(name, str) else [name] for name in names)
    return [part for parts in each for part in parts]


def _common(figure: go.Figure, low: float, high: float) -> str:
    """Put dots on the scale of all steps, unless that would empty the figure; says which."""
    axes = list(figure.select_xaxes())
    own = max(axis.range[1] - axis.range[0] for axis in axes)
    if any(trace.name == "beyond the axis" for trace in figure.data) or EMPTIES * own < high - low:
        return " The scale is that of this step alone: that of all steps would empty the figure."
    for axis in axes:
        name, _, unit = (axis.title.text or "").removesuffix(")").partition(" (")
        set_linear(axis, name, re.sub(r"^\S*10\S* ?", "", unit), low, high)
        axis.title.text = axis.title.text if name else ""
    return " The scale is that of all steps."


def _elsewhere(metric: str, step: int, ok: Sequence[Outcome]) -> html.Div:
    """Says that what follows is of another step, and offers those that there are."""
    near = sorted((one.step for one in ok if one.step is not None), key=lambda each: (abs(each - step), each))
    buttons = [
        html.Button(f"{each:,}", id={"type": "go", "metric": metric, "step": each}, title=f"Go to step {each:,}")
        for each in sorted(near[:MOST_BUTTONS])
    ]
    text = f"Step {near[0]:,}, the nearest to {step:,} that has one."
    return html.Div([html.P(text), html.Span("Go to step"), *buttons], className="elsewhere", role="status")


def _failure(one: Outcome) -> html.Div:
    where = one.subject if one.step is None else f"step {one.step:,}"
    more = [html.Details([html.Summary("Traceback"), html.Pre(one.traceback)])] if one.traceback else []
    return html.Div([html.B(f"{where}: {one.status}"), html.P(one.reason), *more], className="failed", role="alert")


def _block(one: Block | str, metric: str, index: int, file: str) -> Any:
    if isinstance(one, Quote):  # a part that could not be made
        return html.Div([html.B(one.source), html.P(one.text)], className="failed", role="alert")
    if isinstance(one, Table):
        return _table(one)
    return _chart(one, metric, index, file) if isinstance(one, Chart) else html.P(str(one), className="note")


def _table(one: Table) -> html.Div:
    looks = ["words" if words else "" for words in one.words]
    head = [html.Th(text, scope="col", className=look) for text, look in zip(one.headers, looks, strict=True)]
    labels: list[Any] = [{"data-label": name} for name in one.headers]
    rows = [html.Tr([html.Th(joined(row[0]), scope="row")]) for row in one.rows]
    for made, row in zip(rows, one.rows, strict=True):
        each = zip(row[1:], labels[1:], looks[1:], strict=True)
        made.children += [html.Td(joined(text), className=look, **label) for text, label, look in each]
    return html.Div(html.Table([html.Thead(html.Tr(head)), html.Tbody(rows)]), className=f"table {one.width}")


def _chart(one: Chart, metric: str, index: int, file: str) -> html.Figure:
    def name(kind: str) -> dict[str, Any]:
        return {"type": kind, "metric": metric, "index": index}

    one.figure.update_layout(meta={"file": f"{file}-{index + 1}"}, uirevision=metric)
    plain = one.figure.to_dict()
    for trace, made in zip(plain["data"], one.figure.data, strict=True):
        if made.customdata is not None:  # as lists: Dash does not find a clicked point's entry in a packed array
            trace["customdata"] = [x.tolist() if hasattr(x, "tolist") else x for x in made.customdata]
    kinds = ("png", "svg", "html")
    saves = [html.Button(each.upper(), id=name(each), title=f"Save this figure as {each.upper()}") for each in kinds]
    saved = html.Span(id=name("saved"), className="unseen")
    under = html.Figcaption([html.Span(one.caption), html.Span(saves, className="saves"), saved])
    height = {"height": one.figure.layout.height or 400}
    graph = dcc.Graph(id=name("figure"), figure=plain, config=_CONFIG, style=height)
    has_steps = any(str(trace.hovertemplate or "").startswith("step %{customdata") for trace in one.figure.data)
    return html.Figure([graph, under, dcc.Download(id=name("download"))], className="selects" if has_steps else "")
