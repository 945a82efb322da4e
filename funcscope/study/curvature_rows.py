"""What a curvature study has measured, as rows of text: the one source of its tables in a terminal and on its page."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..core.estimate import Estimate
from ..core.standard_errors import jackknife_stderr
from ..core.store import Stored
from ..linalg.summary import SpectrumSummary
from .listing import Listing
from .numbers import between, error, is_known, number, with_error

MATRICES = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix"}
ROUGH = "beyond first order"
"""Of an error over texts."""
METHODS = {"xtrace": "XTrace", "exact": "exact"}


class Row(NamedTuple):
    """A number and what is open about it; what is empty is not known."""

    name: str
    value: str
    draws: str = ""
    """Its standard error over random vectors, on these texts."""
    data: str = ""
    """Its standard error over texts."""
    interval: str = ""
    note: str = ""

    @property
    def said(self) -> str:
        """With its error and interval, for a sentence."""
        over = [f"± {self.draws}"] if self.draws else []
        over += [f"± {self.data} over texts"] if self.data else []
        reach = self.interval or (ROUGH if ROUGH in self.note else "")
        return " ".join([self.value, *over, *([f"({reach})"] if reach else [])])


class Block(NamedTuple):
    """The curvature of some parameters, the others held fixed."""

    name: str
    size: int
    trace: float
    trace_stderr: float
    share: float
    """Of the trace of the whole matrix, from the same products; nan where that cannot be told from zero."""
    share_stderr: float
    eigenvalue: float
    residual: float
    converged: bool


def spectrum_rows(summary: SpectrumSummary, stored: Stored) -> dict[str, Row]:
    """The spectrum's numbers by name, each with the errors that are known."""
    density, ends = summary.density, summary.ends
    negative, rank = density.negative_fraction(), density.resolution("effective_rank")
    method = METHODS.get(summary.trace.method, "Hutchinson")
    rows = [
        _end("largest eigenvalue", summary, stored, 0),
        _end("smallest eigenvalue", summary, stored, len(ends.values) - 1),
        Row(
            "trace", number(float(summary.trace.value), 4), error(float(summary.trace.stderr)),
            note=f"{method}, {summary.trace.num_matvecs} products",
        ),
        _negative(summary, negative),
        Row(
            "effective rank", number(float(density.effective_rank.value), 4),
            error(float(density.effective_rank.stderr)) if rank.resolved else "",
            note=f"of {summary.num_parameters:,}" if rank.resolved else str(rank),
        ),
        Row("spectral gap", number(summary.spectral_gap, 4), note=_open(summary.spectral_gap, "first two")),
        Row(
            "condition number", number(summary.condition_number, 4),
            note=f"damping {number(summary.damping, 2)}{_open(summary.condition_number, 'outermost', '; ')}",
        ),
    ]  # fmt: skip
    return {row.name: row for row in rows}


def spectrum(summary: SpectrumSummary, stored: Stored) -> Listing:
    """The spectrum in a table, and what its errors are about."""
    rows = tuple(spectrum_rows(summary, stored).values())
    num, known = stored.meta["data"]["num_samples"], any(row.data for row in rows)
    notes = ["Over draws: one standard error over random vectors, on these texts."]
    if known:
        notes += [
            f"Over texts: one standard error over {num} texts, to first order; the 95 % interval has the bias of so few "
            "taken off. Where both are empty, the number is about these texts alone."
        ]
    else:
        reason = stored.meta["stages"]["ends"].get("no_data_errors", "not computed")
        notes += [f"No errors over texts: {'there is one' if num == 1 else reason}."]
    return Listing(("", "value", "over draws", "over texts", "95 % interval", "note"), rows, tuple(notes)).trimmed()


def eigenvalues(summary: SpectrumSummary, stored: Stored) -> Listing:
    """Every eigenvalue that was found, with its residual and its error over texts; a rank where that is sure."""
    ends, total = summary.ends, summary.num_parameters
    num = len(ends.values)
    rows = []
    for i, (value, residual, done) in enumerate(
        zip(ends.values.tolist(), ends.residuals.tolist(), ends.converged.tolist(), strict=True)
    ):
        rank = i + 1 if 2 * (i + 1) <= num else total - num + i + 1
        state = "; ".join([ends.states[i], *([ROUGH] if _is_rough(stored, i) else [])])
        rows.append((f"{rank:,}" if done else "", number(value, 5), number(residual, 2), *_data(stored, i), state))
    lost = int((~ends.converged).sum())
    advice = (
        f"{lost} of {num} eigenvalues are not converged: their ranks or values are open. Ask for fewer (`--num`), or allow "
        "larger residuals (`--tol`)."
    )
    rough = (
        f"{ROUGH.capitalize()}: what so few texts add is above the standard error, which is then too small; the interval is "
        "an order of magnitude, and left out where not even that. Score more texts (`--num-samples`)."
    )
    notes = [advice] * bool(lost) + [rough] * any(_is_rough(stored, i) for i in range(num))
    headers = ("rank", "eigenvalue", "residual", "over texts", "95 % interval", "note")
    return Listing(headers, tuple(rows), tuple(notes)).trimmed()


