"""Which rows are of which sequence, rows of equal number of each, and blocks of sequences that are left out in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.checks import check_count
from ..core.estimate import wide
from ..core.keys import Key, fold_in, uniform
from ..core.standard_errors import jackknife_stderr

Rows = Float[Tensor, "n _"]
BLOCKS = 32
"""Sequences are left out one by one up to this many, and in this many blocks beyond."""


def check_rows(name: str, x: Tensor, num: int | None = None) -> Rows:
    """The rows in the dtype of sums, detached, less the first of them: those that do not vary are exactly 0.

    Nothing that is made of rows depends on where they lie, and what a mean leaves of equal rows is its rounding.

    Raises ValueError where they are none, are not finite, or not `num`.
    """
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.numel():
        got = tuple(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"`{name}` must be a tensor of rows by units, neither of them 0, got {got}.")
    if num is not None and len(x) != num:
        raise ValueError(
            f"`{name}` must have a row for each of the {num} samples, the same as the others, got {len(x)}."
        )
    if not x.is_floating_point():
        raise ValueError(f"`{name}` must hold floating-point numbers, got {x.dtype}.")
    if not bool(x.isfinite().all()):
        raise ValueError(
            f"`{name}` must be finite, got nan or infinite values: leave such rows out, in all arrays alike."
        )
    rows = x.detach().to(wide(x.device))
    return rows - rows[0]


def check_layers(name: str, layers: Mapping[str, Tensor], num: int | None = None) -> dict[str, Rows]:
    """`check_rows` of every layer, which have one number of rows; raises ValueError for none."""
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(f"`{name}` must map names to rows by units, at least one, got {layers!r:.60}.")
    num = num if num is not None else len(next(iter(layers.values())))
    return {each: check_rows(f"{name}[{each!r}]", x, num) for each, x in layers.items()}


def sequence_index(groups: Tensor | None, like: Tensor) -> Int[Tensor, " n"]:
    """Of every row the number of its sequence, from 0; without groups, its own place. Raises ValueError for other lengths."""
    if groups is None:
        return torch.arange(len(like), device=like.device)
    if not isinstance(groups, Tensor) or groups.shape != (len(like),) or groups.is_floating_point():
        got = f"{tuple(groups.shape)} of {groups.dtype}" if isinstance(groups, Tensor) else f"a {type(groups).__name__}"
        raise ValueError(f"`groups` must name a sequence by an integer for each of the {len(like)} rows, got {got}.")
    return groups.to(like.device).unique(return_inverse=True)[1]


def equal_rows(sequence: Int[Tensor, " n"], key: Key, per_sequence: int | None) -> Int[Tensor, "g t"]:
    """Places of rows, as many of each sequence: all where these are equally many, else one or `per_sequence` of each.

    Those that are drawn are a uniform sample without replacement, in their order. Sequences with fewer are left out.
    """
    counts = sequence.bincount()
    if per_sequence is not None:
        check_count("per_sequence", per_sequence)
    num = per_sequence or (int(counts[0]) if bool((counts == counts[0]).all()) else 1)
    whole = bool((counts == num).all())
    draw = uniform(fold_in(key, "rows"), torch.zeros(len(sequence), dtype=torch.float64))
    within = torch.arange(len(sequence)) / len(sequence) if whole else draw
    ordered = (sequence.cpu() + within).argsort(stable=True).to(sequence.device)
    starts = (counts.cumsum(0) - counts)[counts >= num]
    return ordered[starts[:, None] + torch.arange(num, device=sequence.device)].sort(1).values


def blocks(sequence: Int[Tensor, " n"]) -> list[Bool[Tensor, " n"]]:
    """Rows that stay when each block of sequences is left out; none where there is one sequence only."""
    num = int(sequence.max()) + 1
    size = min(num, BLOCKS)
    return [sequence % size != i for i in range(size)] if num > 1 else []


def block_stderr(
    statistic: Callable[[Bool[Tensor, " n"]], Tensor], sequence: Int[Tensor, " n"], like: Tensor
) -> Tensor:
    """Jackknife error over sequences of a statistic of the rows that stay; nan, shaped as `like`, for one sequence."""
    values = [statistic(keep) for keep in blocks(sequence)]
    return jackknife_stderr(torch.stack(values, -1)) if values else torch.full_like(like, math.nan)
