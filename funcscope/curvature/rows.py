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
from ..core.layout import Params
from ..core.objective import Loss, Theta
from ..core.progress import tick
from ..core.purity import moved
from .outputs import total_of

Reduction = Literal["sum", "mean"]


def factors_of(num: int) -> Float[Tensor, " num"]:
    """Of each sequence, in sums that are to tell them apart: powers of 2, which round no number, in an order without period.

    >>> factors_of(6)
    tensor([4., 1., 8., 2., 1., 4.], dtype=torch.float64)
    """
    golden = (5**0.5 - 1) / 2
    return 2 ** (4 * (torch.arange(1, num + 1, dtype=torch.float64) * golden).frac()).floor()


def weighted_sum(
    loss: Loss, params: Params, batch: tuple[Any, Any], factors: Float[Tensor, " num"]
) -> Float[Tensor, ""]:
    """The losses of a batch's sequences, each times its factor. Raises ValueError where they are not as many."""
    sums, _ = loss.scored(lambda inputs: loss.net.apply(params, inputs), *batch)
    if len(sums) != len(factors):
        raise ValueError(f"a batch of {len(factors)} rows has {len(sums)} losses: its rows are not its sequences.")
    dtype = torch.promote_types(sums.dtype, torch.float32)
    return (sums.to(dtype) * factors.to(sums.device, dtype)).sum()


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
        own = _Sequences(loss, theta, batch)
        for sums, weights in own.chunks(chunk_size):
            if own.seen == own.num:
                _check_same(own, chunk_size)
            yield sums if reduction == "sum" else sums / weights[:, None].to(sums.dtype)


class _Sequences:
    """The gradients of the single sequences of a batch."""

    def __init__(self, loss: Loss, theta: Tensor, batch: tuple[Any, Any]):
        self.loss, self.theta, self.batch, self.num = loss, theta, batch, num_rows(batch)
        self.refusal = ""
        """What torch says where `vmap` refuses the model."""
        self.factors = factors_of(self.num).to(theta)  # gradients that are wrong can have the right sum
        self.seen, self.total, self.lengths = 0, torch.zeros_like(theta), 0.0
        """Gradients so far, their sum times factors, and the sum of their lengths."""

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Gradients of sums, and weights."""
        while self.seen < self.num:
            tick("forward", num=0 if self.seen else 1)
            at = slice(self.seen, min(self.seen + size, self.num))
            sums, weights = self._of(at)
            self.seen, self.total = at.stop, self.total + self.factors[at] @ sums
            self.lengths += float(torch.linalg.vector_norm(sums, dim=1).sum())
            yield sums, weights

    def off(self) -> float:
        """How far the sum is from the gradient of the batch's losses times factors; 0 where either is not finite."""

        def weighted(t: Tensor) -> Tensor:
            return weighted_sum(self.loss, self.loss.params(t), self.batch, self.factors)

        off = float(torch.linalg.vector_norm(self.total - grad(weighted)(self.theta)))
        return off if math.isfinite(off) else 0.0

    def _of(self, at: slice) -> tuple[Tensor, Tensor]:
        if not self.refusal:
            try:
                return mapped(self._gradient, self.batch, self.num, at)
            except RuntimeError as err:
                self.refusal = str(err).split("\n", 1)[0][:100] or type(err).__name__
            except ValueError as err:
                said = f"{err} That was said of one of {self.num} sequences, which dimension 0 must number."
                raise ValueError(said) from err
        each = (cut(self.batch, slice(i, i + 1), self.num) for i in range(at.start, at.stop))
        sums, weights = map(torch.stack, zip(*map(self._gradient, each), strict=True))
        # or the calls have said what is wrong with the model
        self.loss.say_once(
            f"gradients are taken one sequence at a time, as `vmap` refuses this model ({self.refusal})."
        )
        return sums, weights

    def _gradient(self, part: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        loss, (inputs, targets) = self.loss, part

        def summed(t: Tensor) -> tuple[Tensor, Tensor]:
            out = loss.net.apply(loss.params(t), inputs)
            return total_of(loss.criterion, out, targets), loss.criterion.token_loss(out, targets)[1].sum()

        return grad(summed, has_aux=True)(self.theta)


def _check_same(own: _Sequences, size: int) -> None:
    """Gradients of sequences alone are those that they have in the batch; nearby, where at theta all may be rounding.

    That is so where the model makes the targets itself.
    """
    if own.off() <= tolerance(own.loss) * own.lengths:
        return
    near = _Sequences(own.loss, moved(own.theta), own.batch)
    deque(near.chunks(size), maxlen=0)
    if (off := near.off()) > tolerance(own.loss) * near.lengths:
        raise ValueError(
            f"the gradients of {own.num} single sequences are others than in their batch: a sum of them is off by {off:.1e} "
            f"where their lengths add up to {near.lengths:.1e}: {coupled(own.num)}"
        )


def _parts(batch: tuple[Any, Any], m: int) -> Iterator[tuple[Any, Any]]:
    rows = max(_lengths(batch), default=0)
    if odd := sorted(set(_lengths(batch)) - {1, rows}):
        raise ValueError(
            f"micro-batches are cut by rows: all tensors of a batch must have as many, or one; got {odd[0]} and {rows}."
        )
    return (cut(batch, slice(at, at + m), rows) for at in range(0, rows, m))


def _lengths(tree: Any) -> list[int]:
    return [len(x) if x.ndim else 1 for x in tree_leaves(tree) if isinstance(x, Tensor)]
