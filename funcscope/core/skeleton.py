"""The private skeleton of a model: its module tree without weights, with derivatives that are those of its values.

Functions of torch whose derivatives are wrong or missing are replaced while it runs (core/primitives.py). Embeddings with
`padding_idx`, `scale_grad_by_freq` or `sparse` lose them here: conventions of training, under which reverse mode gives
something else than the derivative.
"""

from __future__ import annotations

import copy
import sys
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .experts import use_experts
from .imported import is_new_gelu, is_pretrained
from .kernels import use_kernel
from .primitives import replaced


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
        elif is_new_gelu(module) and attention != "keep":
            module.forward = nn.GELU("tanh").forward  # type: ignore[method-assign]  # eight passes over memory in one
        elif type(module).__name__ == "BloomGelu":  # an autograd function that torch.func does not take
            module.forward = sys.modules[type(module).__module__].bloom_gelu_forward  # type: ignore[method-assign]
    if is_pretrained(skeleton):
        if attention != "keep":
            use_kernel(skeleton, attention)
            use_experts(skeleton)
        for config in {
            id(config): config for part in skeleton.modules() if (config := getattr(part, "config", None))
        }.values():
            if hasattr(config, "use_cache"):
                config.use_cache = False
    return skeleton


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
            if any(id(x) in own or id(getattr(x, "__self__", None)) in own for x in closed_over(value)):
                raise ValueError(
                    f"`{name}.{attribute}` is a function that holds a part of the model in its closure, so that a copy of "
                    "the model would go on using the original. Make it a method of the module's class."
                )


def closed_over(function: Any) -> list[Any]:
    """What a function or method, a hook for instance, holds in its closure."""
    function = getattr(function, "__func__", function)
    cells = function.__closure__ or () if isinstance(function, FunctionType) else ()
    return [cell.cell_contents for cell in cells]


class TrueDerivatives(TorchFunctionMode):
    """While a model runs: primitives, which torch can differentiate again and again."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = replaced(func)
        return func(*args, **kwargs) if kwargs else func(*args)


class WithoutFloat32(TorchFunctionMode):
    """While a model runs in float64: what it would cast to float32 or make in it (norms, softmax) is in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = Tensor.double if func is Tensor.float else func
        if func is not Tensor.view:  # which reads the same bits in another dtype
            args = tuple(map(_widened, args))
            kwargs = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _widened(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument
