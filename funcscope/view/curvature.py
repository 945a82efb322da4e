"""The page of a model's curvature: reads a stored study, draws spectrum, blocks and sharpness, says what they show."""

from __future__ import annotations

import math
from pathlib import Path

from ..core.store import load, write
from . import curvature_methods
from . import curvature_sections as sections
from .curvature_result import UNIT, Curvature, is_resolved, negative_share, said
from .directional_sections import estimated
from .numbers import number, setting
from .page import Fact, Files, Section, render


def write_page(numbers: Path) -> Path:
    """Write the page of a stored curvature study next to its `.npz`, and return its path.

    Raises FileNotFoundError, and core.store.Damaged for a file that cannot be read.
    """
    found = Curvature(load(numbers))
    page = numbers.with_suffix(".html")
    files = Files([numbers.name, f"{numbers.stem}.json"])
    body = [
        sections.spectrum(found),
        *([sections.blocks(found)] if found.blocks else []),
        sections.sharpness(found),
        sections.eigenvalues(found),
        Section("How these numbers were made", [curvature_methods.terms(found), files]),
    ]
    kicker = f"{found.model['name']}: {found.model['class']}, {found.num:,} parameters"
    write(page, render(title(found), kicker, lede(found), strip(found), body).encode())
    return page


def title(found: Curvature) -> str:
    """From where to where the curvature reaches, in a line."""
    top, bottom = found.summary.max_eigenvalue, found.summary.min_eigenvalue
    if not found.rounding:
        return "No curvature in any direction"
    low = number(bottom) if abs(bottom) > found.rounding else "0"
    high = number(top) if abs(top) > found.rounding else "0"
    return f"The curvature of the loss reaches from {low} to {high}"


def lede(found: Curvature) -> list[str]:
    """The spectrum in words, then sharpness, then where the curvature is."""
    summary = found.summary
    sign = "none" if summary.has_negative_eigenvalues is False else negative_share(found)
    top = summary.max_eigenvalue
    stable = f", for which gradient descent is stable up to a learning rate of {number(2 / top)}" if top > 0 else ""
    first = (
        f"The largest eigenvalue of the {found.matrix} is {number(top, 4)} {UNIT}{stable}; the smallest "
        f"{'is' if bool(summary.ends.converged[-1]) else 'is not converged, and at most'} "
        f"{number(summary.min_eigenvalue, 4)}. Negative beyond rounding: {sign} of all {found.num:,}."
    )
    where = f" {sections.where(found)}" if found.blocks else ""
    resolved = f"The trace is {said(found.trace)}" + ("." if is_resolved(found.trace) else ", not told from zero.")
    return [first, sections.sam_sentence(found), f"{resolved}{where}"]


def strip(found: Curvature) -> list[Fact]:
    """The four numbers that come first."""
    summary, sam = found.summary, found.sharpness["sam"]
    top = Fact(
        "Largest eigenvalue",
        number(summary.max_eigenvalue),
        f"{UNIT}; residual {number(float(summary.residuals[0]), 1)}",
    )
    trace = estimated("Trace", float(found.trace.value), float(found.trace.stderr), UNIT)
    share = summary.negative_fraction
    negative = estimated("Negative eigenvalues", 100 * float(share.value), 100 * float(share.stderr), "% of all")
    negative = negative._replace(value=f"{negative.value} %", detail=negative.detail.removeprefix("% "))
    if not (summary.density.negative_resolution().resolved or math.isnan(share.stderr)):
        negative = Fact("Negative eigenvalues", "not resolved", negative_share(found))
    if "undefined" in sam:
        return [top, trace, negative, Fact("SAM sharpness", "undefined", "the gradient vanishes")]
    detail = f"nats, a step of {setting(sam['epsilon'])} up the gradient"
    stderr = math.nan if sam["stderr"] is None else sam["stderr"]
    return [top, trace, negative, estimated("SAM sharpness", sam["absolute"], stderr, detail)]
