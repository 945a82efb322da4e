"""A page of any study: a title and its metrics, each with its sentence, its table, its figures and how it was measured."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.result import Result
from ..core.store import write
from ..core.tables import Entry, is_estimate, numbers
from ..study.cache import Outcome
from ..study.metric import CATALOGUE
from ..study.pace import duration
from ..study.results import Results
from .numbers import number, setting, typeset, with_error
from .page import Block, Chart, Fact, Note, Page, Quote, Section, Table, Terms, render
from .quantities import figures
from .result import short

MOST_LETTERS = 40
"""Of a cell in a table."""
MOST_COLUMNS = 6
"""Subjects that have a column each; of more, a figure shows what a table would not hold."""


def write_report(results: Results, path: str | Path, *, title: str = "", metrics: Sequence[str] | None = None) -> Page:
    """One self-contained page of a study's results, with what failed and why; returns it, a notebook shows it.

    metrics: the ones that it has, in this order; None: all.
    """
    chosen = metrics or list(dict.fromkeys(outcome.metric for outcome in results.outcomes))
    sections = [section([o for o in results.outcomes if o.metric == name]) for name in chosen]
    sections += [_failures(results.failed)] if results.failed else []
    names = list(results.models)
    heading = title or (
        f"What {len(names)} models are like" if len(names) > 1 else f"What {short(names[0], 60)} is like"
    )
    page = render(heading, "funcscope", [], _strip(results), sections)
    write(Path(path), page.encode())
    return Page(Path(path))


def section(outcomes: Sequence[Outcome]) -> Section:
    """Of one metric over all subjects: its sentence, its numbers in a table, its figures, its settings."""
    one = CATALOGUE.get(outcomes[0].metric)
    ok = [outcome for outcome in outcomes if outcome.result is not None]
    blocks: list[Block] = [] if one is None or not one.summary else [one.summary]
    if ok:
        blocks += [*_sentences(one.sentence if one else "", ok), *_tables(ok)]
        blocks += [Chart(*drawn) for drawn in figures(ok, one.drawn if one else ())]
        blocks += [Quote(note, short(outcome.subject, 40)) for outcome in _shown(ok) for note in _notes(outcome)]
        blocks.append(Terms(_terms(ok[0], one.reference if one else "")))
    lost = len(outcomes) - len(ok)
    blocks += [Note(f"{lost} of {len(outcomes)} have no result; the reasons are at the end.")] if lost else []
    return Section(outcomes[0].metric.replace("_", " ").capitalize(), blocks)


def _sentences(template: str, outcomes: Sequence[Outcome]) -> list[str]:
    """The metric's sentence about the first and the last subject."""
    if not template:
        return []
    shown = [outcomes[0]] if len(outcomes) == 1 else [outcomes[0], outcomes[-1]]
    said = []
    for outcome in shown:
        assert outcome.result is not None
        told = {
            entry.name: f"{_said(outcome.result, entry)} {outcome.in_unit(entry.quantity.unit)}".strip()
            for entry in outcome.result.entries()
            if not entry.quantity.per
        }
        settings = {
            name: setting(float(value)) for name, value in outcome.settings.items() if isinstance(value, (int, float))
        }
        try:
            text = template.format_map({**settings, **told})
        except KeyError:  # a quantity that this subject does not have
            continue
        said.append(text if len(shown) == 1 else f"{_whose(outcome)}: {text}")
    return said


def _tables(outcomes: Sequence[Outcome]) -> list[Block]:
    """A row per single number, a column per subject."""
    shown = _shown(outcomes)
    columns = []
    for outcome in shown:
        assert outcome.result is not None
        single = (entry for entry in outcome.result.entries() if entry.quantity.shown and not entry.quantity.per)
        columns.append({entry.name: (entry, _short(_said(outcome.result, entry))) for entry in single})
    names = dict.fromkeys(name for column in columns for name in column)
    rows = []
    for name in names:
        entry = next(column[name][0] for column in columns if name in column)
        unit = shown[0].in_unit(entry.quantity.unit)
        label = name if entry.quantity.name == "*" else entry.quantity.label
        rows.append([label, *(column[name][1] if name in column else "" for column in columns), unit])
    if not rows:
        return []
    headers = ["", *(_whose(outcome) if len(shown) > 1 else "value" for outcome in shown), "unit"]
    return [Table(headers, rows, "listed")]


