"""The printed form of a curvature study: the tables of its rows, and what it all took."""

from __future__ import annotations

from typing import Any

from ..core.store import Stored
from ..linalg.eigen import NAMES
from ..linalg.summary import SpectrumSummary
from . import curvature_rows as rows
from .listing import Listing, wrapped
from .numbers import number
from .sharpness_rows import rates, sharpness

UNIT = "nats per unit of distance²"


def text(summary: SpectrumSummary, stored: Stored, *, width: int = 0) -> str:
    """Everything that was measured, as tables for a terminal. `summary` and `stored` are of one study.

    width: of the terminal, in characters; 0 where the output goes elsewhere.
    """
    meta, ends = stored.meta, summary.ends
    head = (
        f"{rows.MATRICES[meta['settings']['matrix']]} of {summary.num_parameters:,} parameters, in {UNIT}. "
        f"{len(ends.values)} eigenvalues {NAMES[ends.which]}, to residuals of {ends.tol:g} of the largest |eigenvalue| at "
        f"the same end, in {ends.num_matvecs} products:"
    )
    listings: list[Listing] = [
        rows.spectrum(summary, stored),
        *([rows.block_table(stored)] if "block_traces" in meta["stages"] else []),
        sharpness(stored),
        rates(summary, stored),
    ]
    first = f"{wrapped(head, width)}\n{rows.eigenvalues(summary, stored).text(width)}"
    return "\n\n".join([first, *(one.text(width) for one in listings), wrapped(cost(meta), width)])


def cost(meta: dict[str, Any]) -> str:
    """Products, their price in forward passes, and time."""
    stages, forward = meta["cost"]["stages"], meta["cost"]["forward_seconds"]
    spent = [stage for stage in stages.values() if stage["products"]]
    products = sum(stage["products"] for stage in spent)
    seconds = sum(stage["seconds"] for stage in spent)
    return (
        f"{products} products in {number(seconds, 2)} s, {number(seconds / products, 2)} s each: "
        f"{number(seconds / products / forward, 2)} forward passes over all texts (graph and algorithm included); sharpness "
        f"{number(stages['sharpness']['seconds'], 2)} s."
    )
