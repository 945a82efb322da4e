"""The sections of a curvature page: what is said of spectrum, blocks and sharpness, and the figures that show it."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..core.estimate import Estimate
from ..study import curvature_rows, sharpness_rows
from ..study.curvature_rows import Block
from ..study.curvature_table import UNIT
from . import curvature_figures as figures
from .curvature_result import Curvature, said
from .numbers import number, setting, typeset, with_error
from .page import Chart, Section, listed
from .theme import VERMILION

WIDTH = 0.15
"""Of the bump that stands for a node of the quadrature, in decades."""
MOST = 40
"""Bars that one figure has."""


def spectrum(found: Curvature) -> Section:
    """The density of all eigenvalues, and those that were found one by one."""
    summary = found.summary
    tie = found.rounding or 1.0
    values, residuals = (x.numpy() for x in (summary.ends.values, summary.ends.residuals))
    points, mean, stderr = found.spectrum(tie, WIDTH)
    fig = figures.spectrum(points, mean, stderr, values, residuals, threshold=tie, least=0.5 / found.num, unit=UNIT)
    caption = (
        f"Above: the share of eigenvalues per decade, from quadrature with {summary.density.num_probes} random starts of "
        f"{summary.density.steps} products, each node a bump with a standard deviation of {WIDTH:g} decades; the band is the "
        f"mean ± 1.96 standard errors over starts. Below half an eigenvalue in {found.num:,} nothing is drawn; gaps between "
        "bumps are those of the quadrature’s nodes, not of the spectrum. "
        f"Bottom: the {len(values)} eigenvalues found from both ends, with their residuals. The axis is linear within "
        f"±{number(tie, 2)}, which is what rounding may make of a zero, and logarithmic beyond."
    )
    text = (
        f"The numbers of the spectrum, in {UNIT}. Negative eigenvalues are those beyond rounding; the effective rank is the "
        f"number of equal eigenvalues of the same entropy, out of {found.num:,}."
    )
    table = listed(curvature_rows.spectrum(summary, found.stored), "listed")
    return Section("The spectrum", [text, *table, Chart(fig, caption), _first_instrument(found)])


def blocks(found: Curvature) -> Section:
    """Traces and largest eigenvalues, block by block."""
    shown, rest = _largest(found.blocks)
    names = [block.name for block in shown]
    traces = figures.bars(
        names, np.array([b.trace for b in shown]), np.array([1.96 * b.trace_stderr for b in shown]),
        name="trace", unit=UNIT, error=" (95 %)",
    )  # fmt: skip
    tops = figures.bars(
        names, np.array([b.eigenvalue for b in shown]), np.array([b.residual for b in shown]),
        name="largest eigenvalue", unit=UNIT, error=" (residual)", colour=VERMILION,
        line=(found.summary.max_eigenvalue, "the whole matrix"),
    )  # fmt: skip
    num = found.settings["block_products"]
    return Section(
        f"Where the curvature is, by {found.settings['by']}",
        [
            _sum(found),
            Chart(traces, f"Traces of the diagonal blocks from {num} products. Intervals: 1.96 standard errors.{rest}"),
            Chart(
                tops,
                "The largest eigenvalue of each block, with all other parameters held fixed; it is at most that of the whole "
                f"matrix (dotted). Bars: residuals.{rest}",
            ),
            *listed(curvature_rows.block_table(found.stored)),
        ],
    )


def _sum(found: Curvature) -> str:
    """Two estimates of one number."""
    whole = said(Estimate.of(torch.from_numpy(found.stored.arrays["hutchinson_samples"])))
    return (
        f"The diagonal blocks of the {found.matrix} are the curvature of some parameters with all others held fixed. Their "
        f"traces add up to that of the whole: {whole} from these products, {said(found.trace)} from those of the spectrum."
    )


def where(found: Curvature) -> str:
    """Which block has most of the trace, and which the largest eigenvalue."""
    top = max(found.blocks, key=lambda block: block.eigenvalue)
    sharpest = f"The largest eigenvalue of a single block is that of {top.name}, {number(top.eigenvalue)}."
    most = max(found.blocks, key=lambda block: block.trace)
    if math.isnan(most.share):
        return f"The trace cannot be told from zero, so that no block has a share of it. {sharpest}"
    part = with_error(100 * most.share, 100 * most.share_stderr)
    share = _percent(most.size / found.num)
    return f"The block {most.name} has {part} % of it, and {share} of the parameters. {sharpest}"


def sharpness(found: Curvature) -> Section:
    """How far the loss rises in a step, by three definitions; and the learning rates that curvatures allow."""
    text = (
        "The rise of the loss (nats) in a step of a given length is a slope, a curvature and what is left: only the second "
        "part is about curvature. Shares of the loss have 95 % intervals over sequences in brackets."
    )
    tables = [
        *listed(sharpness_rows.sharpness(found.stored)),
        _rates_text(),
        *listed(sharpness_rows.rates(found.summary, found.stored)),
    ]
    return Section("Sharpness", [text, *tables])


def sam_sentence(found: Curvature) -> str:
    """The documented sharpness in plain words; that there is none, where the gradient vanishes."""
    sam = found.sharpness["sam"]
    if "undefined" in sam:
        return f"The sharpness is undefined: the gradient has norm {number(found.sharpness['gradient_norm'])}."
    known = not sam.get("relative_note")
    share = f", {typeset(sharpness_rows.share(sam))} of the loss" if known else ""
    parts = f"{number(sam['first_order'])} by slope and {number(sam['second_order'])} by curvature"
    return (
        f"A step of {setting(sam['epsilon'])} up the gradient raises the loss by "
        f"{typeset(sharpness_rows.rise(sam))} nats{share}: {parts}."
    )


def eigenvalues(found: Curvature) -> Section:
    """Every eigenvalue that was found, with its residual and its error over texts."""
    ends = found.summary.ends
    text = (
        f"An eigenvalue lies within the residual of each value. The search ended after {ends.num_matvecs} products, and "
        f"asked for residuals of {setting(ends.tol)} of the largest |eigenvalue| at the same end. Only what is converged has "
        f"a rank; what is not resolved is smaller than its residual. All in {UNIT}."
    )
    return Section("Eigenvalues", [text, *listed(curvature_rows.eigenvalues(found.summary, found.stored), "listed")])


def _first_instrument(found: Curvature) -> str:
    """The mean curvature along random directions is the trace over P: two ways to the same number."""
    mean, drawn = found.along_random
    exact = found.trace
    per = (float(exact.value) / found.num, float(exact.stderr) / found.num)
    letter = "H" if found.settings["matrix"] == "hessian" else "G"
    return (
        f"Back to random directions: over {mean.num} random unit directions ({drawn}) the mean of dᵀ{letter}d is "
        f"{said(mean)}; the trace, {said(exact)}, over P is {with_error(*per)}. Both estimate the same number."
    )


def _largest(found: list[Block]) -> tuple[list[Block], str]:
    if len(found) <= MOST:
        return found, ""
    kept = set(sorted(range(len(found)), key=lambda i: -abs(found[i].trace))[:MOST])
    shown = [block for i, block in enumerate(found) if i in kept]
    return shown, f" The {MOST} blocks of {len(found)} with the largest |trace|; all are in the table."


def _rates_text() -> str:
    return (
        "A curvature λ allows gradient descent a learning rate of 2 / λ. The critical sharpness is 2 over the smallest "
        "learning rate at which one step along the gradient raises the loss: measured, not from second derivatives. On a "
        "parabola it is the curvature along the gradient, and at most the largest eigenvalue."
    )


def _percent(share: float) -> str:
    return f"{number(100 * share, 2)} %"
