"""Similarities of two sets of layers on the same samples, with errors over sequences and a null of permuted pairings."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.checks import check_count
from ..core.keys import Key, check_key, fold_in, uniform
from ..core.standard_errors import jackknife_stderr
from ..core.tables import counted
from .measures import Measure, Rows, compact
from .sequences import equal_rows, sequence_index

LEVEL = 0.95
"""Of the null's point that a calibrated similarity is counted from."""
LEAST = 19
"""Permutations: with fewer, no similarity could lie beyond 95 % of them."""


class Calibrated(NamedTuple):
    """Similarities of every pair of layers."""

    values: Float[Tensor, "a b"]
    stderr: Float[Tensor, "a b"]
    null: Float[Tensor, "r a b"]
    """Under permutations of the sequences of one of the two; none of a single sequence."""
    num_sequences: int
    num_rows: int
    num_left_out: int
    """Sequences with too few rows."""


def calibrate(
    measure: Measure, xs: list[Rows], ys: list[Rows] | None, groups: Tensor | None, *, key: Key, num: int,
    per_sequence: int | None,
) -> Calibrated:  # fmt: skip
    """Every layer of xs beside every one of ys (of xs again for None)."""
    check_key(key)
    check_count("num", num, LEAST)
    index = sequence_index(groups, xs[0])
    places = equal_rows(index, key, per_sequence)
    if not len(places):
        raise ValueError(f"`per_sequence` must be at most the rows of the longest sequence, got {per_sequence}.")
    few, rows = len(places), places.shape[1]
    sequence = torch.arange(few, device=places.device).repeat_interleave(rows)
    xs = [compact(x[places.flatten()]) for x in xs]
    x = measure.form(xs, sequence)
    ys = xs if ys is None else [compact(y[places.flatten()]) for y in ys]
    y = x if ys is xs else measure.form(ys, sequence)
    values = measure.values(x, y)
    left_out = measure.left_out(x, y, xs, ys, sequence)
    stderr = jackknife_stderr(torch.stack(left_out, -1)) if left_out else torch.full_like(values, math.nan)
    orders = [_order(fold_in(key, i), few, rows).to(places.device) for i in range(num if few > 1 else 0)]
    null = torch.stack(list(measure.permuted(x, y, orders))) if orders else values[None][:0]
    return Calibrated(values, stderr, null, few, few * rows, int(index.max()) + 1 - few)


def null_point(null: Float[Tensor, "r *m"]) -> Float[Tensor, "*m"]:
    """The value of rank ceil(.95 (R + 1)): beyond it, p is at most .05. nan where there is no null."""
    if not len(null):
        return torch.full_like(null.sum(0), math.nan)
    return (
        null.sort(0)
        .values[min(math.ceil(LEVEL * (len(null) + 1) - 1e-9), len(null)) - 1]
        .where(~null.isnan().any(0), torch.nan)
    )


def null_p_value(null: Float[Tensor, "r *m"], value: Float[Tensor, "*m"]) -> Float[Tensor, "*m"]:
    """(1 + how many of the null are not below) / (1 + R); nan where there is no null, or no value."""
    if not len(null):
        return torch.full_like(value, math.nan)
    close = 1e-12 * value.abs()  # the same pairing, added up in another order, is no smaller
    share = (1 + (null >= value - close).sum(0).to(value)) / (1 + len(null))
    return share.where(value.isfinite() & ~null.isnan().any(0), torch.nan)


def above_null(value: Float[Tensor, "*m"], point: Float[Tensor, "*m"]) -> Float[Tensor, "*m"]:
    """max(0, (S - q) / (1 - q)); nan where the null reaches 1."""
    rest = (1 - point).where(1 - point > 1e-9, torch.nan)
    return ((value - point) / rest).clamp_min(0)


def above_null_stderr(
    value: Float[Tensor, "*m"], stderr: Float[Tensor, "*m"], point: Float[Tensor, "*m"]
) -> Float[Tensor, "*m"]:
    """With the null's point as it is; nan where the value is cut off at 0."""
    return (stderr / (1 - point)).where(above_null(value, point) > 0, torch.nan)


def calibration_notes(num_sequences: int, rows: int, num_left_out: int, undefined: bool) -> list[str]:
    """What a reader must know beside the numbers."""
    notes = []
    if num_sequences < 2:
        notes.append("one sequence has no other to be paired with: there is no null, and no error over sequences.")
    elif num_sequences < 5:
        notes.append(
            f"{num_sequences} sequences can be paired in {math.factorial(num_sequences)} ways only: p cannot be much "
            f"smaller than {1 / math.factorial(num_sequences):.2g}."
        )
    if rows > 1:
        notes.append(
            f"{rows} rows of each sequence stay together, row beside row of the same place, when sequences are permuted: "
            "what all sequences share at a place is in the null, too."
        )
    if num_left_out:
        notes.append(f"{counted(num_left_out, 'sequence')} with fewer rows than are drawn of each: left out.")
    if undefined:
        notes.append(
            "nan is undefined: a representation that does not vary, too few samples for the measure, or as many "
            "dimensions as samples have, where every pairing is as similar."
        )
    return notes


def _order(key: Key, num: int, rows: int) -> Int[Tensor, " n"]:
    """Rows in the order of permuted sequences."""
    order = uniform(key, torch.zeros(num, dtype=torch.float64)).argsort()
    return (order[:, None] * rows + torch.arange(rows)).flatten()
