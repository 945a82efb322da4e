"""What happens at the model's output, batch by batch: sums of losses with closed-form derivatives.

Every operator of this room is a sum over batches of pullbacks through the model. An `Outputs` is one batch: the outputs as
a function of theta, and what the loss does with them. Of two kinds: the model's own output, and `Head`, where it is the
hidden states beside the weight of the last linear layer, so that the logits are made inside, a few tokens at a time if need
be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import grad, vjp

from ..core.batches import UNSCORED
from ..core.checks import check_count
from ..core.criterion import Criterion, Labels
from ..core.objective import Loss, Theta

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


class Outputs:
    """One batch, with the model's own output. All are sums over its scored positions, not means."""

    def __init__(self, loss: Loss, batch: tuple[Any, Any]):
        self.loss, self.criterion, (self.inputs, self.targets) = loss, loss.criterion, batch

    def of(self, theta: Theta) -> Outs:
        """The outputs there."""
        return (self.loss.net.apply(self.loss.params(theta), self.inputs),)

    def total(self, outs: Outs) -> Tensor:
        """sum(weight * loss)."""
        return total_of(self.criterion, outs[0], self.targets)

    def residual(self, outs: Outs) -> Outs:
        """Its gradient in the outputs."""
        return grad(self.total)(outs)

    def hessian(self, outs: Outs, tangents: Outs) -> Outs:
        """Its Hessian in the outputs, times a tangent."""
        return (hessian_of(self.criterion, outs[0], self.targets, tangents[0]),)

    def gauss_newton(self, outs: Outs, tangents: Outs) -> Outs:
        """The same with the logits' own second derivatives in the outputs left out: the loss's curvature only."""
        return self.hessian(outs, tangents)

    def sum(self, theta: Theta) -> Tensor:
        """`total` there, which every transform differentiates."""
        return self.total(self.of(theta))

    def scored(self, theta: Theta) -> Tensor:
        """The same, which reverse mode differentiates twice by the closed forms.

        Several passes over the logits become one. Forward mode has no rule here, nor has a third derivative.
        """
        return _Total.apply(self, *self.of(theta))


class Head(Outputs):
    """Hidden states of the scored tokens, weight and bias of the head: z = h W' + b is made inside, `rows` at a time.

    With tangents (h', W', b'): z' = h' W^T + h W'^T + b', and with M the loss's Hessian in z, r its gradient:
    Gauss-Newton (M z' W, (M z')^T h, sum M z'), and the Hessian adds (r W', r^T h', 0).
    """

    def __init__(self, loss: Loss, batch: tuple[Any, Any], rows: int | None, kept_at: Theta | None):
        super().__init__(loss, batch)
        self.places = self.targets.weight.reshape(-1).nonzero()[:, 0]
        self.labels = Labels(*(x.reshape(-1)[self.places] for x in (self.targets.index, self.targets.weight)))
        self.rows = rows or max(1, len(self.places))
        self.logits: Tensor | None = None
        self.slopes: Tensor | None = None
        if (
            rows is None and kept_at is not None
        ):  # the outputs are these: logits are not made again, nor their gradients
            with torch.no_grad():
                self.logits = _logits(self.of(kept_at))

    def of(self, theta: Theta) -> Outs:
        params = self.loss.params(theta)
        weight, bias = self.loss.net.head_values(params)
        hidden = self.loss.net.hidden(params, self.inputs).flatten(0, -2)[self.places]
        return (hidden, weight) if bias is None else (hidden, weight, bias)

    def total(self, outs: Outs) -> Tensor:
        return torch.stack([total_of(self.criterion, z, labels) for _, labels, z in self._chunks(outs)]).sum()

    def residual(self, outs: Outs) -> Outs:
        sums = _Sums(len(outs))
        for rows, labels, z in self._chunks(outs):
            r = self._slope(rows, labels, z)
            sums.add(r @ outs[1], r.T, outs[0][rows])
        return sums.total()

    def gauss_newton(self, outs: Outs, tangents: Outs) -> Outs:
        return self._product(outs, tangents, with_slopes=False)

    def hessian(self, outs: Outs, tangents: Outs) -> Outs:
        return self._product(outs, tangents, with_slopes=True)

    def _product(self, outs: Outs, tangents: Outs, with_slopes: bool) -> Outs:
        sums = _Sums(len(outs))
        for rows, labels, z in self._chunks(outs):
            moved = _plus(tangents[0][rows] @ outs[1].T, outs[0][rows], tangents[1].T)
            if len(tangents) == 3:
                moved = moved + tangents[2]
            u = hessian_of(self.criterion, z, labels, moved)
            if with_slopes:
                r = self._slope(rows, labels, z)
                sums.add(_plus(u @ outs[1], r, tangents[1]), u.T, outs[0][rows])
                sums.add_to_weight(r.T, tangents[0][rows])
            else:
                sums.add(u @ outs[1], u.T, outs[0][rows])
        return sums.total()

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


def outputs_of(loss: Loss, *, head_chunk: int | None = None, kept_at: Theta | None = None) -> list[Outputs]:
    """One `Outputs` per batch.

    head_chunk: tokens whose logits exist at once, made anew in every product.
    kept_at: for operators at one point, keep the logits there instead; where the model's head is known.

    Raises ValueError where `head_chunk` is given and the logits cannot be made apart from the body, or the loss looks at
    several of them.
    """
    if head_chunk is not None:
        check_count("head_chunk", head_chunk)
        if not has_head(loss):
            raise ValueError(
                "`head_chunk` needs a causal language model whose last layer is one linear map, and a criterion over "
                f"labels; {loss!r} is not known to be one. Leave `head_chunk` out."
            )
    if has_head(loss) and not (head_chunk is None and kept_at is None):
        return [Head(loss, batch, head_chunk, kept_at) for batch in loss.batches]
    return [Outputs(loss, batch) for batch in loss.batches]


def has_head(loss: Loss) -> bool:
    """Whether logits can be made apart from the body: the last layer is one linear map, and a loss looks at one of them."""
    criterion = loss.criterion
    return criterion.positionwise and criterion.output_hessian is not None and loss.net.head is not None


def total_weight(loss: Loss, theta: Theta) -> float:
    """What the objective's sum is divided by; a constant, as weights do not depend on the parameters.

    Raises ValueError where it is 0.
    """
    if loss.criterion.positionwise:
        total = float(sum(targets.weight.double().sum() for _, targets in loss.batches))
    else:
        with torch.no_grad():
            total = float(loss.terms(theta)[1].double().sum())
    total = loss.over_ranks(total)
    if not total:
        raise ValueError(UNSCORED)
    return total


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


class _Total(Function):
    """The outputs -> sum(weight * loss)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(at: Outputs, *outs: Tensor) -> Tensor:
        return at.total(outs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, _: Tensor | Outs) -> None:
        ctx.at, *outs = inputs
        ctx.save_for_backward(*outs)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple:
        # what comes from above is 1: the sum is what is differentiated, and scales are applied to the products
        return (None, *_Residual.apply(ctx.at, *ctx.saved_tensors))


class _Residual(Function):
    """The outputs -> the gradient of the sum; its own backward is the output Hessian, which is symmetric."""

    generate_vmap_rule = True
    setup_context = _Total.setup_context  # type: ignore[assignment]

    @staticmethod
    def forward(at: Outputs, *outs: Tensor) -> Outs:
        return at.residual(outs)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple:
        return (None, *ctx.at.hessian(ctx.saved_tensors, tangents))
