"""What directional losses say, of one model or of two, as rows of text: one source for a terminal and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .listing import Listing, wrapped
from .numbers import UNDEFINED, between, error, is_known, number

Values = Mapping[str, Any]
"""The documented dictionary of a result, as it was stored: what is undefined is None."""
OVER = {
    "over directions": "over directions: one standard error over random directions, on these texts",
    "over texts": "over texts: one standard error over the texts, along these directions",
    "in all": "in all: both together, their interaction counted once",
}
"""Columns of errors and what is in them."""
TRUNCATION = "curvature_truncation"


def text(meta: Mapping[str, Any], *, width: int = 0) -> str:
    """Everything that was measured, as tables for a terminal: a table per model, and one of their differences."""
    parts = []
    for model in meta["models"]:
        head = f"{model['name']}: {_sampling(model['values'])}"
        parts += [f"{wrapped(head, width)}\n{model_table(model).text(width)}"]
    if "comparison" in meta:
        first, second = (model["name"] for model in meta["models"])
        head = f"{second} - {first}, paired over {_directions(meta['comparison']['n_directions'])}"
        parts += [f"{wrapped(head, width)}\n{comparison_table(meta).text(width)}"]
    return "\n\n".join([*parts, "\n".join(wrapped(note, width) for note in explained(meta))])


def model_table(model: Mapping[str, Any]) -> Listing:
    """Every statistic with its errors over directions, over texts, and over both; then what is missing."""
    values = model["values"]
    names = [name for name in values if f"{name}_stderr" in values]
    base = error(values.get("baseline_loss_stderr_data"))
    rows = [("baseline_loss", number(values["baseline_loss"], 6), "", base, base)]
    rows += [_row(values, name) for name in names if is_known(values[name])]
    headers = ("", "value", "over directions", "over texts", "in all")
    return Listing(headers, tuple(rows), (*_missing(values, names), *stored_notes(model))).trimmed()


def comparison_table(meta: Mapping[str, Any]) -> Listing:
    """Every compared statistic: both models, the difference with its errors, interval and tests."""
    values, (first, second) = meta["comparison"], (model["name"] for model in meta["models"])
    names = [name.removesuffix("_difference") for name in values if name.endswith("_difference")]
    rows = tuple(_difference(values, name) for name in names if is_known(values[f"{name}_difference"]))
    headers = ("", first, second, "difference", "over directions", "over texts", "in all",
               f"{100 * values['level']:g} % interval", "p", "Wilcoxon's p", "rank-biserial")  # fmt: skip
    notes = []
    if any(row[7] for row in rows):
        over = (
            "in all, over directions alone where there is no other"
            if any(row[6] for row in rows)
            else "over directions"
        )
        notes += [
            f"Interval and p: Student's t, from the error {over}; {values['n_tests']} quantities are tested, and no p is "
            "corrected for that. Wilcoxon's p and rank-biserial: over directions, on these texts."
        ]
    notes += [*_missing(values, [f"{name}_difference" for name in names]), *_signs(values, names)]
    lost = [f"{name} {values[f'{name}_n_lost']}" for name in names if values[f"{name}_n_lost"]]
    notes += [f"Pairs lost to values that are not finite: {', '.join(lost)}."] if lost else []
    return Listing(headers, rows, tuple(notes)).trimmed()


def explained(meta: Mapping[str, Any]) -> list[str]:
    """What the columns of errors are, of those that there are; why there are none over directions."""
    tables = [model_table(model) for model in meta["models"]]
    seen = [note for column, note in OVER.items() if any(column in table.headers for table in tables)]
    notes = ["; ".join(seen).capitalize() + "."] if seen else []
    if any(row[0] == TRUNCATION for table in tables for row in table.rows):
        notes += [f"{TRUNCATION}: what the length of the step adds to the mean curvature, from half the step."]
    if max(model["values"]["n_samples"] for model in meta["models"]) == 1:
        notes += ["One direction has no error over directions and no spread: `--samples` takes more."]
    return notes


def stored_notes(model: Mapping[str, Any]) -> list[str]:
    """What a result says of its own numbers, as sentences."""
    values = model["values"]
    named = [values.get(name) for name in ("relative_step_note", "note", "step_note", "precision_note")]
    notes = [without_unknown(note) for note in model.get("notes", named) if note]
    return [f"{note[0].upper()}{note[1:]}" for note in notes]


def without_unknown(note: str) -> str:
    """A note without the error of a number that has none, as along one direction.

    >>> without_unknown("off by about 0.2 ± nan")
    'off by about 0.2'
    """
    return note.replace(" ± nan", "")


def _sampling(values: Values) -> str:
    kind = f"{values['normalize']}-normalised {values['distribution']} "
    return (
        f"{_directions(values['n_samples'] + values['n_nonfinite_pos'], kind)} at span {values['actual_span']:g} (relative "
        f"step {values['relative_step']:.3g}), seed {values['seed']}"
    )


def _directions(num: int, kind: str = "") -> str:
    return f"{num:,} {kind}direction{'' if num == 1 else 's'}"


def _row(values: Values, name: str) -> tuple[str, ...]:
    errors = [error(values.get(f"{name}_{ending}")) for ending in ("stderr", "stderr_data", "stderr_total")]
    if values.get("curvature_status") == "rough" and name in ("curvature_mean", "rayleigh_mean"):
        errors = ["not resolved"] * 3
    return (name, number(values[name], 5), *errors)


def _difference(values: Values, name: str) -> tuple[str, ...]:
    each = (number(values[f"{name}_{which}"], 5) for which in ("first", "second", "difference"))
    gap = f"{name}_difference"
    p, wilcoxon, rank = (values.get(f"{name}_{what}") for what in ("p_value", "wilcoxon_p_value", "rank_biserial"))
    tests = (number(x, 2) if is_known(x) else "" for x in (p, wilcoxon, rank))
    return (name, *each, *_row(values, gap)[2:], between(values[f"{gap}_low"], values[f"{gap}_high"], 4), *tests)


def _signs(values: Values, names: Sequence[str]) -> list[str]:
    """The sign test of means of which the interval holds 0."""
    signs = [
        f"{name} {values[f'{name}_n_above']} up, {values[f'{name}_n_below']} down (p = "
        f"{number(values[f'{name}_sign_p_value'], 2)})"
        for name in names
        if is_known(values.get(f"{name}_sign_p_value"))
        and is_known(low := values[f"{name}_difference_low"])
        and low <= 0 <= values[f"{name}_difference_high"]
    ]
    return [f"Not told from 0 by their intervals; signs over directions: {', '.join(signs)}."] if signs else []


def _missing(values: Values, names: Sequence[str]) -> list[str]:
    """Which numbers are undefined, and which errors over texts are unknown where others are known."""
    undefined = [name.removesuffix("_difference") for name in names if not is_known(values[name])]
    notes = [f"{UNDEFINED.capitalize()}: {', '.join(undefined)}."] if undefined else []
    known = [name for name in names if is_known(values[name]) and name != TRUNCATION]
    bare = [name for name in known if not is_known(values.get(f"{name}_stderr_data"))]
    if bare and values.get("n_sequences", 0) != 1:
        listed = ", ".join(name.removesuffix("_difference") for name in bare)
        notes += [f"No error over texts is known: {listed}."]
    return notes
