"""What happens at the model's output, batch by batch: sums of losses with closed-form derivatives.

Every operator of this room is a sum over batches of pullbacks through the model. An `Outputs` is one batch: the outputs as
a function of the parameters, and what the loss does with them. Two kinds: `whole`, where the output is the model's, and
`split`, where it is the hidden states beside the weight of the last linear layer, so that the logits are made inside, a few
tokens at a time if need be.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import grad, vjp

from ..core.criterion import Criterion, Labels
from ..core.layout import Params
from ..core.model import Functional, Inputs
from ..core.objective import Loss, Theta

Outs = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Outputs:
    """One batch. All functions are sums over its scored positions, not means."""

    of: Callable[[Params], Outs]
    """The outputs at these parameters."""
    total: Callable[[Outs], Tensor]
    """sum(weight * loss)."""
    residual: Callable[[Outs], Outs]
    """Its gradient in the outputs."""
    hessian: Callable[[Outs, Outs], Outs]
    """Its Hessian in the outputs, times a tangent."""
    gauss_newton: Callable[[Outs, Outs], Outs]
    """The same with the logits' own second derivatives in the outputs left out: the loss's curvature only."""

    def scored(self, params: Params) -> Tensor:
        """`total` at these parameters, which reverse mode differentiates twice by the closed forms.

        Several passes over the logits become one. Forward mode has no rule here, nor has a third derivative.
        """
        return _Total.apply(self, *self.of(params))


def outputs_of(loss: Loss, *, head_chunk: int | None = None, kept_at: Params | None = None) -> list[Outputs]:
    """One `Outputs` per batch.

    head_chunk: tokens whose logits exist at once, made anew in every product.
    kept_at: for operators at one point, keep the logits there instead; where the model's head is known.
    """
    if head_chunk is not None:
        check_head(loss)
    split = head_chunk is not None or (kept_at is not None and has_head(loss))
    if not split:
        return [whole(loss.net, loss.criterion, *batch) for batch in loss.batches]
    return [_split(loss.net, loss.criterion, *batch, head_chunk, kept_at) for batch in loss.batches]


def has_head(loss: Loss) -> bool:
    """Can the logits be made apart from the body, and does the loss look at each of them alone?"""
    closed = loss.criterion.output_hessian is not None
    return closed and loss.net.head is not None and all(isinstance(targets, Labels) for _, targets in loss.batches)


def check_head(loss: Loss) -> None:
    if not has_head(loss):
        raise ValueError(
            f"`head_chunk` needs a causal language model whose last layer is one linear map, and a criterion over labels; "
            f"{loss!r} is not known to be one. Leave `head_chunk` out."
        )


def total_weight(loss: Loss, theta: Theta) -> float:
    """What the objective's sum is divided by; a constant, as weights do not depend on the parameters."""
    given = [targets.weight for _, targets in loss.batches if hasattr(targets, "weight")]
    with torch.no_grad():
        weights = given if len(given) == len(loss.batches) else [loss.terms(theta)[1]]
    return float(sum(weight.double().sum() for weight in weights))


def normalised(loss: Loss, theta: Tensor) -> tuple[Loss, float]:
    """The same sums with weights that add up to 1, and what is left to multiply: 1, but for targets of other kinds.

    A factor on the weights costs nothing; on the vectors it is a pass over all parameters.
    """
    scale = 1 / total_weight(loss, theta)
    if not all(isinstance(targets, Labels) for _, targets in loss.batches):
        return loss, scale
    batches = tuple(
        (inputs, targets._replace(weight=targets.weight.to(theta.dtype) * scale)) for inputs, targets in loss.batches
    )
    return Loss(loss.net, batches, loss.criterion), 1.0


def whole(net: Functional, criterion: Criterion, inputs: Inputs, targets: Any) -> Outputs:
    """The model's own output."""

    def total(outs: Outs) -> Tensor:
        return total_of(criterion, outs[0], targets)

    def hessian(outs: Outs, tangents: Outs) -> Outs:
        return (hessian_of(criterion, outs[0], targets, tangents[0]),)

    return Outputs(
        of=lambda params: (net.apply(params, inputs),),
        total=total,
        residual=grad(total),
        hessian=hessian,
        gauss_newton=hessian,
    )


