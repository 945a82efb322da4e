"""Parameters that are made at the moment when a model uses them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .layout import Params
from .primitives import replaced

LeafFn = Callable[[str, Tensor], Tensor]
"""(name, value) -> what takes the parameter's place."""

RowsFn = Callable[[str, Tensor], Iterator[tuple[slice, Tensor]]]
"""(name, value) -> the same, some rows at a time: (rows, `leaf(name, value)[rows]`), in their order."""

LARGE = 2**24
"""Matrices with as many numbers never exist as a whole where there are rows of them: those of large vocabularies."""


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
        rows: RowsFn | None = None,
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
        self.rows = rows
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

    def parts(self, x: Any) -> Iterator[tuple[slice, Tensor]] | None:
        """A large matrix of theta, some rows at a time; None for what is made as a whole."""
        name = self.names.get(id(x))
        if self.rows is None or name is None or name not in self.params or name in self.made:
            return None
        base, dtype = self.base[name], self.dtypes[name]
        if base.ndim != 2 or base.numel() < LARGE:
            return None
        return ((rows, value.to(dtype)) for rows, value in self.rows(name, base))

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
        if func in (F.linear, F.embedding) and len(args) > 1 and (parts := self.parts(args[1])) is not None:
            rest = self.swap((args[0], *args[2:]), self.value)
            options = {key: self.swap(x, self.value) for key, x in (kwargs or {}).items()}
            return (_linear_of if func is F.linear else _embedding_of)(parts, *rest, **options)
        func, args = self.replaced(func), self.swap(args, self.value)
        if func is F.embedding:
            func = embedding_of
        return func(*args, **{key: self.swap(x, self.value) for key, x in kwargs.items()}) if kwargs else func(*args)


def embedding_of(input, weight, padding_idx=None, max_norm=None, *rest: Any, **options: Any) -> Tensor:
    """Rows of the weight: `vmap` over weights would copy them all to look up a few."""
    return weight[input] if max_norm is None else F.embedding(input, weight, padding_idx, max_norm, *rest, **options)


def _linear_of(parts: Iterable[tuple[slice, Tensor]], input: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with a weight that exists some rows at a time."""
    wide = input.to(torch.promote_types(input.dtype, torch.float32))  # where gradients of the parts add up

    def part(rows: slice, w: Tensor) -> Tensor:
        return F.linear(wide.to(input.dtype), w, None if bias is None else bias[rows])

    return torch.cat([part(rows, w) for rows, w in parts], -1)


def _embedding_of(
    parts: Iterable[tuple[slice, Tensor]], input: Tensor, padding_idx=None, max_norm=None, *rest: Any, **options: Any
) -> Tensor:
    """`F.embedding` with a weight that exists some rows at a time."""
    if max_norm is not None:
        return F.embedding(input, torch.cat([w for _, w in parts]), padding_idx, max_norm, *rest, **options)
    ids, order = input.reshape(-1).sort()
    chosen = []
    for rows, w in parts:
        first, last = (int(torch.searchsorted(ids, end)) for end in (rows.start, rows.stop))
        if first < last:
            chosen.append(w[ids[first:last] - rows.start])
    return torch.cat(chosen)[order.argsort()].view(*input.shape, -1)


def uses_of(model: nn.Module) -> Counter[str]:
    """How many modules hold each parameter."""
    names = {id(param): name for name, param in model.named_parameters()}
    held = (param for module in model.modules() for param in module._parameters.values())
    return Counter(names[id(param)] for param in held if param is not None)
