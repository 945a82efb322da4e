"""What tensors hold while something is computed: those of one call, whatever the allocator makes of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that tensors made in a call hold at once: not those from before it, nor what kernels use inside.

    The same at every call, on every device, as `memory.peak_growth` is not.

    >>> peak_bytes(lambda: torch.ones(1000) + torch.ones(1000))
    12000
    """
    with _Held() as held:
        call()
    return held.most


def saved_bytes(call: Callable[[], Any]) -> int:
    """What reverse mode keeps of a call: the storages that it saves, each once.

    >>> x = torch.ones(1000, requires_grad=True)
    >>> saved_bytes(lambda: (x * x).exp())              # x, and the result of exp
    8000
    """
    held: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        held[storage._cdata] = storage
        return x.detach()  # an operation that saves its own result would hold itself, where no collector sees it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.enable_grad():
        value = call()
    total = sum(storage.nbytes() for storage in held.values())
    del value
    return total


class _Held(TorchDispatchMode):
    """Counts storages from the operation that makes them until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see((args, kwargs), is_new=False)
        out = func(*args, **(kwargs or {}))
        self._see(out, is_new=True)
        return out

    def _see(self, tree: Any, *, is_new: bool) -> None:
        for x in tree_leaves(tree):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self.known:
                self.known[storage._cdata] = storage.nbytes() if is_new else 0
                self.now += self.known[storage._cdata]
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, number: int) -> None:
        self.now -= self.known.pop(number)
