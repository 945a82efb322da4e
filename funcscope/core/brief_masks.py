"""Attention masks in brief, three numbers a position: which keys a query may see is an interval, less the padding."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def brief(
    visible: Bool[Tensor, "b 1 1 t"], first: Int[Tensor, "*b t"] | None, last: Int[Tensor, " t"] | None
) -> Int[Tensor, "b 1 3 t"]:
    """A mask in three rows: may the key be seen, the first key that a query may see, the one after the last.

    first, last: None where queries see all.
    """
    num = visible.shape[-1]
    begin, end = (
        x if x is not None else visible.new_full((num,), y, dtype=torch.int32) for x, y in ((first, 0), (last, num))
    )
    rows = (visible[:, 0, 0], *(x.expand(visible.shape[0], num) for x in (begin, end)))
    return torch.stack([x.to(torch.int32) for x in rows], 1)[:, None]


def is_brief(mask: Any) -> TypeGuard[Tensor]:
    """Whether a mask is one in brief."""
    return (
        isinstance(mask, Tensor)
        and mask.ndim == 4
        and mask.dtype is torch.int32
        and mask.shape[-2] == 3 != mask.shape[-1]
    )


def spelt_out(
    mask: Int[Tensor, "b 1 3 t"], queries: slice = slice(None), keys: slice = slice(None)
) -> Bool[Tensor, "b 1 q k"]:
    """Which queries of a range may look at which keys of another."""
    visible, first, last = mask.unbind(-2)
    key = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)[keys]
    within = (key >= first[..., queries, None]) & (key < last[..., queries, None])
    return within & visible[..., None, keys].bool()


def additive(allowed: Bool[Tensor, "*b q k"], dtype: torch.dtype) -> Float[Tensor, "*b q k"]:
    """0 where a query may look, a large negative number elsewhere.

    The query of a padding token may look at nothing; it has -1 everywhere, as a softmax over nothing is nan, and its
    output is read by nobody. The number is one that float32 holds: some models take the softmax in float32 always.
    """
    hidden = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    rows = torch.full((*allowed.shape[:-1], 1), hidden, dtype=dtype, device=allowed.device)
    return torch.where(allowed, rows.new_zeros(()), rows.masked_fill(~allowed.any(-1, keepdim=True), -1))
