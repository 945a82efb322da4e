"""A figure of any quantity: what it is per decides how it is drawn, and `CUSTOM` where axes do not say it.

A number over several steps is a trajectory, over several models a row of points; a sample a distribution, and of two models
along the same directions a scatter; what has names along its axis bars, or a line each over training, what has numbers there
a line; two axes a heat map, x and y a plane.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..core.result import Result
from ..core.tables import Entry, numbers
from ..study.cache import Outcome
from . import curves, samples
from .curves import Line
from .instruments import CUSTOM
from .plane_figures import Limits, Plane, contour, heat, shades
from .reading import DRAWS, Drawn, Look, Seen, are_numbers, captioned, gone, named, seen_in

MOST_SUBJECTS = 4
"""Subjects that are told apart by colour, or have a figure each; of more, some are drawn."""
MOST_BARS, MOST_LINES = 60, 12
RUNNING = ("step", "t", "epsilon", "sparsity", "coefficient")
"""Axes along which a quantity that has another one is drawn as lines."""


def figures(
    outcomes: Sequence[Outcome], chosen: Sequence[str] = (), *, current: int | None = None,
    limits: Mapping[str, Limits] | None = None,
) -> Iterator[Drawn]:  # fmt: skip
    """Of the chosen quantities, or of all; of single numbers where there are several subjects.

    current: a step that is marked. limits: by quantity, the ends of its colours, as `limits_of` all steps gives them.
    """
    ok = [outcome for outcome in outcomes if outcome.result is not None]
    for name in chosen or dict.fromkeys(name for outcome in ok for name in drawable(outcome.result)):
        look = Look(current, (limits or {}).get(name))
        own = {(type(outcome.result).__name__, name): outcome for outcome in ok}
        custom = [
            (CUSTOM[kind], [o for o in ok if type(o.result).__name__ == kind[0]]) for kind in own if kind in CUSTOM
        ]
        for drawing, those in custom:
            yield from () if drawing is None else drawing(_few(those), look)
        if not custom and (seen := seen_in(ok, name)):
            yield from draw(seen, look)


def limits_of(outcomes: Sequence[Outcome], name: str) -> Limits | None:
    """The smallest and the largest value of a quantity in all of them: a colour scale that stays. None without any."""
    ends = [one.value[np.isfinite(one.value)] for one in seen_in([o for o in outcomes if o.result is not None], name)]
    every = np.concatenate([np.ravel(end) for end in ends] or [np.empty(0)])
    return (float(every.min()), float(every.max())) if every.size else None


def drawable(result: Result | None) -> Iterator[str]:
    """Names of the quantities that a result has figures of where none is chosen: no errors, no places along axes."""
    assert result is not None
    entries = list(result.entries())
    errors = {what.stderr for what in result.quantities().values()} | {f"{each.name}_stderr" for each in entries}
    yield from (
        name for kind, name in CUSTOM if kind == type(result).__name__ and name not in {e.name for e in entries}
    )
    for each in entries:
        is_error = each.name in errors or each.quantity.label.startswith(("standard error", "its standard error"))
        if (each.quantity.shown or each.quantity.per) and not is_error and not _is_place(each, result):
            yield each.name


def draw(seen: Sequence[Seen], look: Look = Look()) -> Iterator[Drawn]:  # noqa: B008
    """One quantity of some subjects; nothing where a table says all of it, or where no value is finite."""
    per, places = seen[0].entry.quantity.per, seen[0].places
    if not any(np.isfinite(one.value).any() for one in seen):
        return
    if not per:
        if len(seen) > 1:
            yield _trajectory(seen, look) if _has_steps(seen) else _points(seen)
    elif per == ("x", "y"):
        yield from (_plane(one, look, seen) for one in _few(seen))
    elif len(per) == 2:
        yield from (drawn for one in _few(seen) if (drawn := _two_axes(one, look, seen)) is not None)
    elif len(per) == 1 and places[0] is None and per[0] in DRAWS:
        yield _distribution(seen)
        if len(seen) == 2 and len({(one.key, one.value.shape) for one in seen}) == 1 and seen[0].key is not None:
            yield _pairs(*seen)
    elif len(per) == 1 and per[0] in RUNNING and seen[0].value.size > 1:
        yield _along(_few(seen), look)
    elif len(per) == 1 and per != ("bound",):
        yield from _over_names(seen, look)


def _trajectory(seen: Sequence[Seen], look: Look) -> Drawn:
    """A number at every step, a line per training run."""
    runs, each = _runs(seen), []
    for name, run in zip(named(list(runs)), runs.values(), strict=True):
        numbers_at = ((one.step, float(one.value), float(one.half)) for one in run)
        each.append(Line(name, *map(np.array, zip(*numbers_at, strict=True))))
    fig, notes = curves.lines(each, name=seen[0].label, unit=seen[0].unit, current=look.current)
    return captioned(fig, seen[0], f"at every step{_errors(seen)}", gone(seen, "values"), *notes)


def _points(seen: Sequence[Seen]) -> Drawn:
    values, half = (np.array([float(x) for x in each]) for each in zip(*((s.value, s.half) for s in seen), strict=True))
    each = [Line("", np.arange(len(seen)), values, half)]
    fig = curves.bars([one.title for one in seen], each, name=seen[0].label, unit=seen[0].unit, dots=True)
    how = f"of every model{_errors(seen)}"
    return captioned(fig, seen[0], how, gone(seen, "values"))


def _distribution(seen: Sequence[Seen]) -> Drawn:
    """Every sample of the first and the last subject, or of the few there are."""
    shown, first = _few(seen), seen[0]
    axis = first.entry.quantity.per[0]
    by_name = {one.title: one.value for one in shown}
    fig, notes = samples.distribution(by_name, name=first.label, unit=first.unit, axis=axis)
    how = f"per {axis}, a dot each, with the middle half and the mean"
    return captioned(fig, first, how, gone(shown, "dots"), *notes)


def _pairs(first: Seen, second: Seen) -> Drawn:
    names = (f"{first.title}<br>{first.label}", f"{second.title}<br>{first.label}")
    axis = first.entry.quantity.per[0]
    sides = {f"a {axis}": (first.value, second.value)}
    fig = samples.scatter(
        sides, (1.0, "equal"), names=names, units=(first.unit, second.unit), axis=axis, square=True
    )  # fmt: skip
    return captioned(fig, first, f"of one model against that of the other, a dot per {axis} that both have in common")


def _along(seen: Sequence[Seen], look: Look) -> Drawn:
    """A line along a numbered axis for every subject."""
    axis = seen[0].axis(0)
    each = [Line(one.title, one.along(0), one.value, one.half) for one in seen]
    fig, notes = curves.lines(each, name=seen[0].label, unit=seen[0].unit, at=axis, current=look.current)
    return captioned(fig, seen[0], f"along {axis}{_errors(seen)}", gone(seen, "values"), *notes)


def _over_names(seen: Sequence[Seen], look: Look) -> Iterator[Drawn]:
    """Bars by name; over many steps of runs a line per name, or a cell per name and step, for each run."""
    one, axis = _few(seen)[-1], seen[0].entry.quantity.per[0]
    names = _names_along(one)
    runs = _runs(seen)
    if _has_steps(seen) and len(runs) <= MOST_SUBJECTS and all(len(run) > MOST_SUBJECTS for run in runs.values()):
        for title, run in zip(named(list(runs)), runs.values(), strict=True):
            if _alike(run):
                yield from _over_steps(run, look, title if len(runs) > 1 else "")
        return
    shown = [s for s in _few(seen) if s.places == one.places and s.value.shape == one.value.shape]
    if len(names) == 1 and len(seen) == 1:
        return  # a table says it
    is_numbered = one.places[0] is not None and are_numbers(one.places[0])
    if len(names) <= MOST_BARS and not is_numbered:
        each = [Line(s.title, np.arange(len(names)), s.value, s.half) for s in shown]
        fig = curves.bars(names, each, name=one.label, unit=one.unit)
        yield captioned(fig, one, f"per {axis}{_whose(shown)}", gone(shown, "bars"))
    else:
        each = [Line(s.title, s.along(0), s.value, s.half) for s in shown]
        fig, notes = curves.lines(each, name=one.label, unit=one.unit, at=one.axis(0))
        yield captioned(fig, one, f"per {axis}{_whose(shown)}", *notes)


def _over_steps(run: Sequence[Seen], look: Look, whose: str) -> Iterator[Drawn]:
    """What has names along its axis, over the steps of one run."""
    one, axis, names = run[-1], run[0].entry.quantity.per[0], _names_along(run[-1])
    steps, value, half = (np.array(x) for x in zip(*((s.step, s.value, s.half) for s in run), strict=True))
    holes, how = gone(run, "values"), f"per {axis}, at every step{f' of {whose}' if whose else ''}"
    if len(names) <= MOST_LINES:
        each = [Line(name, steps, value[:, i], half[:, i]) for i, name in enumerate(named(names))]
        fig, notes = curves.lines(each, name=one.label, unit=one.unit, current=look.current, height=420)
        yield captioned(fig, one, how, holes, *notes, whose=whose)
    elif len(names) <= MOST_BARS:
        fig = heat(value.T, steps.tolist(), names, ("step", axis), label=one.label, unit=one.unit, limits=look.limits)
        yield captioned(fig, one, how, holes, whose=whose)


def _names_along(one: Seen) -> list[str]:
    axis, places = one.entry.quantity.per[0], one.places[0] or range(1, one.value.size + 1)
    return [f"{axis} {place}" if isinstance(place, int) else str(place) for place in places]


def _runs(seen: Sequence[Seen]) -> dict[str, list[Seen]]:
    """By run, in the order of their steps."""
    runs: dict[str, list[Seen]] = {}
    for one in sorted(seen, key=lambda one: one.step or 0):
        runs.setdefault(one.group, []).append(one)
    return runs


def _two_axes(one: Seen, look: Look, seen: Sequence[Seen]) -> Drawn | None:
    """Lines along an axis that runs, a cell for every pair of places else."""
    per, whose = one.entry.quantity.per, _whose([one])
    if one.value.size < 2 and per[1] not in RUNNING:
        return None
    for i in (1, 0):
        if per[i] in RUNNING and one.value.shape[1 - i] <= MOST_LINES:
            value, half = (x if i else x.T for x in (one.value, one.half))
            names = named([str(place) for place in one.places[1 - i] or range(1, len(value) + 1)])
            each = [Line(name, one.along(i), value[j], half[j]) for j, name in enumerate(names)]
            fig, notes = curves.lines(
                each, name=one.label, unit=one.unit, at=one.axis(i), current=look.current, height=400
            )
            how = f"along {one.axis(i)}, a line per {per[1 - i]}{whose}"
            return captioned(fig, one, how, gone([one], "values"), *notes, whose=_title(one, seen))
    places = [
        known if known is not None else list(range(size))
        for known, size in zip(one.places, one.value.shape, strict=True)
    ]
    finite = np.isfinite(one.value)
    some = [(finite if finite.any() else ~finite).any(1 - i).nonzero()[0] for i in (0, 1)]
    empty = [f"{size - len(at):,} of {size:,} along {axis}" for size, at, axis in zip(one.value.shape, some, per, strict=True)
             if len(at) < size]  # fmt: skip
    one = one._replace(value=one.value[np.ix_(*some)])
    y, x = ([known[i] for i in at] for known, at in zip(places, some, strict=True))
    fig = heat(one.value, x, y, (per[1], per[0]), label=one.label, unit=one.unit, limits=look.limits or _ends(seen))
    told = (f"{' and '.join(empty)} have none" if empty else "", gone([one], "cells"))
    return captioned(fig, one, f"per {' and '.join(per)}{whose}", *told, whose=_title(one, seen))


def _plane(one: Seen, look: Look, seen: Sequence[Seen]) -> Drawn:
    """Contours of equal units, with the checkpoints on it where the result has their coordinates."""
    data = one.outcome.result.asdict() if one.outcome.result is not None else {}
    names = named([str(name) for name in (one.coords.get("axis") or ("direction 1", "direction 2"))])
    plane = Plane(
        one.value, one.along(0), one.along(1), (f"{names[0]}, coefficient", f"{names[1]}, coefficient"),
        float(data.get("baseline_loss", np.nan)),
    )  # fmt: skip
    steps, at = one.coords.get("step"), data.get("coordinates")
    walk = None if steps is None or at is None else (np.asarray(at, dtype=np.float64), np.asarray(steps))
    scale = shades(np.array(look.limits or _ends(seen)), one.unit)
    fig = contour(plane, scale, walk, look.current)
    told = ", with the checkpoints in their order" if walk is not None else ""
    return captioned(
        fig,
        one,
        f"on the plane{_whose([one])}, a star at its centre{told}",
        gone([one], "points"),
        whose=_title(one, seen),
    )


def _few(seen: Sequence[Any]) -> Sequence[Any]:
    """All; of more than have room, the last of each run, or of one run the first and the last."""
    if len(seen) <= MOST_SUBJECTS:
        return seen
    last = [*{one.group: one for one in seen}.values()]
    return last if 1 < len(last) <= MOST_SUBJECTS else (seen[0], seen[-1])


def _ends(seen: Sequence[Seen]) -> Limits:
    every = np.concatenate([one.value[np.isfinite(one.value)] for one in _few(seen)])
    return float(every.min()), float(every.max())


def _title(one: Seen, seen: Sequence[Seen]) -> str:
    return one.title if len(seen) > 1 else ""


def _errors(seen: Sequence[Seen]) -> str:
    return ", with 95 % intervals" if any(np.isfinite(one.half).any() for one in seen) else ""


def _whose(seen: Sequence[Seen]) -> str:
    return f" of {seen[0].title}" if len(seen) == 1 else ""


def _alike(seen: Sequence[Seen]) -> bool:
    return all(one.places == seen[0].places and one.value.shape == seen[0].value.shape for one in seen)


def _has_steps(seen: Sequence[Seen]) -> bool:
    """Whether all have a step, no two of a run the same."""
    steps = [(one.group, one.step) for one in seen]
    return all(step is not None for _, step in steps) and len(set(steps)) == len(steps)


def _is_place(entry: Entry, result: Result) -> bool:
    """Whether these are the numbers along an axis, which every figure over it shows."""
    per = entry.quantity.per
    known = np.asarray(result.coords.get(per[-1], ()) if per else ()).tolist()
    values = numbers(entry) if known and are_numbers(known) else None
    return values is not None and values["value"].shape[-1:] == (len(known),) and bool((values["value"] == known).all())
