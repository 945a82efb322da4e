"""Modules of a model one by one, and the operations in them: whose derivatives are not those of its values?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..core.directions import dot
from ..core.keys import Key, fold_in, normal
from ..core.objective import Loss
from ..core.skeleton import TrueDerivatives
from .audit_result import Culprit
from .differences import Derivative, along_line, in_float64
from .head import total_of
from .pullbacks import ONE_AT_A_TIME

_OFF = 1e-3
_LARGEST = 2**24
"""Numbers in one vector of everything that a module reads; larger ones are not looked at alone."""


class Call(NamedTuple):
    """One call of a module: what it was called with, and its weights at that time."""

    name: str
    module: nn.Module
    weights: dict[str, Tensor]
    args: tuple
    kwargs: dict[str, Any]

    def signature(self) -> tuple:
        """What decides its derivatives, but for values."""
        leaves, tree = tree_flatten((self.weights, self.args, self.kwargs))
        return type(self.module), self.module.extra_repr(), str(tree), tuple(getattr(x, "shape", None) for x in leaves)


class Faults(NamedTuple):
    """Ways to a derivative that are not those of the values, or that torch does not have."""

    wrong: tuple[str, ...]
    missing: tuple[str, ...]


def culprits_of(loss: Loss, theta: Tensor, key: Key) -> tuple[Culprit, ...]:
    """The modules, and the criterion, that break a derivative that no part of them breaks; each kind once."""
    loss = in_float64(loss)
    loss = Loss(
        loss.net.in_dtype(torch.float64), loss.batches[:1], loss.criterion
    )  # a skeleton of its own, to be listened to
    kernels, out = _Kernels(loss), []
    faults: dict[str, Faults | None] = {}
    calls, outputs = _calls(loss, theta.double())
    for call in calls:  # parts come before the whole
        f, at = _of_module(call, kernels), (call.weights, call.args, call.kwargs)
        faults[call.name] = broken = faults_of(f, at, fold_in(key, call.name))
        inside = [other for name, other in faults.items() if name != call.name and name.startswith(_prefix(call.name))]
        if broken and (own := _minus(broken, inside)):
            operations = _operations(f, at, broken, fold_in(key, call.name))
            out.append(
                Culprit(call.name or "the model", type(call.module).__name__, operations, own.wrong, own.missing)
            )
    targets = loss.batches[0][1]
    own = faults_of(lambda z: total_of(loss.criterion, z, targets), (outputs,), fold_in(key, "the criterion"))
    if own:
        out.append(Culprit("the criterion", loss.criterion.name, (loss.criterion.name,), own.wrong, own.missing))
    return tuple(out)


def faults_of(f: Callable[..., Any], at: tuple, key: Key) -> Faults | None:
    """The ways that are wrong or missing for a function of tensors alone, in all its floating arguments and outputs.

    None where all are right, or where values do not decide.
    """
    line = _line_of(f, at, key)
    if line is None:
        return None
    phi, x, d = line
    with torch.no_grad():
        judges = along_line(lambda a: float(phi(x + a * d)))
    wrong, missing = [], []
    for way, (order, take) in _ways(phi, x, d).items():
        try:
            with torch.enable_grad(), ONE_AT_A_TIME:
                value = float(take())
        except (NotImplementedError, RuntimeError):
            missing.append(way)
            continue
        if _off(value, judges[order - 1]):
            wrong.append(way)
    return Faults(tuple(wrong), tuple(missing)) if wrong or missing else None


def _off(value: float, judge: Derivative) -> bool:
    size = max(abs(value), abs(judge.value))
    return judge.error < _OFF * size and not abs(value - judge.value) <= 10 * judge.error + _OFF * size


def _ways(phi: Callable[[Tensor], Tensor], x: Tensor, d: Tensor) -> dict[str, tuple[int, Callable[[], Any]]]:
    zero, one = x.new_zeros(()), x.new_ones(())

    def rate(a: Tensor) -> Tensor:
        return jvp(lambda b: phi(x + b * d), (a,), (one,))[1]

    return {
        "gradient": (1, lambda: dot(grad(phi)(x), d)),
        "jvp": (1, lambda: rate(zero)),
        "vjp of grad": (2, lambda: dot(vjp(grad(phi), x)[1](d)[0], d)),
        "jvp of grad": (2, lambda: dot(jvp(grad(phi), (x,), (d,))[1], d)),
        "jvp of jvp": (2, lambda: jvp(rate, (zero,), (one,))[1]),
    }


def _line_of(f: Callable[..., Any], at: tuple, key: Key) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor] | None:
    """A number made of all outputs, as a function of one vector of all floating inputs; where it is, and a direction."""
    leaves, tree = tree_flatten(at)
    moving = [i for i, leaf in enumerate(leaves) if _is_real(leaf)]
    if not moving or sum(leaves[i].numel() for i in moving) > _LARGEST:
        return None

    def outputs(x: Tensor) -> list[Tensor]:
        parts = x.split([leaves[i].numel() for i in moving])
        values = list(leaves)
        for i, part in zip(moving, parts, strict=True):
            values[i] = part.view(leaves[i].shape)
        return [out for out in tree_flatten(f(*tree_unflatten(values, tree)))[0] if _is_real(out)]

    x = torch.cat([leaves[i].detach().reshape(-1) for i in moving])
    try:
        with torch.no_grad():
            weights = [normal(fold_in(key, i), out) for i, out in enumerate(outputs(x))]
    except (RuntimeError, TypeError, ValueError):  # called with what it is not called with alone
        return None
    if not weights:
        return None

    def phi(x: Tensor) -> Tensor:
        return torch.stack(
            [(w * out + 0.5 * out.square()).mean() for w, out in zip(weights, outputs(x), strict=True)]
        ).sum()

    size = torch.where(x.std(correction=0) > 0, x.std(correction=0), 1.0)
    return phi, x, size * normal(fold_in(key, "direction"), x)


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() > 0


def _calls(loss: Loss, theta: Tensor) -> tuple[list[Call], Tensor]:
    """Every kind of call of a module in a forward pass over the first batch, parts before the whole; and the output."""
    calls: dict[tuple, Call] = {}
    handles = []
    for name, module in loss.net._running.named_modules():

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], _: Any, name: str = name) -> None:
            weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            call = Call(name, module, *tree_map_only(Tensor, Tensor.detach, (weights, args, kwargs)))
            calls.setdefault(call.signature(), call)

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad(), ONE_AT_A_TIME:
        outputs = loss.net.apply(loss.params(theta), loss.batches[0][0])
    for handle in handles:
        handle.remove()
    return list(calls.values()), outputs


def _of_module(call: Call, kernels: _Kernels) -> Callable[..., Any]:
    def f(weights: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        with kernels():
            return functional_call(call.module, weights, args, kwargs)

    return f


class _Kernels:
    """How the net runs: with its own kernels, or with those that have derivatives."""

    def __init__(self, loss: Loss):
        self.own = loss.net.attention == "keep"

    def __call__(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        if not self.own:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(TrueDerivatives())
        return stack


def _operations(f: Callable[..., Any], at: tuple, faults: Faults, key: Key) -> tuple[str, ...]:
    """The functions that break alone what the whole breaks; all names where none does."""
    called = _Recorded()
    line = _line_of(f, at, key)
    assert line is not None
    with torch.no_grad(), called:
        line[0](line[1])
    guilty = []
    for i, (name, func, args, kwargs) in enumerate(called.calls):
        alone = faults_of(lambda a, k, func=func: func(*a, **k), (args, kwargs), fold_in(key, i))
        if alone and (set(alone.wrong) & set(faults.wrong) or set(alone.missing) & set(faults.missing)):
            guilty.append(name)
    if not guilty:
        with _Recorded() as called:
            try:
                grad(line[0])(line[1])  # inside a transform, a mode sees an `autograd.Function`, too
            except RuntimeError:
                line[0](line[1])
        own = [name for name in called.names if name.startswith("autograd.Function")]
        guilty = own or called.names
    return tuple(dict.fromkeys(guilty))


class _Recorded(TorchFunctionMode):
    """The functions of torch that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Callable, tuple, dict]] = []
        self.names: list[str] = []

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name == "custom_function_call":
            name = f"autograd.Function {args[0].__name__}"
        if name != "__get__":
            self.names.append(name)
        if name != "__get__" and not torch._C._functorch.peek_interpreter_stack():
            self.calls.append((name, func, *tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


def _prefix(name: str) -> str:
    return f"{name}." if name else ""


def _minus(faults: Faults, others: list[Faults | None]) -> Faults | None:
    """What is not explained by the parts."""
    wrong = {way for other in others if other for way in other.wrong}
    missing = {way for other in others if other for way in other.missing}
    own = Faults(
        tuple(way for way in faults.wrong if way not in wrong | missing),
        tuple(way for way in faults.missing if way not in missing | wrong),
    )
    return own if own.wrong or own.missing else None
