"""What rules of merging share: checks of tensors that must be alike, weights, and sums a part at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_device, check_number
from ..core.estimate import wide
from ..core.vectors import PART

CACHED = 2**16
"""Entries of a part on a CPU: in float64, those of a handful of models stay in a core's cache between two operations."""


def check_leaves(name: str, leaves: Sequence[Tensor], least: int = 1, like: Tensor | None = None) -> None:
    """There are at least so many, floating, finite, of one shape and on one device.

    Raises ValueError where there are not, and TypeError for tensors of integers.
    """
    if len(leaves) < least:
        raise ValueError(
            f"`{name}` must be at least {least} {'tensor' if least == 1 else 'tensors'}, got {len(leaves)}."
        )
    first = leaves[0] if like is None else like
    for k, each in enumerate(leaves):
        if not isinstance(each, Tensor) or not each.is_floating_point():
            what = each.dtype if isinstance(each, Tensor) else f"a {type(each).__name__}"
            raise TypeError(f"`{name}` must be tensors of floating-point numbers, got {what} at {k}.")
        if each.shape != first.shape:
            raise ValueError(
                f"`{name}` must all have one shape, got {tuple(first.shape)} and at {k} {tuple(each.shape)}: only models "
                "of one architecture have a mean."
            )
        check_device(f"`{name}` at {k}", each.device, "the first", first.device)
        if not all_finite(each):
            raise ValueError(
                f"`{name}` must be finite, and the tensor at {k} has nan or infinity: look at the weights."
            )


def all_finite(x: Tensor) -> bool:
    """Whether no entry is nan or infinite: a finite sum says so at once, one that is not may have overflown.

    >>> all_finite(torch.full((9,), 6e4, dtype=torch.float16)), all_finite(torch.tensor([0.0, torch.nan]))
    (True, False)
    """
    return math.isfinite(float(x.sum())) or bool(x.isfinite().all())


def each_of(name: str, values: float | Sequence[float], num: int) -> list[float]:
    """One finite number for each of `num`; a single one is that of all."""
    numbers = [values] * num if isinstance(values, Real) else list(values)  # type: ignore[arg-type]
    if len(numbers) != num:
        raise ValueError(f"`{name}` must be one number, or one for each of the {num} models, got {len(numbers)}.")
    for number in numbers:
        check_number(name, number)  # type: ignore[arg-type]
    return [float(number) for number in numbers]  # type: ignore[arg-type]


def shares_of(weights: Sequence[float] | None, num: int) -> list[float]:
    """Weights divided by their sum. Raises ValueError where that is 0."""
    numbers = each_of("weights", 1.0 if weights is None else weights, num)
    total = math.fsum(numbers)
    if total == 0:
        raise ValueError(f"`weights` must not sum to 0, got {numbers}: they have no mean.")
    return [number / total for number in numbers]


def positive_weights(weights: Sequence[float] | None, num: int) -> list[float]:
    """Weights as they are. Raises ValueError for one that is not above 0."""
    numbers = each_of("weights", 1.0 if weights is None else weights, num)
    if min(numbers) <= 0:
        raise ValueError(f"`weights` must be above 0, got {min(numbers)}: leave the model out instead.")
    return numbers


def by_parts(
    rule: Callable[..., Float[Tensor, " n"]], leaves: Sequence[Float[Tensor, "..."]], dtype: torch.dtype | None = None
) -> Float[Tensor, "..."]:
    """A rule of entries, applied in the dtype of sums to a part of the leaves at a time: no wide copy of a whole one."""
    first = leaves[0]
    size = CACHED if first.device.type == "cpu" else PART
    flat = [each.detach().reshape(-1).split(size) for each in leaves]
    total, dtype = wide(first.device), dtype or first.dtype
    parts = [rule(*(part.to(total) for part in group)).to(dtype) for group in zip(*flat, strict=True)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(first.shape)
