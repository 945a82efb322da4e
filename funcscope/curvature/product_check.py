"""The first product of a Hessian, held against differences of the loss before it is handed on."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import suppress

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.criterion import Criterion
from ..core.keys import fold_in, key
from ..core.model import Functional
from ..core.objective import Loss
from ..core.vectors import dot
from ..linalg.matvec import Matvec
from .derivatives import METHODS, differenced, has_kinks, moved_leaves, values_of
from .outputs import normalised, outputs_of
from .pullbacks import ONE_AT_A_TIME

STEP, DIFFERENT = 0.05, 0.05
"""Of the direction; and relative, below which two curvatures are not called different, whatever their errors."""

_passed: weakref.WeakKeyDictionary[Functional, list[tuple[Criterion, str]]] = weakref.WeakKeyDictionary()


def checked_product(loss: Loss, theta: Float[Tensor, " p"], make: Callable[[], Matvec], way: str) -> Matvec:
    r"""The product that is made.

    Raises ValueError where $d^\top H d$ by it contradicts the second difference of values along a random d.

    One product and three forward passes where both agree. Where they do not, the values are taken again in float64 with
    eleven steps, so that the difference has an error; the product is refused only beyond ten of those errors and 5 %. What
    cannot be decided passes: half precision, kinks within the smallest step, a curvature below rounding. A model with
    functions that have kinks is refused only if another way of differentiation contradicts the product, too. Once per net,
    criterion and way. What the product keeps is given up where values are taken again, and made again afterwards.

    way: "keep=True" or "keep=False".
    """
    passed = _passed.setdefault(loss.net, [])
    if any(criterion is loss.criterion and other == way for criterion, other in passed):
        return make()
    matvec = make()
    if loss.net.unit_roundoff < 1e-4:
        d = moved_leaves(loss, theta, fold_in(key(0), "check of a product"))
        with torch.no_grad():
            Hd = matvec(d)
        form, rounding = dot(d, Hd), 64 * torch.finfo(theta.dtype).eps * math.sqrt(dot(d, d) * dot(Hd, Hd))
        del Hd  # what has the length of theta is most of what this takes
        if not _agree_at_once(loss, theta, d, form, rounding):
            del matvec  # its graphs: the other way of differentiation makes its own
            _decide(loss, theta, d, form, rounding, way)
            matvec = make()
    passed.append((loss.criterion, way))
    return matvec


def _agree_at_once(loss: Loss, theta: Tensor, d: Tensor, form: float, rounding: float) -> bool:
    with torch.no_grad(), ONE_AT_A_TIME:
        plus, middle, minus = (float(loss(torch.add(theta, d, alpha=a))) for a in (STEP, 0.0, -STEP))
    difference = (plus - 2 * middle + minus) / STEP**2
    noise = 32 * loss.net.unit_roundoff * max(map(abs, (plus, middle, minus))) / STEP**2
    allowed = DIFFERENT * max(abs(form), abs(difference)) + noise + rounding
    return not abs(form - difference) > allowed  # nan: others say what is not finite


def _decide(loss: Loss, theta: Tensor, d: Tensor, form: float, rounding: float, way: str) -> None:
    kinks = has_kinks(loss, theta)
    values = values_of(loss)
    with torch.no_grad(), ONE_AT_A_TIME:  # of a confident classifier, all is rounding of numbers like its outputs
        outputs = float(loss.net.apply(loss.params(theta), loss.batches[0][0]).abs().max())
    rounding += 32 * outputs * (loss.net.unit_roundoff + torch.finfo(values.dtype).eps / STEP**2)
    judge = differenced(values, theta, d, kinks)[1]
    if not judge.contradicts(form, DIFFERENT, rounding):
        return
    other, product = ("keep=False", "jvp of grad") if way == "keep=True" else ("keep=True", "vjp of grad")
    second = math.nan
    with suppress(NotImplementedError, RuntimeError), torch.enable_grad(), ONE_AT_A_TIME:  # torch may not have it
        weighted, scale = normalised(loss, theta)  # a batch at a time
        second = scale * sum(dot(d, METHODS[product].of(each.sum, theta)(d)) for each in outputs_of(weighted))
    if kinks and abs(second - form) <= DIFFERENT * abs(form) + rounding:
        return
    right = not math.isnan(second) and not judge.contradicts(second, DIFFERENT, rounding)
    raise ValueError(
        f"`hessian({way})` is wrong for this model: along a random direction the curvature is {form:.6g} by its product and "
        f"{judge.value:.6g} ± {judge.error:.1g} by differences of the loss; a kernel or an `autograd.Function` has a wrong "
        f"second derivative. Take {f'`hessian({other})`, which agrees' if right else '`hessian_difference`'}; "
        "`funcscope.audit` names the operation."
    )
