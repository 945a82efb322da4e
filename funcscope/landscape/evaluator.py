"""A function at many points of parameter space, by one plan: mapped in chunks, or one at a time in one buffer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map, tree_map_only

from ..core.checks import check_count
from ..core.forward import is_unmapped
from ..core.objective import Loss

MAPPED_UP_TO = 2**22
"""Larger models are evaluated one point at a time."""
MAPPED_POSITIONS = 256
"""So are batches of more positions: beyond, eight models at once have left the cache."""
MAPPED_WORK = 2**29
"""And so is a product of parameters and positions above this."""
MAPPED_ON_DEVICE = 2**26
"""On an accelerator, one small model leaves most of it idle: only the memory of eight copies counts."""
GRADIENT_UP_TO = 2**28
"""Larger models that are perturbed leaf by leaf get their slopes by `jvp`: a gradient is a second set of weights."""

Write = Callable[[int, Tensor], Any]
"""(first, rows): write the points from number `first` on into the rows."""


def points_at_once(loss: Loss, chunk: int | None = None) -> int:
    """Points per `vmap`: as asked for, else by default; 1 where the model cannot be mapped."""
    if chunk is None:
        chunk = default_chunk(loss)
    check_count("chunk", chunk)
    return chunk if chunk == 1 or loss.is_mapped() else 1


def default_chunk(loss: Loss) -> int:
    """Points per `vmap` unless another number is asked for: 8 where that is faster than a loop, else 1."""
    if loss.net.attention == "keep":  # torch maps fused attention by a loop of its own
        return 1
    if loss.net.device.type != "cpu":
        return 8 if loss.layout.num <= MAPPED_ON_DEVICE else 1
    size, positions = loss.layout.num, max(_positions(inputs) for inputs, _ in loss.batches)
    small = size <= MAPPED_UP_TO and positions <= MAPPED_POSITIONS and size * positions <= MAPPED_WORK
    return 8 if small else 1


def _positions(inputs: Any) -> int:
    """Tokens of a batch of ids, else its rows."""
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    sizes = [len(x) if x.is_floating_point() else x.numel() for x in parts if isinstance(x, Tensor) and x.ndim]
    return max(sizes, default=1)


def over_points(
    function: Callable[[Tensor], Any], write: Write, num: int, buffer: Float[Tensor, "k p"]
) -> Iterator[Any]:
    """The function of points 0 to num - 1, as many at a time as the buffer has rows."""
    for first in range(0, num, len(buffer)):
        rows = buffer[: num - first]
        write(first, rows)
        yield of_rows(function, rows, is_mapped=len(buffer) > 1)


def of_rows(function: Callable[[Tensor], Any], rows: Float[Tensor, "k p"], *, is_mapped: bool) -> Any:
    """The function of every row: mapped, or of the only one."""
    if is_mapped:
        return mapped(function, rows, "chunk=1")
    return tree_map_only(Tensor, lambda x: x[None], function(rows[0]))


def mapped(function: Callable[[Tensor], Any], over: Tensor, remedy: str) -> Any:
    """`vmap`; a loop where torch has no batching rule; and what to do instead where a model refuses it otherwise."""
    try:
        return vmap(function)(over)
    except NotImplementedError:  # a derivative that torch does not have: no matter of the plan
        raise
    except RuntimeError as err:
        if is_unmapped(err):
            warnings.warn(
                f"one at a time, as this model cannot be mapped ({str(err).splitlines()[0][:120]})", stacklevel=2
            )
            return tree_map(lambda *parts: torch.stack(parts), *[function(row) for row in over])
        err.add_note(f"If this model cannot be mapped over its parameters, pass `{remedy}`: a plain loop.")
        raise
