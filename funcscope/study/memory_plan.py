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
    net, num = loss.net, len(loss.batches)
    whole, vectors = graph_bytes(loss, theta), 3 * theta.nbytes
    options = [
        (True, False, FIRST + FURTHER * (num - 1), "the graphs of all batches"),
        (False, False, ANEW, "graphs made anew"),
    ]
    sizes = {False: whole / GIB}
    names = layer_names(net._skeleton)
    if names and not net.remat:
        apart = graph_bytes(in_remat(loss), theta)
        sizes[True] = apart / GIB
        options += [
            (True, True, FIRST + FURTHER * (num - 1), "layers in remat"),
            (False, True, ANEW, "layers in remat, anew"),
        ]
    tried = []
    for keep, remat, times, what in options:
        one = (FIRST if keep else ANEW) * sizes[False] / len(names) if remat else 0.0  # a layer that is computed again
        need = times * sizes[remat] + one + vectors / GIB
        tried.append(f"{what}: {need:.2g} GiB")
        if need <= gib:
            break
    why = "" if len(tried) == 1 else "; ".join(tried) + ("" if need <= gib else ", which is too much")
    return MemoryPlan(keep, remat, need, why)


def in_remat(loss: Loss) -> Loss:
    """The same loss, its layers rematerialised."""
    return replace(loss, net=replace(loss.net, remat=layer_names(loss.net._skeleton)))


def _size(batch: tuple[Any, Any]) -> int:
    return sum(x.numel() for x in torch.utils._pytree.tree_leaves(batch) if isinstance(x, Tensor))
