"""Batches cut by rows: a tensor has one row per sequence, or serves them all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..core.checks import check_count
from ..core.objective import Loss


def micro_batches(loss: Loss, m: int) -> list[Loss]:
    """The losses of m sequences each, cut from the prepared batches in order; the last of a batch may have fewer.

    Every tensor of a batch has as many rows as the batch has sequences, or one, which serves every part. Raises
    ValueError where that is not so.

    >>> import torch, funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(3, 2))
    >>> loss = fs.objective(net, [(torch.zeros(5, 3), torch.zeros(5, dtype=torch.long))], fs.classification)
    >>> sizes_of(micro_batches(loss, 2), num_losses=5)
    [2, 2, 1]
    """
    check_count("m", m)
    return [replace(loss, batches=(part,)) for batch in loss.batches for part in _parts(batch, m)]


def sizes_of(parts: list[Loss], num_losses: int) -> list[int]:
    """The rows of each. Raises ValueError where they are not the sequences that have a loss."""
    sizes = [max(_lengths(part.batches[0]), default=0) for part in parts]
    if sum(sizes) != num_losses:
        raise ValueError(
            f"the batches have {sum(sizes)} rows and {num_losses} losses: their rows are not their sequences."
        )
    return sizes


def is_cut(x: Any, rows: int) -> bool:
    """Whether a leaf has an entry for each of so many sequences."""
    return isinstance(x, Tensor) and x.ndim > 0 and len(x) == rows


def cut(tree: Any, part: slice, rows: int) -> Any:
    """Some of the rows of every tensor that has so many."""
    return tree_map(lambda x: x[part] if is_cut(x, rows) else x, tree)


def coupled(rows: int | str = "as many") -> str:
    """Why parts are not those of a whole, and what helps."""
    return (
        "sequences see each other (statistics over the batch, a loss across rows), or a tensor that all share has "
        f"{rows} rows by chance and was cut. Use a batch of another size, give the shared tensor a dimension of 1 in "
        "front, or take statistics that do not depend on the batch."
    )


def tolerance(loss: Loss) -> float:
    """Relative; beyond it, what is computed for sequences alone is not what is computed for all together."""
    return max(32 * loss.net.unit_roundoff, min(1e-4, 1e8 * loss.net.unit_roundoff))


def _parts(batch: tuple[Any, Any], m: int) -> Iterator[tuple[Any, Any]]:
    rows = max(_lengths(batch), default=0)
    if odd := sorted(set(_lengths(batch)) - {1, rows}):
        raise ValueError(
            f"micro-batches are cut by rows: all tensors of a batch must have as many, or one; got {odd[0]} and {rows}."
        )
    return (cut(batch, slice(at, at + m), rows) for at in range(0, rows, m))


def _lengths(tree: Any) -> list[int]:
    return [len(x) if x.ndim else 1 for x in tree_leaves(tree) if isinstance(x, Tensor)]
