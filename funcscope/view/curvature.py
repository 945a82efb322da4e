"""The page of a model's curvature: reads a stored study, draws spectrum, blocks and sharpness, says what they show."""

from __future__ import annotations

import math
from pathlib import Path

from ..core.store import load, write
from ..study import sharpness_rows
from ..study.curvature_rows import is_resolved
from ..study.curvature_table import UNIT
from . import curvature_methods
from . import curvature_sections as sections
from .curvature_result import Curvature, said
from .directional_methods import alone
from .directional_sections import estimated
from .numbers import number, setting, typeset
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
    write(page, render(title(found), kicker, [*lede(found), *alone(found.meta)], strip(found), body).encode())
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
    summary, rows = found.summary, found.rows
    top, bottom = (typeset(rows[f"{which} eigenvalue"].said) for which in ("largest", "smallest"))
    stable = "" if bool(summary.ends.converged[0]) else " (not converged)"
    if summary.max_eigenvalue > 0 and found.settings["matrix"] == "hessian":
        rate, reach = number(2 / summary.max_eigenvalue), sharpness_rows.rate_interval(found.stored)
        stable += f"; gradient descent is stable up to a learning rate of {rate}{f' ({reach})' if reach else ''}"
    negative = "none" if summary.has_negative_eigenvalues is False else typeset(rows["negative eigenvalues"].said)
    open_ = "" if summary.density.negative_resolution().resolved else ", not resolved"
    first = (
        f"The largest eigenvalue of the {found.matrix} is {top} {UNIT}{stable}. The smallest "
        f"{'is' if bool(summary.ends.converged[-1]) else 'is not converged, and on these texts at most'} {bottom}. "
        f"Negative beyond rounding: {negative} of all {found.num:,}{'' if negative == 'none' else open_}."
    )
    where = f" {sections.where(found)}" if found.blocks else ""
    resolved = f"The trace is {said(found.trace)}" + ("." if is_resolved(found.trace) else ", not told from zero.")
    return [first, sections.sam_sentence(found), f"{resolved}{where}"]


def strip(found: Curvature) -> list[Fact]:
    """The four numbers that come first."""
    summary, sam = found.summary, found.sharpness["sam"]
    top, share = found.rows["largest eigenvalue"], found.rows["negative eigenvalues"]
    over = f"± {typeset(top.data)} over texts" if top.data else "error over texts unknown"
    largest = Fact("Largest eigenvalue", typeset(top.value), f"{over}; {UNIT}")
    trace = estimated("Trace", float(found.trace.value), float(found.trace.stderr), f"over draws; {UNIT}")
    resolved = summary.density.negative_resolution().resolved
    error = f"± {typeset(share.draws)} over draws, of all" if share.draws else "of all"
    negative = Fact("Negative eigenvalues", typeset(share.value), error if resolved else "of all, not resolved")
    if "undefined" in sam:
        return [largest, trace, negative, Fact("SAM sharpness", "undefined", "the gradient vanishes")]
    detail = f"nats, a step of {setting(sam['epsilon'])} up the gradient"
    stderr = math.nan if sam["stderr"] is None else sam["stderr"]
    return [largest, trace, negative, estimated("SAM sharpness", sam["absolute"], stderr, detail)]
