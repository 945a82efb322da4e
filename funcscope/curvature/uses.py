"""What every operation does with a parameter in one forward pass, and the gradient at its output in one backward pass.

The gradient of one sequence in a parameter is made of these two alone. Parameters are constants here and no gradient in them
is taken: a scalar zero that every such output passes by is what is differentiated, and autograd brings the gradient at each
output on its way there.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..core.objective import Loss
from ..core.progress import tick
from ..core.substitute import Substitute
from .indexing import chooses_places, lookup, named
from .leaf_gradients import Lookup, Outer, Part, Rows
from .outputs import total_of

Each = Callable[[str, list[Part]], None]
"""Takes a parameter's name and its per-sequence gradients, as soon as all its uses are known."""


class Affine(NamedTuple):
    """One use of a weight matrix: $s = x W^\\top + b$, for the parameters of Kronecker factors."""

    weight: str
    bias: str | None
    x: Tensor
    transposed: bool
    """The weight is stored (in, out), as Hugging Face's Conv1D does."""


def run(
    loss: Loss,
    params: dict[str, Tensor],
    batch: tuple[Any, Any],
    rows: int,
    each: Each,
    affine: Callable[[Affine, Tensor], None] | None = None,
    forward_done: Callable[[bool], None] | None = None,
) -> frozenset[str]:
    """One forward and one backward pass over a batch of so many rows; the names of the parameters left out.

    params: in the dtypes that they are used in. each: called once for every other parameter that the model uses, with
    gradients of the weighted sum of its row's losses, in the order of the backward pass. affine: called with every use of a
    weight matrix, and the gradient at its output. forward_done: called before the backward pass with whether activations were
    taken by index, so that values decide which rows belong to which sequence, and not shapes alone.
    """
    uses = _Uses(params, rows, torch.zeros((), device=loss.net.device, requires_grad=True), each, affine)
    with torch.enable_grad():
        try:
            out = uses.of(loss, params, batch)
        except RuntimeError:
            if not uses.expanded:
                raise
            uses = _Uses(params, rows, uses.seed, each, affine, expand=False)
            out = uses.of(loss, params, batch)
        total = total_of(loss.criterion, out, batch[1])
        if forward_done is not None:
            forward_done(uses.indexed)
        if total.requires_grad:
            torch.autograd.grad(total, uses.seed)
    return uses.unknown()


