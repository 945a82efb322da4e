"""Sharpness and the learning rates that curvatures allow, as rows of text: one source for a terminal and a page."""

from __future__ import annotations

from typing import Any

from ..core.store import Stored
from ..linalg.summary import SpectrumSummary
from .curvature_rows import MATRICES, end_interval, spectrum_rows
from .listing import Listing
from .numbers import between, error, is_known, number, with_error

MEASURES = (("sam", "SAM"), ("asam", "ASAM"), ("average", "average case"))


def sharpness(stored: Stored) -> Listing:
    """How far the loss rises in a step, by three definitions; what is undefined says why below."""
    measured = stored.meta["stages"]["sharpness"]
    seen = [(title, measured[name]) for name, title in MEASURES if "undefined" not in measured[name]]
    headers = ("sharpness", "length", "rise", "share of loss", "slope", "curvature", "remainder", "rounding")
    return Listing(headers, tuple(_row(title, one) for title, one in seen), tuple(_notes(stored))).trimmed()


def share(measure: dict[str, Any]) -> str:
    """Of the loss, with its interval; that the sequences do not support one, where they do not."""
    if measure["relative"] is None:
        return "undefined"
    if measure.get("relative_note"):
        return "not resolved"
    low, high = (measure.get(f"relative_{end}") for end in ("low", "high"))
    if low is None or high is None:
        stderr = measure["relative_stderr"]
        return f"{with_error(100 * measure['relative'], None if stderr is None else 100 * stderr)} %"
    return f"{number(100 * measure['relative'])} ({between(100 * low, 100 * high)}) %"


def rise(measure: dict[str, Any]) -> str:
    """The rise of the loss with its error: that over steps and texts together where it is known."""
    joint = measure.get("stderr_joint")
    return with_error(measure["absolute"], joint if is_known(joint) else measure["stderr"])


def rates(summary: SpectrumSummary, stored: Stored) -> Listing:
    """Curvatures and the learning rates at which gradient descent on a parabola of each is at its edge, 2 / curvature."""
    measured, rows = stored.meta["stages"]["sharpness"], []
    known = measured["critical"]
    if "undefined" not in known and known["value"] is None:
        rows.append(("critical sharpness", "undefined", "", "", "", "", known["status"]))
    elif "undefined" not in known:
        search = f"by search: {between(known['low'], known['high'], 4)}"
        value, rate = number(known["value"], 4), number(known["learning_rate"])
        rows.append(("critical sharpness", value, error(known["stderr"]), "", rate, "", search))
    if "undefined" not in measured["sam"]:
        bent = measured["sam"]["curvature"]
        note = "no error is computed"
        rows.append(("curvature along the gradient", number(bent, 4), "", "", _rate(bent), "", note))
    top = spectrum_rows(summary, stored)["largest eigenvalue"]
    name = f"largest eigenvalue of the {MATRICES[stored.meta['settings']['matrix']]}"
    rate = _rate(summary.max_eigenvalue)
    rows.append((name, top.value, top.data, top.interval, rate, rate_interval(stored), top.note))
    headers = ("", "curvature", "over texts", "95 % interval", "learning rate", "its interval", "note")
    return Listing(headers, tuple(rows)).trimmed()


def rate_interval(stored: Stored) -> str:
    """Of 2 / the largest eigenvalue, from that over texts; empty where it is not known."""
    interval = end_interval(stored, 0)
    if interval is None or interval[1] <= 0:
        return ""
    low, high = interval
    return between(2 / high, 2 / low) if low > 0 else f"above {number(2 / high)}"


def _rate(curvature: float) -> str:
    return number(2 / curvature) if curvature > 0 else "none"


def _row(title: str, measure: dict[str, Any]) -> tuple[str, ...]:
    parts = (measure.get(name) for name in ("first_order", "second_order", "remainder"))
    return (
        title,
        f"{measure['epsilon']:.3g}",
        rise(measure),
        share(measure) if "relative" in measure else "",
        *("" if part is None else number(part) for part in parts),
        number(measure["rounding"], 1),
    )


def _notes(stored: Stored) -> list[str]:
    """Why a measure or its share of the loss is undefined, what ± is over, and the gradient."""
    measured, num = stored.meta["stages"]["sharpness"], stored.meta["data"]["num_samples"]
    titles = (*MEASURES, ("critical", "critical sharpness"))
    notes = [
        f"{title} is undefined: {measured[name]['undefined']}"
        for name, title in titles
        if "undefined" in measured[name]
    ]
    reasons: dict[str, list[str]] = {}
    for name, title in MEASURES:
        if reason := measured[name].get("relative_note"):
            reasons.setdefault(reason, []).append(title)
    notes += [f"{' and '.join(names)}: share of the loss {reason}." for reason, names in reasons.items()]
    over = "no errors over texts, there is one" if num == 1 else f"± is one standard error over {num} texts"
    notes += [f"SAM, ASAM, critical sharpness: {over}, with the step held fixed.{_average(measured['average'])}"]
    return [*notes, f"The gradient has norm {number(measured['gradient_norm'], 4)} nats per unit of distance."]


def _average(measure: dict[str, Any]) -> str:
    if "undefined" in measure:
        return ""
    alone = f"over {measure['num']} pairs of random steps"
    if not is_known(measure.get("stderr_joint")):
        return f" Average case: {alone}, on these texts."
    return f" Average case: over steps and texts together; {alone} alone ± {error(measure['stderr'])}."
