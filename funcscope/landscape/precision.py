"""What half precision makes of a step and of a loss: how far the parameters really move, how far the loss is off."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from ..core.directions import Direction, dot
from ..core.layout import Layout, Params
from ..core.objective import Loss
from ..core.pack import storable

HALF = (torch.bfloat16, torch.float16)


@storable
class Realised(NamedTuple):
    """The steps +h d and -h d after rounding to the dtypes of the parameters; measured on one direction."""

    displacement: float
    r"""$\|[\theta + h d] - \theta\|$, where [.] rounds."""
    error: float
    r"""$\|[\theta + h d] - \theta - h d\| / \|h d\|$."""
    asymmetry: float
    r"""$\|[\theta + h d] + [\theta - h d] - 2 \theta\| / \|h d\|$: 0 where the two steps are opposite."""
    unmoved: float
    """Share that does not move at all, of the parameters that are asked to."""
    loss_error: float
    """How far rounding inside the model moves the loss at theta, against the same weights in float32; nan: not measured."""


def realised(
    layout: Layout, base: Params, direction: Direction, step: float, loss_error: float = math.nan
) -> Realised | None:
    """How the parameters move when they are asked to move by `step` along `direction`; None in full precision.

    >>> from funcscope.core import directions, keys, model
    >>> net = model.functional(torch.nn.Linear(64, 64, bias=False).to(torch.bfloat16))
    >>> d, = directions.directions(net, key=keys.key(0), num=1)
    >>> realised(net.layout, net.params, d, 0.1).error < 0.05 < realised(net.layout, net.params, d, 1e-4).error
    True
    """
    if not is_half(layout):
        return None
    moved = wished = error = asymmetry = 0.0
    still = asked_to = 0
    for leaf in layout.leaves:
        for rows, values in direction.parts(leaf.name):
            asked = values * step
            at = base[leaf.name][rows] if leaf.shape else base[leaf.name]
            before = at.to(leaf.dtype).to(asked.dtype)
            plus, minus = ((at + sign * asked).to(leaf.dtype).to(asked.dtype) - before for sign in (1, -1))
            moved += dot(plus, plus)
            wished += dot(asked, asked)
            error += dot(plus - asked, plus - asked)
            asymmetry += dot(plus + minus, plus + minus)
            still += int(((plus == 0) & (asked != 0)).sum())
            asked_to += int((asked != 0).sum())
    if wished == 0:
        return None
    roots = (math.sqrt(moved), math.sqrt(error / wished), math.sqrt(asymmetry / wished))
    return Realised(*roots, unmoved=still / asked_to, loss_error=loss_error)


def loss_error(loss: Loss, base: Params) -> float:
    r"""The larger of $|\bar\delta|$ and rms(delta) / sqrt(n) over scored tokens, delta the rounding error of a token's loss.

    The first is the error of the loss itself, which may be small by chance; the second what independent errors of that
    size leave of it.
    """
    wide = loss.net.in_dtype(torch.float32)
    sums = torch.zeros(3, dtype=torch.float64)

    def at(name: str, _: torch.Tensor) -> torch.Tensor:
        return base[name].to(loss.layout.by_name[name].dtype)

    for inputs, targets in loss.batches:
        half, weight = loss.criterion.token_loss(loss.net.apply_leaves(at, inputs), targets)
        full, _ = loss.criterion.token_loss(wide.apply_leaves(at, _widened(inputs)), targets)
        delta = torch.where(weight != 0, (half.float() - full.float()) * weight, 0.0).cpu().double()
        sums += torch.stack([delta.sum(), delta.square().sum(), weight.cpu().double().sum()])
    total, squares, weights = sums.tolist()
    return max(abs(total), math.sqrt(squares)) / weights


def is_half(layout: Layout) -> bool:
    return any(leaf.dtype in HALF for leaf in layout.leaves)


def warn_if_swallowed(found: Realised | None, span: float, relative_step: float) -> None:
    """Steps below 0.01 of ||theta|| are lost in half precision: by how much, and what to do."""
    if found is None or relative_step >= 0.01:
        return
    warnings.warn(
        f"span {span:g} in half precision: {found.unmoved:.0%} of the weights do not move at all, and the realised step "
        f"differs from the intended one by {found.error:.0%} of its length. Use a larger span, "
        "`dtype=torch.float32` in `functional`, or `compute_gradient` and `curvature='exact'`, which take no step.",
        stacklevel=4,
    )


def warn_of_small_steps(loss: Loss, step: float, param_norm: float) -> None:
    """Points of a grid that are nearer to each other than half precision tells apart."""
    if is_half(loss.layout) and param_norm and step < 0.01 * param_norm:
        warnings.warn(
            f"points {step / param_norm:.1e} of ||theta|| apart in half precision: rounding of the weights is part of the "
            "differences between their losses, roughness is mostly that. Use fewer points, a larger span, or "
            "`dtype=torch.float32` in `functional`.",
            stacklevel=4,
        )


def _widened(inputs: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda x: x.float() if x.dtype in HALF else x, inputs)


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
