"""What directional losses say, of one model or of two, as rows of text: one source for a terminal and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .listing import Listing, wrapped
from .numbers import UNDEFINED, between, error, is_known, number

Values = Mapping[str, Any]
"""The documented dictionary of a result, as it was stored: what is undefined is None."""
OVER_DIRECTIONS = "over directions: one standard error over random directions, on these texts"
OVER_TEXTS = "over texts: one standard error over the texts, along these directions"
IN_ALL = "in all: both together, their interaction counted once"


def text(meta: Mapping[str, Any], *, width: int = 0) -> str:
    """Everything that was measured, as tables for a terminal: a table per model, and one of their differences."""
    parts = []
    for model in meta["models"]:
        head = f"{model['name']}: {_sampling(model['values'])}"
        parts += [f"{wrapped(head, width)}\n{model_table(model['values']).text(width)}"]
    if "comparison" in meta:
        first, second = (model["name"] for model in meta["models"])
        head = f"{second} - {first}, paired over {meta['comparison']['n_directions']:,} directions"
        parts += [f"{wrapped(head, width)}\n{comparison_table(meta).text(width)}"]
    return "\n\n".join(parts)


def model_table(values: Values) -> Listing:
    """Every statistic with its errors over directions, over texts, and over both; then what they are and what is missing."""
    names = [name for name in values if f"{name}_stderr" in values]
    base = error(values.get("baseline_loss_stderr_data"))
    rows = [("baseline_loss", number(values["baseline_loss"], 6), "", base, base)]
    rows += [_row(values, name) for name in names if is_known(values[name])]
    headers = ("", "value", "over directions", "over texts", "in all")
    notes = [_columns(rows), *_missing(values, names), *stored_notes(values)]
    return Listing(headers, tuple(rows), tuple(note for note in notes if note)).trimmed()


def comparison_table(meta: Mapping[str, Any]) -> Listing:
    """Every compared statistic: both models, the difference with its errors, interval and tests."""
    values, (first, second) = meta["comparison"], (model["name"] for model in meta["models"])
    names = [name.removesuffix("_difference") for name in values if name.endswith("_difference")]
    level = f"{100 * values['level']:g} %"
    rows = tuple(_difference(values, name) for name in names if is_known(values[f"{name}_difference"]))
    headers = ("", first, second, "difference", "over directions", "over texts", "in all", f"{level} interval",
               "p", "Wilcoxon's p", "rank-biserial")  # fmt: skip
    has_data = any(row[5] for row in rows)
    notes = [
        _columns(tuple((row[0], "", *row[4:7]) for row in rows)),
        f"Interval and p: Student's t, from the error {'in all' if has_data else 'over directions'}; {values['n_tests']} "
        "quantities are tested, and no p is corrected for that. Wilcoxon's p and rank-biserial: over directions, on these "
        "texts."
        if any(row[7] for row in rows)
        else "",
        *_missing(values, [f"{name}_difference" for name in names]),
        *[f"{model['name']}: {note}" for model in meta["models"] for note in stored_notes(model["values"])],
    ]
    return Listing(headers, rows, tuple(note for note in notes if note)).trimmed()


def stored_notes(values: Values) -> list[str]:
    """What a result says of its own numbers."""
    notes = (values.get(name) for name in ("relative_step_note", "note", "step_note", "precision_note"))
    return [note.replace(" ± nan", "") for note in notes if note]


def _sampling(values: Values) -> str:
    num = values["n_samples"] + max(values["n_nonfinite_pos"], 0)
    lost = values["n_nonfinite_pos"] + values["n_nonfinite_neg"]
    holes = f"; {lost} losses are not finite ({values['n_nonfinite_pos']} at +span)" if lost else ""
    return (
        f"{num:,} {values['normalize']}-normalised {values['distribution']} directions at span {values['actual_span']:g} "
        f"(relative step {values['relative_step']:.3g}), seed {values['seed']}, key {values['key']}{holes}"
    )


def _row(values: Values, name: str) -> tuple[str, ...]:
    errors = (error(values.get(f"{name}_{ending}")) for ending in ("stderr", "stderr_data", "stderr_total"))
    return (name, number(values[name], 5), *errors)


def _difference(values: Values, name: str) -> tuple[str, ...]:
    each = (number(values[f"{name}_{which}"], 5) for which in ("first", "second", "difference"))
    gap = f"{name}_difference"
    p, wilcoxon, rank = (values.get(f"{name}_{what}") for what in ("p_value", "wilcoxon_p_value", "rank_biserial"))
    tests = (number(x, 2) if is_known(x) else "" for x in (p, wilcoxon, rank))
    return (name, *each, *_row(values, gap)[2:], between(values[f"{gap}_low"], values[f"{gap}_high"], 4), *tests)


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """What the columns of errors are, of those that there are."""
    texts = [OVER_DIRECTIONS, OVER_TEXTS, IN_ALL]
    seen = [text for i, text in enumerate(texts, start=2) if any(row[i] for row in rows)]
    return f"{'; '.join(seen)}." .capitalize() if seen else ""


def _missing(values: Values, names: Sequence[str]) -> list[str]:
    """Which numbers and errors are undefined or unknown, and why."""
    notes, num = [], values.get("n_samples", values.get("n_directions"))
    undefined = [name.removesuffix("_difference") for name in names if not is_known(values[name])]
    if undefined:
        notes += [f"{UNDEFINED.capitalize()}: {', '.join(undefined)}."]
    if num == 1:
        notes += ["One direction has no error over directions and no spread: take more (`--samples`)."]
    if values.get("n_sequences", 0) == 1:
        notes += ["One sequence has no error over texts."]
        return notes
    bare = [name for name in names if is_known(values[name]) and not is_known(values.get(f"{name}_stderr_data"))]
    if bare:
        listed = ", ".join(name.removesuffix("_difference") for name in bare)
        notes += [f"No error over texts is known, those given are over directions alone: {listed}."]
    return notes
