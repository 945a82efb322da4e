"""One product of a Hessian against differences of the loss: the check that runs before an operator is used."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import suppress

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jvp, vjp
from torch.overrides import TorchFunctionMode

from ..core.criterion import Criterion
from ..core.directions import dot
from ..core.keys import fold_in, key
from ..core.model import Functional
from ..core.objective import Loss
from ..linalg.matvec import Matvec
from .differences import Derivative, central, differenced, moved_leaves, values_of
from .pullbacks import ONE_AT_A_TIME

STEP, DIFFERENT = 0.05, 0.05
"""Of the direction; and relative, below which two curvatures are not called different, whatever their errors."""

_passed: weakref.WeakKeyDictionary[Functional, list[tuple[Criterion, str]]] = weakref.WeakKeyDictionary()


def check_product(loss: Loss, theta: Float[Tensor, " p"], matvec: Matvec, way: str) -> None:
    r"""Raises ValueError where $d^\top H d$ by `matvec` contradicts the second difference of values along a random d.

    One product and three forward passes where both agree. Where they do not, the values are taken again in float64 with
    eleven steps, so that the difference has an error; the product is refused only beyond ten of those errors and 5 %. What
    cannot be decided passes: half precision, kinks within the smallest step, a curvature below rounding. A model with
    functions that have kinks is refused only if another way of differentiation contradicts the product, too. Once per net,
    criterion and way.

    way: "keep=True" or "keep=False".
    """
    passed = _passed.setdefault(loss.net, [])
    if any(criterion is loss.criterion and other == way for criterion, other in passed):
        return
    if loss.net.unit_roundoff < 1e-4:
        d = moved_leaves(loss, theta, fold_in(key(0), "check of a product"))
        with torch.no_grad():
            Hd = matvec(d)
        form, rounding = dot(d, Hd), 64 * torch.finfo(theta.dtype).eps * math.sqrt(dot(d, d) * dot(Hd, Hd))
        if not _agree_at_once(loss, theta, d, form, rounding):
            _decide(loss, theta, d, form, rounding, way)
    passed.append((loss.criterion, way))


def contradicts(form: float, judge: Derivative, rounding: float) -> bool:
    """Is a value beyond doubt another one than that of differences? Not where their own error is not small."""
    size = max(abs(form), abs(judge.value))
    resolved = judge.error <= DIFFERENT / 5 * size
    return resolved and abs(form - judge.value) > max(10 * judge.error, DIFFERENT * size, rounding)


def _agree_at_once(loss: Loss, theta: Tensor, d: Tensor, form: float, rounding: float) -> bool:
    def at(a: float) -> float:
        with torch.no_grad(), ONE_AT_A_TIME:
            return float(loss(theta + a * d))

    difference, level = central(at, STEP)
    noise = 32 * loss.net.unit_roundoff * level / STEP**2
    allowed = DIFFERENT * max(abs(form), abs(difference)) + noise + rounding
    return not abs(form - difference) > allowed  # nan: others say what is not finite


def _decide(loss: Loss, theta: Tensor, d: Tensor, form: float, rounding: float, way: str) -> None:
    kinks = has_kinks(loss, theta)
    judge = differenced(values_of(loss), theta, d, kinks)[1]
    if not contradicts(form, judge, rounding):
        return
    other = "keep=False" if way == "keep=True" else "keep=True"
    second = math.nan
    with suppress(NotImplementedError, RuntimeError):  # a way that torch does not have
        second = second_form(loss, theta, d, other)
    if kinks and abs(second - form) <= DIFFERENT * abs(form) + rounding:
        return
    right = not math.isnan(second) and not contradicts(second, judge, rounding)
    raise ValueError(
        f"`hessian({way})` is wrong for this model: along a random direction the curvature is {form:.6g} by its product and "
        f"{judge.value:.6g} ± {judge.error:.1g} by differences of the loss; a kernel or an `autograd.Function` has a wrong "
        f"second derivative. Take {f'`hessian({other})`, which agrees' if right else '`hessian_difference`'}; "
        "`funcscope.audit` names the operation."
    )


def second_form(loss: Loss, theta: Tensor, d: Tensor, way: str) -> float:
    """d'Hd by plain transforms of the loss: "keep=True" by `vjp` of `grad`, "keep=False" by `jvp` of `grad`."""
    with torch.enable_grad(), ONE_AT_A_TIME:
        if way == "keep=True":
            return dot(d, vjp(grad(loss), theta)[1](d)[0])
        return dot(d, jvp(grad(loss), (theta,), (d,))[1])


def has_kinks(loss: Loss, theta: Tensor) -> bool:
    """Does a forward pass call a function that is smooth in pieces only?"""
    with torch.no_grad(), ONE_AT_A_TIME, _Called() as called:
        loss(theta)
    return any(name.strip("_") in KINKED for name in called.names)


class _Called(TorchFunctionMode):
    """The names of the functions of torch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


KINKED = frozenset(
    {
        "abs", "adaptive_max_pool1d", "adaptive_max_pool2d", "amax", "amin", "aminmax", "argmax", "argmin", "argsort",
        "ceil", "clamp", "clamp_max", "clamp_min", "clip", "cummax", "cummin", "floor", "frac", "ge", "gt",
        "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "huber_loss", "kthvalue", "l1_loss", "le", "leaky_relu",
        "lt", "max", "max_pool1d", "max_pool2d", "max_pool3d", "maximum", "median", "min", "minimum", "mode",
        "multi_margin_loss", "nonzero", "one_hot", "prelu", "quantile", "relu", "relu6", "round", "searchsorted", "sgn",
        "sign", "smooth_l1_loss", "softshrink", "sort", "threshold", "topk", "trunc",
    }
)  # fmt: skip
"""Functions with a kink or a jump, or that choose one."""
