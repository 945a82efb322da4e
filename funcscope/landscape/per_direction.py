"""What is evaluated along each direction, by the plan that was chosen: mapped in chunks, one at a time, or lazily."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp

from ..core.directions import Direction, dot, stack
from ..core.estimate import wide
from ..core.layout import Params
from ..core.leaf_rows import Part
from ..core.memory import hand_back
from ..core.objective import Loss, Theta
from ..core.restrict import Phi, restrict
from ..curvature.hessian import hessian
from ..linalg.matvec import Matvec
from .directional_result import Plan
from .evaluator import GRADIENT_UP_TO, mapped, of_rows
from .residuals import residuals
from .terms import PerSequence
from .truncation import STEPS

AGREEMENT = 1e-2
"""Second derivatives of single sequences are used where they add up to the product's, to this share of their size."""


class Request(NamedTuple):
    """What is evaluated along each direction."""

    step: float
    two_sided: bool
    slope: Literal["gradient", "jvp"] | None
    curvature: Literal["product", "jvp"] | None
    """Of an exact one: d'Hd by a product with the Hessian, or `jvp` of `jvp`."""
    refined: int
    """The first so many directions are evaluated at shorter steps, or differentiated sequence by sequence."""
    scored: Tensor
    """Places of the sequences that score something."""
    groups: int
    """Of sequences, of which residuals are summed."""


