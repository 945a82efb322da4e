"""How directional losses show themselves: a table with both errors, what it does not say, and plain values."""

from __future__ import annotations

import html
import textwrap
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from ..core.estimate import Crossed, Estimate
from .notes import few_sequences, half_precision, large_step, unresolved
from .resolution import partly_moved

if TYPE_CHECKING:
    from .samples import DirectionalLosses

HEADERS = ("", "value", "stderr", "over sequences", "in all")


def plain(result: DirectionalLosses) -> str:
    table = tabulate(_rows(result), headers=HEADERS, disable_numparse=True)
    return "\n".join([_head(result), table, *(textwrap.fill(text, 100) for text in _tail(result))])


def page(result: DirectionalLosses) -> str:
    """The same in HTML."""
    table = tabulate(_rows(result), headers=HEADERS, tablefmt="html", disable_numparse=True)
    head, *tail = (f"<p>{html.escape(text)}</p>" for text in (_head(result), *_tail(result)))
    return "\n".join([head, str(table), *tail])


def settings(result: DirectionalLosses) -> dict[str, Any]:
    """What the samples were asked to be, and what they cost."""
    return {
        "n_samples": result.n_samples,
        "n_nonfinite_pos": result.n_nonfinite_pos,
        "n_nonfinite_neg": result.n_nonfinite_neg,
        "actual_span": result.actual_span,
        "displacement": result.displacement,
        "param_norm": result.param_norm,
        "relative_step": result.relative_step,
        "use_filter_norm": result.normalize == "filter",
        "global_renorm": result.global_renorm or result.normalize == "global",
        "normalize": result.normalize,
        "distribution": result.distribution,
        "relative_span": result.relative_span,
        "seed": result.key.seed,
        "key": f"{result.key.bits:032x}",
        "homogeneous_dtype": result.homogeneous_dtype,
        "fast_vec_path": not result.plan.lazy,
        "chunk": result.plan.chunk,
        "threads": result.plan.threads,
        "num_forwards": result.num_forwards,
        "num_gradients": result.num_gradients,
        "num_jvps": result.num_jvps,
        "num_second_jvps": result.num_second_jvps,
        "num_matvecs": result.num_matvecs,
        "note": result.note,
    }


def arrays(result: DirectionalLosses) -> dict[str, Any]:
    """The samples, as numpy arrays."""
    columns = {
        "losses": result.losses,
        "losses_negative": result.losses_negative,
        "slopes": result.slopes,
        "curvatures": result.curvatures,
        "rayleigh_quotients": result.rayleigh_quotients,
        "direction_norms": result.direction_norms,
    }
    return {name: array.numpy() for name, array in columns.items() if array is not None}


def row(name: str, estimate: Estimate) -> tuple[str, ...]:
    """A line of a result's table: value, and the errors over directions, over sequences, and over both."""
    errors = [estimate.stderr]
    errors += [estimate.stderr_data, estimate.stderr_total] if isinstance(estimate, Crossed) else []
    cells = [f"{float(error):.2g}" for error in errors]
    return (name, f"{float(estimate.value):.5g}", *cells, *[""] * (3 - len(cells)))


def _head(result: DirectionalLosses) -> str:
    return (
        f"{len(result.losses)} {result.normalize}-normalised {result.distribution} directions at span "
        f"{result.actual_span:g} (relative step {result.relative_step:.3g}), {result.key!r}"
    )


def _rows(result: DirectionalLosses) -> list[tuple[str, ...]]:
    over = f"{float(result.baseline.stderr):.2g}" if result.residuals is not None else ""
    rough = result.truncation is not None and result.truncation.status == "rough"
    unclear = ["curvature_mean", "rayleigh_mean"] if rough else []
    if result.resolution_note is not None:
        unclear += [name for name, estimate in result.estimates.items() if estimate.stderr.isnan()]
    return [("baseline_loss", f"{result.baseline_loss:.6g}", "", over, over)] + [
        (*cells[:2], *["not resolved"] * 3) if cells[0] in unclear else cells
        for cells in (row(name, estimate) for name, estimate in result.estimates.items())
    ]


def _tail(result: DirectionalLosses) -> list[str]:
    """Lost samples, what half precision does, means that are not told from zero, and notes."""
    tail = []
    if result.n_nonfinite_pos + result.n_nonfinite_neg:
        tail += [f"non-finite losses: {result.n_nonfinite_pos} at +span, {result.n_nonfinite_neg} at -span"]
    if result.realised is not None:
        tail += [half_precision(result.displacement, result.realised)]
    columns = result.columns
    means = [
        unresolved(what, result.estimates[f"{name}_mean"], columns[name][columns[name].isfinite()])
        for name, what in (("delta", "loss change"), ("curvature", "curvature"))
        if name in columns
    ]
    steps = (result.resolution_note or partly_moved(result.unmoved), large_step(result.relative_step))
    notes = (*steps, *means, result.note, result.step_note, result.precision_note, *_of_sequences(result))
    return tail + [note for note in notes if note]


def _of_sequences(result: DirectionalLosses) -> list[str | None]:
    """That they are few, and which statistics have no error over them."""
    num = 0 if result.residuals is None else result.residuals.num
    without = [
        name
        for name, estimate in result.estimates.items()
        if not (isinstance(estimate, Crossed) and estimate.stderr_data.isfinite()) and estimate.stderr.isfinite()
    ]
    if num < 2 or not without:
        return [few_sequences(num)]
    return [
        few_sequences(num),
        "no error over sequences, as their own terms are not known along every direction; intervals are about these data "
        f"alone: {', '.join(without)}",
    ]
