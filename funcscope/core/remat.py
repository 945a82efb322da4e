"""Rematerialisation: a function keeps its inputs alone, and is evaluated again where a derivative asks for more.

`torch.utils.checkpoint` rests on hooks that `torch.func` refuses, and knows reverse mode only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree

from .captured import Door, Flat, Watch

P = ParamSpec("P")
R = TypeVar("R")


def remat(fn: Callable[P, R]) -> Callable[P, R]:
    r"""`fn` with the same values and derivatives of every order, of which a graph keeps the inputs and nothing between.

    $$y = f(x), \qquad \bar x = J_f(x)^\top \bar y, \qquad \dot y = J_f(x)\,\dot x.$$

    The pull $(x, \bar y) \mapsto \bar x$ and the push $(x, \dot x) \mapsto \dot y$ are functions that evaluate f anew, and
    are rematerialised themselves, so that memory is that of the inputs at every order. `grad`, `vjp`, `jvp`, `vmap`,
    `jacrev`, `jacfwd` and `hessian` of `torch.func` are taken in any composition, and `backward`. While a derivative of one
    call is taken, all that this call computes is kept as usual: memory is saved by functions that are a part of the whole.

    fn: arguments and results are any nesting of tuples, lists and dicts with tensors of every dtype, numbers, None and other
    objects among them. A module may be given: its parameters and buffers are then among the arguments, those of
    `torch.func.functional_call` where it is called within one.

    Assumes that fn is a function: it writes to nothing outside, and what it reads there does not change between a call and
    its derivatives. Modes (autocast, `TorchFunctionMode`) are those of the call. An input that fn does not use has a
    derivative of zeros, which `backward` adds to a `grad` that it would leave at None. Generators that are made outside and
    drawn from inside are not noticed.

    Raises ValueError where fn is not callable, or scripted; where it uses a tensor that is differentiated or mapped over and
    is not among its arguments (its derivative would be lost), a parameter that requires a gradient included; where it draws
    from torch's global generators, as dropout does, or writes to an argument; and under `forward_ad.dual_level`.

    Griewank and Walther (2000), doi:10.1145/347837.347846; Chen et al. (2016), arXiv:1604.06174.

    >>> from torch.func import grad, hessian
    >>> cube = remat(lambda x: x * x * x)
    >>> x = torch.tensor(2.0)
    >>> float(cube(x)), float(grad(cube)(x)), float(hessian(cube)(x)), float(grad(hessian(cube))(x))
    (8.0, 12.0, 12.0, 6.0)
    >>> float(grad(lambda w: remat(lambda w, x: w * x)(w, x))(torch.tensor(3.0)))    # w is an argument, not captured
    2.0
    """
    if not callable(fn) or isinstance(fn, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise ValueError(
            f"`fn` must be a function or a module written in Python, got {type(fn).__name__}: `remat(fn)` is called on what "
            "fn is called on."
        )
    if isinstance(fn, nn.Module):
        return _of_module(fn)

    @functools.wraps(fn, updated=())
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return _call(fn, args, kwargs)

    return call


def rematerialised(fn: Callable[P, R]) -> Callable[P, R]:
    """`remat` of what is known to be a function of its arguments, whose first evaluation nobody needs to watch."""

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return _call(fn, args, kwargs, watched=False)

    return call


def _of_module(module: nn.Module) -> Callable:
    def run(state: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        return functional_call(module, state, args, kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return _call(run, (state, args, kwargs), {})

    return call


def _call(fn: Callable, args: Any, kwargs: Any, *, watched: bool = True) -> Any:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors, joined = _split(leaves)
    modes = _get_current_function_mode_stack()
    if modes:  # what a mode puts in the place of an argument is differentiated from here on
        tensors = [x.view_as(x) if watched or isinstance(x, nn.Parameter) else x for x in tensors]
    surroundings = _surroundings(modes, {x.device.type for x in tensors})
    result: list[Callable[[Sequence[Tensor]], Any]] = []

    def flat(*xs: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = pytree.tree_unflatten(joined(xs), spec)
        with ExitStack() as stack:
            for context in surroundings():
                stack.enter_context(context)
            out, out_spec = pytree.tree_flatten(fn(*args, **kwargs))
        ys, rejoined = _split(out)
        if not result:
            result.append(lambda values: pytree.tree_unflatten(rejoined(values), out_spec))
        return tuple(ys)

    values = _Remat.apply(flat, Door() if watched else None, *tensors)
    return result[0](values)


def _split(leaves: Sequence[Any]) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], list[Any]]]:
    """The tensors among them, and what puts others in their places."""
    place = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return [leaves[i] for i in place], lambda xs: _placed(rest, place, xs)


def _placed(base: Sequence[Any], place: Sequence[int], values: Sequence[Any]) -> list[Any]:
    out = list(base)
    for i, value in zip(place, values, strict=True):
        out[i] = value
    return out


@dataclass(frozen=True, eq=False)
class Formula:
    """A function of tensors with a faster way to its values, and functions that are its derivatives."""

    fn: Flat
    """Of operations of torch, for whatever is asked for and not said here."""
    closed: Flat
    """The same values, of plain tensors; it may write to what it has made."""
    pulls: Mapping[tuple[int, ...], Flat] = field(default_factory=dict)
    """(inputs, cotangents of all results) -> those of some inputs, by the places of these."""
    pushes: Mapping[tuple[int, ...], Flat] = field(default_factory=dict)
    """(inputs, tangents of some of them) -> those of all results, by the places of these."""

    def __call__(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return self.fn(*xs)


def by_formula(formula: Formula, *xs: Tensor) -> tuple[Tensor, ...]:
    """Its values, differentiated as by `remat`."""
    return _Remat.apply(formula, None, *xs)


class _Remat(torch.autograd.Function):
    """`fn(*xs)`, of which the pull and the push are `_Remat` again. door: for the first evaluation; None in derivatives."""

    @staticmethod
    def forward(fn: Flat, door: Door | None, *xs: Tensor) -> tuple[Tensor, ...]:
        inside = tuple(x.detach() for x in xs)
        made = fn.closed if isinstance(fn, Formula) else fn
        return _apart(inside, made(*inside) if door is None else door.first(fn, inside))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.fn, _, *xs = inputs
        ctx.num = len(output)
        ctx.real = [i for i, y in enumerate(output) if y.is_floating_point() or y.is_complex()]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*xs)
        ctx.save_for_forward(*xs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        xs, fn, num = ctx.saved_tensors, ctx.fn, len(ctx.saved_tensors)
        wrt = [i for i in range(num) if ctx.needs_input_grad[i + 2]]
        ys = [i for i in ctx.real if cotangents[i] is not None]

        def pulled(*args: Tensor) -> tuple[Tensor, ...]:
            points, bars = args[:num], args[num:]
            with torch.enable_grad():  # without it torch takes kernels that cannot be differentiated once more
                return vjp(_part(fn, points, wrt, ys), *(points[i] for i in wrt))[1](bars)

        none = [None] * (2 + num)
        if not (wrt and ys):
            return tuple(none)
        if isinstance(fn, Formula) and len(ys) == ctx.num:
            pulled = fn.pulls.get(tuple(wrt), pulled)
        values = _Remat.apply(pulled, None, *xs, *(cotangents[i] for i in ys))
        return tuple(_placed(none, [i + 2 for i in wrt], values))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        xs, fn, ys, num = ctx.saved_tensors, ctx.fn, ctx.real, len(ctx.saved_tensors)
        wrt = [i for i in range(num) if tangents[i + 2] is not None]

        def pushed(*args: Tensor) -> tuple[Tensor, ...]:
            points, dots = args[:num], args[num:]
            with torch.enable_grad():
                return jvp(_part(fn, points, wrt, ys), tuple(points[i] for i in wrt), dots)[1]

        none = [None] * ctx.num
        if not (wrt and ys):
            return tuple(none)
        if isinstance(fn, Formula) and len(ys) == ctx.num:
            pushed = fn.pushes.get(tuple(wrt), pushed)
        values = _Remat.apply(pushed, None, *xs, *(tangents[i + 2] for i in wrt))
        return tuple(_placed(none, ys, values))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], fn: Flat, door: Door | None, *xs: Tensor) -> Any:
        out = _Remat.apply(torch.vmap(fn, in_dims=in_dims[2:], randomness=info.randomness), door, *xs)
        return out, (0,) * len(out)


def _part(fn: Flat, points: Sequence[Tensor], wrt: Sequence[int], ys: Sequence[int]) -> Flat:
    """Some of the results as a function of some of the inputs."""

    def part(*moved: Tensor) -> tuple[Tensor, ...]:
        out = fn(*_placed(points, wrt, moved))
        return tuple(out[i] for i in ys)

    return part


def _apart(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Results that may be written to, each on memory of its own: not an argument, not twice the same, not expanded."""
    memory = {x.untyped_storage()._cdata for x in xs}
    shared = [
        y.untyped_storage()._cdata in memory or 0 in y.stride() or any(y is other for other in ys[:i])
        for i, y in enumerate(ys)
    ]
    return tuple(y.clone() if again else y for y, again in zip(ys, shared, strict=True))


_KERNELS = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
}
"""Of fused attention, on every device."""


def _enabled() -> list[SDPBackend]:
    return [backend for backend, enabled in _KERNELS.items() if enabled()]


def _surroundings(modes: Sequence[Any], devices: set[str]) -> Callable[[], Iterator[Any]]:
    """What is switched on at the call, to be switched on again whenever the function is evaluated."""
    modes = list(dict.fromkeys(mode for mode in modes if not isinstance(mode, Watch)))
    casts = [
        (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        for device in sorted(devices | {"cpu"})
        if torch.amp.is_autocast_available(device)
    ]
    kernels = _enabled()

    def contexts() -> Iterator[Any]:
        for device, dtype, enabled in casts:
            yield torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
        if kernels != _enabled():  # which is a matter of the whole process, and so left alone where it can be
            yield sdpa_kernel(kernels)
        yield from modes

    return contexts
