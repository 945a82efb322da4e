"""Is what is to be evaluated again a function of its arguments? Watched at its first evaluation (core/remat.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.func import grad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .substitute import Substitute

Flat = Callable[..., tuple[Tensor, ...]]
"""Tensors in, tensors out."""

NO_WRAPPER = -1
"""Level of a plain tensor. What is left of a transform that has ended bears -2; kernels see the plain tensor in it."""


class Door:
    """Made where a function is called, inside whatever differentiates it; `first` evaluates it outside of that.

    Every tensor that the function uses is an argument or a constant, none is drawn, and no argument is written to.

    `torch.func` numbers its nested transforms, and an autograd function is evaluated outside of them all. Idle ones are put
    in their place and one more, whose number all that is computed bears: a tensor of a smaller number was captured.
    """

    def __init__(self) -> None:
        self.depth = torch._C._functorch.get_dynamic_layer_stack_depth()
        self.reverse = torch.is_grad_enabled()
        self.refusal: ValueError | None = None
        if forward_ad._current_level >= 0 and eager_transforms.JVP_NESTING == 0:
            raise ValueError(
                "`remat` does not take `forward_ad.dual_level`, which cannot be nested: use `torch.func.jvp`."
            )

    def first(self, fn: Flat, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        devices = {x.device for x in xs} | {torch.device("cpu")}
        before, versions = _generators(devices), _versions(xs)
        out = _nested(self.depth + 1 if self.depth else 0, lambda: self._watched(fn, xs))
        if not all(map(torch.equal, before, _generators(devices))):
            raise ValueError(
                "the function given to `remat` draws random numbers, and would draw others when it is evaluated again: "
                "switch dropout off (`eval()`), or draw before and pass the numbers as an argument."
            )
        if _versions(xs) != versions:
            raise ValueError(
                "the function given to `remat` writes to its arguments (a module: to its buffers), and would find other "
                "values when it is evaluated again: write to a clone, and return what is new."
            )
        return out

    def _watched(self, fn: Flat, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        try:
            with Watch(self.check), _Beneath(self):
                return self.check(fn(*xs))
        except RuntimeError as err:
            if self.refusal is None:
                raise
            raise self.refusal from err  # the interpreter of TorchScript swallows what is raised beneath it

    def check(self, tree: Any) -> Any:
        for x in pytree.tree_leaves(tree):
            if isinstance(x, Tensor) and self._captured(x):
                self.refusal = ValueError(
                    f"the function given to `remat` uses a tensor of shape {tuple(x.shape)} that is not among its arguments "
                    "and is differentiated or mapped over outside, so that a derivative would be lost: pass it as an "
                    "argument (the parameters of a module: `remat(module)`)."
                )
                raise self.refusal
        return tree

    def _captured(self, x: Tensor) -> bool:
        level = torch._C._functorch.maybe_get_level(x)
        if level > 0:
            return level <= self.depth
        return level == NO_WRAPPER and self.reverse and x.requires_grad


class Watch(TorchFunctionMode):
    """Shows a check the arguments of every call of torch, but for what asks for a shape, a dtype or a device."""

    def __init__(self, check: Callable[[Any], Any]) -> None:
        super().__init__()
        self.check = check

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in Substitute.METADATA:
            return func(*args, **kwargs)
        if name == "__get__" and not isinstance(out := func(*args, **kwargs), Tensor):
            return out
        self.check((args, kwargs))
        return func(*args, **kwargs)


class _Beneath(TorchDispatchMode):
    """Shows a door the arguments of every kernel: parameters that C++ holds, as in scripted modules, come to light here."""

    def __init__(self, door: Door) -> None:
        super().__init__()
        self.door = door

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.door.check((args, kwargs))
        return func(*args, **(kwargs or {}))


def _nested(depth: int, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """`run()` inside transforms that differentiate nothing."""
    if depth == 0:
        return run()
    return grad(lambda zero: (zero, _nested(depth - 1, run)), has_aux=True)(torch.zeros(()))[1]


def _generators(devices: set[torch.device]) -> list[Tensor]:
    """States of torch's global generators."""
    return [
        torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        for device in sorted(devices, key=str)
        if device.type != "meta"
    ]


def _versions(xs: Sequence[Tensor]) -> list[int | None]:
    return [None if x.is_inference() else x._version for x in xs]
