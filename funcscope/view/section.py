"""What a page says of one metric over all its subjects: a sentence, tables, figures, and how it was measured."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..core.tables import LONGEST, Entry, counted, is_estimate, numbers
from ..study.cache import Outcome
from ..study.catalogue import CATALOGUE
from ..study.record import duration
from ..study.results import Results
from .numbers import number, setting, typeset, with_error
from .page import Block, Chart, Quote, Section, Table, Terms
from .quantities import figures

MOST_LETTERS = 40
"""Of a cell in a table; a longer text stands below."""
MOST_COLUMNS = 6
"""Subjects that have a column each; of more steps the first and the last have one, and a figure shows all."""
BOUNDS = ("bound",)
"""The axes of an interval: a pair of numbers that is read as one."""
RAISED = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What properties and figures of results raise, and stored files that are damaged."""


def section(outcomes: Sequence[Outcome], text: str = "") -> Section:
    """Of one metric over all subjects: its sentence, its numbers in tables, its figures, its notes, its settings.

    text: what is said in place of the metric's own sentence. Where a part cannot be made, the error stands in its place.
    """
    name, ok = outcomes[0].metric, [outcome for outcome in outcomes if outcome.result is not None]
    one, lost = CATALOGUE.get(name), len(outcomes) - len(ok)
    blocks: list[Block | str] = [one.summary] if one is not None and one.summary else []
    for part in (lambda: [text] if text else _sentences(ok), lambda: tables(ok), lambda: panel(ok), lambda: _notes(ok)):
        blocks += tried(part, name) if ok else []
    blocks += [f"{lost} of {len(outcomes)} have no result; the reasons are at the end."] if lost else []
    return Section(heading(name), [*blocks, *(tried(lambda: [methods(ok)], name) if ok else [])])


def panel(outcomes: Sequence[Outcome]) -> list[Chart]:
    """The figures of one metric over all subjects, each with how to read it."""
    name = outcomes[0].metric
    drawn = figures(outcomes, CATALOGUE[name].drawn if name in CATALOGUE else ())
    return [Chart(figure, caption, f"{name}-{i}") for i, (figure, caption) in enumerate(drawn, start=1)]


def table(results: Results, metrics: Sequence[str] | None = None, *, rows: bool | None = None) -> Table:
    """The main number of every metric, of every model: a column per model, or a row where there are many, as steps are.

    metrics: those that it has, in this order; None: all that models have. Those without a main number are left out. rows:
    whether models are rows; None: where they are more than have room beside each other.
    """
    outcomes = [o for o in results.outcomes if on(o) == "model" and (metrics is None or o.metric in metrics)]
    mains = {(outcome.subject, outcome.metric): (outcome, _main(outcome)) for outcome in outcomes}
    texts = {key: _brief(_text(e, *_known(o))) if e else "" if o.ok else o.status for key, (o, e) in mains.items()}
    labels = {metric: _with_unit(o, e) for (_, metric), (o, e) in mains.items() if e is not None}
    chosen = [name for name in metrics or dict.fromkeys(outcome.metric for outcome in outcomes) if name in labels]
    subjects = {outcome.subject: outcome for outcome in outcomes}
    names = whose(list(subjects.values()))
    lines = [[texts.get((subject, each), "") for subject in subjects] for each in chosen]
    if rows or (rows is None and len(subjects) > MOST_COLUMNS):
        heads = ["model", *(f"{heading(each)}: {labels[each]}" for each in chosen)]
        return Table(heads, list(zip(names, *lines, strict=True)))
    rows_of = zip(chosen, lines, strict=True)
    return Table(["metric", "number", *names], [[heading(each), labels[each], *line] for each, line in rows_of])


def tables(outcomes: Sequence[Outcome]) -> Iterator[Table]:
    """Single numbers with a row each and a column per subject; what is per a few named things, of the last subject."""
    few = shown(outcomes)
    for i in range(0, len(few), MOST_COLUMNS):
        if (singles := _singles(few[i : i + MOST_COLUMNS])).rows:
            yield singles
    last, coords = outcomes[-1], getattr(outcomes[-1].result, "coords", {})
    per_one = [e for e in entries(last).values() if e.quantity.shown and len(e.quantity.per) == 1]
    for axis in dict.fromkeys(e.quantity.per[0] for e in per_one if e.quantity.per != BOUNDS):
        if 0 < len(places := list(map(str, coords.get(axis, ())))) <= LONGEST:
            columns = {e.name: (_with_unit(last, e), cells(e)) for e in per_one if e.quantity.per == (axis,)}
            if columns.keys() >= {"low", "high"}:
                ends = zip(columns["low"][1], columns.pop("high")[1], strict=True)
                columns["low"] = ("interval", [a if a == b else f"{a} to {b}" for a, b in ends])
            rows = list(zip(places, *(texts for _, texts in columns.values()), strict=True))
            caption = "" if len(outcomes) == 1 else f"Of {whose([last])[0]}."
            yield Table([axis, *(head for head, _ in columns.values())], rows, caption)


