"""What there is to look at in a study: its groups, their steps and metrics, and the place that an address asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs

from ...core.tables import numbers
from ...study import catalogue as catalogue  # without it the classes of stored results are not known
from ...study.cache import Outcome
from ...study.metric import CATALOGUE
from ...study.results import MANIFEST, Results
from ..report import with_short_names
from ..section import entries, on

MODELS = "all models"
"""The group of those that are no checkpoints, side by side."""


ORDER = {"series": 0, "experts": 1, "pair": 2, "tasks": 3, "model": 4}
"""Of cards, by what their metric looks at."""


@dataclass(frozen=True)
class Group:
    """A training run, a model, or the models side by side."""

    name: str
    steps: tuple[int, ...]
    """Of a training run; none elsewhere."""
    outcomes: dict[str, list[Outcome]]
    """By metric: of a run in the order of steps; those of series and pairs first."""


class Place(NamedTuple):
    """Where the reader stands, and why that is not what was asked for."""

    group: str | None
    step: int | None
    metric: str | None
    message: str = ""


class Reading(NamedTuple):
    """A study as it was when it was last whole."""

    groups: dict[str, Group]
    stamp: str
    """Another one when something is to be shown anew."""
    message: str = ""
    """Why it is not what the folder has at this moment."""


_LAST: dict[Path, Reading] = {}
"""By folder."""


def study(folder: Path) -> Reading:
    """The groups of a study; while its list cannot be read, as it is being written, those of before."""
    try:
        status = (folder / MANIFEST).stat()
        stamp = f"{status.st_mtime_ns}-{status.st_size}"
        if folder not in _LAST or _LAST[folder].stamp != stamp:
            _LAST[folder] = Reading(grouped(with_short_names(Results.open(folder)).outcomes), stamp)
    except (OSError, ValueError, KeyError, TypeError) as err:
        last, why = _LAST.get(folder, Reading({}, "")), f"{folder.name} cannot be read ({type(err).__name__}: {err})"
        return Reading(last.groups, f"{last.stamp} and {why}", f"{why}; this is what was read before.")
    return _LAST[folder]


def grouped(outcomes: Sequence[Outcome]) -> dict[str, Group]:
    """Training runs by name, then the models side by side where there are several, then each of them."""
    runs = dict.fromkeys(o.group or o.subject for o in outcomes if o.step is not None)
    others = [o for o in outcomes if (o.group or o.subject) not in runs]
    models = dict.fromkeys(o.subject for o in others if on(o) == "model")
    parts = {name: [o for o in outcomes if (o.group or o.subject) == name] for name in runs}
    if len(models) > 1:
        parts[MODELS] = others
    parts |= {name: [o for o in others if name in (o.subject, o.group)] for name in models}
    return {name: _group(name, each) for name, each in parts.items()}


def _group(name: str, outcomes: Sequence[Outcome]) -> Group:
    places, by_metric = {metric: i for i, metric in enumerate(CATALOGUE)}, dict[str, list[Outcome]]()
    for one in sorted(outcomes, key=lambda o: (ORDER[on(o)], places.get(o.metric, len(places)), o.step or 0)):
        by_metric.setdefault(one.metric, []).append(one)
    return Group(name, tuple(sorted({o.step for o in outcomes if o.step is not None})), by_metric)


def singles(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Labels of the quantities that are one number at every step, where there are several steps; that of the page first."""
    ok = [o for o in outcomes if o.ok and o.step is not None]
    if len(ok) < 2:
        return {}
    drawn = CATALOGUE[ok[0].metric].drawn if ok[0].metric in CATALOGUE else ()
    labels = {
        name: entry.quantity.label if entry.quantity.name != "*" else name
        for outcome in (ok[0], ok[-1])
        for name, entry in entries(outcome).items()
        if entry.quantity.shown and not entry.quantity.per and (seen := numbers(entry)) and seen["value"].ndim == 0
    }
    return {name: labels[name] for name in [*(n for n in drawn if n in labels), *labels]}


def nearest(among: Sequence[int], step: int) -> int:
    """The step that lies nearest, the earlier one of two.

    >>> nearest((0, 100, 200), 160), nearest((0, 100, 200), 150)
    (200, 100)
    """
    return min(among, key=lambda each: (abs(each - step), each))


def requested(search: str | None) -> dict[str, str]:
    """Group, step and metric that the address asks for, as text: nothing is believed yet.

    >>> requested("?group=p37&step=100&x=1")
    {'group': 'p37', 'step': '100'}
    """
    asked = parse_qs((search or "").removeprefix("?"))
    return {name: asked[name][0] for name in ("group", "step", "metric") if name in asked}


def admitted(groups: Mapping[str, Group], asked: Mapping[str, str]) -> Place | None:
    """Where to stand: what was asked for where the study has it, and else what is next to it, which is said.

    None where it is a group that the study does not have: another one would be taken for it.
    """
    name = asked.get("group", next(iter(groups), ""))
    if name not in groups:
        return None
    group, metric, said = groups[name], asked.get("metric"), []
    if metric is not None and metric not in group.outcomes:
        said.append(f"{name} has no metric “{metric[:80]}”: these are all that it has.")
        metric = None
    step, text = (group.steps[-1] if group.steps else None), asked.get("step")
    if text is not None and group.steps:
        if text.isascii() and text.isdigit() and len(text) < 16:
            step = nearest(group.steps, int(text))
            said += [] if step == int(text) else [f"Step {int(text):,} is not in the study: this is step {step:,}."]
        else:
            said.append("The step of the address is not a whole number: this is the last one.")
    return Place(name, step, metric, " ".join(said))
