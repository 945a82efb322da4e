r"""Softmax attention over blocks of queries, its pullback and the derivatives of that, in closed form.

With $P = \mathrm{softmax}(s Q K^\top + M)$ by rows, $O = P V$, a dot for the derivative along $(\dot Q, \dot K, \dot V)$ and
rows(X) for the sums of X over keys,

$$\bar V = P^\top G, \quad \bar P = G V^\top, \quad \bar S = P \circ (\bar P - \mathrm{rows}(P \circ \bar P)), \quad
  \bar Q = s \bar S K, \quad \bar K = s \bar S^\top Q,$$
$$\dot S = s (\dot Q K^\top + Q \dot K^\top), \quad \dot P = P \circ (\dot S - \mathrm{rows}(P \circ \dot S)), \quad
  \dot O = \dot P V + P \dot V,$$
$$\dot{\bar P} = G \dot V^\top, \quad \dot{\bar S} = \dot P \circ (\bar P - \mathrm{rows}(P \circ \bar P))
  + P \circ (\dot{\bar P} - \mathrm{rows}(\dot P \circ \bar P + P \circ \dot{\bar P})),$$

and the derivatives of $\bar Q, \bar K, \bar V$ at a constant G follow by the product rule. The pullback of the pullback is
this derivative along its cotangents, as second derivatives are symmetric. What no formula here says (`vmap`, third
derivatives) is left to torch, block by block.

Dao, Fu, Ermon, Rudra, Re (2022), arXiv:2205.14135, on the first pullback by blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vjp

from .brief_masks import additive, is_brief, spelt_out
from .remat import Formula, rematerialised

MOVED, COTANGENT = (0, 1, 2), 4
"""The places of queries, keys and values among the arguments, and of what is pulled back; between them is the mask."""


class Span(NamedTuple):
    """A block of queries, and the keys that it may see."""

    rows: slice
    keys: slice


class Block(NamedTuple):
    """Queries of the heads that share keys one below the other, (b k, g r, d), and what they may see, (b k, m, d)."""

    q: Tensor
    k: Tensor
    v: Tensor
    p: Tensor
    """What they pay to each key, (b k, g r, m)."""


class Moves(NamedTuple):
    """How the queries, keys and values of a block move."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    """Keys, and their moves beside them, (b k, m, 2 d)."""


class Room:
    """Memory for one block's scores after the other's: temporary tensors of many sizes leave holes in the heap.

    Each name is a part of its own, of the size of the largest block.
    """

    def __init__(self, like: Tensor, size: int):
        self.like, self.size = like, size
        self.parts: dict[str, Tensor] = {}

    def scores(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """x y^T, (b k, g r, d) and (b k, m, d) -> (b k, g r, m), written over what the part has held."""
        part = self.part(name, x.shape[0], x.shape[1], y.shape[1])
        return torch.bmm(x, y.mT, out=part)

    def part(self, name: str, *shape: int) -> Tensor:
        if name not in self.parts:
            self.parts[name] = self.like.new_empty(self.size)
        return self.parts[name][: math.prod(shape)].view(shape)


@dataclass(frozen=True, eq=False)
class Attention:
    """What is constant in one call: queries (b, g k, n, d), keys and values (b, k, m, d), outputs (b, n, g k, d).

    The mask is one in brief, one that is added, or of no entries where all see all.
    """

    scale: float
    groups: int
    """Heads of queries for each of keys."""
    spans: tuple[Span, ...]

    def formula(self) -> Formula:
        """Attention for `remat`, with its first and second derivatives."""
        push = Formula(self._push, self._pushed)
        of_cotangent = Formula(lambda *xs: self._push(*xs[:4], *xs[5:]), lambda *xs: self._pushed(*xs[:4], *xs[5:]))
        everything = (*MOVED, COTANGENT)
        pulls = {everything: Formula(self._second, self._seconds), (COTANGENT,): of_cotangent}
        pull = Formula(self._pull, self._pulled, pulls, {everything: Formula(self._along, self._moved)})
        return Formula(lambda *xs: (self._plain(*xs),), self._closed, {MOVED: pull}, {MOVED: push})

    # by torch

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        each = (rematerialised(partial(self._attended, at))(q[..., at.rows, :], k, v, mask) for at in self.spans)
        return torch.cat(list(each), 1)

    def _attended(self, at: Span, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (self._stacked(q) * self.scale) @ k[..., at.keys, :].flatten(0, 1).mT
        if mask.numel():
            apart = self._heads_apart(scores, mask) + self._part(mask, at, q.dtype)
            scores = apart.flatten(0, 1).flatten(1, 2)
        return self._apart(scores.softmax(-1) @ v[..., at.keys, :].flatten(0, 1), len(q))

    def _push(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *dots: Tensor) -> tuple[Tensor, ...]:
        return (jvp(lambda q, k, v: self._plain(q, k, v, mask), (q, k, v), dots)[1],)

    def _pull(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return vjp(lambda q, k, v: self._plain(q, k, v, mask), q, k, v)[1](g)

    def _second(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, g: Tensor, *bars: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return vjp(lambda q, k, v, g: self._pull(q, k, v, mask, g), q, k, v, g)[1](bars)

    def _along(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, g: Tensor, *dots: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return jvp(lambda q, k, v, g: self._pull(q, k, v, mask, g), (q, k, v, g), dots)[1]

    # in closed form

    def _closed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        out, room = _outputs(q, v), self._room(q)
        for at, one in self._blocks(q, k, v, mask, room):
            out[:, at.rows] = self._apart(one.p @ one.v, len(q))
        return (out,)

    def _pulled(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        dq, dk, dv, room = torch.empty_like(q), _sums(k), _sums(v), self._room(q)
        for at, one in self._blocks(q, k, v, mask, room):
            bar = self._beside(g[:, at.rows])
            slope = room.scores("slope", bar, one.v)
            slope.sub_(_rows(one.p, slope)).mul_(one.p)
            self._put(dq, at, slope @ one.k)
            _add(dk[:, at.keys], slope, one.q, self.scale)
            _add(dv[:, at.keys], one.p, bar)
        return dq, _like(dk, k), _like(dv, v)

    def _pushed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *dots: Tensor) -> tuple[Tensor, ...]:
        out, room = _outputs(q, v), self._room(q)
        for (at, one), moved in zip(self._blocks(q, k, v, mask, room), self._moves(k, *dots), strict=True):
            dp = self._bent(one, moved, room)
            out[:, at.rows] = self._apart(torch.baddbmm(dp @ one.v, one.p, moved.v), len(q))
        return (out,)

    def _seconds(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, g: Tensor, *bars: Tensor) -> tuple[Tensor, ...]:
        dq, dk, dv, dg, room = torch.empty_like(q), _sums(k), _sums(v), _outputs(q, v), self._room(q)
        for (at, one), moved in zip(self._blocks(q, k, v, mask, room), self._moves(k, *bars), strict=True):
            bar = self._beside(g[:, at.rows])
            dp = self._bent(one, moved, room)
            dg[:, at.rows] = self._apart(torch.baddbmm(dp @ one.v, one.p, moved.v), len(q))
            _add(dv[:, at.keys], dp, bar)
            slope, change = room.scores("slope", bar, one.v), room.scores("change", bar, moved.v)
            off = _rows(dp, slope) + _rows(one.p, change)
            slope.sub_(_rows(one.p, slope))
            bent = change.sub_(off).mul_(one.p).addcmul_(dp, slope)
            slope.mul_(one.p)
            self._put(dq, at, torch.baddbmm(bent @ one.k, slope, moved.k))
            _add(dk[:, at.keys], bent, one.q, self.scale)
            _add(dk[:, at.keys], slope, moved.q, self.scale)
        return dq, _like(dk, k), _like(dv, v), dg

    def _moved(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, g: Tensor, *dots: Tensor) -> tuple[Tensor, ...]:
        bent = self._seconds(q, k, v, mask, g, *dots[:3])
        return tuple(x + y for x, y in zip(bent[:3], self._pulled(q, k, v, mask, dots[3]), strict=True))

    # one block

    def _room(self, q: Tensor) -> Room:
        most = max((at.rows.stop - at.rows.start) * (at.keys.stop - at.keys.start) for at in self.spans)
        return Room(q, q.shape[0] * q.shape[1] * most)

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, room: Room) -> Iterator[tuple[Span, Block]]:
        """One after the other: each is written over the one before."""
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        for at in self.spans:
            rows, keys = self._stacked(q[..., at.rows, :]), k[:, at.keys]
            scores = room.scores("scores", rows * self.scale, keys)
            if mask.numel():
                self._heads_apart(scores, mask).add_(self._part(mask, at, q.dtype))
            p = torch.softmax(scores, -1, out=room.part("p", *scores.shape))
            yield at, Block(rows, keys, v[:, at.keys], p)

    def _moves(self, k: Tensor, *dots: Tensor) -> Iterator[Moves]:
        """Of each block."""
        k, (dk, dv) = k.flatten(0, 1), (x.flatten(0, 1) for x in dots[1:])
        both = torch.cat([k, dk], -1)
        for at in self.spans:
            yield Moves(self._stacked(dots[0][..., at.rows, :]), dk[:, at.keys], dv[:, at.keys], both[:, at.keys])

    def _bent(self, one: Block, moved: Moves, room: Room) -> Tensor:
        """How the softmax moves with its scores."""
        dots = room.scores("scores", torch.cat([moved.q, one.q], -1) * self.scale, moved.keys)
        return dots.sub_(_rows(one.p, dots)).mul_(one.p)

    def _heads_apart(self, scores: Tensor, mask: Tensor) -> Tensor:
        """(b k, g r, m) -> (b, k, g, r, m); where one mask serves a whole batch, that is as if it were of one."""
        return scores.unflatten(1, (self.groups, -1)).unflatten(0, (len(mask), -1))

    def _part(self, mask: Tensor, at: Span, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of a block, (b, 1, 1, r, m)."""
        rows = at.rows if mask.shape[-2] > 1 else slice(None)
        part = spelt_out(mask, *at) if is_brief(mask) else mask[..., rows, at.keys]
        return (additive(part, dtype) if part.dtype == torch.bool else part)[:, :, None]

    def _stacked(self, q: Tensor) -> Tensor:
        """(b, g k, r, d) -> (b k, g r, d)."""
        return q.unflatten(1, (-1, self.groups)).flatten(0, 1).flatten(1, 2)

    def _beside(self, g: Tensor) -> Tensor:
        """(b, r, g k, d) -> (b k, g r, d)."""
        return self._stacked(g.transpose(1, 2))

    def _apart(self, x: Tensor, num: int) -> Tensor:
        """(b k, g r, d) -> (b, r, g k, d)."""
        return x.unflatten(1, (self.groups, -1)).unflatten(0, (num, -1)).flatten(1, 2).transpose(1, 2)

    def _put(self, out: Tensor, at: Span, x: Tensor) -> None:
        """(b k, g r, d), times the scale, into the rows of (b, g k, n, d)."""
        out[..., at.rows, :] = self._apart(x, len(out)).transpose(1, 2) * self.scale


def _rows(p: Tensor, x: Tensor) -> Tensor:
    """Sums of products by rows; a product of matrices makes no tensor of the products."""
    return torch.einsum("brm,brm->br", p, x)[..., None]


def _add(out: Tensor, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
    """x^T y, times the scale, added to a part of a sum."""
    if out.dtype == x.dtype:
        out.baddbmm_(x.mT, y, alpha=scale)
    else:
        out.add_(x.mT @ y, alpha=scale)


def _sums(x: Tensor) -> Tensor:
    """Zeros (b k, m, d) that parts of a gradient are added to, in float32 at least."""
    return x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32)).flatten(0, 1)


def _like(total: Tensor, x: Tensor) -> Tensor:
    return total.view(x.shape).to(x.dtype)


def _outputs(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
