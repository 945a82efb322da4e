"""Argument checks: each message names the argument, the rule, the value, and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from inspect import signature
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def check_flat(name: str, vector: Tensor, num: int) -> None:
    """`vector` is a floating vector of shape (num,)."""
    if not isinstance(vector, Tensor):
        raise TypeError(
            f"`{name}` must be a flat tensor, got a {type(vector).__name__}. Parameter dicts become flat vectors with "
            "`net.layout.ravel(params)`, arrays with `torch.as_tensor`; for a module pass `fs.functional(model)` as an end "
            "of a path, and its `theta` elsewhere."
        )
    if tuple(vector.shape) != (num,):
        raise ValueError(
            f"`{name}` must be a flat vector of shape ({num},), got {tuple(vector.shape)}. "
            "Parameter dicts become flat vectors with `net.layout.ravel(params)`."
        )
    if not vector.is_floating_point():
        raise TypeError(f"`{name}` must hold floating-point numbers, got {vector.dtype}.")


def check_instance(name: str, value: object, kind: type, remedy: str) -> None:
    """`value` is of that kind; the remedy is how one is made."""
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must be a {kind.__name__}, got a {type(value).__name__}: {remedy}.")


def check_options(name: str, function: Callable[..., Any], options: Iterable[str]) -> None:
    """Every option is an argument of the function that they are passed on to."""
    known = [each for each, what in signature(function).parameters.items() if what.kind is what.KEYWORD_ONLY]
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"`{name}` has no option `{unknown[0]}`: beside its own arguments it takes {', '.join(known)}.")


def check_names(given: Mapping[str, Any], expected: Iterable[str], what: str) -> None:
    """`given` has exactly these keys: functional_call would ignore unknown ones without a word."""
    names = set(expected)
    if given.keys() == names:
        return
    unknown = sorted(given.keys() - names)[:3]
    missing = sorted(names - given.keys())[:3]
    raise ValueError(
        f"`{what}` must have the {len(names)} names of `net.layout.names`; unknown: {unknown}, missing: {missing}. "
        "Tied and frozen parameters are not among them."
    )


def check_finite_params(params: Mapping[str, Tensor], what: str) -> None:
    """No entry is nan or infinite: `what` is not defined there."""
    for name, value in params.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"`{name}` is not finite, where {what} not defined: look at the weights.")


def check_finite_loss(value: float, params: Mapping[str, Tensor]) -> None:
    """What is measured around theta is compared with the loss there."""
    if not math.isfinite(value):
        raise ValueError(
            f"the loss at theta is {value}: nothing around it can be measured. Check the weights and the batch (an attention "
            f"mask of zeros, an overflow in half precision).{said_not_finite(params)}"
        )


def said_not_finite(params: Mapping[str, Tensor]) -> str:
    """A sentence that names the weights with entries that are not finite; empty where there are none."""
    bad = [name for name, value in params.items() if not bool(value.isfinite().all())]
    if not bad:
        return ""
    others = f", and {len(bad) - 1} more of the weights have" if len(bad) > 1 else ""
    return f" `{bad[0]}` has entries that are not finite{others}: the checkpoint itself is broken."


def check_params(given: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """`given` has exactly these names and shapes: a wrong shape might broadcast."""
    check_names(given, shapes, what)
    for name, shape in shapes.items():
        if tuple(given[name].shape) != shape:
            raise ValueError(f"`{what}[{name!r}]` must have shape {shape}, got {tuple(given[name].shape)}.")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """`value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_flag(name: str, value: object) -> None:
    """True or False: a word would count as True whatever it says."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def check_positive(name: str, value: float) -> None:
    """`value` is a finite number above zero."""
    if not (isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be a finite number above 0, got {value!r}.")


def check_number(name: str, value: float, least: float = -math.inf, most: float = math.inf) -> None:
    """`value` is a finite number between two bounds, which it may equal."""
    if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and least <= value <= most):
        lower = f" of at least {least:g}" if least > -math.inf and most == math.inf else ""
        range_ = f" in [{least:g}, {most:g}]" if most < math.inf else ""
        raise ValueError(f"`{name}` must be a finite number{lower}{range_}, got {value!r}.")


def check_mask(name: str, mask: Tensor, num: int) -> None:
    """`mask` has True or False for each of `num` parameters: other numbers would be added up as they are."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (num,):
        what = f"{tuple(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"`{name}` must be a mask of {num} parameters of torch.bool, got {what}: the `mask` of `pruning_mask`, or "
            "`score > threshold`."
        )


def check_count(name: str, value: int, least: int = 1) -> None:
    """`value` is an integer, and not smaller than `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")


def check_device(what: str, device: torch.device, other: str, other_device: torch.device) -> None:
    """Two things that meet in one computation lie on one device."""
    if device != other_device:
        raise ValueError(
            f"{what} is on {device}, {other} on {other_device}: move both to one device, "
            f"for example with `.to('{other_device}')`."
        )
