"""Whether a step is resolved: the weights move in their dtype, and the loss by more than it is rounded."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..core.directions import Direction, norm
from ..core.estimate import Crossed, Estimate
from ..core.layout import Layout, Params
from .precision import Realised

MOST_UNMOVED = 0.5
"""Share of the weights that may stay where they are in a step that is resolved."""
UNMOVED_TOLD = 0.01
FAR = 2.0**10
"""Steps of more units in the last place of ||theta|| than that move all but the odd weight: they are not looked at."""
ROUNDINGS = 4.0
"""Relative roundings in the difference of two losses: those of both, and of a forward pass that rounds at every layer."""


def unmoved(layout: Layout, base: Params, direction: Direction, step: float) -> float:
    """Share of the parameters that do not move at all at `step` along `direction`, though asked to; 0 for steps far above.

    >>> from funcscope.core import directions, keys, model
    >>> net = model.functional(torch.nn.Linear(64, 64, bias=False))
    >>> d, = directions.directions(net, key=keys.key(0), num=1)
    >>> unmoved(net.layout, net.params, d, 1e-12), unmoved(net.layout, net.params, d, 0.1)
    (1.0, 0.0)
    """
    coarsest = max(torch.finfo(leaf.dtype).eps for leaf in layout.leaves)
    if abs(step) * direction.norm > FAR * coarsest * norm(base):
        return 0.0
    still = asked_to = 0
    for leaf in layout.leaves:
        for rows, values in direction.parts(leaf.name):
            at = base[leaf.name][rows] if leaf.shape else base[leaf.name]
            asked = values != 0
            still += int((((at + step * values).to(leaf.dtype) == at.to(leaf.dtype)) & asked).sum())
            asked_to += int(asked.sum())
    return still / asked_to if asked_to else 0.0


def loss_rounding(level: float, unit_roundoff: float, num: int, realised: Realised | None = None) -> float:
    r"""By how much rounding alone may move a difference of two means over `num` sequences: $4 u |L| / \sqrt n$.

    Sequences are rounded apart from each other and summed in float64. In half precision it is what was measured; 0 where
    nothing was.
    """
    if realised is None:
        return ROUNDINGS * unit_roundoff * abs(level) / max(num, 1) ** 0.5
    return 2 * realised.loss_error if math.isfinite(realised.loss_error) else 0.0


def unresolved_step(share: float, change: Estimate, rounding: float) -> str | None:
    """Why the change of the loss at a step is not resolved, with what to do; None where it is."""
    remedy = "take a larger step, or compute in float64 (`functional(model, dtype=torch.float64)`)"
    if share > MOST_UNMOVED:
        return f"the step is not resolved: {share:.0%} of the weights do not move at all in their dtype; {remedy}."
    value, error = abs(float(change.value)), float(change.stderr)
    if not value <= rounding or error > rounding:
        return None
    return (
        f"the change of the loss is not resolved: a mean of {float(change.value):.2g} is no more than rounding of the loss "
        f"in its dtype ({rounding:.1g}) makes; {remedy}."
    )


def partly_moved(share: float) -> str | None:
    """That some of the weights stay where they are, in a step that is resolved."""
    if not UNMOVED_TOLD < share <= MOST_UNMOVED:
        return None
    return f"{share:.0%} of the weights do not move at all at this step, which is below the resolution of their dtype."


def without_error(estimate: Estimate) -> Estimate:
    """The value alone: its errors are nan."""
    nan = torch.full_like(estimate.stderr, math.nan)
    if not isinstance(estimate, Crossed):
        return replace(estimate, stderr=nan)
    return replace(estimate, stderr=nan, stderr_data=nan, stderr_total=nan)
