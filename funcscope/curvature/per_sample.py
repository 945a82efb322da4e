"""Gradients of single sequences, by `vmap` of `grad` over the rows of every batch, or by a loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves, tree_map

from ..core.checks import check_choice, check_count
from ..core.objective import Loss, Theta
from .outputs import total_of
from .rows import coupled, cut, is_cut, tolerance

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
        yield from _Batch(loss, *batch).gradients(theta, reduction, chunk_size)


class _Batch:
    """One batch, cut into batches of one sequence."""

    def __init__(self, loss: Loss, inputs: Any, targets: Any):
        self.loss, self.whole = loss, (inputs, targets)
        self.rows = next(len(leaf) for leaf in tree_leaves(targets) if isinstance(leaf, Tensor) and leaf.ndim)
        self.dims = tree_map(lambda x: 0 if is_cut(x, self.rows) else None, self.whole)
        self.mapped = True

    def gradients(self, theta: Tensor, reduction: str, chunk_size: int) -> Iterator[Tensor]:
        """The rows, a chunk at a time; the last chunk comes once they are known to add up to the gradient of the whole."""
        total, lengths = torch.zeros_like(theta), 0.0
        for first in range(0, self.rows, chunk_size):
            sums, weights = self._chunk(theta, range(first, min(first + chunk_size, self.rows)))
            total, lengths = total + sums.sum(0), lengths + float(torch.linalg.vector_norm(sums, dim=1).sum())
            if first + chunk_size >= self.rows:
                self._check_sum(theta, total, lengths)
            yield sums if reduction == "sum" else sums / weights[:, None].to(sums.dtype)

    def _one(self, theta: Tensor, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        out = self.loss.net.apply(self.loss.params(theta), inputs)
        return total_of(self.loss.criterion, out, targets), self.loss.criterion.token_loss(out, targets)[1].sum()

    def _chunk(self, theta: Tensor, rows: range) -> tuple[Tensor, Tensor]:
        one, reason = grad(self._one, has_aux=True), ""
        if self.mapped:
            span = slice(rows.start, rows.stop)
            some = tree_map(lambda x: x[span][:, None] if is_cut(x, self.rows) else x, self.whole)
            try:
                return vmap(one, in_dims=(None, *self.dims))(theta, *some)
            except RuntimeError as err:
                reason = str(err).split("\n", 1)[0][:100]
            self.mapped = False
        singles = [
            one(theta, *cut(self.whole, slice(r, r + 1), self.rows)) for r in rows
        ]  # or what is wrong with the model
        self.loss.say_once(f"gradients are taken one sequence at a time, as `vmap` refuses this model ({reason}).")
        gradients, weights = zip(*singles, strict=True)
        return torch.stack(gradients), torch.stack(weights)

    def _check_sum(self, theta: Tensor, total: Tensor, lengths: float) -> None:
        whole, _ = grad(self._one, has_aux=True)(theta, *self.whole)
        off = float(torch.linalg.vector_norm(total - whole))
        if math.isfinite(off) and off > tolerance(self.loss) * lengths:
            raise ValueError(
                f"the gradients of {self.rows} single sequences add up to another one than that of their batch, off by "
                f"{off / lengths:.1e} of their lengths: {coupled(self.rows)}"
            )
