"""What is evaluated along each direction, by the plan that was chosen: mapped in chunks, one at a time, or lazily."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_map

from ..core.directions import Direction, Part, dot, stack
from ..core.estimate import wide
from ..core.layout import Params
from ..core.memory import hand_back
from ..core.objective import Loss, Theta
from ..core.restrict import Phi, restrict
from .samples import Plan

GRADIENT_UP_TO = 2**28
"""Larger models that are perturbed leaf by leaf get their slopes by `jvp`: a gradient is a second set of weights."""


class Wanted(NamedTuple):
    """What is evaluated along each direction."""

    step: float
    two_sided: bool
    slope: Literal["gradient", "jvp"] | None
    exact_curvature: bool


def sampled(
    loss: Loss, theta: Theta, dirs: tuple[Direction, ...], wanted: Wanted, plan: Plan
) -> Iterator[dict[str, Tensor]]:
    """Losses, slopes and curvatures, one dict of columns per chunk of directions."""
    if plan.lazy:
        params = loss.leaves(theta)
        gradient = grad(loss)(_computed(loss, params)) if wanted.slope == "gradient" else None
        for direction in dirs:
            if loss.layout.num > GRADIENT_UP_TO:  # what is handed back costs time to get again
                hand_back()
            yield _lazy(loss, params, direction, wanted, gradient)
        return
    flat = theta if isinstance(theta, Tensor) else loss.layout.ravel(theta, dirs[0].scales.dtype)
    slope = grad(loss)(flat).to(wide(flat.device)) if wanted.slope == "gradient" else None
    for first in range(0, len(dirs), plan.chunk):
        rows = stack(dirs[first : first + plan.chunk])
        if plan.chunk > 1:
            out = mapped(lambda row: _along(loss, flat, row, wanted), rows, "chunk=1")
        else:
            out = _along_one(loss, flat, rows[0], wanted)
        if slope is not None:
            out["slopes"] = rows.to(wide(rows.device)) @ slope
        yield out


def _computed(loss: Loss, params: Params) -> dict[str, Tensor]:
    """The parameters in the dtypes that the model computes in: a gradient has the dtype of what it is taken for."""
    return {name: value.to(loss.layout.by_name[name].dtype) for name, value in params.items()}


_NO_RULE = ("Batching rule not implemented", "vmap: we do not yet support", "does not have vmap support")


def mapped(function: Callable[[Tensor], Any], over: Tensor, remedy: str) -> Any:
    """`vmap`; a loop where torch has no batching rule; and what to do instead where a model refuses it otherwise."""
    try:
        return vmap(function)(over)
    except NotImplementedError:  # a derivative that torch does not have: no matter of the plan
        raise
    except RuntimeError as err:
        if any(words in str(err) for words in _NO_RULE):
            warnings.warn(
                f"one at a time, as this model cannot be mapped ({str(err).splitlines()[0][:120]})", stacklevel=2
            )
            return tree_map(lambda *parts: torch.stack(parts), *[function(row) for row in over])
        err.add_note(f"If this model cannot be mapped over its parameters, pass `{remedy}`: a plain loop.")
        raise


def _along(loss: Loss, theta: Tensor, row: Tensor, wanted: Wanted) -> dict[str, Tensor]:
    """Everything that is wanted along one dense direction, as derivatives of phi; mapped over directions."""
    phi = restrict(loss, theta, row)
    out = {"losses": phi(wanted.step)}
    if wanted.two_sided:
        out["losses_negative"] = phi(-wanted.step)
    return out | _derivatives(phi, theta.new_zeros(()), wanted)


def _along_one(loss: Loss, theta: Tensor, row: Tensor, wanted: Wanted) -> dict[str, Tensor]:
    return {name: value[None] for name, value in _along(loss, theta, row, wanted).items()}


def _derivatives(phi: Phi, zero: Tensor, wanted: Wanted) -> dict[str, Tensor]:
    one = torch.ones_like(zero)

    def rate(a: Tensor) -> Tensor:
        return jvp(phi, (a,), (one,))[1]

    if wanted.exact_curvature:
        with torch.enable_grad():  # without grad mode, torch takes formulas that have no derivative themselves (SiLU)
            slope, curvature = jvp(rate, (zero,), (one,))
        return {"curvatures": curvature} | ({"slopes": slope} if wanted.slope == "jvp" else {})
    return {"slopes": rate(zero)} if wanted.slope == "jvp" else {}


def _lazy(
    loss: Loss, params: Params, direction: Direction, wanted: Wanted, gradient: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """Everything that is wanted along one direction that is made leaf by leaf."""
    tapped = _Tapped(direction, gradient or {})
    phi = restrict(loss, params, tapped, lazy=True)
    zero = torch.zeros((), dtype=direction.scales.dtype, device=direction.scales.device)
    if wanted.two_sided and loss.net.attention != "keep":  # one draw serves both signs
        signs = zero.new_tensor([wanted.step, -wanted.step])
        positive, negative = mapped(phi, signs, "lazy=False, chunk=1")
        out = {"losses": positive, "losses_negative": negative}
    else:
        out = {"losses": phi(wanted.step)} | ({"losses_negative": phi(-wanted.step)} if wanted.two_sided else {})
    if gradient is not None:
        out["slopes"] = torch.tensor(tapped.slope, dtype=torch.float64)
    out |= _derivatives(restrict(loss, params, direction, lazy=True), zero, wanted)
    return {name: value[None] for name, value in out.items()}


class _Tapped:
    """A direction whose dot product with the gradient is summed while its leaves are used: no draw of its own."""

    def __init__(self, direction: Direction, gradient: Mapping[str, Tensor]):
        self.direction, self.gradient = direction, dict(gradient)
        self.slope = 0.0

    def parts(self, name: str) -> Iterator[Part]:
        gradient = self.gradient.pop(name, None)  # once, also where a leaf is used by several batches
        for rows, values in self.direction.parts(name):
            if gradient is not None:
                self.slope += dot(values, (gradient[rows] if gradient.ndim else gradient).to(values))
            yield Part(rows, values)
