"""Parameters that are gathered of the rows of all ranks at the moment when an operation uses them, and kept by no graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from .primitives import replaced
from .remat import remat, rematerialised
from .shares import Gather, Rows
from .substitute import Substitute, embedding_of

_OF_STORAGE = frozenset({"device", "is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu"})
"""What a placeholder says of the tensor that takes its place."""
_IN_PLACE = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__imatmul__", "__setitem__"})


class Plan(NamedTuple):
    """What is the same at every call of a model: its placeholders, on the meta device, and how each is cut."""

    names: dict[int, str]
    """By id of the placeholder."""
    rows: dict[str, Rows]
    dtypes: Mapping[str, torch.dtype]
    fused: bool
    """Kernels stay as they are, without derivatives of every order."""


class Slot(NamedTuple):
    """The place of a parameter among the arguments of an operation."""

    name: str


class Gathering(TorchFunctionMode):
    """While a model runs, each call of torch that takes a placeholder takes the whole parameter, gathered for that call.

    The call and the gathering are rematerialised together: the graph of a derivative keeps the rows and the other arguments,
    and every derivative gathers anew. Calls that write to an argument, and views of a parameter (`weight.T`), keep it.
    """

    def __init__(self, plan: Plan, values: Mapping[str, Tensor]):
        super().__init__()
        self.plan, self.values = plan, values
        self.replaced: Callable[[Any], Any] = (lambda func: func) if plan.fused else replaced

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kind, kwargs = getattr(func, "__name__", ""), kwargs or {}
        used = dict.fromkeys(self._used((args, kwargs)))
        if not used:
            return self.replaced(func)(*args, **kwargs)
        if kind == "__get__" or kind in Substitute.METADATA:
            out = self._fact(func, args, kwargs)
            if not isinstance(out, Tensor):
                return out
        func = embedding_of if func is F.embedding else self.replaced(func)
        rows = {name: self.values[name] for name in used}
        slots = _swapped(
            (args, kwargs), lambda x: Slot(name) if (name := self.plan.names.get(id(x))) is not None else x
        )
        call = _called(func, self.plan.rows)
        writes = kind in _IN_PLACE or (kind.endswith("_") and not kind.endswith("__")) or "out" in kwargs
        return call(rows, *slots) if writes else rematerialised(call)(rows, *slots)

    def _used(self, tree: Any) -> Iterator[str]:
        for x in tree.values() if isinstance(tree, dict) else tree:
            if isinstance(x, Tensor):
                if (name := self.plan.names.get(id(x))) is not None:
                    yield name
            elif type(x) in (tuple, list, dict):
                yield from self._used(x)

    def _fact(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Shapes are those of the whole parameter, its dtype the one that it is used in, its device that of the rows."""
        fact = getattr(getattr(func, "__self__", None), "__name__", "")
        name = self.plan.names.get(id(args[0])) if args else None
        if name is not None and fact == "dtype":
            return self.plan.dtypes[name]
        if name is not None and fact in _OF_STORAGE:
            return func(self.values[name], *args[1:], **kwargs)
        return func(*args, **kwargs)


def rematerialise(part: nn.Module, plan: Plan) -> None:
    """Its forward pass becomes `remat` of a twin's, on the rows of its parameters."""
    own = {id(x): x for x in (*part.parameters(), *part.buffers())}
    twin = copy.deepcopy(part, dict[int, Any](own))
    twin._forward_hooks.clear()
    twin._forward_pre_hooks.clear()  # they run around the part
    names = list(dict.fromkeys(plan.names[id(param)] for param in part.parameters()))

    def run(rows: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        with Gathering(plan, rows):
            return twin(*args, **kwargs)

    call = remat(run)

    def forward(*args: Any, **kwargs: Any) -> Any:
        mode = next(mode for mode in reversed(_get_current_function_mode_stack()) if isinstance(mode, Gathering))
        return call({name: mode.values[name] for name in names}, args, kwargs)

    part.forward = forward  # type: ignore[method-assign]


def _called(func: Callable, cuts: Mapping[str, Rows]) -> Callable[..., Any]:
    """A call of torch as a function of the rows of its parameters and of its other arguments."""

    def call(rows: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        wholes = {name: Gather.apply(x, cuts[name]) for name, x in rows.items()}
        args, kwargs = _swapped((args, kwargs), lambda x: wholes[x.name] if isinstance(x, Slot) else x)
        return func(*args, **kwargs)

    return call


def _swapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    if type(tree) is dict:
        return {key: _swapped(x, change) for key, x in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_swapped(x, change) for x in tree)
    return change(tree)
