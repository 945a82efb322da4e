"""Activation functions whose first two derivatives are kept: what a kept Hessian graph would make anew in every product.

torch differentiates the backward of GELU and SiLU by a dozen operations on arrays of the size of the activations. Here both
derivatives are made once, with the graph, and a product takes three multiplications and torch's own pullback.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import _C, Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Pointwise(NamedTuple):
    """A function of one number."""

    value: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor, Tensor], Tensor]
    """g, x -> g f'(x) by torch's own kernel, one pass over memory."""
    derivatives: Callable[[Tensor], tuple[Tensor, Tensor]]
    """x -> f'(x), f''(x)."""


class KeptActivations(TorchFunctionMode):
    """While a graph is made for reverse mode, twice: no forward mode, and no third derivative."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = _KNOWN.get(func)
        pointwise = known(*args[1:], **{k: v for k, v in kwargs.items() if k != "input"}) if known else None
        if pointwise is None:
            return func(*args, **kwargs)
        return _Value.apply(pointwise, args[0] if args else kwargs["input"])


class _Value(Function):
    """x -> f(x)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(at: Pointwise, x: Tensor) -> Tensor:
        return at.value(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, _: Tensor) -> None:
        ctx.at, x = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:
        upstream, x = (_C._functorch.unwrap_if_dead(each) for each in (upstream, *ctx.saved_tensors))
        if torch.is_grad_enabled() and (upstream.requires_grad or x.requires_grad):
            return None, _Slope.apply(ctx.at, upstream, x)[0]
        return None, ctx.at.pull(upstream, x)  # in a product, which comes through here once more


class _Slope(Function):
    """g, x -> g f'(x); and f'(x), f''(x), which its own backward takes up again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(at: Pointwise, upstream: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second = at.derivatives(x)
        return upstream * first, first, second

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[1], *output[1:])

    @staticmethod
    def backward(ctx: Any, v: Tensor, *_: Tensor) -> tuple[None, Tensor, Tensor]:
        upstream, first, second = ctx.saved_tensors
        return None, v * first, v * upstream * second


def _gelu(approximate: str = "none") -> Pointwise:
    derivatives = _gelu_derivatives if approximate == "none" else _gelu_tanh_derivatives
    pull = partial(torch.ops.aten.gelu_backward, approximate=approximate)
    return Pointwise(partial(F.gelu, approximate=approximate), pull, derivatives)


def _gelu_derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    """x Phi(x): Phi + x phi, and (2 - x^2) phi."""
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(x) + x * density, (2 - x * x) * density


def _gelu_tanh_derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (1 + tanh u) / 2 with u = a (x + c x^3)."""
    a, c = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    t = torch.tanh(a * x * (1 + c * square))
    du, bend = a * (1 + 3 * c * square), 1 - t * t  # bend = dt/du
    first = 0.5 * (1 + t) + 0.5 * x * bend * du
    second = bend * (du + 0.5 * x * (6 * a * c * x) - x * t * du * du)
    return first, second


def _silu(inplace: bool = False) -> Pointwise | None:
    return None if inplace else Pointwise(F.silu, torch.ops.aten.silu_backward, _silu_derivatives)


def _silu_derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    """x s(x) with the logistic s: s (1 + x (1 - s)), and s (1 - s) (2 + x (1 - 2 s))."""
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s)), s * (1 - s) * (2 + x * (1 - 2 * s))


_KNOWN: dict[Callable, Callable[..., Pointwise | None]] = {F.gelu: _gelu, F.silu: _silu}
