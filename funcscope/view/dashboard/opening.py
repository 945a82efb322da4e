"""What the page shows when it opens or another variant is chosen; what an address may ask for, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from ...study.runs import Runs, Variant
from . import layout, reading
from .catalogue import available


class Opened(NamedTuple):
    """What the page shows of a variant."""

    message: str
    panels: list[Any] | None
    """None: they are what they were."""
    facts: Any
    times: Any
    steps: dict[str, Any]
    """`variant`, the `steps` of the slider, and a `stamp` that makes the panels look again."""
    place: int
    """Of the step, on the slider."""


def requested(search: str | None) -> dict[str, str]:
    """Variant and step that the address asks for, as text: nothing is believed yet.

    >>> requested("?variant=p37&step=100&x=1")
    {'variant': 'p37', 'step': '100'}
    """
    asked = parse_qs((search or "").removeprefix("?"))
    return {name: asked[name][0] for name in ("variant", "step") if name in asked}


def admitted(runs: Runs, asked: Mapping[str, str]) -> str | None:
    """The variant to show at first: the one asked for if it is one of the run's, the first if none was asked for."""
    try:
        return runs.variant(asked.get("variant", runs.variants()[0])).name
    except ValueError:
        return None


def opened(
    runs: Runs, asked: Mapping[str, str], name: str | None, here: Mapping[str, Any] | None, stamp: int
) -> Opened:
    """The page of a variant. The step stays at a reload and from variant to variant; so do the panels at a reload.

    here: where the reader stands; None where the address is to say it.
    """
    if name is None:
        return Opened(_refusal(runs, asked.get("variant", "")), [], None, None, {}, 0)
    try:
        variant = runs.variant(name)
    except ValueError:
        return Opened(_refusal(runs, name), [], None, None, {}, 0)
    steps = reading.steps(variant)
    meant = admitted(runs, asked) == variant.name
    index, remark = _arrival(steps, asked.get("step") if meant else None, here)
    shown = available(variant)
    wanted = [panel.name for panel in shown]
    same = here is not None and here.get("variant") == variant.name and here.get("panels") == wanted
    message, head = _head(variant)
    return Opened(
        " ".join(filter(None, [message, remark, "" if shown else f"Nothing is stored for {variant.name} yet."])),
        None if same else [layout.card(panel, variant) for panel in shown],
        head,
        layout.times([reading.cost(variant, analyzer) for analyzer in variant.analyzers()]),
        {"variant": variant.name, "steps": list(steps), "stamp": stamp, "panels": wanted},
        index,
    )


def _head(variant: Variant) -> tuple[str, Any]:
    try:
        return "", layout.facts(variant)
    except ValueError as err:
        return str(err).replace(f"{variant.path}/", ""), None


def _refusal(runs: Runs, name: str) -> str:
    shown = name if len(name) <= 80 else f"{name[:80]}…"
    return f"There is no variant “{shown}” in this run. It has {', '.join(runs.variants())}: choose one above."


def _arrival(steps: Sequence[int], text: str | None, here: Mapping[str, Any] | None) -> tuple[int, str]:
    """Place of the step to stand at, and what is to be said about it."""
    if not steps:
        return 0, ""
    if here is not None and "step" in here:
        return steps.index(reading.nearest(tuple(steps), int(here["step"]))), ""
    if text is None:
        return len(steps) - 1, ""
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        return len(steps) - 1, "The step of the address is not a whole number: this is the last one."
    near = reading.nearest(tuple(steps), int(text))
    return steps.index(near), "" if near == int(text) else f"Step {int(text):,} is not stored: this is the nearest."
