"""What rounding makes of a step and of a loss: how far the parameters really move, how far the loss is off."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..core.directions import Direction, dot, norm
from ..core.layout import Layout, Params
from ..core.objective import Loss
from ..core.pack import storable

HALF = (torch.bfloat16, torch.float16)
FAR = 2.0**10
"""Steps of more units in the last place of ||theta|| than that move all but the odd weight: they are not looked at."""
ROUNDINGS = 4.0
"""Relative roundings in the difference of two losses: those of both, and of a forward pass that rounds at every layer."""


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
    for dtype, at, values in _parts(layout, base, direction):
        intended = values * step
        before = at.to(dtype).to(intended.dtype)
        plus, minus = ((at + sign * intended).to(dtype).to(intended.dtype) - before for sign in (1, -1))
        sums = (dot(x, x) for x in (plus, intended, plus - intended, plus + minus))
        moved, wished, error, asymmetry = (a + b for a, b in zip((moved, wished, error, asymmetry), sums, strict=True))
    if wished == 0:
        return None
    roots = (math.sqrt(moved), math.sqrt(error / wished), math.sqrt(asymmetry / wished))
    return Realised(*roots, unmoved=_unmoved(layout, base, direction, step), loss_error=loss_error)


def unmoved(layout: Layout, base: Params, direction: Direction, step: float) -> float:
    """Share of the parameters that do not move at all at `step` along `direction`, though asked to; 0 for steps far above.

    >>> from funcscope.core import directions, keys, model
    >>> net = model.functional(torch.nn.Linear(64, 64, bias=False))
    >>> d, = directions.directions(net, key=keys.key(0), num=1)
    >>> unmoved(net.layout, net.params, d, 1e-30), unmoved(net.layout, net.params, d, 0.1)
    (1.0, 0.0)
    """
    coarsest = max(torch.finfo(leaf.dtype).eps for leaf in layout.leaves)
    is_far = abs(step) * direction.norm > FAR * coarsest * norm(base)
    return 0.0 if is_far else _unmoved(layout, base, direction, step)


def _unmoved(layout: Layout, base: Params, direction: Direction, step: float) -> float:
    still = num = 0
    for dtype, at, values in _parts(layout, base, direction):
        moving = values != 0
        still += int((((at + step * values).to(dtype) == at.to(dtype)) & moving).sum())
        num += int(moving.sum())
    return still / num if num else 0.0


def _parts(layout: Layout, base: Params, direction: Direction) -> Iterator[tuple[torch.dtype, Tensor, Tensor]]:
    """The dtype of some parameters, where they are, and their direction."""
    for leaf in layout.leaves:
        for rows, values in direction.parts(leaf.name):
            yield leaf.dtype, base[leaf.name][rows] if leaf.shape else base[leaf.name], values


def loss_rounding(level: float, unit_roundoff: float, num: int, realised: Realised | None = None) -> float:
    r"""By how much rounding alone may move a difference of two means over `num` sequences: $4 u |L| / \sqrt n$.

    Sequences are rounded apart from each other and summed in float64. In half precision it is what was measured; 0 where
    nothing was.
    """
    if realised is None:
        return ROUNDINGS * unit_roundoff * abs(level) / max(num, 1) ** 0.5
    return 2 * realised.loss_error if math.isfinite(realised.loss_error) else 0.0


def loss_error(loss: Loss, base: Params) -> float:
    r"""The larger of $|\bar\delta|$ and rms(delta) / sqrt(n) over scored tokens, delta the rounding error of a token's loss.

    The first is the error of the loss itself, which may be small by chance; the second what independent errors of that
    size leave of it.
    """
    wide = loss.net.in_dtype(torch.float32)
    sums = torch.zeros(3, dtype=torch.float64)

    def at(name: str, _: Tensor) -> Tensor:
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


def warn_if_swallowed(rounded: Realised | None, span: float, relative_step: float) -> None:
    """Steps below 0.01 of ||theta|| are lost in half precision: by how much, and what to do."""
    if rounded is None or relative_step >= 0.01:
        return
    warnings.warn(
        f"span {span:g} in half precision: {rounded.unmoved:.0%} of the weights do not move at all, and the realised step "
        f"differs from the intended one by {rounded.error:.0%} of its length. Use a larger span, "
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
    return tree_map_only(Tensor, lambda x: x.float() if x.dtype in HALF else x, inputs)
