"""A loss at one point, leaf by leaf: terms per sequence, gradient, derivatives along a line; what every sharpness needs.

All are sums over the batches, one batch at a time, so that the memory is that of one batch however many there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp

from ..core.objective import Loss, Theta
from ..core.vectors import Leaves, inner, norm
from .pullbacks import kept_gradient


class Terms(NamedTuple):
    """The loss per sequence, float64 on the CPU: the weighted sum of its token losses, and the sum of its weights."""

    sums: Tensor
    weights: Tensor

    @property
    def mean(self) -> float:
        """The loss: the ratio of the totals."""
        return float(self.sums.sum() / self.weights.sum())


def terms_at(loss: Loss, theta: Theta) -> Terms:
    """One forward pass over all batches; theta is a vector or leaves."""
    with torch.no_grad():
        return Terms(*(x.cpu().double() for x in loss.terms(theta)))


def gradient_at(loss: Loss, leaves: Leaves) -> tuple[dict[str, Tensor], Terms]:
    """The gradient, in the dtypes of the leaves, and the terms of the same pass.

    Raises ValueError where the loss or an entry of the gradient is not finite.
    """
    total, terms = summed_gradient(loss, leaves)
    check_finite(sum(int((~x.isfinite()).sum()) for x in total.values()), terms.mean)
    weight = float(terms.weights.sum())
    return {k: v.div_(weight) for k, v in total.items()}, terms


def summed_gradient(loss: Loss, leaves: Leaves) -> tuple[dict[str, Tensor], Terms]:
    """The gradient of the weighted sum of all token losses, finite or not, and the terms of the same pass."""
    total: dict[str, Tensor] = {}
    parts = []
    for one in one_by_one(loss):

        def summed(at: Leaves, one: Loss = one) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            terms = one.terms(at)
            return terms[0].sum(), terms

        with torch.enable_grad():
            part, terms = grad(summed, has_aux=True)(dict(leaves))
        total = {k: total[k].add_(v) for k, v in part.items()} if total else part
        parts.append(terms)
    return total, Terms(*(torch.cat(each).detach().cpu().double() for each in zip(*parts, strict=True)))


def ascent_length(length: float, norm_threshold: float) -> float:
    """A gradient's norm; raises ValueError where there is no direction to climb in."""
    if length == 0 or length < norm_threshold:
        raise ValueError(
            f"the gradient's norm is {length:.3g}, below `norm_threshold={norm_threshold:g}` (absolute, in nats per unit of "
            "theta), so that there is no direction to climb in. At a stationary point the maximum over the ball is "
            "epsilon^2 lambda_max / 2: use the Hessian's largest eigenvalue. Or lower `norm_threshold`."
        )
    return length


def curvature_along(loss: Loss, leaves: Leaves, v: Leaves, weight: float) -> float:
    r"""$v^\top H v$ exactly: v with the gradient differentiated along v, at the memory of one batch's two graphs.

    Raises ValueError where the model keeps kernels of its own, which have no reliable second derivatives.
    """
    if loss.net.attention == "keep":
        raise ValueError(
            'the net was made with `attention="keep"`: its own kernels have no reliable second derivatives. Make it with '
            '`attention="eager"`, or pass `curvature=False`.'
        )
    total = 0.0
    for one in one_by_one(loss):
        along = {k: v[k].to(x.dtype) for k, x in leaves.items()}
        total += inner(kept_gradient(lambda at, one=one: one.terms(at)[0].sum(), dict(leaves))(along), along)
    return total / weight


def slope_along(loss: Loss, leaves: Leaves, v: Leaves, weight: float) -> float:
    r"""$g^\top v$ by one `jvp`; by the gradient where the model keeps kernels that have no forward derivative."""
    if loss.net.attention == "keep":
        return inner(gradient_at(loss, leaves)[0], v)
    some = next(iter(leaves.values()))

    def along(one: Loss) -> float:
        def line(a: Tensor) -> Tensor:
            at = {k: torch.addcmul(x, a.to(x.dtype), v[k].to(x.dtype)) for k, x in leaves.items()}
            return one.terms(at)[0].sum()

        return float(jvp(line, (some.new_zeros(()),), (some.new_ones(()),))[1])

    return sum(map(along, one_by_one(loss))) / weight


def realised_norm(loss: Loss, leaves: Leaves, at: Leaves) -> float:
    """The distance of two points after rounding to the dtypes that the model computes in."""
    used = {leaf.name: leaf.dtype for leaf in loss.layout.leaves}
    return norm({k: at[k].to(used[k]).to(x.dtype) - x.to(used[k]).to(x.dtype) for k, x in leaves.items()})


def rounding_of_difference(loss: Loss, leaves: Leaves, gradient: Leaves, level: float) -> float:
    r"""What rounding may do to a difference of two losses: $2 u |L| + \sum_i u_i |g_i \theta_i|$.

    u is the unit roundoff of the model (`Functional.unit_roundoff`): a loss per token carries a relative error of that
    size, and a few more from its layers, so that this is the order of magnitude and no bound for a deep model. $u_i$ is
    that of the narrower of theta's dtype and the one that the model casts it to; to first order, this half is a bound.
    """
    used = {leaf.name: leaf.dtype for leaf in loss.layout.leaves}
    total = 2 * loss.net.unit_roundoff * abs(level)
    for k, x in leaves.items():
        roundoff = max(torch.finfo(used[k]).eps, torch.finfo(x.dtype).eps) / 2
        total += roundoff * inner({k: x.abs()}, {k: gradient[k].abs()})
    return total


def one_by_one(loss: Loss) -> Iterator[Loss]:
    """The loss of each batch."""
    return (replace(loss, batches=(batch,)) for batch in loss.batches)


def check_finite(bad: int, level: float) -> None:
    """Raises ValueError for a loss that is not finite, and for so many bad entries of its gradient."""
    if not math.isfinite(level):
        raise ValueError(
            f"the loss at theta is {level}: there is no sharpness around it. Check the weights and the batch."
        )
    if bad:
        raise ValueError(
            f"the gradient at theta has {bad} entries that are not finite: compute in a wider dtype (`dtype` of "
            "`functional`), or check the weights and the batch."
        )