class _Tap(torch.autograd.Function):
    """The output as it is; its gradient is shown on the way back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, seed: Tensor, show: Callable[[Tensor], None]) -> Tensor:
        ctx.show, ctx.like = show, seed
        if 0 in y.stride():
            return y.view_as(y)
        # torch lets nobody write to a view that is made here, as `nn.ReLU(inplace=True)` does with what it is given
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        with torch.no_grad():
            ctx.show(grads[0])
        return grads[0], torch.zeros_like(ctx.like), None


class _Uses(TorchFunctionMode):
    def __init__(
        self, params: dict[str, Tensor], rows: int, seed: Tensor, each: Each, affine: Any, *, expand: bool = True
    ):
        super().__init__()
        self.names = {id(value): name for name, value in params.items()}
        self.memory = {value.untyped_storage().data_ptr() for value in params.values()}
        self.flipped: dict[int, Tensor] = {}
        self.rows, self.seed, self.each, self.affine = rows, seed, each, affine
        self.pending: dict[str, int] = {}
        self.parts: dict[str, list[Part]] = {}
        self.strange: set[str] = set()
        self.indexed = self.expanded = False
        self.expand = expand  # what every row looks up alike, which a model may take for the one row that it made
        self.second = False  # inside torch's attention, sequences are the second dimension

    def of(self, loss: Loss, params: dict[str, Tensor], batch: tuple[Any, Any]) -> Tensor:
        tick("forward")
        with self:
            return loss.net.whole.apply(params, batch[0])

    def unknown(self) -> frozenset[str]:
        """Those of an operation that is not known, and those whose uses did not all reach the loss."""
        stuck = {name for name, left in self.pending.items() if left and name in self.parts}
        return frozenset(self.strange | stuck)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        self.indexed |= chooses_places(name, args, kwargs)
        taken = {self.names[id(x)] for x in tree_leaves((args, kwargs)) if id(x) in self.names}
        if not taken or name in Substitute.METADATA:
            return func(*args, **kwargs)
        if func in _OPENED:
            self.second = args[0].ndim == 3
            with self:
                out = _OPENED[func](*args, **kwargs)
            self.second = False
            return out
        out = func(*args, **kwargs)
        if id(out) in self.names or (name == "__get__" and not isinstance(out, Tensor)):
            return out  # a parameter itself, cast to the dtype that it has, say
        if func in _FLIPS and args[0].ndim == 2 and id(args[0]) not in self.flipped:
            self.flipped[id(out)] = out
            self.names[id(out)] = self.names[id(args[0])]
            return out
        writes = name.startswith("__i") or (name.endswith("_") and not name.startswith("__")) or "out" in kwargs
        made = None if writes else _known(func, args, kwargs, self)
        if made is None and not writes and not self.second:
            made = _by_rows(func, args, kwargs, self, out)
        shared = made is not None and len(out) == 1 < self.rows and not self.second
        if made is None or (shared and not self.expand):
            self.strange |= taken
            return out
        if shared:
            self.expanded, out = True, out.expand(self.rows, *out.shape[1:])
        return self.tapped(out, made)

    def tapped(self, out: Tensor, made: _Made) -> Tensor:
        if out.untyped_storage().data_ptr() in self.memory:
            out = out.clone()  # a view of a parameter, as `expand` makes for one row, may not be marked as written to
        second = self.second
        for name in made.parts:
            self.pending[name] = self.pending.get(name, 0) + 1

        def show(g: Tensor) -> None:
            self.second = second
            if made.affine is not None and self.affine is not None:
                self.affine(made.affine, self.by_row(g))
            parts = self.parts_of(made, g)
            for name in made.parts:
                self.parts.setdefault(name, []).extend(parts.get(name, ()))
                self.pending[name] -= 1
                if not self.pending[name] and name not in self.strange:
                    self.each(name, self.parts.pop(name))

        return _Tap.apply(out, self.seed, show)

    def parts_of(self, made: _Made, g: Tensor) -> dict[str, list[Part]]:
        """None where one row is nothing that the operation takes: it has as many rows as sequences by chance."""
        try:
            return {name: [make(g)] for name, make in made.parts.items()}
        except (RuntimeError, ValueError, IndexError):
            self.strange |= made.parts.keys()
            return {}

    def by_row(self, x: Tensor) -> Tensor:
        """(rows, everything between, last)."""
        if self.second:
            return x.reshape(-1, self.rows, x.shape[-1]).transpose(0, 1)
        return x.reshape(self.rows, -1, x.shape[-1])

    def is_parameter(self, x: Any) -> bool:
        return id(x) in self.names


class _Made(NamedTuple):
    parts: dict[str, Callable[[Tensor], Part]]
    affine: Affine | None = None


def _known(func: Any, args: tuple, kwargs: dict[str, Any], uses: _Uses) -> _Made | None:
    """Linear maps and tables."""
    if func is F.linear:
        return _linear(uses, *named(("input", "weight", "bias"), args, kwargs), transposed=False)
    if func is torch.addmm and not kwargs:
        return _linear(uses, args[1], args[2], args[0], transposed=True)
    if func in _PRODUCTS and not kwargs and args[1].ndim == 2:
        return _linear(uses, args[0], args[1], None, transposed=True)
    if func is F.embedding or func is torch.embedding:
        return _table(uses, *lookup(func, args, kwargs))
    return None


def _table(uses: _Uses, ids: Tensor, weight: Tensor, padding: int | None, strange: bool) -> _Made | None:
    if strange or not uses.is_parameter(weight) or uses.is_parameter(ids):
        return None
    if not ids.ndim or len(ids) not in (1, uses.rows):
        return None
    if padding is not None and padding < 0:
        padding += len(weight)

    def look(g: Tensor) -> Part:
        places = (ids.expand(uses.rows, *ids.shape[1:]) if len(ids) == 1 else ids).reshape(uses.rows, -1)
        right = uses.by_row(g)
        return Lookup(places, right if padding is None else right.masked_fill((places == padding)[..., None], 0))

    return _Made({uses.names[id(weight)]: look})


def _linear(uses: _Uses, x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> _Made | None:
    if not uses.is_parameter(weight) or uses.is_parameter(x) or weight.ndim != 2:
        return None
    if x.ndim < 2 or x[..., 0].numel() % uses.rows or (len(x) == 1 < uses.rows and not uses.second):
        return None
    if bias is not None and bias.shape != (weight.shape[1 if transposed else 0],):
        return None
    transposed ^= id(weight) in uses.flipped
    inputs = uses.by_row(x.detach())
    parts: dict[str, Callable[[Tensor], Part]] = {}

    def outer(g: Tensor) -> Part:
        return Outer(inputs, uses.by_row(g)) if transposed else Outer(uses.by_row(g), inputs)

    parts[uses.names[id(weight)]] = outer
    if bias is not None and uses.is_parameter(bias):
        parts[uses.names[id(bias)]] = lambda g: Rows(uses.by_row(g).sum(1))
    name = uses.names[id(bias)] if bias is not None and uses.is_parameter(bias) else None
    return _Made(parts, Affine(uses.names[id(weight)], name, inputs, transposed))


def _by_rows(func: Any, args: tuple, kwargs: dict[str, Any], uses: _Uses, out: Any) -> _Made | None:
    """Any other operation that has a row for every sequence: its own pullback, row by row."""
    leaves, spec = tree_flatten((args, kwargs))
    at = [i for i, x in enumerate(leaves) if uses.is_parameter(x)]
    names = [uses.names[id(leaves[i])] for i in at]
    if not isinstance(out, Tensor) or not out.ndim or len(out) != uses.rows or len(set(names)) != len(names):
        return None
    if uses.flipped.keys() & {id(leaves[i]) for i in at}:
        return None
    rest = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
    cut = [
        i for i, x in enumerate(rest)
        if i not in at and isinstance(x, Tensor) and x.ndim == out.ndim and len(x) == uses.rows
    ]  # fmt: skip

    def pulled(moved: dict[int, Tensor], g: Tensor) -> tuple[Tensor, ...]:
        def f(*values: Tensor) -> Tensor:
            placed = {**moved, **dict(zip(at, values, strict=True))}
            given, named = tree_unflatten([placed.get(i, x) for i, x in enumerate(rest)], spec)
            return func(*given, **named)

        return vjp(f, *(rest[i] for i in at))[1](g)

    def pull(g: Tensor) -> tuple[Tensor, ...]:
        if not cut:  # made of parameters alone, a copy for every row
            return vmap(lambda mask: pulled({}, g * mask.reshape(-1, *[1] * (g.ndim - 1))))(torch.eye(len(g)).to(g))
        return vmap(pulled)({i: rest[i][:, None] for i in cut}, g[:, None])

    memory: list[tuple[Tensor, ...]] = []

    def part(i: int) -> Callable[[Tensor], Part]:
        def make(g: Tensor) -> Part:
            if i == 0:
                memory[:] = [pull(g)]
            return Rows(memory[0][i].reshape(uses.rows, rest[at[i]].numel()))

        return make

    return _Made({name: part(i) for i, name in enumerate(names)})


_FLIPS = (Tensor.T.__get__, Tensor.mT.__get__, Tensor.t, torch.t)  # type: ignore[attr-defined]
_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


def _opened(function: Any) -> FunctionType:
    """A function of torch written in Python that does not ask the mode first, so that the mode sees what it calls."""
    scope = {**vars(F), **dict.fromkeys(("has_torch_function", "has_torch_function_variadic"), lambda *_: False)}
    return FunctionType(function.__code__, scope, argdefs=function.__defaults__)


_OPENED = {f: _opened(f) for f in (F.multi_head_attention_forward,)}
