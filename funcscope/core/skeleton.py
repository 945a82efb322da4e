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
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation


def make_skeleton(model: nn.Module, attention: str) -> nn.Module:
    """A copy of the module tree in eval mode, with parameters on the meta device and buffers of its own.

    No weight is copied, ties survive, and configuration, modes and kernels of the copy are private.
    """
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()
    }
    skeleton = copy.deepcopy(model, memo).eval()
    for name, module in skeleton.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            _use_true_gradient(name, module)
        if attention != "keep":
            _use_primitives(module)
    if isinstance(skeleton, PreTrainedModel):
        if attention != "keep":
            skeleton.set_attn_implementation("eager" if attention == "eager" else "sdpa")
        if hasattr(skeleton.config, "use_cache"):
            skeleton.config.use_cache = False
    return skeleton


def _use_true_gradient(name: str, module: nn.Embedding | nn.EmbeddingBag) -> None:
    if module.max_norm is not None:
        raise ValueError(
            f"`{name}` is an embedding with `max_norm`, which rewrites its weights in the forward pass: "
            "no function of its parameters. Renormalise the weights once and set `max_norm=None`."
        )
    if isinstance(module, nn.Embedding):  # in a bag, `padding_idx` leaves entries out of the mean: part of the value
        module.padding_idx = None
    module.scale_grad_by_freq = module.sparse = False


def _use_primitives(module: nn.Module) -> None:
    forward = type(module).forward
    if forward is nn.LayerNorm.forward:
        module.forward = MethodType(_layer_norm, module)  # type: ignore[method-assign]
    elif forward in (_BatchNorm.forward, _InstanceNorm.forward) and module.running_mean is None:
        module.forward = MethodType(_statistics_norm, module)  # type: ignore[method-assign]
    elif forward is NewGELUActivation.forward:  # eight passes over memory, and their derivatives, in place of one
        module.forward = MethodType(_gelu_tanh, module)  # type: ignore[method-assign]


def _gelu_tanh(_: nn.Module, x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


def _layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    unit = _standardised(x, tuple(range(-len(module.normalized_shape), 0)), module.eps)
    return _affine(unit, module.weight, module.bias)


def _statistics_norm(module: _BatchNorm | _InstanceNorm, x: Tensor) -> Tensor:
    batched = x.ndim == 2 + _spatial(module) or (isinstance(module, nn.BatchNorm1d) and x.ndim == 2)
    spatial = tuple(range(1 + batched, x.ndim))
    unit = _standardised(x, spatial if isinstance(module, _InstanceNorm) else (0, *spatial), module.eps)
    if module.weight is None:
        return unit
    shape = (-1, *[1] * len(spatial))
    return _affine(unit, module.weight.view(shape), module.bias.view(shape))


def _spatial(module: _BatchNorm | _InstanceNorm) -> int:
    return int(type(module).__name__[-2])  # BatchNorm1d, InstanceNorm3d, ...


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(unit: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return unit
    return unit * weight if bias is None else bias.addcmul(unit, weight)
