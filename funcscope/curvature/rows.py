"""Batches cut by rows, where a tensor has one per sequence or serves them all; and gradients of single sequences."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves, tree_map

from ..core.apart import check_apart, coupled, tolerance
from ..core.batches import cut, is_cut, num_rows
from ..core.checks import check_choice, check_count
from ..core.objective import Loss, Theta
from ..core.progress import tick
from ..core.purity import moved
from .outputs import total_of

Reduction = Literal["sum", "mean"]
GOLDEN = (5**0.5 - 1) / 2


def micro_batches(loss: Loss, m: int) -> list[Loss]:
    """The losses of m sequences each, cut from the prepared batches in order; the last of a batch may have fewer.

    Every tensor of a batch has as many rows as the batch has sequences, or one, which serves every part. Raises
    ValueError where that is not so, and as `check_apart` does.

    >>> import torch, funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(3, 2))
    >>> loss = fs.objective(net, [(torch.zeros(5, 3), torch.zeros(5, dtype=torch.long))], fs.classification)
    >>> sizes_of(micro_batches(loss, 2), num_losses=5)
    [2, 2, 1]
    """
    check_count("m", m)
    parts = [part for batch in loss.batches for part in _parts(batch, m)]
    check_apart(loss, m)
    return [replace(loss, batches=(part,)) for part in parts]


def sizes_of(parts: list[Loss], num_losses: int) -> list[int]:
    """The rows of each. Raises ValueError where they are not the sequences that have a loss."""
    sizes = [max(_lengths(part.batches[0]), default=0) for part in parts]
    if sum(sizes) != num_losses:
        raise ValueError(
            f"the batches have {sum(sizes)} rows and {num_losses} losses: their rows are not their sequences."
        )
    return sizes


def mapped(function: Callable[[Any], Any], batch: Any, rows: int, part: slice = slice(None)) -> Any:
    """By `vmap`, the function of every sequence of a part of a batch: of batches of one."""
    dims = tree_map(lambda x: 0 if is_cut(x, rows) else None, batch)
    return vmap(function, in_dims=(dims,))(tree_map(lambda x: x[part][:, None] if is_cut(x, rows) else x, batch))


def per_sample_gradients(
    loss: Loss, theta: Theta, *, reduction: Reduction = "sum", chunk_size: int = 8
) -> Float[Tensor, "n p"]:
    r"""One row per sequence, in the order of the batches: the gradient of its own loss.

    `sum`: $g_b = \sum_{t \in b} w_t \nabla \ell_t$, so that the rows add up to $W \nabla L$. `mean`: $g_b / W_b$, with nan
    for a sequence without a scored position. n P numbers are in memory; `gradient_chunks` gives them a few at a time.

    chunk_size: sequences whose gradients are computed at once. Tensors of a batch whose first dimension is the number of
    sequences are taken to have one entry per sequence; all others are shared. Models that `vmap` refuses (a
    `.item()` in the forward pass) are differentiated one sequence at a time, which a warning says once.

    Raises ValueError where the rows of a batch do not add up to its gradient: sequences that see each other.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 1, bias=False))
    >>> half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> loss = fs.objective(net, [(torch.eye(2), torch.zeros(2, 1))], half_square)
    >>> per_sample_gradients(loss, torch.tensor([3.0, 4.0])).tolist()
    [[3.0, 0.0], [0.0, 4.0]]
    """
    return torch.cat(list(gradient_chunks(loss, theta, reduction=reduction, chunk_size=chunk_size)))


def gradient_chunks(
    loss: Loss, theta: Theta, *, reduction: Reduction = "sum", chunk_size: int = 8
) -> Iterator[Float[Tensor, "c p"]]:
    """The rows of `per_sample_gradients`, at most `chunk_size` at a time: chunks do not cross batches."""
    check_choice("reduction", reduction, ("sum", "mean"))
    check_count("chunk_size", chunk_size)
    theta = Loss.vector(loss, theta)
    for batch in loss.batches:
        yield from _of_batch(loss, theta, batch, reduction, chunk_size)


def _of_batch(
    loss: Loss, theta: Tensor, batch: tuple[Any, Any], reduction: Reduction, chunk_size: int, *, nearby: bool = False
) -> Iterator[Tensor]:
    """The rows, a chunk at a time; the last one once they, each with a factor, are known to be the gradient of the whole.

    Rows that are not are of sequences that see each other, unless all that they are is rounding, as where the model makes the
    targets itself: then those of parameters nearby are.
    """
    rows = num_rows(batch)
    factors = 1 + (torch.arange(1, rows + 1, dtype=torch.float64) * GOLDEN).frac().to(
        theta
    )  # no two alike: sums may agree
    total, lengths, refusal = torch.zeros_like(theta), 0.0, ""

    def summed(t: Tensor, part: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        out = loss.net.apply(loss.params(t), part[0])
        return total_of(loss.criterion, out, part[1]), loss.criterion.token_loss(out, part[1])[1].sum()

    def gradient(part: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        return grad(summed, has_aux=True)(theta, part)

    def weighted(t: Tensor) -> Tensor:
        sums, _ = loss.scored(lambda inputs: loss.net.apply(loss.params(t), inputs), *batch)
        if sums.shape != factors.shape:
            raise ValueError(f"a batch of {rows} rows has {sums.numel()} losses: its rows are not its sequences.")
        return (sums.to(factors) * factors).sum()

    for first in range(0, rows, chunk_size):
        last = min(first + chunk_size, rows)
        tick("forward", num=0 if first else 1)
        if not refusal:
            try:
                sums, weights = mapped(gradient, batch, rows, slice(first, last))
            except RuntimeError as err:
                refusal = str(err).split("\n", 1)[0][:100] or type(err).__name__
            except ValueError as err:
                raise ValueError(
                    f"{err} That was said of one of {rows} sequences, which dimension 0 must number."
                ) from err
        if refusal:  # or this says what is wrong with the model
            singles = zip(*(gradient(cut(batch, slice(i, i + 1), rows)) for i in range(first, last)), strict=True)
            sums, weights = map(torch.stack, singles)
            loss.say_once(f"gradients are taken one sequence at a time, as `vmap` refuses this model ({refusal}).")
        total = total + factors[first:last] @ sums
        lengths += float(torch.linalg.vector_norm(sums, dim=1).sum())
        off = float(torch.linalg.vector_norm(total - grad(weighted)(theta))) if last == rows else 0.0
        if math.isfinite(off) and off > tolerance(loss) * lengths:
            if nearby:
                raise ValueError(
                    f"the gradients of {rows} single sequences are others than in their batch: their sum is off by "
                    f"{off:.1e} where their lengths add up to {lengths:.1e}: {coupled(rows)}"
                )
            deque(_of_batch(loss, moved(theta), batch, reduction, chunk_size, nearby=True), maxlen=0)
        yield sums if reduction == "sum" else sums / weights[:, None].to(sums.dtype)


def _parts(batch: tuple[Any, Any], m: int) -> Iterator[tuple[Any, Any]]:
    rows = max(_lengths(batch), default=0)
    if odd := sorted(set(_lengths(batch)) - {1, rows}):
        raise ValueError(
            f"micro-batches are cut by rows: all tensors of a batch must have as many, or one; got {odd[0]} and {rows}."
        )
    return (cut(batch, slice(at, at + m), rows) for at in range(0, rows, m))


def _lengths(tree: Any) -> list[int]:
    return [len(x) if x.ndim else 1 for x in tree_leaves(tree) if isinstance(x, Tensor)]
