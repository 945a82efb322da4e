"""The sections of a curvature page: what is said of spectrum, blocks and sharpness, and the figures that show it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ..core.estimate import Estimate
from . import curvature_figures as figures
from .curvature_result import UNIT, Block, Curvature, negative_share, said
from .numbers import number, setting, with_error
from .page import Chart, Quote, Section, Table
from .theme import VERMILION

WIDTH = 0.15
"""Of the bump that stands for a node of the quadrature, in decades."""
MOST = 40
"""Bars that one figure has."""
MEASURES = (("sam", "SAM"), ("asam", "ASAM"), ("average", "average case"))


def spectrum(found: Curvature) -> Section:
    """The density of all eigenvalues, and those that were found one by one."""
    summary, rank = found.summary, found.summary.density.resolution("effective_rank")
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
        f"Of {found.num:,} eigenvalues, {negative_share(found)} are negative beyond rounding (below "
        f"−{number(summary.density.edge(), 2)}). The effective rank, the number of equal eigenvalues of the same entropy, is "
        f"{said(summary.effective_rank)}{'' if rank.resolved else f' ({rank})'}."
    )
    return Section(
        "The spectrum", [text, *_over_data(found), Chart(fig, caption), _first_instrument(found), *_late(found)]
    )


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
            _block_table(found.blocks),
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
    return f"{most.name} has {part} % of the trace, and {_percent(most.size / found.num)} of the parameters. {sharpest}"


def sharpness(found: Curvature) -> Section:
    """How far the loss rises in a step, by three definitions; and the learning rates that curvatures allow."""
    told, num = found.sharpness, found.meta["data"]["num_samples"]
    rows = [_row(title, told[name]) for name, title in MEASURES if "undefined" not in told[name]]
    notes = [
        Quote(told[name]["undefined"], f"Why {title} is undefined here.")
        for name, title in (*MEASURES, ("critical", "critical sharpness"))
        if "undefined" in told[name]
    ]
    text = (
        f"The gradient has norm {number(told['gradient_norm'])} nats per unit of distance. The rise of the loss (nats) in a "
        "step of a given length is a slope, a curvature and what is left: only the second part is about curvature. ± is one "
        f"standard error over {num} sequences, with the step held fixed; for the average case over random steps. Shares of "
        "the loss have 95 % intervals over sequences in brackets."
    )
    headers = ["", "length", "rise", "share of loss", "slope", "curvature", "remainder", "rounding"]
    table = [Table(headers, rows, "named")] if rows else []
    return Section("Sharpness", [text, *notes, *table, _rates_text(), _rates(found)])


def sam_sentence(found: Curvature) -> str:
    """The documented sharpness in plain words; that there is none, where the gradient vanishes."""
    sam = found.sharpness["sam"]
    if "undefined" in sam:
        return f"The sharpness is undefined: the gradient has norm {number(found.sharpness['gradient_norm'])}."
    parts = f"{number(sam['first_order'])} by slope and {number(sam['second_order'])} by curvature"
    return (
        f"A step of {setting(sam['epsilon'])} up the gradient raises the loss by "
        f"{with_error(sam['absolute'], sam['stderr'])} nats, {_share(sam)} of the loss: {parts}."
    )


def eigenvalues(found: Curvature) -> Section:
    """Every eigenvalue that was found, with its residual."""
    ends = found.summary.ends
    rows = [
        [
            f"{i if 2 * i <= len(ends.values) else found.num - len(ends.values) + i:,}",
            number(value, 5),
            number(residual, 2),
            state,
        ]
        for i, (value, residual, state) in enumerate(
            zip(ends.values.tolist(), ends.residuals.tolist(), ends.states, strict=True), start=1
        )
    ]
    for row, done in zip(rows, ends.converged.tolist(), strict=True):
        row[0] = row[0] if done else ""
    text = (
        f"An eigenvalue lies within the residual of each value. The search ended after {ends.num_matvecs} products, and "
        f"asked for residuals of {setting(ends.tol)} of the largest |eigenvalue| at the same end. Only what is converged has "
        f"a rank; what is not resolved is smaller than its residual. All in {UNIT}."
    )
    return Section("Eigenvalues", [text, Table(["rank", "eigenvalue", "residual", ""], rows, "listed")])


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


def _late(found: Curvature) -> list[Quote]:
    if found.summary.converged:
        return []
    lost = int((~found.summary.ends.converged).sum())
    text = f"{lost} of {len(found.summary.ends.values)} eigenvalues are not converged: their ranks or values are open."
    return [Quote(text, "Fewer of them, or a larger tolerance, will be reached.")]


def _largest(found: list[Block]) -> tuple[list[Block], str]:
    if len(found) <= MOST:
        return found, ""
    kept = set(sorted(range(len(found)), key=lambda i: -abs(found[i].trace))[:MOST])
    shown = [block for i, block in enumerate(found) if i in kept]
    return shown, f" The {MOST} blocks of {len(found)} with the largest |trace|; all are in the table."


def _block_table(found: list[Block]) -> Table:
    rows = [
        [
            block.name,
            f"{block.size:,}",
            with_error(block.trace, block.trace_stderr),
            "" if math.isnan(block.share) else f"{with_error(100 * block.share, 100 * block.share_stderr)} %",
            number(block.eigenvalue),
            number(block.residual, 2),
        ]
        for block in found
    ]
    return Table(["block", "parameters", "trace", "of the trace", "largest eigenvalue", "residual"], rows, "named")


def _row(title: str, told: dict[str, Any]) -> list[str]:
    parts = (number(told.get(name)) if told.get(name) is not None else "" for name in ("first_order", "second_order"))
    rest = told.get("remainder")
    share = _share(told) if "relative" in told else ""
    return [
        title, setting(float(f"{told['epsilon']:.3g}")), with_error(told["absolute"], told["stderr"]), share, *parts,
        "" if rest is None else number(rest), number(told["rounding"], 1),
    ]  # fmt: skip


def _share(told: dict[str, Any]) -> str:
    """Of the loss, with its interval; that the sequences do not support one, where they do not."""
    if told["relative"] is None:
        return "undefined"
    if told.get("relative_note"):
        return "an unresolved share"
    relative, stderr = told["relative"], told["relative_stderr"]
    low, high = (told.get(f"relative_{end}") for end in ("low", "high"))
    if low is None or high is None:
        return f"{with_error(100 * relative, None if stderr is None else 100 * stderr)} %"
    return f"{number(100 * relative, 3)} ({number(100 * low, 3)} to {number(100 * high, 3)}) %"


def _over_data(found: Curvature) -> list[str]:
    """What other sequences would change in the two outermost eigenvalues."""
    arrays, values = found.stored.arrays, found.summary.ends.values
    if "end_data_stderr" not in arrays:
        return []
    each = (
        f"{name} {with_error(float(values[i]), float(arrays['end_data_stderr'][i]))} "
        f"({number(float(arrays['end_data_low'][i]), 3)} to {number(float(arrays['end_data_high'][i]), 3)})"
        for name, i in (("the largest", 0), ("the smallest", -1))
    )
    return [
        f"Other sequences would give other eigenvalues. Over {found.meta['data']['num_samples']} of them, with the standard "
        f"error and, in brackets, the 95 % interval without the bias of so few: {'; '.join(each)}."
    ]


def _rates_text() -> str:
    return (
        "A curvature λ allows gradient descent a learning rate of 2 / λ. The critical sharpness is 2 over the smallest "
        "learning rate at which one step along the gradient raises the loss: measured, not from second derivatives. On a "
        "parabola it is the curvature along the gradient, and at most the largest eigenvalue."
    )


def _rates(found: Curvature) -> Table:
    told, top = found.sharpness, found.summary
    rows = []
    known = told["critical"]
    if "undefined" not in known:
        if known["value"] is None:
            rows.append(["critical sharpness", f"undefined ({known['status']})", "", ""])
        else:
            ends = f"{number(known['low'])} to {number(known['high'])}"
            value = with_error(known["value"], known["stderr"])
            rows.append(["critical sharpness", value, ends, number(known["learning_rate"])])
    if "undefined" not in told["sam"]:
        bent = told["sam"]["curvature"]
        rows.append(["curvature along the gradient", number(bent), "", _rate(bent)])
    residual = float(top.ends.residuals[0])
    near = f"{number(top.max_eigenvalue - residual, 4)} to {number(top.max_eigenvalue + residual, 4)}"
    rows.append(
        [f"largest eigenvalue of the {found.matrix}", number(top.max_eigenvalue), near, _rate(top.max_eigenvalue)]
    )
    return Table(["", UNIT, "interval", "learning rate, 2 / λ"], rows, "listed")


def _rate(value: float) -> str:
    return number(2 / value) if value > 0 else "none"


def _percent(share: float) -> str:
    return f"{number(100 * share, 2)} %"
