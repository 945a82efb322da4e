"""What a page says of one metric over all its subjects: a sentence, tables, figures, and how it was measured."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..core.result import Result
from ..core.tables import LONGEST, Entry, is_estimate, numbers
from ..study.cache import Outcome
from ..study.metric import CATALOGUE
from ..study.pace import duration
from ..study.results import Results
from .numbers import number, setting, typeset, with_error
from .page import Block, Chart, Note, Quote, Section, Table, Terms
from .quantities import figures

MOST_LETTERS = 40
"""Of a cell in a table; a longer text stands below."""
MOST_COLUMNS = 6
"""Subjects that have a column each; of more steps the first and the last have one, and a figure shows all."""
BOUNDS = ("bound",)
"""The axes of an interval: a pair of numbers that is read as one."""


def section(outcomes: Sequence[Outcome], text: str = "") -> Section:
    """Of one metric over all subjects: its sentence, its numbers in tables, its figures, its notes, its settings.

    text: what is said in place of the metric's own sentence. Where a part cannot be made, the error stands in its place.
    """
    name, ok = outcomes[0].metric, [outcome for outcome in outcomes if outcome.result is not None]
    one, lost = CATALOGUE.get(name), len(outcomes) - len(ok)
    blocks: list[Block | str] = [one.summary] if one is not None and one.summary else []
    parts: tuple[Callable[[], Iterable[Block | str]], ...] = (
        lambda: [text] if text else _sentences(ok),
        lambda: tables(ok),
        lambda: panel(ok),
        lambda: _notes(shown(ok)),
        lambda: [methods(ok)],
    )
    for part in parts if ok else ():
        blocks += _tried(part, name)
    blocks += [Note(f"{lost} of {len(outcomes)} have no result; the reasons are at the end.")] if lost else []
    return Section(heading(name), blocks)


def panel(outcomes: Sequence[Outcome]) -> list[Chart]:
    """The figures of one metric over all subjects, each with how to read it."""
    name = outcomes[0].metric
    one = CATALOGUE.get(name)
    drawn = figures(outcomes, one.drawn if one else ())
    return [Chart(figure, caption, f"{name}-{i}") for i, (figure, caption) in enumerate(drawn, start=1)]


def table(results: Results, metrics: Sequence[str] | None = None) -> Table:
    """The main number of every metric, of every model: a row per model or step, a column per metric.

    metrics: those that it has, in this order; None: all that models have.
    """
    outcomes = [o for o in results.outcomes if on(o) == "model" and (metrics is None or o.metric in metrics)]
    subjects = {outcome.subject: outcome for outcome in outcomes}
    cells, labels = dict[tuple[str, str], str](), dict[str, str]()
    for outcome in outcomes:
        where, entry = (outcome.subject, outcome.metric), _main(outcome)
        cells[where] = (
            outcome.status if outcome.result is None else "" if entry is None else brief(said(outcome, entry))
        )
        if entry is not None:
            labels.setdefault(outcome.metric, _with_unit(outcome, entry))
    chosen = [name for name in metrics or dict.fromkeys(outcome.metric for outcome in outcomes) if name in labels]
    steps = len({outcome.group for outcome in subjects.values()}) == 1 and len(subjects) > 1
    names = [f"{one.step:,}" if steps and one.step is not None else name for name, one in subjects.items()]
    rows = [[name, *(cells.get((s, metric), "") for metric in chosen)] for name, s in zip(names, subjects, strict=True)]
    return Table(["step" if steps else "model", *(labels[name] for name in chosen)], rows)


def tables(outcomes: Sequence[Outcome]) -> list[Table]:
    """Single numbers with a row each and a column per subject, and what is per a few named things of the last subject."""
    few = shown(outcomes)
    made = [_singles(few[i : i + MOST_COLUMNS]) for i in range(0, len(few), MOST_COLUMNS)]
    last, result = outcomes[-1], outcomes[-1].result
    assert result is not None
    axes = dict.fromkeys(entry.quantity.per for entry in _listed(result))
    for (axis,) in axes:
        same = [entry for entry in _listed(result) if entry.quantity.per == (axis,)]
        columns = [[str(place) for place in result.coords[axis]], *(cells(last, entry) for entry in same)]
        caption = "" if len(outcomes) == 1 else f"Of {whose(last)}."
        made.append(
            Table([axis, *(_with_unit(last, entry) for entry in same)], list(zip(*columns, strict=True)), caption)
        )
    return [each for each in made if each.rows]


def methods(outcomes: Sequence[Outcome]) -> Terms:
    """Settings, plan, cost, data, reference and versions of what was measured; each value once where it is one for all."""
    one = CATALOGUE.get(outcomes[0].metric)
    costs = [outcome.cost for outcome in outcomes]
    sums = {name: sum(cost.get(name, 0) for cost in costs) for name in ("forwards", "products", "seconds")}
    rows = {
        "Settings": [_values(outcome.settings) for outcome in outcomes],
        "Plan": [_values(outcome.plan) for outcome in outcomes],
        "Seed": [str(seed) for outcome in outcomes if (seed := outcome.content.get("seed")) is not None],
        "Cost": [
            f"{sums['forwards']:,} forward passes, {sums['products']:,} products, {duration(sums['seconds'])}"
            + (f" for {len(outcomes)} subjects" if len(outcomes) > 1 else "")
        ],
        "Data": [outcome.task for outcome in outcomes],
        "Reference": [one.reference if one else ""],
    }
    return Terms([(name, list(dict.fromkeys(filter(None, texts)))) for name, texts in rows.items() if any(texts)])


def said(outcome: Outcome, entry: Entry) -> str:
    """A single value with its error, or why there is none."""
    assert outcome.result is not None
    if entry.name in outcome.result.texts:
        return typeset(outcome.result.texts[entry.name])
    if entry.name in outcome.result.unresolved:
        return "not resolved"
    return " to ".join(cells(outcome, entry))


def told(outcome: Outcome, name: str) -> str:
    """`said` with its unit; "undefined" for a quantity that the result does not have."""
    entry = next((each for each in getattr(outcome.result, "entries", tuple)() if each.name == name), None)
    return "undefined" if entry is None else f"{said(outcome, entry)} {outcome.in_unit(entry.quantity.unit)}".strip()


def cells(outcome: Outcome, entry: Entry) -> list[str]:
    """A text per number, each with its standard error where there is one."""
    values, value = numbers(entry), entry.value
    if values is None or isinstance(value, bool):
        return [str(each) for each in value] if isinstance(value, (list, tuple)) else [str(value)]
    has_errors = is_estimate(value) or "stderr" in values
    errors = np.ravel(values.get("stderr_total", values.get("stderr", np.full(values["value"].shape, math.nan))))
    return [
        with_error(each, error) if has_errors and math.isfinite(error) else number(each, 4)
        for each, error in zip(np.ravel(values["value"]).tolist(), errors.tolist(), strict=True)
    ]


def heading(metric: str) -> str:
    """
    >>> heading("loss_landscape_2d"), heading("sam_sharpness")
    ('Loss landscape 2D', 'SAM sharpness')
    """
    words = metric.replace("_", " ")
    return re.sub(r"\b(a?sam|2d)\b", lambda word: word[0].upper(), words[:1].upper() + words[1:], flags=re.IGNORECASE)


def label(entry: Entry) -> str:
    return entry.name if entry.quantity.name == "*" else entry.quantity.label


def _with_unit(outcome: Outcome, entry: Entry) -> str:
    unit = outcome.in_unit(entry.quantity.unit)
    return label(entry) + (f" ({unit})" if unit else "")


def whose(outcome: Outcome) -> str:
    return outcome.subject if outcome.step is None else f"step {outcome.step:,}"


def on(outcome: Outcome) -> str:
    """What its metric looks at: a model, a pair or a series."""
    one = CATALOGUE.get(outcome.metric)
    return "model" if one is None else one.on


def brief(text: str) -> str:
    """What a cell has room for; the whole text is among the notes."""
    return text if len(text) <= MOST_LETTERS else re.split("[:;]", text)[0]


def shown(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """All; of a training run with more steps than have room, the first and the last."""
    if len(outcomes) <= MOST_COLUMNS:
        return list(outcomes)
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.group if outcome.step is not None else outcome.subject, []).append(outcome)
    return [outcome for each in groups.values() for outcome in _ends(each)]


def _ends(outcomes: list[Outcome]) -> list[Outcome]:
    return outcomes if len(outcomes) == 1 else [outcomes[0], outcomes[-1]]


def _main(outcome: Outcome) -> Entry | None:
    """The single number that stands for a result: the first that its page draws, or the first there is."""
    one, result = CATALOGUE.get(outcome.metric), outcome.result
    if result is None:
        return None
    single = {entry.name: entry for entry in _scalars(result)}
    chosen = [name for name in (one.drawn if one and one.drawn else single) if name in single]
    return single[chosen[0]] if chosen else None


def _scalars(result: Result) -> Iterator[Entry]:
    """What has a row of its own: single values and intervals."""
    return (entry for entry in result.entries() if entry.quantity.shown and entry.quantity.per in ((), BOUNDS))


def _listed(result: Result) -> list[Entry]:
    """What is per a few named things."""
    per_one = (entry for entry in result.entries() if entry.quantity.shown and len(entry.quantity.per) == 1)
    return [
        e for e in per_one if e.quantity.per != BOUNDS and 0 < len(result.coords.get(e.quantity.per[0], ())) <= LONGEST
    ]


def _singles(outcomes: Sequence[Outcome]) -> Table:
    columns: list[dict[str, str]] = []
    names: dict[str, Entry] = {}
    for outcome in outcomes:
        assert outcome.result is not None
        single = {entry.name: entry for entry in _scalars(outcome.result)}
        columns.append({name: brief(said(outcome, entry)) for name, entry in single.items()})
        names = {**single, **names}
    rows = [
        [label(entry), *(column.get(name, "") for column in columns), outcomes[0].in_unit(entry.quantity.unit)]
        for name, entry in names.items()
    ]
    heads = ["value"] if len(outcomes) == 1 else heads_of(outcomes)
    units = any(row[-1] for row in rows)
    return Table(["", *heads, *(["unit"] if units else [])], rows if units else [row[:-1] for row in rows])


def heads_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Names of columns: steps of one run, else whole names."""
    heads = [whose(outcome) for outcome in outcomes]
    return heads if len(set(heads)) == len(heads) else [outcome.subject for outcome in outcomes]


