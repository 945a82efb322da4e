# ruff: noqa: ARG001  (signatures are those of torch)
"""Functions of torch whose values are right and whose derivatives are wrong or missing, written in primitives.

What is wrong in torch 2.13, by differences of values in float64 (tests/test_derivatives.py):

- The fused norms (layer norm; batch and instance norm on statistics of their input): `jvp` of `jvp`, `grad` of `jvp`, and
  what differentiates through a `vmap` of `vjp` take the saved mean and deviation for constants.
  https://github.com/pytorch/pytorch/issues/196700
- `_weight_norm`, on which `nn.utils.parametrizations.weight_norm` rests: the saved norm is a constant to `vjp` of `grad`.
- Determinants, `linalg.solve`, `householder_product`: the saved factors are constants to `jvp` of `jvp`. In
  `triangular_solve` and `cholesky_inverse`, `jvp` itself is wrong.

Missing: second derivatives of `glu`, `hardsigmoid`, `embedding_bag` and the fused kernels of attention, a batching rule of
`scatter_` of a number, and what core/recurrent.py says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import factorisations, recurrent

aten = torch.ops.aten


def replaced(func: Callable) -> Callable:
    """What takes the place of a function of torch while a model runs: another one, or itself."""
    return _REPLACED.get(func, func)


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    return _native_layer_norm(input, normalized_shape, weight, bias, eps)[0]


def _native_layer_norm(input, normalized_shape, weight, bias, eps):
    unit, mean, rstd = _standardised(input, tuple(range(-len(normalized_shape), 0)), eps)
    return affine(unit, weight, bias, input), mean, rstd


def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if not training and running_mean is not None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _native_batch_norm(input, weight, bias, None, None, True, momentum, eps)[0]


def _torch_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled=True):
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps):
    if not training:
        return torch.native_batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps)
    unit, mean, rstd = _standardised(input, (0, *range(2, input.ndim)), eps)
    return affine(unit, per_channel(weight, input), per_channel(bias, input), input), mean.flatten(), rstd.flatten()


def _batch_norm_without_statistics(input, weight, bias, training, momentum, eps):
    return _native_batch_norm(input, weight, bias, None, None, training, momentum, eps)


def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    unit = _standardised(input, tuple(range(2, input.ndim)), eps)[0]
    return affine(unit, per_channel(weight, input), per_channel(bias, input), input)


def _torch_instance_norm(input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled):
    return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _weight_norm(v, g, dim=0):
    return _weight_norm_interface(v, g, dim)[0]


def _weight_norm_interface(v, g, dim=0):
    """g v / |v|, with a norm for each index of one dimension; dim = -1: one norm of all."""
    others = tuple(range(v.ndim)) if dim == -1 else tuple(i for i in range(v.ndim) if i != dim)
    norm = torch.linalg.vector_norm(v, dim=others, keepdim=True, dtype=torch.promote_types(v.dtype, torch.float32))
    return (v * (g / norm.reshape(g.shape))).to(v.dtype), norm.reshape(g.shape)


def _glu(input, dim=-1):
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


def _hardsigmoid(input, inplace=False):
    return F.relu6(input + 3) / 6


def _embedding_bag(
    input, weight, offsets=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, mode="mean", sparse=False,
    per_sample_weights=None, include_last_offset=False, padding_idx=None,
):  # fmt: skip
    if max_norm is not None:
        return F.embedding_bag(
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights,
            include_last_offset, padding_idx,
        )  # fmt: skip
    if input.ndim == 1:
        ends = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([len(input)])])
        bag = torch.searchsorted(ends, torch.arange(len(input), device=input.device), right=True)
        num = len(ends)
    else:
        num, bag = len(input), torch.arange(len(input), device=input.device).repeat_interleave(input.shape[1])
    rows = weight[input.reshape(-1)]
    used = torch.ones_like(bag) if padding_idx is None else (input.reshape(-1) != padding_idx % len(weight)).long()
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    counts = torch.zeros(num, dtype=bag.dtype, device=bag.device).index_add(0, bag, used)
    if mode == "max":
        low = torch.where(used[:, None] > 0, rows, -torch.inf)
        index = bag[:, None].expand_as(rows)
        top = torch.full((num, rows.shape[1]), -torch.inf, dtype=rows.dtype, device=rows.device)
        return torch.where(counts[:, None] > 0, top.scatter_reduce(0, index, low, "amax"), 0.0)
    zeros = torch.zeros((num, rows.shape[1]), dtype=rows.dtype, device=rows.device)
    total = zeros.index_add(0, bag, rows * used[:, None])
    return total / counts[:, None].clamp(min=1) if mode == "mean" else total


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """In matrix products: `sdpa_kernel` chooses these, too, and does so for all threads of the process at once."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    # a query that may see nothing has 0, and torch's second derivatives of it are not finite
    blind = None if attn_mask is None else attn_mask.isneginf().all(-1, keepdim=True)
    attn_mask = attn_mask if blind is None else attn_mask.masked_fill(blind, 0)
    out = aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]
    return out if blind is None else out.masked_fill(blind, 0)


