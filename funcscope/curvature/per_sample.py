"""Gradients of single sequences, by `vmap` of `grad` over the rows of every batch, or by a loop."""

from __future__ import annotations

import math
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
    sequences are taken to have one entry per sequence; all others are shared. Models that `vmap` refuses (a
    `.item()` in the forward pass) are differentiated one sequence at a time, which a warning says once.

    Raises ValueError where the rows of a batch do not add up to its gradient: sequences that see each other.

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
    for batch in loss.batches:
        yield from _Batch(loss, *batch).gradients(theta, reduction, chunk_size)


class _Batch:
    """One batch, cut into batches of one sequence."""

    def __init__(self, loss: Loss, inputs: Any, targets: Any):
        self.loss, self.whole = loss, (inputs, targets)
        self.rows = next(len(leaf) for leaf in tree_leaves(targets) if isinstance(leaf, Tensor) and leaf.ndim)
        self.dims = tuple(_each(tree, lambda _: 0, self.rows, otherwise=None) for tree in self.whole)
        self.mapped = True

    def gradients(self, theta: Tensor, reduction: str, chunk_size: int) -> Iterator[Tensor]:
        """The rows, a chunk at a time; the last chunk comes once they are known to add up to the gradient of the whole."""
        total, lengths = torch.zeros_like(theta), 0.0
        for first in range(0, self.rows, chunk_size):
            sums, weights = self._chunk(theta, slice(first, min(first + chunk_size, self.rows)))
            total, lengths = total + sums.sum(0), lengths + float(torch.linalg.vector_norm(sums, dim=1).sum())
            if first + chunk_size >= self.rows:
                self._check_sum(theta, total, lengths)
            yield sums if reduction == "sum" else sums / weights[:, None].to(sums.dtype)

    def _one(self, theta: Tensor, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        out = self.loss.net.apply(self.loss.params(theta), inputs)
        return total_of(self.loss.criterion, out, targets), self.loss.criterion.token_loss(out, targets)[1].sum()

    def _chunk(self, theta: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        one, reason = grad(self._one, has_aux=True), ""
        if self.mapped:
            some = tuple(_each(tree, lambda x: x[rows][:, None], self.rows) for tree in self.whole)
            try:
                return vmap(one, in_dims=(None, *self.dims))(theta, *some)
            except RuntimeError as err:
                reason = str(err).split("\n", 1)[0][:100]
            self.mapped = False
        gradients = self._looped(one, theta, rows)  # raises what is wrong with the model itself
        self.loss.say_once(f"gradients are taken one sequence at a time, as `vmap` refuses this model ({reason}).")
        return gradients

    def _looped(self, one: Any, theta: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        singles = (
            tuple(_each(tree, lambda x, r=r: x[r : r + 1], self.rows) for tree in self.whole)
            for r in range(rows.start, rows.stop)
        )
        gradients, weights = zip(*(one(theta, *single) for single in singles), strict=True)
        return torch.stack(gradients), torch.stack(weights)

    def _check_sum(self, theta: Tensor, total: Tensor, lengths: float) -> None:
        whole, _ = grad(self._one, has_aux=True)(theta, *self.whole)
        roundoff = self.loss.net.unit_roundoff
        tolerance = max(32 * roundoff, min(1e-4, 1e8 * roundoff))
        off = float(torch.linalg.vector_norm(total - whole))
        if math.isfinite(off) and off > tolerance * lengths:
            raise ValueError(
                f"the gradients of {self.rows} single sequences add up to another one than that of their batch, off by "
                f"{off / lengths:.1e} of their lengths: sequences see each other (statistics over the batch, a loss across "
                f"rows), or a tensor that all share has {self.rows} rows by chance and was cut. Use a batch of another "
                "size, give the shared tensor a dimension of 1 in front, or take statistics that do not depend on the batch."
            )


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