def _sentences(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The metric's sentence about the first and the last subject."""
    one = CATALOGUE.get(outcomes[0].metric)
    few = _ends(list(outcomes))
    for outcome, head in zip(few, heads_of(few), strict=True) if one is not None and one.sentence else ():
        numeric = {name: value for name, value in outcome.settings.items() if isinstance(value, (int, float))}
        words = {name: setting(float(value)) for name, value in numeric.items()}
        assert outcome.result is not None
        words |= {entry.name: told(outcome, entry.name) for entry in _scalars(outcome.result)}
        names = set(re.findall(r"{(\w+)}", one.sentence))
        if names <= words.keys():  # a quantity that was not asked for has no sentence
            text = one.sentence.format_map(words)
            yield text if len(few) == 1 else f"{head[:1].upper()}{head[1:]}: {text[:1].lower()}{text[1:]}"


def _notes(outcomes: Sequence[Outcome]) -> Iterator[Quote]:
    """What the results say of themselves, once for all that say it, and texts that are too long for a cell."""
    sources: dict[str, list[str]] = {}
    for outcome, head in zip(outcomes, heads_of(outcomes), strict=True):
        assert outcome.result is not None
        labels = {entry.name: label(entry) for entry in outcome.result.entries()}
        texts = {
            labels.get(name, name): text for name, text in outcome.result.texts.items() if len(text) > MOST_LETTERS
        }
        for note in (*(f"{name}: {text}" for name, text in texts.items()), *outcome.result.notes):
            sources.setdefault(typeset(note), []).append(head)
    yield from (Quote(note, ", ".join(heads)) for note, heads in sources.items())


def _tried(make: Callable[[], Iterable[Block | str]], name: str) -> list[Block | str]:
    try:
        return list(make())
    except Exception as err:  # noqa: BLE001 - of a class or a figure of the reader's own: the rest of the page is there
        return [Quote(f"{type(err).__name__}: {err}", f"This part of {name} could not be shown.")]


def _values(settings: Mapping[str, Any]) -> str:
    there = {name.replace("_", " "): value for name, value in settings.items() if value is not None}
    return ", ".join(f"{name} {_plain(value)}" for name, value in there.items())


def _plain(value: Any) -> str:
    return setting(float(value)) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
