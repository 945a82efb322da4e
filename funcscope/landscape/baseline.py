"""The loss at theta, by the plan and the kernels of the losses around it, from which it is subtracted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.directions import Direction, stack
from ..core.objective import Loss, Theta
from ..core.restrict import restrict
from .directional_result import Plan
from .evaluator import mapped
from .residuals import num_groups, residuals
from .terms import PerSequence


def copies(loss: Loss, plan: Plan, num: int, steps: int) -> int:
    """How many models are evaluated at once, at so many steps along each of `num` directions."""
    if not plan.lazy:
        return min(plan.chunk, num)
    return steps if loss.net.attention != "keep" and loss.is_mapped() else 1


def centre_at(
    loss: Loss, theta: Theta, plan: Plan, num: int, dirs: Sequence[Direction], steps: int, rows: Tensor | None = None
) -> tuple[float, Tensor, Tensor]:
    """The loss at theta by that plan, the residuals of its sequences for `num` values, and which of them are scored.

    As many copies at once as at the steps: mapped products round in another way, which small differences would have in them.
    Raises ValueError where the loss is not finite, or not the same twice.
    """
    params, per, many = loss.leaves(theta), PerSequence.of(loss), copies(loss, plan, len(dirs), steps)

    def at(of: Loss) -> Tensor:
        return of.at_leaves(lambda name, _: params[name]) if plan.lazy else of(theta)

    if many == 1:
        return centred(at(per), at(loss), loss, num)
    if plan.lazy:
        scales = dirs[0].scales
        phi, zeros = (
            restrict(per, params, dirs[0], lazy=True),
            torch.zeros(many, dtype=scales.dtype, device=scales.device),
        )
        return centred(mapped(phi, zeros, "lazy=False, chunk=1")[0], at(loss), loss, num)
    flat = theta if isinstance(theta, Tensor) else loss.layout.ravel(theta, dirs[0].scales.dtype)
    terms = mapped(
        lambda row: restrict(per, flat, row)(0.0), stack(dirs[:many]) if rows is None else rows[:many], "chunk=1"
    )
    return centred(terms[0], at(loss), loss, num)


def centred(terms: Tensor, again: Tensor, loss: Loss, num: int) -> tuple[float, Tensor, Tensor]:
    """The same from sums and weights per sequence, and the loss evaluated once more."""
    scored = terms[1].nonzero()[:, 0]
    value, centre = residuals(terms, scored, num_groups(len(scored), num))
    check_baseline(float(value), float(again), loss.net.unit_roundoff)
    return float(value), centre, scored


def check_baseline(value: float, again: float, unit_roundoff: float) -> None:
    """The loss at theta, evaluated twice, is finite and a function of theta."""
    if not math.isfinite(value):
        raise ValueError(
            f"the loss at theta is {value}: nothing around it can be measured. Check the weights and the batch "
            "(an attention mask of zeros, an overflow in half precision)."
        )
    if abs(again - value) > max(1e-5, unit_roundoff) * abs(value):  # bfloat16 kernels may sum in another order
        raise ValueError(
            f"the loss at theta is {value:.8g} at one call and {again:.8g} at the next: the model's forward pass changes "
            "something (a buffer, a cache, dynamic position embeddings) or draws random numbers, and is no function of theta."
        )
