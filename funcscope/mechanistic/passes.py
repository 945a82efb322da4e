"""Patterns of a forward pass, a block of queries at a time, and what its mask leaves to see."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.forward import Inputs
from ..core.layout import Params
from ..core.model import Functional
from ..core.trace import Trace, pattern_blocks, sites_of, trace

MOST_ENTRIES = 2**21
"""Of a block of patterns."""


def traced(net: Functional, params: Params, inputs: Inputs, *sites: str) -> Trace:
    """A pass with the queries and keys that patterns are made of, and other sites."""
    kind = "rot_" if "rot_q.0" in sites_of(net) else ""
    return trace(net, params, inputs, [f"{kind}q", f"{kind}k", *sites])


def blocks_of(seen: Trace) -> list[slice]:
    """Queries whose patterns are made at once."""
    query, key = _queries_and_keys(seen, 0)
    size = max(1, MOST_ENTRIES // (len(query) * query.shape[2] * key.shape[1]))
    return [slice(first, min(first + size, query.shape[1])) for first in range(0, query.shape[1], size)]


def pattern_at(seen: Trace, layer: int, rows: slice) -> Float[Tensor, "b h n k"]:
    """The patterns of these queries, in float32 at least."""
    (query, key), kernel = _queries_and_keys(seen, layer), seen.kernels[layer]
    mask = None if kernel.mask is None else kernel.mask[:, :, rows]
    blocks = pattern_blocks(query[:, rows], key, kernel._replace(mask=mask), size=rows.stop - rows.start)
    _, pattern = next(blocks)
    return pattern.to(torch.promote_types(pattern.dtype, torch.float32))


def visible_to(seen: Trace, layer: int) -> Bool[Tensor, "b t t"]:
    """The keys that each query may look at; none for padding."""
    mask, both = seen.kernels[layer].mask, seen.mask[:, None] & seen.mask[:, :, None]
    return both if mask is None else both & (mask[:, 0] == 0)


def _queries_and_keys(seen: Trace, layer: int) -> tuple[Tensor, Tensor]:
    kind = "rot_" if f"rot_q.{layer}" in seen.values else ""
    return seen.values[f"{kind}q.{layer}"], seen.values[f"{kind}k.{layer}"]