def methods(outcomes: Sequence[Outcome]) -> Terms:
    """Settings, plan, seed, cost, data and reference of what was measured; each once where it is one for all."""
    one, many = CATALOGUE.get(outcomes[0].metric), f" for {len(outcomes)} subjects" if len(outcomes) > 1 else ""
    seeds = (outcome.content.get("seed") for outcome in outcomes)
    rows = {
        "Settings": [_values(outcome.settings) for outcome in outcomes],
        "Plan": [_values(outcome.plan) for outcome in outcomes],
        "Seed": [str(seed) for seed in seeds if seed is not None],
        "Cost": [", ".join((*_work(outcomes), duration(total(outcomes, "seconds")))) + many],
        "Data": [outcome.task for outcome in outcomes],
        "Reference": [one.reference if one else ""],
    }
    return Terms([(name, list(dict.fromkeys(filter(None, texts)))) for name, texts in rows.items() if any(texts)])


def passes(outcomes: Sequence[Outcome]) -> str:
    """How many forward passes they took."""
    return counted(int(total(outcomes, "forwards")), "forward pass of a batch", "forward passes of a batch")


def _work(outcomes: Sequence[Outcome]) -> list[str]:
    """What they took of each kind; kinds of which they took nothing are left out beside another."""
    num = int(total(outcomes, "products"))
    products = [f"{counted(num, 'product')} of a matrix and a vector"] if num else []
    return [passes(outcomes), *products] if total(outcomes, "forwards") or not num else products


def total(outcomes: Sequence[Outcome], what: str) -> float:
    """Of what they cost: forwards, products or seconds."""
    return float(sum(outcome.cost.get(what, 0) for outcome in outcomes))


def entries(outcome: Outcome) -> dict[str, Entry]:
    """The quantities of a result by name; none where there is no result."""
    return {} if outcome.result is None else {entry.name: entry for entry in outcome.result.entries()}


def said(outcome: Outcome, *, units: bool = False) -> dict[str, str]:
    """By name, every single value or interval with its error, or why there is none; with its unit where that is asked."""
    every = {name: entry for name, entry in entries(outcome).items() if entry.quantity.per in ((), BOUNDS)}
    known = _known(outcome)  # once: a result computes them
    texts = {name: _text(entry, *known) for name, entry in every.items()}
    return {n: f"{t} {outcome.in_unit(every[n].quantity.unit)}".strip() for n, t in texts.items()} if units else texts


def _known(outcome: Outcome) -> tuple[Mapping[str, str], Collection[str]]:
    """Texts in place of numbers, and names of what is not resolved."""
    return ({}, ()) if outcome.result is None else (outcome.result.texts, outcome.result.unresolved)


def _text(entry: Entry, texts: Mapping[str, str], lost: Collection[str]) -> str:
    if entry.name in texts:
        return typeset(texts[entry.name])
    return "not resolved" if entry.name in lost else " to ".join(cells(entry))


def cells(entry: Entry) -> list[str]:
    """A text per number, each with its standard error where there is one."""
    values, value = numbers(entry), entry.value
    if values is None or isinstance(value, bool):
        return [str(each) for each in value] if isinstance(value, (list, tuple)) else [str(value)]
    known = is_estimate(value) or "stderr" in values
    errors = np.ravel(values.get("stderr_total", values.get("stderr", np.full(values["value"].shape, math.nan))))
    every = np.ravel(values["value"])
    if every.size > 1 and np.isfinite(every).all() and (every == np.round(every)).all() and np.abs(every).max() < 1e9:
        return [typeset(f"{x:,.0f}") for x in every]  # counts
    pairs = zip(every.tolist(), errors.tolist(), strict=True)
    return [with_error(x, error) if known and math.isfinite(error) else number(x, 4) for x, error in pairs]


def heading(metric: str) -> str:
    """
    >>> heading("loss_landscape_2d"), heading("sam_sharpness")
    ('Loss landscape 2D', 'SAM sharpness')
    """
    words = metric.replace("_", " ")
    return re.sub(
        r"\b(a?sam|2d|qkov|qk|ov)\b", lambda word: word[0].upper(), words[:1].upper() + words[1:], flags=re.IGNORECASE
    )


def label(entry: Entry) -> str:
    return entry.name.replace("_", " ") if entry.quantity.name == "*" else entry.quantity.label


def on(outcome: Outcome) -> str:
    """What its metric looks at: a model, a pair or a series."""
    return CATALOGUE[outcome.metric].on if outcome.metric in CATALOGUE else "model"


