"""Modules of a model one by one, and the operations in them: whose derivatives are not those of its values?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..core.keys import Key, fold_in, normal
from ..core.pack import storable
from ..core.skeleton import TrueDerivatives
from .derivatives import METHODS, Calls, Scalar, Values, along, along_line
from .outputs import total_of
from .pullbacks import ONE_AT_A_TIME

_OFF = 1e-3
_LARGEST = 2**24
"""Numbers in one vector of everything that a module reads; larger ones are not looked at alone."""


Faults = dict[str, Literal["wrong", "missing"]]
"""Methods of differentiation that contradict the values, or that torch does not have; empty where all are right."""


@storable
@dataclass(frozen=True)
class Culprit:
    """A module, or the criterion, whose own derivatives are wrong or missing, and not because of a part of it.

    operations: the functions of torch that break alone what the module breaks; all that it calls where none does alone.
    """

    module: str
    kind: str
    operations: tuple[str, ...]
    wrong: tuple[str, ...]
    missing: tuple[str, ...]

    @classmethod
    def of(cls, module: str, kind: str, operations: tuple[str, ...], faults: Faults) -> Culprit:
        named = {what: tuple(way for way, fault in faults.items() if fault == what) for what in ("wrong", "missing")}
        return cls(module, kind, operations, **named)

    def __str__(self) -> str:
        faults = [f"{what}: {', '.join(ways)}" for what in ("wrong", "missing") if (ways := getattr(self, what))]
        return f"{self.module} ({self.kind}) calls {', '.join(self.operations)}; {'; '.join(faults)}"


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


def culprits_of(values: Values, theta: Tensor, key: Key) -> tuple[Culprit, ...]:
    """The modules, and the criterion, that break a derivative that no part of them breaks; each kind once."""
    net = replace(values.loss.net)  # a copy to be listened to
    loss = replace(values.loss, net=net, batches=values.loss.batches[:1])
    values = replace(values, loss=loss)
    out: list[Culprit] = []
    faults: dict[str, Faults] = {}
    calls, outputs = _calls(values, theta.to(torch.promote_types(values.dtype, torch.float32)))
    for call in calls:  # parts come before the whole
        f, at = _of_module(call, values), (call.weights, call.args, call.kwargs)
        inside = call.name and f"{call.name}."
        parts = {
            way for name, broken in faults.items() if name.startswith(inside) and name != call.name for way in broken
        }
        faults[call.name] = broken = faults_of(f, at, fold_in(key, call.name))
        if own := {way: fault for way, fault in broken.items() if way not in parts}:
            operations = _operations(f, at, broken, fold_in(key, call.name))
            out.append(Culprit.of(call.name or "the model", type(call.module).__name__, operations, own))
    name, targets = loss.criterion.name, loss.batches[0][1]
    with values.mode():
        own = faults_of(lambda z: total_of(loss.criterion, z, targets), (outputs,), fold_in(key, "the criterion"))
    return (*out, *([Culprit.of("the criterion", name, (name,), own)] if own else ()))


def faults_of(f: Callable[..., Any], at: tuple, key: Key) -> Faults:
    """The faults of a function of tensors, in all its floating arguments and outputs; none where values do not decide."""
    line = _line_of(f, at, key)
    if line is None:
        return {}
    phi, x, d = line
    with torch.no_grad():
        judges = along_line(lambda a: float(phi(x + a * d)))
    faults: Faults = {}
    for name, method in METHODS.items():
        try:
            with torch.enable_grad(), ONE_AT_A_TIME:
                value = along(method.of(phi, x)(d), d)
        except (NotImplementedError, RuntimeError):
            faults[name] = "missing"
            continue
        if judges[method.order - 1].contradicts(value, _OFF):
            faults[name] = "wrong"
    return faults


def _line_of(f: Callable[..., Any], at: tuple, key: Key) -> tuple[Scalar, Tensor, Tensor] | None:
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
        pairs = zip(weights, outputs(x), strict=True)
        return torch.stack([(w * out + 0.5 * out.square()).mean() for w, out in pairs]).sum()

    size = torch.where(x.std(correction=0) > 0, x.std(correction=0), 1.0)
    return phi, x, size * normal(fold_in(key, "direction"), x)


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() > 0


def _calls(values: Values, theta: Tensor) -> tuple[list[Call], Tensor]:
    """Every kind of call of a module in a forward pass over the first batch, parts before the whole; and the output."""
    calls: dict[tuple, Call] = {}
    handles, loss, net = [], values.loss, values.loss.net.whole
    for name, module in net._running.named_modules():

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], _: Any, name: str = name) -> None:
            weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            call = Call(name, module, *tree_map_only(Tensor, Tensor.detach, (weights, args, kwargs)))
            calls.setdefault(call.signature(), call)

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad(), ONE_AT_A_TIME, values.mode():
        outputs = net.apply(loss.params(theta), loss.batches[0][0])
    for handle in handles:
        handle.remove()
    return list(calls.values()), outputs


def _of_module(call: Call, values: Values) -> Callable[..., Any]:
    """The module as the judge runs it: with its own kernels, or with those that have derivatives."""

    def f(weights: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        with ExitStack() as stack:
            stack.enter_context(values.mode())
            if values.loss.net.attention != "keep":
                stack.enter_context(TrueDerivatives())
            return functional_call(call.module, weights, args, kwargs)

    return f


def _operations(f: Callable[..., Any], at: tuple, faults: Faults, key: Key) -> tuple[str, ...]:
    """The functions that break alone what the whole breaks; all names where none does."""
    called = Calls(arguments=True)
    line = _line_of(f, at, key)
    assert line is not None
    with torch.no_grad(), called:
        line[0](line[1])
    breaking = []
    for i, (name, func, args, kwargs) in enumerate(called.calls):
        alone = faults_of(lambda a, k, func=func: func(*a, **k), (args, kwargs), fold_in(key, i))
        if alone.items() & faults.items():
            breaking.append(name)
    if not breaking:
        with Calls() as called:
            try:
                grad(line[0])(line[1])  # inside a transform, a mode sees an `autograd.Function`, too
            except RuntimeError:
                line[0](line[1])
        own = [name for name in called.names if name.startswith("autograd.Function")]
        breaking = own or called.names
    return tuple(dict.fromkeys(breaking))