def blocks(stored: Stored) -> list[Block]:
    """In the order of the model; empty where they were not asked for."""
    arrays = stored.arrays
    if "block_trace_samples" not in arrays:
        return []
    whole, made = torch.from_numpy(arrays["hutchinson_samples"]), []
    for i, name in enumerate(stored.meta["stages"]["block_traces"]["names"]):
        samples = torch.from_numpy(arrays["block_trace_samples"][i])
        trace = Estimate.of(samples)
        eigenvalue, residual, converged = (
            arrays[f"block_{what}"][i] for what in ("eigenvalues", "residuals", "converged")
        )
        made.append(
            Block(
                name, int(arrays["block_sizes"][i]), float(trace.value), float(trace.stderr), *_part(samples, whole),
                float(eigenvalue), float(residual), bool(converged),
            )
        )  # fmt: skip
    return made


def block_table(stored: Stored) -> Listing:
    """Traces and largest eigenvalues by block."""
    rows = tuple(
        (
            block.name,
            f"{block.size:,}",
            with_error(block.trace, block.trace_stderr),
            "" if math.isnan(block.share) else f"{with_error(100 * block.share, 100 * block.share_stderr)} %",
            number(block.eigenvalue),
            number(block.residual, 2),
            "" if block.converged else "not converged",
        )
        for block in blocks(stored)
    )
    headers = ("block", "parameters", "trace", "of the trace", "largest eigenvalue", "residual", "note")
    num = stored.meta["settings"]["block_products"]
    notes = (f"Traces: ± is one standard error over {num} products, on these texts.",)
    return Listing(headers, rows, notes).trimmed()


def is_resolved(estimate: Estimate) -> bool:
    """Whether 1.96 standard errors leave zero out."""
    return abs(float(estimate.value)) > 1.96 * float(estimate.stderr)


def end_interval(stored: Stored, i: int) -> tuple[float, float] | None:
    """Between which ends the i-th eigenvalue of all texts lies; None where that is not known."""
    if _stderr(stored, i) is None or not is_known(float(stored.arrays["end_data_low"][i])):
        return None
    return float(stored.arrays["end_data_low"][i]), float(stored.arrays["end_data_high"][i])


def _end(name: str, summary: SpectrumSummary, stored: Stored, i: int) -> Row:
    """An outermost eigenvalue with its residual and what other texts would change."""
    ends, data = summary.ends, _data(stored, i)
    notes = [f"residual {number(float(ends.residuals[i]), 2)}"]
    notes += [] if ends.states[i] == "converged" else [ends.states[i]]
    notes += [ROUGH] if _is_rough(stored, i) else []
    return Row(name, number(float(ends.values[i]), 4), "", *data, "; ".join(notes))


def _stderr(stored: Stored, i: int) -> float | None:
    """Over texts, of the i-th eigenvalue; None where it is not known."""
    known = "end_data_stderr" in stored.arrays and is_known(float(stored.arrays["end_data_stderr"][i]))
    return float(stored.arrays["end_data_stderr"][i]) if known else None


def _is_rough(stored: Stored, i: int) -> bool:
    """Whether the second order of the i-th eigenvalue over texts is not below the first, so that the interval is rough."""
    stderr = _stderr(stored, i)
    return stderr is not None and abs(float(stored.arrays["end_data_bias"][i])) >= stderr


def _data(stored: Stored, i: int) -> tuple[str, str]:
    """Standard error and interval over texts of the i-th eigenvalue."""
    interval = end_interval(stored, i)
    return error(_stderr(stored, i)), "" if interval is None else between(*interval)


def _negative(summary: SpectrumSummary, share: Estimate) -> Row:
    """The share of negative eigenvalues; what it may be, where the steps leave it open."""
    density = summary.density
    resolution, edge = density.negative_resolution(), density.edge()
    within = float(density.mass_between(-edge, edge).value) if edge else 1.0
    note = f"below {number(-edge, 2)}; {number(100 * within, 2)} % within ±{number(edge, 2)}"
    value, stderr = 100 * float(share.value), 100 * float(share.stderr)
    if resolution.resolved:
        known = error(stderr)
        return Row("negative eigenvalues", f"{number(value)} %", f"{known} %" if known else "", note=note)
    low, high = (min(100.0, max(0.0, value + sign * 100 * resolution.bound)) for sign in (-1, 1))
    return Row("negative eigenvalues", f"{between(low, high, 2)} %", note=f"{resolution}; {note}")


def _open(value: float, which: str, before: str = "") -> str:
    """Why a number of converged eigenvalues is undefined."""
    return f"{before}undefined unless the {which} are converged" if math.isnan(value) else ""


def _part(samples: torch.Tensor, whole: torch.Tensor) -> tuple[float, float]:
    """A ratio of two means over the same products, with its jackknife error."""
    if len(samples) < 2 or not is_resolved(Estimate.of(whole)):
        return math.nan, math.nan
    left_out = (samples.sum() - samples) / (whole.sum() - whole)
    return float(samples.sum() / whole.sum()), float(jackknife_stderr(left_out))
