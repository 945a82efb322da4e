"""The printed form of a curvature study: eigenvalues, shape of the spectrum, blocks, sharpness and what it all took."""

from __future__ import annotations

import math
from typing import Any

import torch
from tabulate import tabulate

from ..core.estimate import Estimate
from ..core.store import Stored
from ..linalg.summary import SpectrumSummary, shape

MATRICES = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix"}
_PARTS = ("absolute", "stderr", "relative", "first_order", "second_order", "remainder")


def text(summary: SpectrumSummary, stored: Stored) -> str:
    """Everything that was measured, as tables for a terminal. `summary` and `stored` are of one study."""
    meta = stored.meta
    parts = [
        f"{MATRICES[meta['settings']['matrix']]}, {summary.ends}",
        _over_data(summary, stored),
        _shape(summary),
        *([_blocks(stored)] if "block_traces" in meta["stages"] else []),
        _sharpness(meta["stages"]["sharpness"], summary),
        cost(meta),
    ]
    return "\n\n".join(parts)


def _over_data(summary: SpectrumSummary, stored: Stored) -> str:
    """What the texts leave open about the two outermost eigenvalues."""
    arrays, num = stored.arrays, stored.meta["data"]["num_samples"]
    if "end_data_stderr" not in arrays:
        return f"no error over the texts: {stored.meta['stages']['ends'].get('no_data_errors', 'not computed')}"
    lines = [f"over {num} texts, with the bias of so few taken off the interval (95 %):"]
    for name, i in (("largest", 0), ("smallest", -1)):
        value, stderr, low, high = (
            float(x)
            for x in (summary.ends.values[i], *(arrays[f"end_data_{part}"][i] for part in ("stderr", "low", "high")))
        )
        lines.append(f"{name:9} {value:.4g} ± {stderr:.2g}, {low:.4g} to {high:.4g}")
    return "\n".join(lines)


def cost(meta: dict[str, Any]) -> str:
    """Products, their price in forward passes, and time."""
    stages, forward = meta["cost"]["stages"], meta["cost"]["forward_seconds"]
    spent = [stage for stage in stages.values() if stage["products"]]
    products = sum(stage["products"] for stage in spent)
    each = sum(stage["seconds"] for stage in spent) / products
    return (
        f"{products} products in {each * products:.0f} s, {each:.2g} s each: {each / forward:.1f} forward passes over all "
        f"texts (graph and algorithm included); sharpness {stages['sharpness']['seconds']:.1f} s."
    )


def _shape(summary: SpectrumSummary) -> str:
    return tabulate([(name, *said) for name, said in shape(summary).items()], disable_numparse=True)


def _blocks(stored: Stored) -> str:
    arrays = stored.arrays
    rows = []
    for i, name in enumerate(stored.meta["stages"]["block_traces"]["names"]):
        samples = arrays["block_trace_samples"][i]
        rows.append(
            [
                name,
                f"{arrays['block_sizes'][i]:,}",
                _estimate(Estimate.of(torch.from_numpy(samples))),
                f"{arrays['block_eigenvalues'][i]:.4g}",
                f"{arrays['block_residuals'][i]:.1g}",
            ]
        )
    headers = ("block", "parameters", "trace", "largest eigenvalue", "residual")
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", *4 * ("right",)))


def _sharpness(found: dict[str, Any], summary: SpectrumSummary) -> str:
    rows, notes = [], []
    for name, title in (("sam", "SAM"), ("asam", "ASAM"), ("average", "average case")):
        if "undefined" in found[name]:
            notes.append(f"{title}: undefined. {found[name]['undefined']}")
        else:
            rows.append([title, *(_cell(found[name].get(part)) for part in ("epsilon", *_PARTS))])
            notes += _beside(title, found[name])
    table = tabulate(rows, headers=("sharpness", "epsilon", *_PARTS), disable_numparse=True) if rows else "sharpness"
    known = found["critical"]
    if "undefined" in known or known["value"] is None:
        line = f"critical sharpness undefined: {known.get('undefined') or known['status']}"
    else:
        line = (
            f"critical sharpness {known['value']:.4g} ± {_cell(known['stderr']) or 'undefined'} in [{known['low']:.4g}, "
            f"{known['high']:.4g}], learning rate {known['learning_rate']:.4g}"
        )
    top = summary.max_eigenvalue
    bound = f"2 / lambda_max {2 / top:.4g}" if top > 0 else "no positive eigenvalue"
    return "\n".join([table, *notes, f"{line}; {bound}; gradient norm {found['gradient_norm']:.4g}"])


def _beside(title: str, told: dict[str, Any]) -> list[str]:
    """What its samples support: of the loss's share an interval or why there is none, of an average the error over data."""
    if told.get("relative_note"):
        return [f"{title}: share of the loss {told['relative_note']}"]
    if told.get("relative_low") is not None:
        return [f"{title}: {100 * told['relative_low']:.3g} to {100 * told['relative_high']:.3g} % of the loss (95 %)"]
    joint = told.get("stderr_joint")
    return [] if joint is None else [f"{title}: stderr over steps and sequences together {_cell(joint) or 'undefined'}"]


def _estimate(found: Estimate) -> str:
    return f"{float(found.value):.4g} ± {float(found.stderr):.2g}"


def _cell(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4g}"
