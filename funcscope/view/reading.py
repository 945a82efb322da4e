"""Quantities as figures take them: values, 95 % intervals and places along their axes, names as plotly shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from ..core.estimate import interval
from ..core.tables import Entry, is_estimate, numbers
from ..study.cache import Outcome
from .drawing import Z95, lost, titled
from .names import apart, plain, short
from .plane_figures import Limits

DRAWS = ("direction", "probe", "sample", "sequence", "pair", "micro-batch", "parameter", "vector", "point")
"""Axes along which a quantity is a sample: their order says nothing."""


class Drawn(NamedTuple):
    figure: go.Figure
    caption: str


class Look(NamedTuple):
    """What a figure is told from outside: the step that is marked, and the ends of its colours."""

    current: int | None = None
    limits: Limits | None = None


class Seen(NamedTuple):
    """One quantity of one subject."""

    outcome: Outcome
    title: str
    """Of the subject, among the others that are drawn."""
    entry: Entry
    value: Float[np.ndarray, "*shape"]
    stderr: Float[np.ndarray, "*shape"]
    places: tuple[list[Any] | None, ...]
    """Names or numbers along each axis, where it has any."""

    @property
    def step(self) -> int | None:
        return self.outcome.step

    @property
    def group(self) -> str:
        return str(getattr(self.outcome, "group", "")) or ("" if self.step is not None else self.outcome.subject)

    @property
    def key(self) -> Any:
        """That of the draws."""
        return getattr(self.outcome.result, "key", None)

    @property
    def coords(self) -> dict[str, Any]:
        assert self.outcome.result is not None
        return {name: np.asarray(each).tolist() for name, each in self.outcome.result.coords.items()}

    @property
    def label(self) -> str:
        return plain(
            self.entry.quantity.label if self.entry.quantity.name != "*" else self.entry.name.replace("_", " ")
        )

    @property
    def unit(self) -> str:
        return plain(self.outcome.in_unit(self.entry.quantity.unit))

    @property
    def half(self) -> Float[np.ndarray, "*shape"]:
        """Half of the 95 % interval: Student's t for an estimate."""
        if is_estimate(self.entry.value):
            low, high = interval(self.entry.value)
            return np.where(np.isfinite(self.value), (high - low) / 2, math.nan)
        return np.asarray(Z95 * self.stderr)

    @property
    def is_resolved(self) -> bool:
        assert self.outcome.result is not None
        return self.entry.name not in self.outcome.result.unresolved

    def axis(self, axis: int) -> str:
        """What the numbers along an axis are."""
        name = self.entry.quantity.per[axis]
        return plain(getattr(self.outcome.result, "axis_titles", {}).get(name, name))

    def along(self, axis: int) -> Float[np.ndarray, " n"]:
        """Numbers along an axis: its places, or positions from 1 on."""
        known = self.places[axis]
        return np.asarray(
            range(1, self.value.shape[axis] + 1) if known is None or not are_numbers(known) else known, float
        )


def seen_in(outcomes: Sequence[Outcome], name: str) -> list[Seen]:
    """A quantity of every subject that has it as numbers, under names that tell the subjects apart."""
    titles = titles_of(outcomes)
    every = (_seen(one, title, name) for one, title in zip(outcomes, titles, strict=True))
    return [one for one in every if one is not None]


def titles_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Steps of one run as such, else names, with steps that these do not have."""
    groups = {getattr(one, "group", "") for one in outcomes}
    if (
        len(groups) == 1
        and len({one.step for one in outcomes}) == len(outcomes) > 1
        and None not in {o.step for o in outcomes}
    ):
        return [f"step {one.step:,}" for one in outcomes]
    names = named([one.subject for one in outcomes])
    return [
        name if one.step is None or str(one.step) in one.subject else f"{name}, step {one.step:,}"
        for one, name in zip(outcomes, names, strict=True)
    ]


def named(names: Sequence[str], most: int = 30) -> list[str]:
    """Names as plotly shows them, and short; none is that of another."""
    shorter = [short(name, most) for name in apart(names)]
    return [plain(name) for name in (shorter if len(set(shorter)) == len(set(names)) else names)]


def are_numbers(places: Sequence[Any]) -> bool:
    return all(isinstance(place, (int, float)) and not isinstance(place, bool) for place in places)


def gone(seen: Sequence[Seen], what: str) -> str:
    """How many values are holes because they are not resolved, and how many because they are not finite."""
    hidden = sum(one.value.size for one in seen if not one.is_resolved)
    rest = [one.value.ravel() for one in seen if one.is_resolved]
    known = f"{hidden:,} of {sum(one.value.size for one in seen):,} {what} not resolved" if hidden else ""
    return ", ".join(filter(None, [known, lost(np.concatenate(rest), what) if rest else ""]))


def captioned(fig: go.Figure, one: Seen, how: str, *notes: str, whose: str = "") -> Drawn:
    """With the quantity as its title, and a caption that says how it is drawn and what is not."""
    said = "; ".join(filter(None, notes))
    label = one.label[:1].upper() + one.label[1:] + (f", {whose}" if whose else "")
    return Drawn(titled(fig, label), f"The {one.entry.quantity.label} {how}{f'; {said}' if said else ''}.")


def _seen(outcome: Outcome, title: str, name: str) -> Seen | None:
    result = outcome.result
    assert result is not None
    entry = next((each for each in result.entries(name) if each.name == name), None)
    values = None if entry is None or entry.value is None else numbers(entry)
    if entry is None or values is None or values["value"].ndim != len(entry.quantity.per):  # a word, or a range
        return None
    value = values["value"]
    known = (result.coords.get(axis) for axis in entry.quantity.per)
    places = tuple(None if each is None else np.asarray(each).tolist() for each in known)
    stderr = values.get("stderr_total", values.get("stderr", np.full(value.shape, math.nan)))
    if name in result.unresolved:  # a hole, that is counted: a mark would be believed
        value = np.full(value.shape, math.nan)
    return Seen(outcome, title, entry, value, stderr, places)
