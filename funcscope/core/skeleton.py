"""The private skeleton of a model: its module tree without weights, with derivatives that are those of its values.

Two things in torch are right as values and wrong as functions to differentiate:

- The fused layer norm, and batch norm on batch statistics. `grad`, `grad` of `grad` and `jvp` of `grad` are right;
  `jvp` of `jvp`, `grad` of `jvp`, and whatever differentiates through a `vmap` of `vjp` (`torch.func.hessian` does), are
  silently wrong: the saved mean and deviation are taken for constants. https://github.com/pytorch/pytorch/issues/196700
- Embeddings with `padding_idx`, `scale_grad_by_freq` or `sparse`: conventions of training, under which reverse mode
  gives something else than the derivative.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation


def make_skeleton(model: nn.Module, attention: str, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the module tree in eval mode, with parameters on the meta device and buffers of its own.

    No weight is copied, ties survive, and configuration, modes and kernels of the copy are private. dtype: what real
    parameters and buffers become; None leaves each its own.
    """
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta", _real(p, dtype)), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    _check_closures(model)
    try:
        skeleton = copy.deepcopy(model, memo).eval()
    except RuntimeError as err:
        raise ValueError(
            f"the module tree cannot be copied ({str(err).splitlines()[0]}): a module keeps a tensor that was computed, "
            "such as a stored activation or the weight of the old `nn.utils.weight_norm`. Delete it, or use "
            "`nn.utils.parametrizations`."
        ) from err
    for name, module in skeleton.named_modules():
        for buffer, value in module._buffers.items():
            if value is not None and (wider := torch.promote_types(value.dtype, _real(value, dtype))) != value.dtype:
                module._buffers[buffer] = value.to(wider)  # tables of angles keep their float32 in a bfloat16 model
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            _use_true_gradient(name, module)
        elif isinstance(module, NewGELUActivation) and attention != "keep":
            module.forward = nn.GELU("tanh").forward  # type: ignore[method-assign]  # eight passes over memory in one
        elif type(module).__name__ == "BloomGelu":  # an autograd function that torch.func does not take
            module.forward = sys.modules[type(module).__module__].bloom_gelu_forward  # type: ignore[method-assign]
    if isinstance(skeleton, PreTrainedModel):
        if attention != "keep":
            _use_kernel(skeleton, attention)
        if hasattr(skeleton.config, "use_cache"):
            skeleton.config.use_cache = False
    return skeleton


def _use_kernel(skeleton: PreTrainedModel, attention: str) -> None:
    if attention == "math" and not skeleton._supports_sdpa:
        raise ValueError(
            f'{type(skeleton).__name__} has one kernel of its own: pass `attention="eager"` instead of "math".'
        )
    if skeleton._can_set_attn_implementation():
        skeleton.set_attn_implementation("eager" if attention == "eager" else "sdpa")
    elif attention == "eager":
        skeleton.config._attn_implementation = "eager"  # where modules read it at every call, transformers only warns


def _real(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _use_true_gradient(name: str, module: nn.Embedding | nn.EmbeddingBag) -> None:
    if module.max_norm is not None:
        raise ValueError(
            f"`{name}` is an embedding with `max_norm`, which rewrites its weights in the forward pass: "
            "no function of its parameters. Renormalise the weights once and set `max_norm=None`."
        )
    if isinstance(module, nn.Embedding):  # in a bag, `padding_idx` leaves entries out of the mean: part of the value
        module.padding_idx = None
    module.scale_grad_by_freq = module.sparse = False


def _check_closures(model: nn.Module) -> None:
    """A function is shared with the copy, and what it closes over would stay the caller's."""
    own = {id(module) for module in model.modules()} | {id(param) for param in model.parameters()}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            function = getattr(value, "__func__", value)
            cells = function.__closure__ or () if isinstance(function, FunctionType) else ()
            held = [cell.cell_contents for cell in cells]
            if any(id(x) in own or id(getattr(x, "__self__", None)) in own for x in held):
                raise ValueError(
                    f"`{name}.{attribute}` is a function that holds a part of the model in its closure, so that a copy of "
                    "the model would go on using the original. Make it a method of the module's class."
                )


class TrueDerivatives(TorchFunctionMode):
    """While a model runs: norms from primitives, which torch can differentiate again and again."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = replaced(func)
        return func(*args, **kwargs) if kwargs else func(*args)


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    return _affine(_standardised(input, tuple(range(-len(normalized_shape), 0)), eps), weight, bias, input)


def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if not training and running_mean is not None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    unit = _standardised(input, (0, *range(2, input.ndim)), eps)
    return _affine(unit, _per_channel(weight, input), _per_channel(bias, input), input)


def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    unit = _standardised(input, tuple(range(2, input.ndim)), eps)
    return _affine(unit, _per_channel(weight, input), _per_channel(bias, input), input)


def replaced(func: Callable) -> Callable:
    """What takes the place of a function of torch while a model runs: another one, or itself."""
    return _REPLACED.get(func, func)


_REPLACED: dict[Callable, Callable] = {
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # squares overflow in float16; the fused kernels widen too
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(unit: Tensor, weight: Tensor | None, bias: Tensor | None, like: Tensor) -> Tensor:
    if weight is not None:
        unit = unit * weight if bias is None else torch.addcmul(bias, unit, weight)
    return unit.to(like.dtype)


def _per_channel(x: Tensor | None, like: Tensor) -> Tensor | None:
    return None if x is None else x.view(-1, *[1] * (like.ndim - 2))
