"""Frozen values as a tree that JSON can say and the arrays in it, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

C = TypeVar("C", bound=type)

UNUSUAL = {"stored": "where it differs from its default"}
"""Metadata of a field that what is stored has only where it is not as usual."""

_CLASSES: dict[str, type] = {}
_DTYPES = {str(each).removeprefix("torch."): each for each in vars(torch).values() if isinstance(each, torch.dtype)}


class Packed(NamedTuple):
    arrays: dict[str, Any]
    """By their path in the tree, as "forms.terms"."""
    tree: dict[str, Any]


def storable(cls: C) -> C:
    """A dataclass or named tuple that `pack` takes, known by its name, and one of your own by that of its module, too.

    A class that is defined again, as in a notebook, takes the place of the one before.
    """
    other = _CLASSES.setdefault(_stored_name(cls), cls)
    if other.__module__ != cls.__module__:  # in the package a name means one thing
        raise TypeError(f"{other.__module__} has a class {cls.__name__} already: name this one otherwise.")
    _CLASSES[_stored_name(cls)] = cls
    return cls


def _stored_name(cls: type) -> str:
    ours = cls.__module__.partition(".")[0] == __name__.partition(".")[0]
    return cls.__name__ if ours else f"{cls.__module__}:{cls.__name__}"


def pack(value: Any) -> Packed:
    """Dataclasses and named tuples that are `storable`, of numbers, strings, tensors, arrays, tuples, lists, mappings.

    >>> from .keys import key
    >>> unpack(pack({"a": (1, math.inf), "k": key(3)})) == {"a": (1, math.inf), "k": key(3)}
    True
    """
    arrays: dict[str, Any] = {}
    return Packed(arrays, _packed(value, "", arrays))


def unpack(packed: Packed) -> Any:
    """What `pack` took. Raises ValueError for a class that is not here or has other fields, and for missing parts."""
    try:
        return _unpacked(packed.tree, packed.arrays)
    except (KeyError, TypeError) as err:
        raise ValueError(f"this is no stored result: {err} is missing or of another kind.") from err


def equal(one: Packed, other: Packed) -> bool:
    """Bit for bit, nan equal to nan."""
    # as text: in Python 1 is 1.0 and True, and -0.0 is 0.0
    if json.dumps(one.tree) != json.dumps(other.tree) or one.arrays.keys() != other.arrays.keys():
        return False
    return all(_same(torch.as_tensor(x), torch.as_tensor(other.arrays[path])) for path, x in one.arrays.items())


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool((((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())).all())


def _packed(value: Any, path: str, arrays: dict[str, Any]) -> Any:
    def inner(name: object, each: Any) -> Any:
        return _packed(each, f"{path}.{name}" if path else str(name), arrays)

    if isinstance(value, (Tensor, np.ndarray)):
        arrays[path] = value.detach().cpu() if isinstance(value, Tensor) else value
        return {"is": "tensor" if isinstance(value, Tensor) else "array", "at": path}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"is": "float", "value": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return {"is": "dtype", "value": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        pairs = [[inner(f"{i}k", key), inner(key, each)] for i, (key, each) in enumerate(value.items())]
        return {"is": "dict", "items": pairs}
    if type(value) is list:
        return [inner(i, each) for i, each in enumerate(value)]
    if type(value) is tuple:
        return {"is": "tuple", "items": [inner(i, each) for i, each in enumerate(value)]}
    usual = _usual(type(value))
    names = [name for name in _names(type(value)) if name not in usual or getattr(value, name) != usual[name]]
    return {"is": _stored_name(type(value)), "fields": {name: inner(name, getattr(value, name)) for name in names}}


def _names(cls: type) -> list[str]:
    if _stored_name(cls) not in _CLASSES:  # by name: a class that a notebook defines again is another object
        raise TypeError(f"a {cls.__name__} has no stored form: it is no number, array or result.")
    return [each.name for each in fields(cls)] if is_dataclass(cls) else list(cls._fields)  # type: ignore[attr-defined]


def _usual(cls: type) -> dict[str, Any]:
    marked = fields(cls) if is_dataclass(cls) else ()
    return {each.name: each.default for each in marked if each.metadata == UNUSUAL}


def _unpacked(tree: Any, arrays: Mapping[str, Any]) -> Any:
    if isinstance(tree, list):
        return [_unpacked(each, arrays) for each in tree]
    if not isinstance(tree, Mapping):
        return tree
    match tree.get("is"):
        case "tensor":
            return torch.as_tensor(arrays[tree["at"]])
        case "array":
            return np.asarray(arrays[tree["at"]])
        case "float":
            return float(tree["value"])
        case "dtype":
            return _DTYPES[tree["value"]]
        case "dict":
            return {_unpacked(key, arrays): _unpacked(each, arrays) for key, each in tree["items"]}
        case "tuple":
            return tuple(_unpacked(each, arrays) for each in tree["items"])
    cls, known = _CLASSES.get(str(tree.get("is"))), tree.get("fields", {})
    if cls is None or set(_names(cls)) != known.keys() | _usual(cls).keys():
        raise ValueError(
            f"no result of this version of funcscope: {tree.get('is')!r}. Import the module that defines it where it is a "
            "class of your own; otherwise compute it again."
        )
    return cls(**{name: _unpacked(each, arrays) for name, each in known.items()})