_multi_head_attention = FunctionType(  # torch's own: a mode is not asked about what is called within
    F.multi_head_attention_forward.__code__,
    {**vars(F), "scaled_dot_product_attention": _attention},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def _scatter_(self, dim, index, value, **options):
    if isinstance(value, Tensor) or options:
        return self.scatter_(dim, index, value, **options)
    return self.copy_(self.scatter(dim, index, value))


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x in units of its deviation, its mean, and 1 / deviation."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # squares overflow in float16; the fused kernels widen too
    mean = x.mean(dims, keepdim=True)
    rstd = ((x - mean).square().mean(dims, keepdim=True) + eps).rsqrt()
    return (x - mean) * rstd, mean, rstd


def affine(unit: Tensor, weight: Tensor | None, bias: Tensor | None, like: Tensor) -> Tensor:
    if weight is not None:
        unit = unit * weight if bias is None else torch.addcmul(bias, unit, weight)
    elif bias is not None:
        unit = unit + bias
    return unit.to(like.dtype)


def per_channel(x: Tensor | None, like: Tensor) -> Tensor | None:
    return None if x is None else x.view(-1, *[1] * (like.ndim - 2))


def _with_aten(table: Iterable[tuple[Callable, tuple[Any, ...]]]) -> dict[Callable, Callable]:
    """One function in the place of several; an operation of aten goes by its name and by that of its default overload."""
    out: dict[Callable, Callable] = {}
    for function, names in table:
        for name in names:
            out[name] = function
            if isinstance(name, torch._ops.OpOverloadPacket) and "default" in name.overloads():
                out[name.default] = function
    return out


_REPLACED = _with_aten(
    [
        (_layer_norm, (F.layer_norm, torch.layer_norm, aten.layer_norm)),
        (_native_layer_norm, (torch.native_layer_norm, aten.native_layer_norm)),
        (_batch_norm, (F.batch_norm,)),
        (_torch_batch_norm, (torch.batch_norm, aten.batch_norm)),
        (_native_batch_norm, (torch.native_batch_norm, aten.native_batch_norm, aten._native_batch_norm_legit.default)),
        (_batch_norm_without_statistics, (aten._native_batch_norm_legit.no_stats,)),
        (_instance_norm, (F.instance_norm,)),
        (_torch_instance_norm, (torch.instance_norm, aten.instance_norm)),
        (_weight_norm, (torch._weight_norm, aten._weight_norm)),
        (_weight_norm_interface, (torch._weight_norm_interface, aten._weight_norm_interface)),
        (_glu, (F.glu, aten.glu)),
        (_hardsigmoid, (F.hardsigmoid, aten.hardsigmoid)),
        (_embedding_bag, (F.embedding_bag,)),
        (_attention, (F.scaled_dot_product_attention, aten.scaled_dot_product_attention)),
        (_scatter_, (Tensor.scatter_,)),
        (_multi_head_attention, (F.multi_head_attention_forward,)),
        *factorisations.TABLE,
        *recurrent.TABLE,
    ]
)