def sampled(
    loss: Loss, theta: Theta, dirs: tuple[Direction, ...], request: Request, plan: Plan, first: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Losses, residuals, slopes and curvatures of direction `first` and on, one dict of columns per chunk of directions."""
    product = hessian(loss, theta) if request.curvature == "product" else None
    if plan.lazy:
        params = loss.leaves(theta)
        gradient = grad(loss)(_computed(loss, params)) if request.slope == "gradient" else None
        for number, direction in enumerate(dirs[first:], start=first):
            if loss.layout.num > GRADIENT_UP_TO:  # what is handed back costs time to get again
                hand_back()
            out = _lazy(loss, params, direction, request, gradient, refined=number < request.refined)
            if product is not None:
                phis = (
                    [restrict(PerSequence.of(loss), params, direction, lazy=True)] if number < request.refined else []
                )
                out |= _forms(product, direction.dense()[None], phis, request)
            yield out
        return
    flat = theta if isinstance(theta, Tensor) else loss.layout.ravel(theta, dirs[0].scales.dtype)
    slope = grad(loss)(flat).to(wide(flat.device)) if request.slope == "gradient" else None
    for start in range(first, len(dirs), plan.chunk):
        rows = stack(dirs[start : start + plan.chunk])
        out = _settled(of_rows(lambda row: _along(loss, flat, row, request), rows, is_mapped=plan.chunk > 1), request)
        if slope is not None:
            out["slopes"] = rows.to(wide(rows.device)) @ slope
        few = rows[: max(0, request.refined - start)]
        if product is not None:
            out |= _forms(product, rows, [restrict(PerSequence.of(loss), flat, row) for row in few], request)
        elif request.refined:
            finer = (
                of_rows(lambda row: _finer(loss, flat, row, request), few, is_mapped=plan.chunk > 1)
                if len(few)
                else rows.new_empty((0, len(STEPS)))
            )
            out["finer"] = _padded(finer, len(rows))
        yield out


def _forms(product: Matvec, rows: Tensor, phis: Sequence[Phi], request: Request) -> dict[str, Tensor]:
    """d'Hd of every row; of the first few, what each group of sequences adds beside the mean."""
    forms = [dot(row, product(row).to(row)) for row in rows]
    zero = rows.new_zeros(())
    bent = [_bent(phi, zero, form, request) for phi, form in zip(phis, forms, strict=False)]
    known = torch.stack(bent) if bent else zero.new_empty((0, request.groups))
    return {"curvatures": torch.tensor(forms, dtype=torch.float64), "residuals_curvatures": _padded(known, len(rows))}


def _bent(phi: Phi, zero: Tensor, form: float, request: Request) -> Tensor:
    """Residuals of d'Hd by `jvp` of `jvp`; nan where there is none, or where its sum is not the product's."""
    one = torch.ones_like(zero)
    try:
        with torch.enable_grad():
            (terms, _), (_, second) = jvp(lambda a: jvp(phi, (a,), (one,)), (zero,), (one,))
    except NotImplementedError:  # a kernel without a forward derivative
        return zero.new_full((request.groups,), math.nan)
    value, beside = residuals(torch.stack([second[0], terms[1]]), request.scored, request.groups)
    scale = float((second[0] / terms[1].sum()).abs().sum())
    return beside if abs(float(value) - form) <= AGREEMENT * scale else torch.full_like(beside, math.nan)


def _settled(out: dict[str, Tensor], request: Request) -> dict[str, Tensor]:
    """Losses and residuals in the place of sums and weights per sequence."""
    for side in ("losses", "losses_negative"):
        if side in out:
            out[side], out[f"residuals_{side}"] = residuals(out[side], request.scored, request.groups)
    return out


def _finer(loss: Loss, theta: Tensor, row: Tensor, request: Request) -> Tensor:
    phi = restrict(loss, theta, row)
    return torch.stack([phi(share * request.step) for share in STEPS])


def _padded(few: Tensor, num: int) -> Tensor:
    """Rows of the first directions, nan for those that are not evaluated so."""
    return torch.cat([few, few.new_full((num - len(few), few.shape[1]), math.nan)])


def _computed(loss: Loss, params: Params) -> dict[str, Tensor]:
    """The parameters in the dtypes that the model computes in: a gradient has the dtype of what it is taken for."""
    return {name: value.to(loss.layout.by_name[name].dtype) for name, value in params.items()}


def _along(loss: Loss, theta: Tensor, row: Tensor, request: Request) -> dict[str, Tensor]:
    """Terms and derivatives of phi along one dense direction; mapped over directions."""
    phi = restrict(PerSequence.of(loss), theta, row)
    out = {"losses": phi(request.step)}
    if request.two_sided:
        out["losses_negative"] = phi(-request.step)
    return out | _derivatives(restrict(loss, theta, row), theta.new_zeros(()), request)


def _derivatives(phi: Phi, zero: Tensor, request: Request) -> dict[str, Tensor]:
    one = torch.ones_like(zero)

    def rate(a: Tensor) -> Tensor:
        return jvp(phi, (a,), (one,))[1]

    if request.curvature == "jvp":
        with torch.enable_grad():  # without grad mode, torch takes formulas that have no derivative themselves (SiLU)
            slope, curvature = jvp(rate, (zero,), (one,))
        return {"curvatures": curvature} | ({"slopes": slope} if request.slope == "jvp" else {})
    return {"slopes": rate(zero)} if request.slope == "jvp" else {}


def _lazy(
    loss: Loss,
    params: Params,
    direction: Direction,
    request: Request,
    gradient: dict[str, Tensor] | None,
    refined: bool,
) -> dict[str, Tensor]:
    """Everything that is asked for along one direction that is made leaf by leaf, but products."""
    tapped = _Tapped(direction, gradient or {})
    at, phi = restrict(PerSequence.of(loss), params, tapped, lazy=True), restrict(loss, params, direction, lazy=True)
    h, zero = request.step, torch.zeros((), dtype=direction.scales.dtype, device=direction.scales.device)
    if request.two_sided:
        positive, negative = _pair(at, h, zero, loss)
        out = {"losses": positive, "losses_negative": negative}
    else:
        out = {"losses": at(h)}
    if gradient is not None:
        out["slopes"] = torch.tensor(tapped.slope, dtype=torch.float64)
    out = _settled(out, request) | _derivatives(phi, zero, request)
    out = {name: value[None] for name, value in out.items()}
    if request.refined and request.curvature is None:
        finer = [x for share in STEPS[::2] for x in _pair(phi, share * h, zero, loss)] if refined else []
        out["finer"] = _padded(torch.stack(finer)[None] if finer else zero.new_empty((0, len(STEPS))), 1)
    return out


def _pair(phi: Phi, step: float, zero: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Values at both ends of a step; one draw serves both signs where the model can be mapped."""
    if loss.net.attention == "keep" or not loss.is_mapped():
        return phi(step), phi(-step)
    positive, negative = mapped(phi, zero.new_tensor([step, -step]), "lazy=False, chunk=1")
    return positive, negative


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
