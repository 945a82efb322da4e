"""Patterns of a forward pass, a block of queries at a time, and what its mask leaves to see."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.anatomy import Body
from ..core.checks import check_instance
from ..core.forward import Inputs
from ..core.layout import Params
from ..core.model import Functional
from ..core.objective import Loss
from ..core.trace import Trace, pattern_blocks, sites_of, trace

MOST_ENTRIES = 2**21
"""Of a block of patterns."""


def not_finite(what: str, *values: Tensor | float) -> list[str]:
    """The note of a result in which a number is nan or infinite that data and weights as they should be do not make so."""
    bad = any(not bool(torch.as_tensor(each).isfinite().all()) for each in values)
    return [f"{what} not finite, and what is made of it undefined: check the weights."] if bad else []


def token_ids(inputs: Inputs) -> Int[Tensor, "b t"]:
    """Of a batch. Raises ValueError for one that has embeddings alone."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs[0] if isinstance(inputs, tuple) else inputs
    if ids is None:
        raise ValueError("`inputs` must have `input_ids`: embeddings and sound do not say which tokens they are.")
    return ids  # type: ignore[no-any-return]


def attributed_ids(body: Body, inputs: Inputs) -> Int[Tensor, "b t"]:
    """Token ids whose embedding is all that `tok_embed` adds to the stream. Raises ValueError for other inputs."""
    types = inputs.get("token_type_ids") if isinstance(inputs, Mapping) else None
    if types is not None and body.kind != "bert":
        raise ValueError(f"`token_type_ids` of {body.kind!r} are no part that is attributed to: leave them out.")
    return token_ids(inputs)


def sequence_at(loss: Loss, sequence: int) -> Inputs:
    """One sequence of the data, with its padding. Raises ValueError for one that is not there."""
    check_instance("loss", loss, Loss, "`objective(functional(model), batches, criterion)`")
    batches = loss.split(1).batches
    if not 0 <= sequence < len(batches):
        raise ValueError(f"`sequence` must be one of the {len(batches)} of the data, from 0 on, got {sequence}.")
    return batches[sequence][0]


def pattern_sites(net: Functional) -> tuple[str, str]:
    """The queries and keys that patterns are made of."""
    kind = "rot_" if "rot_q.0" in sites_of(net) else ""
    return f"{kind}q", f"{kind}k"


def traced(net: Functional, params: Params, inputs: Inputs, *sites: str) -> Trace:
    """A pass with the queries and keys that patterns are made of, and other sites."""
    return trace(net, params, inputs, [*pattern_sites(net), *sites])


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
    kind = "rot_" if f"rot_q.{layer}" in seen.values and f"rot_k.{layer}" in seen.values else ""
    return seen.values[f"{kind}q.{layer}"], seen.values[f"{kind}k.{layer}"]