def _shown(outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    return outcomes if len(outcomes) <= MOST_COLUMNS else [outcomes[0], outcomes[-1]]


def _said(result: Result, entry: Entry) -> str:
    """A single value with its error; why there is none."""
    if entry.name in result.texts:
        return typeset(result.texts[entry.name])
    if entry.name in result.unresolved:
        return "not resolved"
    if isinstance(entry.value, (bool, str)) or entry.value is None:
        return str(entry.value)
    values = numbers(entry)
    if values is None:
        return str(entry.value)
    errors = np.ravel(values.get("stderr_total", values.get("stderr", np.full(values["value"].shape, math.nan))))
    known = is_estimate(entry.value) or entry.stderr is not None
    return " to ".join(
        with_error(value, error) if known and math.isfinite(error) else number(value, 4)
        for value, error in zip(np.ravel(values["value"]).tolist(), errors.tolist(), strict=True)
    )


def _short(text: str) -> str:
    """What a cell has room for; the whole text is in the notes."""
    return text if len(text) <= MOST_LETTERS else re.split("[:;]", text)[0]


def _notes(outcome: Outcome) -> list[str]:
    assert outcome.result is not None
    long = [f"{name}: {text}" for name, text in outcome.result.texts.items() if len(text) > MOST_LETTERS]
    return [typeset(note) for note in (*long, *outcome.result.notes)]


def _terms(outcome: Outcome, reference: str) -> list[tuple[str, list[str]]]:
    cost = outcome.cost
    rows = {
        "Settings": _listed(outcome.settings),
        "Plan": _listed({name: value for name, value in outcome.plan.items() if value is not None}),
        "Cost": f"{cost.get('forwards', 0):,} forward passes, {cost.get('products', 0):,} products, "
        f"{duration(cost.get('seconds', 0))}",
        "Data": outcome.task,
        "Reference": reference,
        "Versions": ", ".join(f"{name} {version}" for name, version in outcome.content.get("packages", {}).items()),
    }
    return [(name, [text]) for name, text in rows.items() if text]


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in settings.items())


def _plain(value: Any) -> str:
    return setting(float(value)) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _whose(outcome: Outcome) -> str:
    return short(outcome.subject, 30) if outcome.step is None else f"step {outcome.step:,}"


def _failures(failed: Sequence[Outcome]) -> Section:
    reasons = (f"{o.error_type.rpartition('.')[2]}: {o.error}".strip(": ") for o in failed)
    rows = [[short(o.subject, 30), o.metric, o.status, reason] for o, reason in zip(failed, reasons, strict=True)]
    return Section("What has no result", [Table(["model", "metric", "status", "reason"], rows, "listed noted")])


def _strip(results: Results) -> list[Fact]:
    seconds = sum(outcome.cost.get("seconds", 0) for outcome in results.outcomes)
    metrics = {outcome.metric for outcome in results.outcomes}
    steps = [model.step for model in results.models.values() if model.step is not None]
    names = ", ".join(short(name, 20) for name in list(results.models)[:2])
    span = f"steps {min(steps):,} to {max(steps):,}" if len(steps) > 1 else names
    ok = len(results.outcomes) - len(results.failed)
    return [
        Fact("Models", str(len(results.models)), span),
        Fact("Metrics", str(len(metrics)), "each on every model"),
        Fact(
            "Results",
            f"{ok} of {len(results.outcomes)}",
            "the others say why not" if results.failed else "nothing failed",
        ),
        Fact("Computing", duration(seconds), "in all, stored results included"),
    ]
