"""What tells tensors apart by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BLOCK = 2**18
_WORDS = {1: torch.int8, 2: torch.int16}


def of_tensors(tensors: Iterable[Tensor]) -> str:
    """One sum over dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        _add_tensor(total, tensor)
    return total.hexdigest()


def of_tree(tree: Any) -> str:
    """The same of nested mappings, tuples and lists, with their names, numbers and strings; the kind of everything else.

    >>> of_tree({"x": torch.ones(2), "gain": 1.0}) == of_tree({"gain": 1.0, "x": torch.ones(2)})
    True
    >>> of_tree({"x": torch.ones(2), "gain": 1.0}) == of_tree({"x": torch.ones(2), "gain": 3.0})
    False
    """
    total = hashlib.sha256()
    _add(total, tree)
    return total.hexdigest()


def of_bits(x: Tensor) -> str:
    r"""Of dtype, shape and bits, made where the tensor lies and in little memory: the same on every device and machine.

    $\sum_i h_i w_i \bmod 2^{64}$ over the words $w_i$ of each block, at most 32 bits, with random $h_i$ of 64 bits, and one
    digest of these sums. Two blocks that differ in $d_i = w_i - w_i'$, of at most 31 factors of 2, have one sum for one in
    $2^{33}$ choices of $h_i$, whatever else differs.

    >>> x = torch.eye(2, dtype=torch.float64)
    >>> of_bits(x[0]) == of_bits(x[1]), of_bits(x[0]) == of_bits(-x[0]), of_bits(x[0]) == of_bits(x[0].clone())
    (False, False, True)
    """
    words = x.detach().reshape(-1).contiguous().view(_WORDS.get(x.element_size(), torch.int32))
    factors = _factors(x.device)
    sums = torch.stack([(part * factors[: len(part)]).sum() for part in words.split(_BLOCK)])
    return hashlib.blake2b(_head(x) + sums.cpu().numpy().tobytes(), digest_size=16).hexdigest()


@cache
def _factors(device: torch.device) -> Tensor:
    return torch.from_numpy(np.random.Philox(key=0).random_raw(_BLOCK).view(np.int64)).to(device)


def _add(total: Any, tree: Any) -> None:
    if isinstance(tree, Tensor):
        _add_tensor(total, tree)
    elif isinstance(tree, Mapping):
        total.update(f"{len(tree)} named ".encode())
        for name in sorted(tree, key=repr):
            _add(total, name)
            _add(total, tree[name])
    elif isinstance(tree, (tuple, list)):
        total.update(f"{len(tree)} listed ".encode())
        for value in tree:
            _add(total, value)
    else:
        plain = isinstance(tree, (bool, int, float, complex, str, bytes, type(None)))
        total.update(f"{type(tree).__qualname__} {tree!r}\0".encode() if plain else type(tree).__qualname__.encode())


def _add_tensor(total: Any, tensor: Tensor) -> None:
    plain = tensor.detach().cpu().contiguous()
    total.update(_head(plain))
    if plain.numel():
        total.update(plain.reshape(-1).view(torch.uint8).numpy().data)


def _head(x: Tensor) -> bytes:
    return f"{x.dtype} {tuple(x.shape)}".encode()
