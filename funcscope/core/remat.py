"""Rematerialisation: a function keeps its inputs alone, and is evaluated again where a derivative asks for more.

`torch.utils.checkpoint` rests on hooks that `torch.func` refuses, and knows reverse mode only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vjp
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import _pytree as pytree

P = ParamSpec("P")
R = TypeVar("R")
Flat = Callable[..., tuple[Tensor, ...]]
"""Tensors in, tensors out."""


def remat(fn: Callable[P, R]) -> Callable[P, R]:
    r"""`fn` with the same values and derivatives of every order, of which a graph keeps the inputs and nothing between.

    $$y = f(x), \qquad \bar x = J_f(x)^\top \bar y, \qquad \dot y = J_f(x)\,\dot x,$$

    where the pull $(x, \bar y) \mapsto \bar x$ and the push $(x, \dot x) \mapsto \dot y$ are functions that evaluate f anew, and
    are rematerialised themselves: so are their own pulls and pushes, and memory is that of the inputs at every order. Works
    under `grad`, `vjp`, `jvp`, `vmap`, `jacrev`, `jacfwd` and `hessian` of `torch.func` in any composition, and under
    `backward`. What a call costs: a gradient one evaluation of f more, a Hessian product (`vjp` of `grad`) up to three.

    fn: arguments and results are any nesting of tuples, lists and dicts with tensors of every dtype, numbers, None and other
    objects among them. A module may be given, and its parameters and buffers are then among the arguments, under
    `torch.func.functional_call` those that it is called with. Results that are no tensors belong to the call itself.

    Assumes that fn is a function: it writes to nothing outside, and what it reads there does not change between a call and its
    derivatives. Modes (autocast, `TorchFunctionMode`) are those of the call. Inputs that fn does not use have a derivative of
    zeros, which `backward` writes to `grad` where it would leave None.

    Raises ValueError where fn is not callable; where it uses a tensor that is differentiated or mapped over and that is not
    among its arguments (its derivative would be lost), a parameter with `requires_grad` included; and where it draws
    from torch's global generators, as dropout does (other numbers would come at the next evaluation).

    Griewank and Walther (2000), doi:10.1145/347837.347846; Chen et al. (2016), arXiv:1604.06174.

    >>> cube = remat(lambda x: x * x * x)
    >>> x = torch.tensor(2.0)
    >>> float(cube(x)), float(grad(cube)(x)), float(jvp(grad(cube), (x,), (torch.tensor(1.0),))[1])
    (8.0, 12.0, 12.0)
    >>> weight = torch.tensor(3.0)
    >>> grad(lambda w: remat(lambda x: w * x)(x))(weight)
    Traceback (most recent call last):
    ValueError: the function given to `remat` uses a tensor of shape () that is not among its arguments...
    """
    if not callable(fn):
        raise ValueError(
            f"`fn` must be a function or a module, got {type(fn).__name__}: call what `remat(fn)` returns on the arguments."
        )

    def call(*args: Any, **kwargs: Any) -> Any:
        if not isinstance(fn, nn.Module):
            return _call(fn, args, kwargs)
        state = {**dict(fn.named_parameters()), **dict(fn.named_buffers())}
        return _call(lambda state, args, kwargs: functional_call(fn, state, args, kwargs), (state, args, kwargs), {})

    return call if isinstance(fn, nn.Module) else functools.wraps(fn, updated=())(call)


def _call(fn: Callable, args: Any, kwargs: Any) -> Any:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    place = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[i] for i in place]
    modes = _get_current_function_mode_stack()
    for mode in modes:
        if isinstance(mode, _Watch):
            mode.door.check(tensors)  # inside another `remat`: `apply` is no call that a mode sees
    rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    result: dict[str, Any] = {}

    def flat(*xs: Tensor) -> tuple[Tensor, ...]:
        full = list(rest)
        for i, x in zip(place, xs, strict=True):
            full[i] = x
        args, kwargs = pytree.tree_unflatten(full, spec)
        with ExitStack() as stack:
            for context in surroundings():
                stack.enter_context(context)
            out, result["spec"] = pytree.tree_flatten(fn(*args, **kwargs))
        result["rest"] = [None if isinstance(leaf, Tensor) else leaf for leaf in out]
        result["place"] = [i for i, leaf in enumerate(out) if isinstance(leaf, Tensor)]
        return tuple(out[i] for i in result["place"])

    surroundings = _surroundings(modes, {x.device.type for x in tensors})
    values = _Remat.apply(flat, _Door(), *tensors)
    out = result["rest"]
    for i, value in zip(result["place"], values, strict=True):
        out[i] = value
    return pytree.tree_unflatten(out, result["spec"])


class _Remat(torch.autograd.Function):
    """`fn(*xs)`, of which the pull and the push are `_Remat` again. door: what the first evaluation passes; None later."""

    @staticmethod
    def forward(fn: Flat, door: _Door | None, *xs: Tensor) -> tuple[Tensor, ...]:
        inside = tuple(x.detach() for x in xs)
        out = fn(*inside) if door is None else door.first(fn, inside)
        memory = {x.untyped_storage()._cdata for x in inside}
        seen: set[int] = set()
        return tuple(
            x.clone() if x.untyped_storage()._cdata in memory or id(x) in seen or seen.add(id(x)) else x  # type: ignore[func-returns-value]
            for x in out
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.fn, _, *xs = inputs
        ctx.num, ctx.real = len(output), [i for i, y in enumerate(output) if _real(y)]
        ctx.mark_non_differentiable(*(y for y in output if not _real(y)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*xs)
        ctx.save_for_forward(*xs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        xs = ctx.saved_tensors
        wrt = [i for i, x in enumerate(xs) if ctx.needs_input_grad[i + 2] and _real(x)]
        ys = [i for i in ctx.real if cotangents[i] is not None]
        grads: list[Tensor | None] = [None] * len(xs)
        if wrt and ys:
            fn = ctx.fn

            def pulled(*args: Tensor) -> tuple[Tensor, ...]:
                points, bars = args[: len(xs)], args[len(xs) :]
                return vjp(_part(fn, points, wrt, ys), *(points[i] for i in wrt))[1](bars)

            for i, value in zip(wrt, _Remat.apply(pulled, None, *xs, *(cotangents[i] for i in ys)), strict=True):
                grads[i] = value
        return None, None, *grads

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        xs, ys, moved = ctx.saved_tensors, ctx.real, tangents[2:]
        wrt = [i for i, x in enumerate(xs) if moved[i] is not None and _real(x)]
        fn = ctx.fn
        out: list[Tensor | None] = [None] * ctx.num

        def pushed(*args: Tensor) -> tuple[Tensor, ...]:
            points, dots = args[: len(xs)], args[len(xs) :]
            return jvp(_part(fn, points, wrt, ys), tuple(points[i] for i in wrt), dots)[1]

        for i, value in zip(ys, _Remat.apply(pushed, None, *xs, *(moved[i] for i in wrt)), strict=True):
            out[i] = value
        return tuple(out)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], fn: Flat, door: _Door | None, *xs: Tensor) -> Any:
        rows = torch.vmap(fn, in_dims=in_dims[2:], randomness=info.randomness)
        out = _Remat.apply(rows, door, *xs)
        return out, (0,) * len(out)


def _part(fn: Flat, points: Sequence[Tensor], wrt: Sequence[int], ys: Sequence[int]) -> Flat:
    """Some of the results as a function of some of the inputs."""

    def part(*moved: Tensor) -> tuple[Tensor, ...]:
        full = list(points)
        for i, x in zip(wrt, moved, strict=True):
            full[i] = x
        out = fn(*full)
        return tuple(out[i] for i in ys)

    return part


def _real(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _surroundings(modes: Sequence[Any], devices: set[str]) -> Callable[[], Iterator[Any]]:
    """What is switched on at the call, to be switched on again whenever the function is evaluated."""
    modes = list(dict.fromkeys(mode for mode in modes if not isinstance(mode, _Watch)))
    casts = [
        (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        for device in sorted(devices | {"cpu"})
        if torch.amp.is_autocast_available(device)
    ]

    def contexts() -> Iterator[Any]:
        for device, dtype, enabled in casts:
            yield torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
        yield from modes

    return contexts


class _Door:
    """Watches the first evaluation: every tensor comes from the arguments or is a constant, and none is drawn.

    `torch.func` numbers its nested transforms, and an autograd function is evaluated outside of them all. Idle ones are put in
    their place and one more, whose number all that fn computes bears: a tensor of a smaller one comes from outside.
    """

    def __init__(self) -> None:
        self.depth = torch._C._functorch.get_dynamic_layer_stack_depth()
        self.reverse = torch.is_grad_enabled()
        if forward_ad._current_level >= 0 and eager_transforms.JVP_NESTING == 0:
            raise ValueError("`remat` does not take `forward_ad.dual_level`, which cannot be nested: use `torch.func.jvp`.")

    def first(self, fn: Flat, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        devices = {x.device for x in xs} | {torch.device("cpu")}
        before, versions = _generators(devices), _versions(xs)
        out = _nested(self.depth + 1 if self.depth else 0, lambda: self._watched(fn, xs))
        if not all(map(torch.equal, before, _generators(devices))):
            raise ValueError(
                "the function given to `remat` draws random numbers, and would draw others when it is evaluated again: switch "
                "dropout off (`eval()`), or draw before and pass the numbers as an argument."
            )
        if _versions(xs) != versions:
            raise ValueError(
                "the function given to `remat` writes to its arguments (a module: to its buffers), and would find other values "
                "when it is evaluated again: write to a clone, and return what is new."
            )
        return out

    def _watched(self, fn: Flat, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with _Watch(self):
            return self.check(fn(*xs))

    def check(self, tree: Any) -> Any:
        for x in pytree.tree_leaves(tree):
            if isinstance(x, Tensor) and self._foreign(x):
                raise ValueError(
                    f"the function given to `remat` uses a tensor of shape {tuple(x.shape)} that is not among its arguments and "
                    "is differentiated or mapped over outside, so that a derivative would be lost: pass it as an argument (the "
                    "parameters of a module: `remat(module)`)."
                )
        return tree

    def _foreign(self, x: Tensor) -> bool:
        level = torch._C._functorch.maybe_get_level(x)
        if level > 0:
            return level <= self.depth
        return self.reverse and x.requires_grad


class _Watch(TorchFunctionMode):
    """Shows a door the arguments of every call."""

    METADATA = frozenset({"size", "dim", "numel", "is_floating_point", "is_complex", "stride", "is_contiguous", "__len__"})

    def __init__(self, door: _Door) -> None:
        super().__init__()
        self.door = door

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in self.METADATA:
            return func(*args, **kwargs)
        if name == "__get__":
            out = func(*args, **kwargs)
            if not isinstance(out, Tensor):
                return out
        self.door.check((args, kwargs))
        return func(*args, **kwargs)


def _nested(depth: int, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """`run()` inside `depth` transforms that differentiate nothing."""
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
