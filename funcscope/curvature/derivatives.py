"""Derivatives of a function of one vector: by torch's transforms, by differences of values, and whether these agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import _C, Tensor
from torch.func import grad, jvp, vjp
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..core.keys import Key, normal
from ..core.objective import Loss
from ..core.skeleton import WithoutFloat32
from ..core.vectors import dot
from .pullbacks import ONE_AT_A_TIME

Scalar = Callable[[Tensor], Tensor]


class Method(NamedTuple):
    """One way to differentiate f at x: `of(f, x)(d)` is the derivative along d, or a vector whose product with d that is.

    Of order 1 that vector is the gradient, of order 2 H d, whose products with other vectors are derivatives, too.
    """

    order: int
    of: Callable[[Any, Tensor], Callable[[Tensor], Tensor]]


def along(derivative: Tensor, d: Tensor) -> float:
    """The number itself, or the product of the vector with d."""
    return dot(derivative, d) if derivative.ndim else float(derivative)


def _gradient(f: Scalar, x: Tensor) -> Callable[[Tensor], Tensor]:
    g = grad(f)(x)
    return lambda _: g


def _slope(f: Scalar, x: Tensor, d: Tensor) -> Scalar:
    """a -> the slope of f along d at x + a d, in forward mode."""
    return lambda a: jvp(lambda b: f(x + b * d), (a,), (x.new_ones(()),))[1]


def _nested(f: Scalar, x: Tensor, d: Tensor) -> Tensor:
    return jvp(_slope(f, x, d), (x.new_zeros(()),), (x.new_ones(()),))[1]


METHODS = {
    "gradient": Method(1, _gradient),
    "jvp": Method(1, lambda f, x: lambda d: jvp(f, (x,), (d,))[1]),
    "jvp of grad": Method(2, lambda f, x: lambda v: jvp(grad(f), (x,), (v,))[1]),
    "vjp of grad": Method(2, lambda f, x: lambda v: vjp(grad(f), x)[1](v)[0]),
    "jvp of jvp": Method(2, lambda f, x: lambda d: _nested(f, x, d)),
}
"""Of torch; those of the Hessian differentiate anew for each vector."""


FIRST_STEP, FIRST_STEP_WITH_KINKS, RATIO, NUM_STEPS = 0.3, 2e-3, 2.5, 16
_TINY = 1e-6


class Derivative(NamedTuple):
    """A value by differences, and how far two neighbouring extrapolations and rounding let it be off."""

    value: float
    error: float

    def contradicts(self, other: float, share: float, rounding: float = 0.0) -> bool:
        """Is another value beyond doubt a different one, by this share at least? Not where the error is not small."""
        size = max(abs(other), abs(self.value))
        resolved = self.error <= share / 5 * size
        return resolved and not abs(other - self.value) <= max(10 * self.error, share * size, rounding)


def along_line(values: Callable[[float], float], first_step: float = FIRST_STEP) -> tuple[Derivative, Derivative]:
    r"""The first and second derivative of a function of one number at 0, by extrapolated central differences.

    Steps $h_k = h_0 2.5^{-k}$, k < 16, two values each; a smaller first one crosses fewer kinks. Of Neville's table for
    $h^2 \to 0$, the entry is taken that differs least from its neighbours (Ridders), the noise of the values included: what
    three second differences over a millionth show, divided by $h^2$; and from what smaller steps show, beyond the errors of
    these: large steps may agree by chance where the function oscillates faster. A function with kinks, where the smallest
    steps cross one, has no entry that agrees with its neighbours: its error is large.

    Ridders (1982), doi:10.1016/S0141-1195(82)80057-0.

    >>> slope, curvature = along_line(lambda a: math.exp(2 * a))
    >>> abs(slope.value - 2) < 1e-9, abs(curvature.value - 4) < 1e-7, curvature.error < 1e-6
    (True, True, True)
    >>> along_line(lambda a: abs(a - 1e-9))[1].error > 1
    True
    >>> abs(along_line(lambda a: math.cos(3e4 * a))[1].value / 9e8 + 1) < 1e-3
    True
    """
    middle = values(0.0)
    steps = [first_step * RATIO**-k for k in range(NUM_STEPS)]
    pairs = [(values(h), values(-h)) for h in steps]
    noise = max(2**-51 * abs(middle), *(abs(values(k * _TINY) - 2 * middle + values(-k * _TINY)) for k in (1, 2, 3)))
    first = [(p - m) / (2 * h) for h, (p, m) in zip(steps, pairs, strict=True)]
    second = [(p - 2 * middle + m) / h**2 for h, (p, m) in zip(steps, pairs, strict=True)]
    return (
        _extrapolated(first, [noise / (2 * h) for h in steps]),
        _extrapolated(second, [noise / h**2 for h in steps]),
    )


def _extrapolated(row: list[float], rounding: list[float]) -> Derivative:
    each, before = [], [row[0]]
    for value, floor in zip(row[1:], rounding[1:], strict=True):
        entries, best = [value], Derivative(math.nan, math.inf)
        for j, old in enumerate(before, start=1):
            weight = RATIO ** (2 * j)
            entries.append((weight * entries[-1] - old) / (weight - 1))
            error = max(abs(entries[-1] - entries[-2]), abs(entries[-1] - old)) + floor
            if error < best.error:
                best = Derivative(entries[-1], error)
        each.append(best)
        before = entries
    return min((_widened(one, each[k + 1 :]) for k, one in enumerate(each)), key=lambda one: one.error)


def _widened(one: Derivative, smaller: list[Derivative]) -> Derivative:
    """The error grown to what smaller steps show beyond their own."""
    beyond = (abs(one.value - other.value) - other.error for other in smaller if math.isfinite(other.error))
    return Derivative(one.value, max([one.error, *beyond]))


@dataclass(frozen=True, eq=False)
class Values:
    """A loss as a judge sees it. Made by `values_of`."""

    loss: Loss
    mode: Callable[[], AbstractContextManager[Any]]

    @property
    def dtype(self) -> torch.dtype:
        """That of the model's parameters, in which the values are taken."""
        return self.loss.layout.dtype

    def __call__(self, theta: Tensor) -> float:
        with self.mode():
            return value_at(self.loss, theta)