def whose(outcomes: Sequence[Outcome]) -> list[str]:
    """Names of columns: the steps of one run, else those of the models."""
    steps = [f"step {one.step:,}" if one.step is not None else one.subject for one in outcomes]
    return steps if len(set(steps)) == len(steps) else [outcome.subject for outcome in outcomes]


def _with_unit(outcome: Outcome, entry: Entry) -> str:
    unit = outcome.in_unit(entry.quantity.unit)
    return label(entry) + (f" ({unit})" if unit else "")


def _brief(text: str) -> str:
    """What a cell has room for; the whole text is among the notes."""
    return text if len(text) <= MOST_LETTERS else re.split("[:;]", text)[0]


def shown(outcomes: Sequence[Outcome], most: int = MOST_COLUMNS) -> list[Outcome]:
    """All; of a training run with more steps than have room, the first and the last."""
    runs: dict[str, list[Outcome]] = {}
    for one in outcomes:
        runs.setdefault(one.subject if one.step is None or len(outcomes) <= most else one.group, []).append(one)
    return [one for run in runs.values() for one in (run if len(run) == 1 else (run[0], run[-1]))]


def _main(outcome: Outcome) -> Entry | None:
    """The single number that stands for a result: the first that its page draws, or the first there is."""
    one, single = CATALOGUE.get(outcome.metric), _scalars(outcome)
    if one is None or not one.drawn or outcome.result is None:
        return next(iter(single.values()), None)
    each = (entry for name in one.drawn for entry in outcome.result.entries(name) if entry.name == name)
    return next((entry for entry in each if entry.quantity.per in ((), BOUNDS)), None)


def _scalars(outcome: Outcome) -> dict[str, Entry]:
    """What has a row of its own: single values and intervals."""
    return {name: e for name, e in entries(outcome).items() if e.quantity.shown and e.quantity.per in ((), BOUNDS)}


def _singles(outcomes: Sequence[Outcome]) -> Table:
    columns = [_scalars(outcome) for outcome in outcomes]
    texts = [{name: _brief(text) for name, text in said(outcome).items()} for outcome in outcomes]
    rows = [
        [label(entry), *(each.get(name, "") for each in texts), outcomes[0].in_unit(entry.quantity.unit)]
        for name, entry in {name: e for each in columns for name, e in each.items()}.items()
    ]
    heads = ["", *(["value"] if len(outcomes) == 1 else whose(outcomes)), "unit"]
    return Table(heads, rows) if any(row[-1] for row in rows) else Table(heads[:-1], [row[:-1] for row in rows])


def _sentences(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The metric's sentence about every subject, of a run about the first and the last."""
    sentence = CATALOGUE[outcomes[0].metric].sentence if outcomes[0].metric in CATALOGUE else ""
    few = shown(outcomes, 2) if sentence else []
    for outcome, name in zip(few[:MOST_COLUMNS], whose(few), strict=False):
        words = {each: _plain(value) for each, value in outcome.settings.items()} | said(outcome, units=True)
        if set(re.findall(r"{(\w+)}", sentence)) <= words.keys():  # what was not asked for has no sentence
            text = sentence.format_map(words)
            yield text if len(few) == 1 else f"{name}: {text}"


def _notes(outcomes: Sequence[Outcome]) -> Iterator[Quote]:
    """What the results say of themselves, once for all that say it, and texts that are too long for a cell."""
    few, sources = shown(outcomes), dict[str, list[str]]()
    for outcome, name in zip(few, whose(few), strict=True):
        labels = {each: label(entry) for each, entry in _scalars(outcome).items()}
        long = {each: text for each, text in said(outcome).items() if len(text) > MOST_LETTERS and each in labels}
        texts = [f"{labels[each]}: {text}" for each, text in long.items()]
        for note in (*texts, *getattr(outcome.result, "notes", ())):
            note = re.sub(r"[^\s:]+@(?=\d)", "step ", note) if outcome.subject.startswith("step ") else note
            sources.setdefault(typeset(note), []).append(name)
    yield from (Quote(note, ", ".join(names)) for note, names in sources.items())


def tried(make: Callable[[], Iterable[Block | str]], name: str) -> list[Block | str]:
    """Blocks, or the error in their place: a class or a figure of the reader's own does not take the page with it."""
    try:
        return list(make())
    except RAISED as err:
        return [Quote(f"{type(err).__name__}: {err}", f"This part of {name} could not be shown.")]


def _values(settings: Mapping[str, Any]) -> str:
    return "; ".join(f"{k.replace('_', ' ')} {_plain(v)}" for k, v in settings.items() if v is not None)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return setting(float(value)) if isinstance(value, (int, float)) else str(value)
