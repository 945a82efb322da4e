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
    """Queries of the heads that share keys one below the other, (b, k, g r, d), and what they may see, (b, k, m, d)."""

    q: Tensor
    k: Tensor
    v: Tensor
    p: Tensor
    """What they pay to each key, (b, k, g r, m)."""
    at: Span


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
        one = self._block(q, k, v, mask, at)
        return self._apart(one.p @ one.v)

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
        out = _outputs(q, v)
        for at in self.spans:
            one = self._block(q[..., at.rows, :], k, v, mask, at)
            out[:, at.rows] = self._apart(one.p @ one.v)
        return (out,)

    def _pulled(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        dq, dk, dv = torch.empty_like(q), _sums(k), _sums(v)
        for at in self.spans:
            one, bar = self._block(q[..., at.rows, :], k, v, mask, at), self._beside(g[:, at.rows])
            slope = bar @ one.v.mT
            slope.sub_(_rows(one.p, slope)).mul_(one.p)
            self._put(dq, at, slope @ one.k, self.scale)
            dk[..., at.keys, :].add_(slope.mT @ one.q, alpha=self.scale)
            dv[..., at.keys, :].add_(one.p.mT @ bar)
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    def _pushed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *dots: Tensor) -> tuple[Tensor, ...]:
        out = _outputs(q, v)
        for at in self.spans:
            one = self._block(q[..., at.rows, :], k, v, mask, at)
            moved = self._dots(one, *dots)
            out[:, at.rows] = self._apart(_bent(one.p, self._score_dots(one, moved)) @ one.v + one.p @ moved.v)
        return (out,)

    def _seconds(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, g: Tensor, *bars: Tensor) -> tuple[Tensor, ...]:
        dq, dk, dv, dg = torch.empty_like(q), _sums(k), _sums(v), _outputs(q, v)
        for at in self.spans:
            one, bar = self._block(q[..., at.rows, :], k, v, mask, at), self._beside(g[:, at.rows])
            moved = self._dots(one, *bars)
            dp = _bent(one.p, self._score_dots(one, moved))
            dg[:, at.rows] = self._apart(dp @ one.v + one.p @ moved.v)
            dv[..., at.keys, :].add_(dp.mT @ bar)
            slope, change = bar @ one.v.mT, bar @ moved.v.mT
            off = _rows(dp, slope) + _rows(one.p, change)
            slope.sub_(_rows(one.p, slope))
            bent = change.sub_(off).mul_(one.p).addcmul_(dp, slope)
            slope.mul_(one.p)
            self._put(dq, at, bent @ one.k + slope @ moved.k, self.scale)
            dk[..., at.keys, :].add_(bent.mT @ one.q + slope.mT @ moved.q, alpha=self.scale)
        return dq, dk.to(k.dtype), dv.to(v.dtype), dg

    def _moved(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, g: Tensor, *dots: Tensor) -> tuple[Tensor, ...]:
        bent = self._seconds(q, k, v, mask, g, *dots[:3])
        return tuple(x + y for x, y in zip(bent[:3], self._pulled(q, k, v, mask, dots[3]), strict=True))

    # one block

    def _block(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, at: Span) -> Block:
        """Of the queries of the block and of all keys."""
        num = q.shape[-2]
        q, k, v = self._stacked(q), k[..., at.keys, :], v[..., at.keys, :]
        scores = (q * self.scale) @ k.mT
        if mask.numel():
            part = (
                spelt_out(mask, *at)
                if is_brief(mask)
                else mask[..., at.rows if mask.shape[-2] > 1 else slice(None), at.keys]
            )
            part = additive(part, q.dtype) if part.dtype == torch.bool else part
            scores = (scores.unflatten(2, (self.groups, num)) + part[:, :, None]).flatten(2, 3)
        return Block(q, k, v, scores.softmax(-1), at)

    def _dots(self, one: Block, q: Tensor, k: Tensor, v: Tensor) -> Block:
        return Block(
            self._stacked(q[..., one.at.rows, :]), k[..., one.at.keys, :], v[..., one.at.keys, :], one.p, one.at
        )

    def _score_dots(self, one: Block, moved: Block) -> Tensor:
        both = torch.cat([moved.q, one.q], -1) * self.scale
        return both @ torch.cat([one.k, moved.k], -1).mT

    def _stacked(self, q: Tensor) -> Tensor:
        """(b, g k, r, d) -> (b, k, g r, d)."""
        return q if self.groups == 1 else q.unflatten(1, (-1, self.groups)).flatten(2, 3)

    def _beside(self, g: Tensor) -> Tensor:
        """(b, r, g k, d) -> (b, k, g r, d)."""
        return self._stacked(g.transpose(1, 2))

    def _apart(self, x: Tensor) -> Tensor:
        """(b, k, g r, d) -> (b, r, g k, d)."""
        return x.unflatten(2, (self.groups, -1)).flatten(1, 2).transpose(1, 2)

    def _put(self, out: Tensor, at: Span, x: Tensor, scale: float) -> None:
        """(b, k, g r, d) into the rows of (b, g k, n, d)."""
        out[..., at.rows, :] = x.unflatten(2, (self.groups, -1)).flatten(1, 2) * scale


def _rows(p: Tensor, x: Tensor) -> Tensor:
    return (p * x).sum(-1, keepdim=True)


def _bent(p: Tensor, dots: Tensor) -> Tensor:
    """How a softmax moves with its scores; overwrites these."""
    return dots.sub_(_rows(p, dots)).mul_(p)


def _sums(x: Tensor) -> Tensor:
    """Zeros that parts of a gradient are added to, in float32 at least."""
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format)


def _outputs(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
