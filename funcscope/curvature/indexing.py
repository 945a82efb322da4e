"""What operations of torch look up by index: rows of a table, and places of activations that values choose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_CHOOSING = frozenset({
    "__getitem__", "__setitem__", "gather", "index_add", "index_add_", "index_copy", "index_copy_", "index_put", "index_put_",
    "index_select", "masked_scatter", "masked_scatter_", "masked_select", "repeat_interleave", "scatter", "scatter_",
    "scatter_add", "scatter_add_", "take", "take_along_dim",
})  # fmt: skip


def chooses_places(name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    """A tensor chooses the places of activations, which a gradient goes through."""
    if name not in _CHOOSING:
        return False
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    return any(x.requires_grad for x in given) and any(not x.is_floating_point() for x in given)


def lookup(func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any, int | None, bool]:
    """Ids, table, the id of which no gradient is taken, and whether rows are written to or weighted by their number."""
    if func is torch.embedding:
        weight, ids, padding, by_count = named(("weight", "indices", "padding_idx", "scale_grad_by_freq"), args, kwargs)
        return ids, weight, padding, bool(by_count)
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")
    ids, weight, padding, most, _, by_count = named(names, args, kwargs)
    return ids, weight, padding, bool(by_count) or most is not None


def named(names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]