def values_of(loss: Loss) -> Values:
    """In float64 throughout; but for the casts of the model, or in its own dtype, where a part does not take that."""
    wide = in_float64(loss)
    for values in (Values(wide, WithoutFloat32), Values(wide, nullcontext)):
        try:
            values(wide.net.theta)
            return values
        except RuntimeError as err:
            if "dtype" not in str(err) and "scalar type" not in str(err):
                raise
    return Values(loss, nullcontext)


def in_float64(loss: Loss) -> Loss:
    """The same function of the same weights, computed in float64."""
    if all(leaf.dtype == torch.float64 for leaf in loss.layout.leaves):
        return loss
    batches = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, loss.batches)
    return Loss(loss.net.in_dtype(torch.float64), batches, loss.criterion)


def value_at(loss: Loss, theta: Tensor) -> float:
    """The loss in its own dtype."""
    with torch.no_grad(), ONE_AT_A_TIME:
        return float(loss(theta.to(torch.promote_types(loss.layout.dtype, torch.float32))))


def moved_leaves(loss: Loss, theta: Float[Tensor, " p"], draw: Key) -> Float[Tensor, " p"]:
    """A random direction in which every leaf moves by its own size: a part of the model with few weights is seen, too."""
    typical = theta.norm() / len(theta) ** 0.5
    out = normal(draw, theta)
    for leaf in loss.layout.leaves:
        size = theta[leaf.slice].norm() / leaf.numel**0.5
        out[leaf.slice] *= torch.where(size > 0, size, torch.where(typical > 0, typical, 1.0))
    return out


def differenced(values: Values, theta: Tensor, direction: Tensor, kinks: bool) -> tuple[Derivative, Derivative]:
    """Slope and curvature of the loss along a direction at theta."""
    wide = torch.float64 if values.dtype == torch.float64 else theta.dtype
    base, step = theta.to(wide), direction.to(wide)
    return along_line(lambda a: values(base + a * step), FIRST_STEP_WITH_KINKS if kinks else FIRST_STEP)


class Calls(TorchFunctionMode):
    """The functions of torch that are called: their names, and outside of transforms their arguments where asked for."""

    def __init__(self, arguments: bool = False) -> None:
        super().__init__()
        self.arguments = arguments
        self.names: list[str] = []
        self.kinks = False  # is one of them, of real numbers, smooth in pieces only?
        self.calls: list[tuple[str, Callable, tuple, dict]] = []

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name == "custom_function_call":
            name = f"autograd.Function {args[0].__name__}"
        if name != "__get__":
            self.names.append(name)
            given = (x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor))
            self.kinks |= name.strip("_") in KINKED and any(x.is_floating_point() for x in given)
            if self.arguments and not _C._functorch.peek_interpreter_stack():
                self.calls.append((name, func, *tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


def has_kinks(loss: Loss, theta: Tensor) -> bool:
    """Does a forward pass call a function that is smooth in pieces only?"""
    with torch.no_grad(), ONE_AT_A_TIME, Calls() as called:
        loss(theta)
    return called.kinks


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