def total_of(criterion: Criterion, out: Tensor, targets: Any) -> Tensor:
    """sum(weight * loss) over all positions, where a position of weight 0 is never looked at."""
    loss, weight = criterion.token_loss(out, targets)
    wide = torch.promote_types(loss.dtype, torch.float32)
    return (torch.where(weight != 0, loss, torch.zeros_like(loss)) * weight).sum(dtype=wide)


def hessian_of(criterion: Criterion, out: Tensor, targets: Any, v: Tensor) -> Tensor:
    """The Hessian of `total_of` in the output, times v: in closed form where the criterion has one."""
    if criterion.output_hessian is not None:
        return criterion.output_hessian(out, targets, v).to(v.dtype)
    return vjp(grad(lambda z: total_of(criterion, z, targets)), out)[1](v)[0]


def _split(
    net: Functional,
    criterion: Criterion,
    inputs: Inputs,
    targets: Labels,
    chunk: int | None,
    kept_at: Params | None,
) -> Outputs:
    """Hidden states of the scored tokens, weight and bias of the head: z = h W' + b is made inside."""
    scored = targets.weight.reshape(-1).nonzero()[:, 0]
    labels = Labels(targets.index.reshape(-1)[scored], targets.weight.reshape(-1)[scored])

    def of(params: Params) -> Outs:
        weight, bias = net.head_values(params)
        hidden = net.hidden(params, inputs).flatten(0, -2)[scored]
        return (hidden, weight) if bias is None else (hidden, weight, bias)

    head = _Head(criterion, labels, chunk or max(1, len(scored)))
    if chunk is None and kept_at is not None:
        with torch.no_grad():
            head.keep(of(kept_at))
    return Outputs(of, head.total, head.residual, head.hessian, head.gauss_newton)


class _Head:
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
        return sums.found()

    def gauss_newton(self, outs: Outs, tangents: Outs) -> Outs:
        sums = _Sums(len(outs))
        for rows, labels, z in self._chunks(outs):
            u = self._bent(outs, tangents, rows, labels, z)
            sums.add(u @ outs[1], u.T, outs[0][rows])
        return sums.found()

    def hessian(self, outs: Outs, tangents: Outs) -> Outs:
        sums = _Sums(len(outs))
        for rows, labels, z in self._chunks(outs):
            u, r = self._bent(outs, tangents, rows, labels, z), self._slope(rows, labels, z)
            sums.add(_plus(u @ outs[1], r, tangents[1]), u.T, outs[0][rows])
            sums.add_to_weight(r.T, tangents[0][rows])
        return sums.found()

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

    def add(self, hidden: Tensor, left: Tensor, right: Tensor) -> None:
        """hidden, and left @ right for the weight; the bias is the sum of the columns of left."""
        self.hidden.append(hidden)
        self.add_to_weight(left, right)
        if self.with_bias:
            bias = left.sum(1)
            self.bias = bias if self.bias is None else self.bias + bias

    def add_to_weight(self, left: Tensor, right: Tensor) -> None:
        self.weight = left @ right if self.weight is None else _plus(self.weight, left, right)

    def found(self) -> Outs:
        hidden = self.hidden[0] if len(self.hidden) == 1 else torch.cat(self.hidden)
        assert self.weight is not None
        return (hidden, self.weight) if self.bias is None else (hidden, self.weight, self.bias)


def _logits(outs: Outs) -> Tensor:
    return torch.nn.functional.linear(*outs)


def _plus(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out + a b, written into `out`: a copy of the weight of a large vocabulary is a tenth of the product."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # under `vmap`: as slow as a loop, and right
        return out.addmm_(a, b)


class _Total(Function):
    """The outputs -> sum(weight * loss)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(at: Outputs, *outs: Tensor) -> Tensor:
        return at.total(outs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, _: Tensor) -> None:
        ctx.at, *outs = inputs
        ctx.save_for_backward(*outs)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple:
        # what comes from above is 1: the sum is what is differentiated, and scales are applied to the products
        return (None, *_Residual.apply(ctx.at, *ctx.saved_tensors))


class _Residual(Function):
    """The outputs -> the gradient of the sum; its own backward is the output Hessian, which is symmetric."""

    generate_vmap_rule = True

    @staticmethod
    def forward(at: Outputs, *outs: Tensor) -> Outs:
        found = at.residual(outs)
        return found if isinstance(found, tuple) else (found,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, _: Outs) -> None:
        ctx.at, *outs = inputs
        ctx.save_for_backward(*outs)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple:
        return (None, *ctx.at.hessian(ctx.saved_tensors, tangents))
