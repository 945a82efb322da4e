"""The Hessian of the loss as a matvec: exact, with the graph kept or rebuilt, or by differences of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jvp, vjp

from ..core.checks import check_count, check_flat, check_positive
from ..core.directions import dot
from ..core.model import Inputs
from ..core.objective import Loss, Theta
from ..linalg.matvec import Matvec
from .head import total_of
from .outputs import Outputs, check_head, normalised, outputs_of, total_weight
from .pointwise import KeptActivations
from .pullbacks import ONE_AT_A_TIME, flat, named_if_missing, summed, unchanged

_NEEDS = "the Hessian needs second derivatives"


def hessian(loss: Loss, theta: Theta, *, keep: bool = True, head_chunk: int | None = None) -> Matvec:
    r"""v -> H v, with $H = \nabla^2 L(\theta)$ of the exact token-weighted mean over all batches.

    Exact up to rounding. For a piecewise linear network (ReLU) it is the Hessian of the pieces: kinks are not in it.

    keep: differentiate the gradient once and keep that graph, one per batch, for all products: about 6 forward passes
    per product, at the memory of the activations of a forward and a backward pass. Otherwise forward mode over reverse
    mode for every product: about 10 forward passes, and no memory between products.
    head_chunk: for causal language models with a large vocabulary (needs keep=True): the logits of so many tokens exist at
    a time, made again in every product.

    The graph holds theta and the batches: a product after one of them was changed in place raises RuntimeError. It costs
    less under `torch.no_grad()`, which every algorithm of `linalg` uses; without it, reverse mode can differentiate it in v.

    Raises ValueError, in the first product at the latest, where a kernel has no second derivative.

    Pearlmutter (1994), doi:10.1162/neco.1994.6.1.147.

    >>> from funcscope.core import criterion, model, objective
    >>> net = model.functional(torch.nn.Linear(2, 1, bias=False))
    >>> square = criterion.custom(lambda out, y: (out - y) ** 2)
    >>> loss = objective.objective(net, [(torch.eye(2), torch.zeros(2, 1))], square)      # (a^2 + b^2) / 2
    >>> hessian(loss, net.theta)(torch.tensor([3.0, 4.0]))
    tensor([3., 4.])
    """
    theta = flat(loss, theta)
    if head_chunk is not None:
        check_count("head_chunk", head_chunk)
        check_head(loss)
        if not keep:
            raise ValueError("`head_chunk` needs keep=True: the closed form of the head is one of reverse mode.")
    loss, scale = normalised(loss, theta)
    check = unchanged(loss, theta)
    with named_if_missing(loss, _NEEDS):
        if keep:
            kept = outputs_of(loss, head_chunk=head_chunk, kept_at=loss.params(theta))
            maps = [_kept(loss, theta, batch) for batch in kept]
        else:
            maps = [_rebuilt(loss, theta, *batch) for batch in loss.batches]

    def matvec(v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        check_flat("v", v, len(theta))
        check()
        with named_if_missing(loss, _NEEDS):
            return summed(maps, v, scale)

    return matvec


def hessian_difference(loss: Loss, theta: Theta, *, step: float | None = None) -> Matvec:
    r"""v -> H v by a central difference of gradients, for models whose kernels have no second derivative.

    $$Hv \approx \frac{\nabla L(\theta + h \hat v) - \nabla L(\theta - h \hat v)}{2h}\,\|v\|, \qquad
      \text{error} = \tfrac{h^2}{6} \|D^4 L\| + O(u \|\nabla L\| / h).$$

    step: h, a length in parameter space. Default: $u^{1/3} \max(\|\theta\|, 1)$ with the model's unit roundoff u, which
    balances both errors where the third and first derivatives are of one size: 0.4 % of the norm in float32, and a tenth in
    bfloat16, where curvatures along most directions drown. Compare two steps before a value is trusted.

    Symmetric up to that error only. Two gradients per product, no memory between products.

    >>> from funcscope.core import criterion, model, objective
    >>> net = model.functional(torch.nn.Linear(2, 1, bias=False).double())
    >>> square = criterion.custom(lambda out, y: (out - y) ** 2)
    >>> x, y = torch.eye(2).double(), torch.zeros(2, 1).double()
    >>> loss = objective.objective(net, [(x, y)], square)
    >>> torch.allclose(hessian_difference(loss, net.theta)(x[0]), x[0])
    True
    """
    theta = flat(loss, theta)
    if step is None:
        step = loss.net.unit_roundoff ** (1 / 3) * max(dot(theta, theta) ** 0.5, 1.0)
    check_positive("step", step)
    check, scale = unchanged(loss, theta), 1 / total_weight(loss, theta)

    def slope(t: Tensor) -> Tensor:  # batch by batch: one graph at a time
        with ONE_AT_A_TIME:
            return summed([grad(_total(loss, *batch)) for batch in loss.batches], t, scale)

    def matvec(v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        check_flat("v", v, len(theta))
        check()
        length = torch.linalg.vector_norm(v, dtype=torch.promote_types(v.dtype, torch.float32))
        unit = torch.where(length > 0, v / length, v)  # the product with 0 is 0
        difference = slope(theta + step * unit) - slope(theta - step * unit)
        return (difference * (length / (2 * step))).to(v.dtype)

    return matvec


def _kept(loss: Loss, theta: Tensor, batch: Outputs) -> Matvec:
    with torch.enable_grad(), KeptActivations():
        _, pull = vjp(grad(lambda t: batch.scored(loss.params(t))), theta)
    return lambda v: pull(v)[0]


def _total(loss: Loss, inputs: Inputs, targets: Any) -> Callable[[Tensor], Tensor]:
    """One batch's sum of losses as a function of theta."""
    return lambda t: total_of(loss.criterion, loss.net.apply(loss.params(t), inputs), targets)


def _rebuilt(loss: Loss, theta: Tensor, inputs: Inputs, targets: Any) -> Matvec:
    total = _total(loss, inputs, targets)

    def matvec(v: Tensor) -> Tensor:
        # without grad mode, torch takes formulas that have no derivative themselves (SiLU)
        with torch.enable_grad(), ONE_AT_A_TIME:
            return jvp(grad(total), (theta,), (v,))[1]

    return matvec
