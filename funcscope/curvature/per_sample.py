"""Gradients of single sequences, by `vmap` of `grad` over the rows of every batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves

from ..core.checks import check_choice, check_count
from ..core.objective import Loss, Theta
from .head import total_of
from .pullbacks import flat

Reduction = Literal["sum", "mean"]


def per_sample_gradients(
    loss: Loss, theta: Theta, *, reduction: Reduction = "sum", chunk_size: int = 8
) -> Float[Tensor, "n p"]:
    r"""One row per sequence, in the order of the batches: the gradient of its own loss.

    `sum`: $g_b = \sum_{t \in b} w_t \nabla \ell_t$, so that the rows add up to $W \nabla L$. `mean`: $g_b / W_b$, with nan
    for a sequence without a scored position. n P numbers are in memory; `gradient_chunks` gives them a few at a time.

    chunk_size: sequences whose gradients are computed at once. Tensors of a batch whose first dimension is the number of
    sequences are taken to have one entry per sequence; all others are shared.

    >>> from funcscope.core import criterion, model, objective
    >>> net = model.functional(torch.nn.Linear(2, 1, bias=False))
    >>> half_square = criterion.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> loss = objective.objective(net, [(torch.eye(2), torch.zeros(2, 1))], half_square)
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
    theta = flat(loss, theta)
    for inputs, targets in loss.batches:
        rows = next(len(leaf) for leaf in tree_leaves(targets) if isinstance(leaf, Tensor) and leaf.ndim)
        yield from _of_batch(loss, theta, inputs, targets, rows, reduction, chunk_size)


def _of_batch(
    loss: Loss, theta: Tensor, inputs: Any, targets: Any, rows: int, reduction: str, chunk_size: int
) -> Iterator[Tensor]:
    def one(t: Tensor, *sequence: Any) -> Tensor:
        inputs, targets = sequence
        out = loss.net.apply(loss.params(t), inputs)
        total = total_of(loss.criterion, out, targets)
        return total if reduction == "sum" else total / loss.criterion.token_loss(out, targets)[1].sum()

    dims = tuple(_each(tree, lambda _: 0, rows, otherwise=None) for tree in (inputs, targets))
    alone = tuple(_each(tree, lambda x: x[:, None], rows) for tree in (inputs, targets))  # batches of one sequence
    for first in range(0, rows, chunk_size):
        chunk = slice(first, first + chunk_size)
        some = tuple(_each(tree, lambda x, chunk=chunk: x[chunk], rows) for tree in alone)
        yield vmap(grad(one), in_dims=(None, *dims))(theta, *some)


def _each(tree: Any, change: Any, rows: int, **otherwise: Any) -> Any:
    """Change every tensor that has one entry per sequence; the others are shared by all."""

    def leaf(x: Any) -> Any:
        return change(x) if isinstance(x, Tensor) and x.ndim and len(x) == rows else otherwise.get("otherwise", x)

    if isinstance(tree, Mapping):
        return {name: _each(value, change, rows, **otherwise) for name, value in tree.items()}
    if isinstance(tree, tuple):
        values = [_each(value, change, rows, **otherwise) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return leaf(tree)
