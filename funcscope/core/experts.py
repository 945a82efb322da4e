"""Mixtures of experts in operations that have derivatives of every order and a batching rule, and their routing.

Of the kernels of transformers, the fast ones have no second derivative and the loop over the experts that are hit no
batching rule. Here every expert takes its own tokens, or, where a routing is mapped over, all of them at their weights,
zero for most: the same function, at the price of all experts. A routing is piecewise constant in the parameters, so that
derivatives are those within the routing at theta.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.nn import functional as F

from .imported import Model, register_experts

KERNEL = "funcscope_experts"

_CHOSEN: ContextVar[list[Tensor] | None] = ContextVar("chosen experts", default=None)


def use_experts(skeleton: Model) -> None:
    """The kernel of this file, where a model calls its experts by name."""
    if skeleton._can_set_experts_implementation():
        register_experts(KERNEL, _by_experts)
        skeleton.set_experts_implementation(KERNEL)


@contextmanager
def recorded_routing() -> Iterator[list[Tensor]]:
    """A list that gets the chosen experts, (tokens of all rows, k), of every layer that is called meanwhile."""
    chosen: list[Tensor] = []
    token = _CHOSEN.set(chosen)
    try:
        yield chosen
    finally:
        _CHOSEN.reset(token)


def _by_experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What transformers calls in the place of an experts' function of its own.

    hidden: (tokens, d). index, weights: (tokens, k), the experts of each token and their shares.
    """
    if (chosen := _CHOSEN.get()) is not None:
        chosen.append(index)
    mapped, out = _is_mapped(index), torch.zeros_like(hidden)
    for expert, part in enumerate(_experts_of(module)):
        hit = index == expert
        share = torch.where(hit, weights, 0).sum(-1, keepdim=True)
        if mapped:
            out = out + (_expert(module, hidden, part) * share).to(out.dtype)
            continue
        rows = hit.any(-1).nonzero()[:, 0]
        if len(rows):
            out = out.index_add(0, rows, (_expert(module, hidden[rows], part) * share[rows]).to(out.dtype))
    return out


def _experts_of(module: Any) -> Iterator[tuple[Tensor | None, ...]]:
    """Weight and bias of the first map and of the last, expert by expert; each parameter is taken once."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    names = (name for way in (first, "down_proj") for name in (way, f"{way}_bias" if module.has_bias else None))
    parts = (getattr(module, name).unbind(0) if name else [None] * module.num_experts for name in names)
    yield from zip(*parts, strict=True)


def _expert(module: Any, x: Tensor, part: tuple[Tensor | None, ...]) -> Tensor:
    up, up_bias, down, down_bias = part
    inner = _linear(module, x, up, up_bias)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    out = _linear(module, inner, down, down_bias)
    return module.post_expert_norm(out) if module.has_post_expert_norm else out


def _linear(module: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.T if module.is_transposed else weight, bias)


def _is_mapped(x: Tensor) -> bool:
    """Whether `vmap` maps over it, at whatever level of transforms."""
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False
