"""The loss at the output, and through a linear head, with its first two derivatives in closed form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vjp

from ..core.criterion import Criterion, Labels

Outs = tuple[Tensor, ...]


def total_of(criterion: Criterion, out: Tensor, targets: Any) -> Tensor:
    """sum(weight * loss) over all positions, where a position of weight 0 is never looked at."""
    loss, weight = criterion.scored(out, targets)
    return (loss * weight).sum(dtype=torch.promote_types(loss.dtype, torch.float32))


def hessian_of(criterion: Criterion, out: Tensor, targets: Any, v: Tensor) -> Tensor:
    """The Hessian of `total_of` in the output, times v: in closed form where the criterion has one."""
    if criterion.output_hessian is not None:
        return criterion.output_hessian(out, targets, v).to(v.dtype)
    return vjp(grad(lambda z: total_of(criterion, z, targets)), out)[1](v)[0]


class Head:
    """The loss of a linear head, in closed form, `rows` tokens at a time.

    With tangents (h', W', b'): z' = h' W^T + h W'^T + b', and with M the loss's Hessian in z, r its gradient:
    Gauss-Newton (M z' W, (M z')^T h, sum M z'), and the Hessian adds (r W', r^T h', 0).
    """

    def __init__(self, criterion: Criterion, labels: Labels, rows: int):
        self.criterion, self.labels, self.rows = criterion, labels, rows
        self.logits: Tensor | None = None
        self.slopes: Tensor | None = None

    def keep(self, outs: Outs) -> None:
        """From now on the outputs are these: logits are not made again, nor their gradients once they were used."""
        self.logits = _logits(outs)

    def total(self, outs: Outs) -> Tensor:
        return torch.stack([total_of(self.criterion, z, labels) for _, labels, z in self._chunks(outs)]).sum()

    def residual(self, outs: Outs) -> Outs:
        sums = _Sums(len(outs))
        for rows, labels, z in self._chunks(outs):
            r = self._slope(rows, labels, z)
            sums.add(r @ outs[1], r.T, outs[0][rows])
        return sums.total()

    def gauss_newton(self, outs: Outs, tangents: Outs) -> Outs:
        sums = _Sums(len(outs))
        for rows, labels, z in self._chunks(outs):
            u = self._bent(outs, tangents, rows, labels, z)
            sums.add(u @ outs[1], u.T, outs[0][rows])
        return sums.total()

    def hessian(self, outs: Outs, tangents: Outs) -> Outs:
        sums = _Sums(len(outs))
        for rows, labels, z in self._chunks(outs):
            u, r = self._bent(outs, tangents, rows, labels, z), self._slope(rows, labels, z)
            sums.add(_plus(u @ outs[1], r, tangents[1]), u.T, outs[0][rows])
            sums.add_to_weight(r.T, tangents[0][rows])
        return sums.total()

    def _bent(self, outs: Outs, tangents: Outs, rows: slice, labels: Labels, z: Tensor) -> Tensor:
        """M z' for some rows."""
        moved = _plus(tangents[0][rows] @ outs[1].T, outs[0][rows], tangents[1].T)
        if len(tangents) == 3:
            moved = moved + tangents[2]
        return hessian_of(self.criterion, z, labels, moved)

    def _chunks(self, outs: Outs) -> Iterator[tuple[slice, Labels, Tensor]]:
        """Rows, their labels, their logits."""
        for first in range(0, max(1, len(outs[0])), self.rows):
            rows = slice(first, first + self.rows)
            labels = Labels(self.labels.index[rows], self.labels.weight[rows])
            z = _logits((outs[0][rows], *outs[1:])) if self.logits is None else self.logits[rows]
            yield rows, labels, z

    def _slope(self, rows: slice, labels: Labels, z: Tensor) -> Tensor:
        if self.logits is None:
            return grad(lambda z: total_of(self.criterion, z, labels))(z)
        if self.slopes is None:
            self.slopes = grad(lambda z: total_of(self.criterion, z, self.labels))(self.logits)
        return self.slopes[rows]


class _Sums:
    """What the chunks of a head amount to: hidden states one after the other, weight and bias added up in place."""

    def __init__(self, num: int):
        self.with_bias = num == 3
        self.hidden: list[Tensor] = []
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, hidden: Tensor, a: Tensor, b: Tensor) -> None:
        """hidden, and a @ b for the weight; the bias is the sum of the columns of a."""
        self.hidden.append(hidden)
        self.add_to_weight(a, b)
        if self.with_bias:
            bias = a.sum(1)
            self.bias = bias if self.bias is None else self.bias + bias

    def add_to_weight(self, a: Tensor, b: Tensor) -> None:
        wide = torch.promote_types(a.dtype, torch.float32)  # sums over many chunks would stall in half precision
        if a.dtype != wide:
            part = (a @ b).to(wide)
            self.weight = part if self.weight is None else self.weight + part
        else:
            self.weight = a @ b if self.weight is None else _plus(self.weight, a, b)

    def total(self) -> Outs:
        hidden = self.hidden[0] if len(self.hidden) == 1 else torch.cat(self.hidden)
        assert self.weight is not None
        self.weight = self.weight.to(hidden.dtype)
        return (hidden, self.weight) if self.bias is None else (hidden, self.weight, self.bias)


def _logits(outs: Outs) -> Tensor:
    return torch.nn.functional.linear(*outs)


def _plus(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out + a b, written into `out`: a copy of the weight of a large vocabulary is a tenth of the product."""
    return out.addmm_(a, b) if all(map(_plain, (out, a, b))) else torch.addmm(out, a, b)


def _plain(x: Tensor) -> bool:
    """Not inside a transform, where tensors have no memory of their own, and writing into one may be refused."""
    try:
        return bool(x.data_ptr()) or not x.numel()
    except RuntimeError:
        return False
