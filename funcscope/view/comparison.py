"""The page of two models on the same random directions: what their differences are, pair by pair."""

from __future__ import annotations

import math
from typing import Any

from ..core.store import Stored
from . import comparison_sections as sections
from . import directional_methods
from .directional_sections import estimated
from .numbers import counted, number
from .page import Fact, Files, Section, render
from .pairing import Comparison
from .result import is_resolved, read


def rendered(stored: Stored, files: Files) -> str:
    """The page of a stored comparison, as HTML."""
    first, second = read(stored)
    c = Comparison(first, second, stored.meta["comparison"])
    body = [
        sections.changes(c),
        *([sections.curvature(c)] if "curvature_mean" in c.statistics else []),
        sections.table(c, stored.meta),
        sections.reading(c),
        sections.both(c, stored.meta),
        *([half] if (half := sections.half_precision(c)) is not None else []),
        Section("How these numbers were made", [directional_methods.terms(stored, c.results), files]),
    ]
    kicker = f"{c.second.name} against {c.first.name}, on the same {sections.directions(c)}"
    return render(
        title(c), kicker, [*lede(c), *directional_methods.alone(stored.meta)], strip(c, stored.meta["data"]), body
    )


def title(c: Comparison) -> str:
    """Whose loss rises less, and by how much; that the difference is not resolved, where it is not."""
    gap = c.gap(c.headline)
    if math.isnan(gap.value):
        return f"No loss at {c.first.step} is finite in both models"
    if math.isnan(gap.low):
        return f"The loss changes of {c.first.name} and {c.second.name} along one direction, without an error"
    if not is_resolved(gap):
        return f"The loss changes of {c.first.name} and {c.second.name} at {c.first.step} cannot be told apart"
    first, second = (c.of(f"{c.headline}_{which}") for which in ("first", "second"))
    low, high = sorted((abs(gap.low), abs(gap.high)))
    size = f"{number(abs(gap.value))} nats ({number(low)} to {number(high)})"
    if first <= 0 <= second or second <= 0 <= first:
        return f"The loss change of {c.second.name} is {size} {'above' if gap.value > 0 else 'below'} that of {c.first.name}"
    more = "more" if abs(second) > abs(first) else "less"
    return (
        f"The loss of {c.second.name} {'rises' if second > 0 else 'falls'} by {size} {more} than that of {c.first.name}"
    )


def lede(c: Comparison) -> list[str]:
    """The paired difference with its interval, and what it is a mean of; then the curvature and the baselines."""
    n, name = c.values["n_directions"], c.headline
    interval = sections.interval(c, name)
    sides = "on both sides of the weights" if name == "delta_two_sided_mean" else f"at {c.first.side}"
    text = (
        f"Along the same {sections.directions(c)}, {sides} at {c.first.step}, the loss changes by {_pair(c, name)} nats. "
        f"The paired difference is {c.said(f'{name}_difference')} nats{f' ({interval})' if interval else ''}."
    )
    lost = c.values[f"{name}_n_lost"]
    text += f" {lost} of {n} pairs are not finite and left out." if lost else ""
    more = f"The loss at the weights is {_baselines(c)} nats."
    if "curvature_mean" in c.statistics:
        gap = c.gap("curvature_mean")
        how = "" if math.isnan(gap.low) else " differ" if is_resolved(gap) else " cannot be told apart"
        more += (
            f" The mean curvatures{how}: {_pair(c, 'curvature_mean')} nats per {c.first.unit}², "
            f"a difference of {c.said('curvature_mean_difference')}."
        )
    return [text, more]


def strip(c: Comparison, data: dict[str, Any]) -> list[Fact]:
    """The paired differences, what pairing was good for, and how much was sampled."""
    gap = c.of("baseline_loss_second") - c.of("baseline_loss_first")
    gain = c.of(f"{c.headline}_pairing_gain")
    change = estimated("Loss change", *c.estimate(f"{c.headline}_difference"), "nats, second − first")
    bent = estimated("Curvature", *c.estimate("curvature_mean_difference"), f"nats per {c.first.unit}², second − first")
    apart = "so many times the directions would be needed without pairs"
    scored, _ = directional_methods.scored(data["task"])
    return [
        change,
        bent if "curvature_mean" in c.statistics else Fact("Loss at the weights", number(gap), "nats, second − first"),
        Fact("Gain of pairing", number(gain, 2) + ("" if math.isnan(gain) else "×"), apart),
        Fact(
            "Sampling",
            counted(c.values["n_directions"], "direction"),
            f"{data['num_scored']:,} scored {scored}, seed {c.values['seed']}",
        ),
    ]


def _pair(c: Comparison, name: str) -> str:
    return f"{c.said(f'{name}_first')} ({c.first.name}) and {c.said(f'{name}_second')} ({c.second.name})"


def _baselines(c: Comparison) -> str:
    first, second = (number(c.of(f"baseline_loss_{which}"), 4) for which in ("first", "second"))
    return f"{first} ({c.first.name}) and {second} ({c.second.name})"
