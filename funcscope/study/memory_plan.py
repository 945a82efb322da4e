"""How a metric's products are to be made so that they fit: whole graphs, graphs made anew, or layers rematerialised.

One forward pass says what a graph of one batch holds; what derivatives of it take are multiples of that, measured of GPT-2
and Llama models. No number depends on the choice beyond rounding: all make the same products.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..core.imported import layer_names
from ..core.objective import Loss

FIRST, FURTHER, ANEW = 5.5, 3.5, 8.5
"""Graphs of one batch that a kept Hessian product takes for its first batch and for each further one, and that one made anew
takes; a Gauss-Newton product takes less."""
WAYS = (
    (True, False, "the graphs of all batches"),
    (False, False, "graphs made anew"),
    (True, True, "layers in remat"),
    (False, True, "layers in remat, anew"),
)
"""keep, remat, and their name, by the time that a product takes."""
GIB = 2**30
_KNOWN: WeakKeyDictionary[Loss, int] = WeakKeyDictionary()


class MemoryPlan(NamedTuple):
    """How to make products, and why."""

    keep: bool
    remat: bool
    gib: float
    """That they are expected to take."""
    why: str
    """What was expected of the ways that were tried; empty where the first one fits."""


def graph_bytes(loss: Loss, theta: Tensor) -> int:
    """What reverse mode keeps of a forward pass over the largest batch: the storages that it saves, each once."""
    if loss in _KNOWN:
        return _KNOWN[loss]
    held: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        held[storage._cdata] = storage
        return x

    batch = max(loss.batches, key=_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.enable_grad():
        point = theta.detach().clone().requires_grad_()
        value = Loss(loss.net, (batch,), loss.criterion)(point)
    _KNOWN[loss] = sum(storage.nbytes() for storage in held.values())
    del value
    return _KNOWN[loss]


def memory_plan(loss: Loss, theta: Tensor, gib: float | int) -> MemoryPlan:
    """The first of four ways that fits into so much memory, by what they cost in time; the last where none does."""
    kept, whole = FIRST + FURTHER * (len(loss.batches) - 1), graph_bytes(loss, theta)
    names = () if loss.net.remat else layer_names(loss.net._skeleton)
    tried = []
    for keep, remat, what in WAYS if names else WAYS[:2]:
        need = (kept if keep else ANEW) * (graph_bytes(in_remat(loss), theta) if remat else whole) + 3 * theta.nbytes
        if remat:  # one layer, computed again
            need += (FIRST if keep else ANEW) * whole / len(names)
        tried.append(f"{what}: {need / GIB:.2g} GiB")
        if need / GIB <= gib:
            break
    why = "" if need / GIB <= gib and len(tried) == 1 else "; ".join(tried)
    return MemoryPlan(keep, remat, need / GIB, why + (", which is too much" if need / GIB > gib else ""))


def in_remat(loss: Loss) -> Loss:
    """The same loss, its layers rematerialised."""
    return replace(loss, net=replace(loss.net, remat=layer_names(loss.net._skeleton)))


def _size(batch: tuple[Any, Any]) -> int:
    return sum(x.numel() for x in torch.utils._pytree.tree_leaves(batch) if isinstance(x, Tensor))
