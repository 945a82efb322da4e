"""The page of a model of one's own: reads stored directional losses, draws them, says what they show."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..core.store import Stored, load, write
from ..study import directional_rows
from . import comparison, directional_methods
from . import directional_sections as sections
from .numbers import counted, number, with_error
from .page import Fact, Files, Section, render
from .result import Result, is_resolved, read


def write_page(numbers: Path) -> Path:
    """Write the page of stored directional losses, of one model or of two, next to their `.npz`; return its path.

    Raises FileNotFoundError, and core.store.Damaged for a file that cannot be read.
    """
    stored = load(numbers)
    files = Files([numbers.name, f"{numbers.stem}.json"])
    page = numbers.with_suffix(".html")
    make = comparison.rendered if stored.meta["kind"] == "comparison" else _rendered
    write(page, make(stored, files).encode())
    return page


def _rendered(stored: Stored, files: Files) -> str:
    (result,) = read(stored)
    means = [*directional_rows.explained(stored.meta), "Names are those of the stored file."]
    body = [
        sections.loss_changes(result),
        *([sections.curvature(result)] if result.has("curvatures") else []),
        *([sections.slopes(result)] if result.has("slopes") else []),
        *([sections.half_precision(result)] if "realised_displacement" in result.values else []),
        Section("All statistics", [*means, *sections.statistics(result), sections.plain((result,), ("value",))]),
        Section("How these numbers were made", [directional_methods.terms(stored, (result,)), files]),
    ]
    kicker = f"{result.name}: {result.model['class']}, {result.model['num_parameters']:,} parameters"
    return render(
        title(result),
        kicker,
        [*lede(result), *directional_methods.alone(stored.meta)],
        strip(result, stored.meta["data"]),
        body,
    )


def title(result: Result) -> str:
    """What the loss does, in a line; that it cannot be told, where the interval of the mean change holds 0."""
    found = result.mean_changes[result.side]
    num = result.values["n_samples"]
    if not num:
        return f"No loss at {result.step} is finite"
    if num == 1:
        return f"Along one random direction, the loss {_way(found.value)} nats at {result.step}"
    if not is_resolved(found):
        return _unresolved(result)
    return f"The loss {'rises' if found.value > 0 else 'falls'} by {_size(result)} nats at {result.step}"


def lede(result: Result) -> list[str]:
    """From where to where the loss goes, over which directions; what bends it."""
    values, num = result.values, result.values["n_samples"]
    gone = result.num - num
    left_out = f" {gone} of {result.num} losses there are not finite and left out of every mean." if gone else ""
    if not num:
        return [f"At the weights the loss is {number(values['baseline_loss'], 4)} nats.{left_out}"]
    found = result.mean_changes[result.side]
    digits = _digits(values["baseline_loss"], found.value)
    first = (
        f"From {number(values['baseline_loss'], digits)} nats at the weights it goes to "
        f"{number(values['loss_mean'], digits)} nats {'on average over' if num > 1 else 'along'} {_directions(result)}."
    )
    unclear = result.values.get("resolution_note")
    if num > 1 and not unclear and not is_resolved(found):
        low, high = number(found.low), number(found.high)
        first += f" The change is {result.said('delta_mean')} nats, its 95 % interval reaches from {low} to {high}."
        first += _signs(result)
    notes = [note for note in (unclear, result.values.get("relative_step_note")) if note]
    return [f"{first}{left_out}", *_shape(result), *(f"{note[0].upper()}{note[1:]}" for note in notes)]


def strip(result: Result, data: dict[str, Any]) -> list[Fact]:
    """The four numbers that come first."""
    at = f"nats at {result.step}"
    change, bent = result.of("delta_mean"), result.of("curvature_mean")
    spread = result.of("delta_std")
    scored, _ = directional_methods.scored(data["task"])
    return [
        Fact(
            "Baseline loss",
            number(result.values["baseline_loss"], 4),
            f"nats, mean over {data['num_scored']:,} {scored}",
        ),
        sections.estimated("Mean loss change", *change, at),
        sections.estimated("Mean curvature", *bent, f"nats per {result.unit}²")
        if result.has("curvatures")
        else sections.estimated("Standard deviation", *spread, f"{at}, over directions"),
        Fact(
            "Sampling",
            counted(result.num, "direction"),
            f"{'both sides' if result.has('losses_negative') else 'one side'}, seed {result.values['seed']}",
        ),
    ]


def _unresolved(result: Result) -> str:
    """What signs say where the interval of the mean holds 0."""
    above, below, p = (result.values.get(f"delta_{name}") for name in ("n_above", "n_below", "sign_p_value"))
    if above is None or below is None or p is None or (0 not in (above, below) and p >= 0.05) or above == below:
        return f"The mean loss change at {result.step} cannot be told from zero"
    way, most = ("rises", above) if above > below else ("falls", below)
    most_of = f"all {most}" if most == result.num else f"{most} of {result.num}"
    return f"The loss {way} along {most_of} directions at {result.step}; how much on average is not resolved"


def _signs(result: Result) -> str:
    """The sign test beside an interval that holds 0, and a tail that makes the interval worthless."""
    values = result.values
    if values.get("delta_sign_p_value") is None:
        return ""
    text = (
        f" The loss is higher along {values['delta_n_above']} and lower along {values['delta_n_below']} directions (sign "
        f"test over directions, p\u00a0=\u00a0{number(values['delta_sign_p_value'], 2)})."
    )
    share = values.get("delta_largest_share")
    heavy = share is not None and share > 0.5 and values["n_samples"] > 2
    return f"{text} One direction makes {share:.0%} of the sum, and the interval does not hold." if heavy else text


def _way(change: float) -> str:
    return f"{'rises' if change > 0 else 'falls'} by {number(abs(change))}"


def _size(result: Result) -> str:
    value, stderr = result.of("delta_mean")
    return with_error(abs(value), stderr)


def _directions(result: Result) -> str:
    num = result.values["n_samples"]
    kind = f"{result.values['normalize']}-normalised"
    return f"{num:,} random {kind} directions" if num > 1 else f"one random {kind} direction"


def _digits(level: float, change: float) -> int:
    """Enough digits of a loss to see its change."""
    if not change or not level:
        return 4
    return min(9, max(4, 3 + math.floor(math.log10(abs(level))) - math.floor(math.log10(abs(change)))))


def _shape(result: Result) -> list[str]:
    """What the curvature and the slopes say, where they are there."""
    said = []
    unit = f"nats per {result.unit}²"
    if result.has("curvatures") and result.values["curvature_mean"] is not None:
        bent = result.mean("curvature_mean", "curvatures")
        few = result.values["n_curvatures_undecided"]
        if result.num == 1:
            return [f"Its curvature is {number(bent.value)} {unit}."]
        sign = ("upward" if bent.value > 0 else "downward") + " on average"
        way = f"bends {sign}" if is_resolved(bent) else "has no mean curvature that can be told from zero"
        if result.values.get("curvature_status") == "rough":
            way = "has no curvature that is resolved: it depends on the step"
        text = f"Along these directions it {way}, {result.said('curvature_mean')} {unit}"
        said.append(f"{text}; rounding may decide the sign of {few} of {result.num} curvatures." if few else f"{text}.")
    if result.has("slopes") and result.values["dir_grad_delta_corr"] is not None:
        said.append(f"Slope and loss change have a correlation of {result.said('dir_grad_delta_corr')}.")
    return [" ".join(said)] if said else []
