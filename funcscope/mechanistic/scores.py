"""What single attention patterns do: sums over queries of how concentrated, how far, and on which tokens they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.estimate import wide

SCORES = ("entropy", "distance", "self_attention", "sink", "previous", "duplicate", "induction")


class Scores(NamedTuple):
    """In the order of `SCORES`; the score of a head is its sum over the number of queries."""

    sums: Float[Tensor, "s b h"]
    """Over the queries of each sequence."""
    num: Float[Tensor, "s b"]
    """Queries that have such a score."""


class Sight(NamedTuple):
    """Which keys queries see."""

    visible: Bool[Tensor, "b t t"]
    """By query and key; nothing of padding."""
    first: Int[Tensor, "b t"]
    """The first token of the sequence that a token is in."""
    follows: Bool[Tensor, "b t"]
    """Whether the position before holds the token before of that sequence."""

    @classmethod
    def of(cls, visible: Bool[Tensor, "b t t"]) -> Sight:
        real = visible.diagonal(dim1=1, dim2=2)
        starts = real & ~visible.tril(-1).any(-1)
        place = torch.arange(visible.shape[1], device=visible.device)
        return cls(visible, (place * starts).cummax(1).values, real & real.roll(1, 1) & ~starts & (place > 0))


class Queries(NamedTuple):
    """Of a block of queries: what a score adds up."""

    place: Int[Tensor, " n"]
    first: Int[Tensor, "b n"]
    num_keys: Int[Tensor, "b n"]
    weights: Float[Tensor, "b n 3 k"]
    """Of the attention that a query pays to each key: the distance, and 1 for duplicates and for what followed them."""
    counts: Bool[Tensor, "s b n"]
    """Whether a query has such a score."""


def pattern_scores(
    pattern: Float[Tensor, "b h t t"], tokens: Int[Tensor, "b t"], visible: Bool[Tensor, "b t t"]
) -> Scores:
    r"""Scores of whole patterns A, summed over the queries of each sequence; see `attention_patterns` for what they are.

    visible: the keys that each query may look at, none for padding.

    >>> import torch
    >>> causal = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    >>> uniform = (causal / causal.sum(-1, keepdim=True))[None]
    >>> made = pattern_scores(uniform, torch.tensor([[5, 6, 5]]), causal)
    >>> dict(zip(SCORES, (made.sums[:, 0, 0] / made.num[:, 0]).tolist()))["entropy"]
    1.0
    """
    sight = Sight.of(visible)
    queries = queries_of(tokens, sight, slice(0, visible.shape[1]))
    return Scores(sums_of(pattern, queries), counted(queries))


def queries_of(tokens: Int[Tensor, "b t"], sight: Sight, rows: slice) -> Queries:
    """What the scores of these queries add up."""
    visible, place = sight.visible[:, rows], torch.arange(tokens.shape[1], device=tokens.device)
    query, num = place[rows], visible.sum(-1)
    earlier = visible & (place < query[:, None])
    before = tokens.roll(1, 1).where(sight.follows, -1)
    of = tokens[:, rows, None]
    duplicate, induction = earlier & (tokens[:, None] == of), earlier & (before[:, None] == of)
    distance = (place - query[:, None]).abs().expand_as(visible)
    some, first = num > 1, sight.first[:, rows]
    counts = [some, some, some, visible.gather(2, first[..., None])[..., 0], sight.follows[:, rows]]
    counts += [duplicate.any(-1), induction.any(-1)]
    weights = torch.stack([distance, duplicate, induction], 2).to(torch.float32)
    return Queries(query, first, num, weights, torch.stack(counts) & some)


def uniform_of(sight: Sight, rows: slice) -> Float[Tensor, "b 1 n k"]:
    """The pattern of a head that looks at all visible keys alike."""
    seen = sight.visible[:, None, rows].to(wide(sight.visible.device))
    return seen / seen.sum(-1, keepdim=True).clamp(min=1)


def sums_of(pattern: Float[Tensor, "b h n k"], queries: Queries) -> Float[Tensor, "s b h"]:
    """Sums over these queries of their scores."""
    each, total = torch.stack(list(_of_queries(pattern, queries))), wide(pattern.device)
    return torch.where(queries.counts[:, :, None], each, 0).sum(-1, dtype=total)


def counted(queries: Queries) -> Float[Tensor, "s b"]:
    """How many of these queries have each score."""
    return queries.counts.sum(-1, dtype=wide(queries.counts.device))


def _of_queries(pattern: Float[Tensor, "b h n k"], queries: Queries) -> Iterator[Float[Tensor, "b h n"]]:
    b, h, n, _ = pattern.shape
    distance, duplicate, induction = torch.einsum("bhnk,bnwk->wbhn", pattern, queries.weights.to(pattern.dtype))

    def at(keys: Int[Tensor, "#b n"]) -> Float[Tensor, "b h n"]:
        return pattern.gather(3, keys[:, None, :, None].expand(b, h, n, 1))[..., 0]

    yield torch.special.entr(pattern).sum(-1) / queries.num_keys.to(pattern.dtype).clamp(min=2).log()[:, None]
    yield distance
    yield at(queries.place[None])
    yield at(queries.first)
    yield at((queries.place[None] - 1).clamp(min=0))
    yield duplicate
    yield induction
