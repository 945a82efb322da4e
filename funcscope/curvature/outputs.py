"""What happens at the model's output, batch by batch: sums of losses with closed-form derivatives.

Every operator of this room is a sum over batches of pullbacks through the model. An `Outputs` is one batch: the outputs as
a function of the parameters, and what the loss does with them. Two kinds: `whole`, where the output is the model's, and
`split`, where it is the hidden states beside the weight of the last linear layer, so that the logits are made inside, a few
tokens at a time if need be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import grad

from ..core.criterion import Criterion, Labels
from ..core.layout import Params
from ..core.model import Functional, Inputs
from ..core.objective import Loss, Theta
from .head import Head, Outs, hessian_of, total_of


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
    criterion = loss.criterion
    return criterion.positionwise and criterion.output_hessian is not None and loss.net.head is not None


def check_head(loss: Loss) -> None:
    if not has_head(loss):
        raise ValueError(
            f"`head_chunk` needs a causal language model whose last layer is one linear map, and a criterion over labels; "
            f"{loss!r} is not known to be one. Leave `head_chunk` out."
        )


def loss_at(loss: Loss, inputs: Inputs, targets: Any) -> Callable[[Tensor], Tensor]:
    """One batch's sum of losses as a function of theta."""
    return lambda t: total_of(loss.criterion, loss.net.apply(loss.params(t), inputs), targets)


def total_weight(loss: Loss, theta: Theta) -> float:
    """What the objective's sum is divided by; a constant, as weights do not depend on the parameters."""
    if loss.criterion.positionwise:
        return float(sum(targets.weight.double().sum() for _, targets in loss.batches))
    with torch.no_grad():
        return float(loss.terms(theta)[1].double().sum())


def normalised(loss: Loss, theta: Tensor) -> tuple[Loss, float]:
    """The same sums with weights that add up to 1, and what is left to multiply: 1, but for criteria of other kinds.

    A factor on the weights costs nothing; on the products it is a pass over all parameters. In float16 it is left to the
    products, as small weights vanish.
    """
    scale = 1 / total_weight(loss, theta)
    if not loss.criterion.positionwise or any(leaf.dtype == torch.float16 for leaf in loss.layout.leaves):
        return loss, scale
    batches = tuple(
        (inputs, targets._replace(weight=targets.weight.to(theta.dtype) * scale)) for inputs, targets in loss.batches
    )
    return replace(loss, batches=batches), 1.0


def whole(net: Functional, criterion: Criterion, inputs: Inputs, targets: Any) -> Outputs:
    """The model's own output."""

    def total(outs: Outs) -> Tensor:
        return total_of(criterion, outs[0], targets)

    def hessian(outs: Outs, tangents: Outs) -> Outs:
        return (hessian_of(criterion, outs[0], targets, tangents[0]),)

    return Outputs(lambda params: (net.apply(params, inputs),), total, grad(total), hessian, gauss_newton=hessian)


def _split(
    net: Functional, criterion: Criterion, inputs: Inputs, targets: Labels, chunk: int | None, kept_at: Params | None
) -> Outputs:
    """Hidden states of the scored tokens, weight and bias of the head: z = h W' + b is made inside."""
    scored = targets.weight.reshape(-1).nonzero()[:, 0]
    labels = Labels(targets.index.reshape(-1)[scored], targets.weight.reshape(-1)[scored])

    def of(params: Params) -> Outs:
        weight, bias = net.head_values(params)
        hidden = net.hidden(params, inputs).flatten(0, -2)[scored]
        return (hidden, weight) if bias is None else (hidden, weight, bias)

    head = Head(criterion, labels, chunk or max(1, len(scored)))
    if chunk is None and kept_at is not None:
        with torch.no_grad():
            head.keep(of(kept_at))
    return Outputs(of, head.total, head.residual, head.hessian, head.gauss_newton)


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
        slopes = at.residual(outs)
        return slopes if isinstance(slopes, tuple) else (slopes,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, _: Outs) -> None:
        ctx.at, *outs = inputs
        ctx.save_for_backward(*outs)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple:
        return (None, *ctx.at.hessian(ctx.saved_tensors, tangents))
