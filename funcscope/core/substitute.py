"""Parameters that are made at the moment when a model uses them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .layout import Params
from .primitives import replaced

LeafFn = Callable[[str, Tensor], Tensor]
"""(name, value) -> what takes the parameter's place."""


NOT_LEAF_BY_LEAF = (
    "so that the plan that makes weights leaf by leaf would leave it where it is: take the dense one, `lazy=False` "
    "(with `chunk=1` where directions are sampled), or pass the Python module that it was made of."
)


def immovable(skeleton: nn.Module, names: Collection[str]) -> str | None:
    """A parameter that is no placeholder: C++ holds it, and no torch call through which it could be replaced takes it."""
    return next((name for name, param in skeleton.named_parameters() if name in names and not param.is_meta), None)


class Substitute(TorchFunctionMode):
    """Replaces the skeleton's meta parameters by values at every torch call that takes one."""

    METADATA = frozenset(
        {"size", "dim", "numel", "is_floating_point", "is_complex", "stride", "is_contiguous", "__len__"}
    )

    def __init__(
        self,
        skeleton: nn.Module,
        params: Params,
        frozen: Params,
        dtypes: Mapping[str, torch.dtype],
        leaf: LeafFn,
        *,
        fused: bool,
    ):
        super().__init__()
        if (name := immovable(skeleton, params)) is not None:
            raise ValueError(f"`{name}` belongs to a scripted or traced module, {NOT_LEAF_BY_LEAF}")
        self.names = {id(param): name for name, param in skeleton.named_parameters()}
        self.tied = {name for name, count in uses_of(skeleton).items() if count > 1}
        self.params, self.base, self.dtypes, self.leaf = params, {**params, **frozen}, dtypes, leaf
        self.replaced = replaced if not fused else lambda func: func
        self.made: dict[str, Tensor] = {}

    def value(self, name: str) -> Tensor:
        if name in self.made:
            return self.made[name]
        if name not in self.params:
            return self.base[name].to(self.dtypes[name])
        made = self.leaf(name, self.base[name]).to(self.dtypes[name])
        if name in self.tied:
            self.made[name] = made
        return made

    def dtype_of(self, x: Any) -> torch.dtype | None:
        return None if (name := self.names.get(id(x))) is None else self.dtypes[name]

    def swap(self, x: Any, value: Callable[[str], Tensor]) -> Any:
        if (name := self.names.get(id(x))) is not None:
            return value(name)
        return type(x)(self.swap(item, value) for item in x) if type(x) in (tuple, list) else x

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kind = getattr(func, "__name__", "")
        if kind == "__get__" or kind in self.METADATA:  # sizes and devices are those of the base
            if func == Tensor.dtype.__get__ and (dtype := self.dtype_of(args[0])) is not None:  # type: ignore[attr-defined]
                return dtype
            out = func(*self.swap(args, self.base.__getitem__), **(kwargs or {}))
            if not isinstance(out, Tensor):
                return out
        func, args = self.replaced(func), self.swap(args, self.value)
        if func is F.embedding:
            func = embedding_of
        return func(*args, **{key: self.swap(x, self.value) for key, x in kwargs.items()}) if kwargs else func(*args)


def embedding_of(input, weight, padding_idx=None, max_norm=None, *rest: Any, **options: Any) -> Tensor:
    """Rows of the weight: `vmap` over weights would copy them all to look up a few."""
    return weight[input] if max_norm is None else F.embedding(input, weight, padding_idx, max_norm, *rest, **options)


def uses_of(model: nn.Module) -> Counter[str]:
    """How many modules hold each parameter."""
    names = {id(param): name for name, param in model.named_parameters()}
    held = (param for module in model.modules() for param in module._parameters.values())
    return Counter(names[id(param)] for param in held if param is not None)
