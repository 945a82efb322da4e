"""Which parameters are matrices of affine maps, and the sums over positions that their Kronecker factors are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..core.apart import check_apart
from ..core.batches import cut
from ..core.batches import rows as rows_of
from ..core.estimate import wide
from ..core.objective import Loss
from ..linalg.kronecker import Kronecker
from ..linalg.low_rank import Scatter
from .gram import finite
from .kfac import Kfac, KroneckerBlock
from .leaf_gradients import LeafGradients, Outer, Part, row_chunks
from .uses import Affine, run


def affine_maps(loss: Loss, theta: Tensor) -> dict[str, Map]:
    """The weights that the first sequence uses as matrices alone, always with the same bias, which no other one has."""
    check_apart(loss, 1)
    params = {name: x.to(loss.net._dtypes[name]) for name, x in loss.params(theta).items()}
    batch = loss.batches[0]
    num = rows_of(batch)
    parts: dict[str, list[Part]] = {}
    uses: dict[str, list[Affine]] = {}

    def each(name: str, made: list[Part]) -> None:
        parts[name] = made

    def affine(use: Affine, _: Tensor) -> None:
        uses.setdefault(use.weight, []).append(use)

    first = batch if num is None else cut(batch, slice(0, 1), num)
    run(loss, params, first, 1, each, affine)
    maps = {}
    for name, several in uses.items():
        kinds = {(use.bias, use.transposed) for use in several}
        if len(kinds) == 1 and len(parts.get(name, ())) == len(several):
            bias, transposed = kinds.pop()
            alone = bias is not None and len(parts.get(bias, ())) == len(several)
            maps[name] = Map(bias if alone else None, transposed)
    return maps


class Map(NamedTuple):
    """How a weight is used."""

    bias: str | None
    transposed: bool

    def sides(self, part: Outer) -> tuple[Tensor, Tensor]:
        """Inputs, with a 1 for the bias, and gradients at the outputs: (n, t, i), (n, t, o)."""
        g, x = (part.right, part.left) if self.transposed else part
        return (x if self.bias is None else torch.nn.functional.pad(x, (0, 1), value=1.0)), g


class _Squares(NamedTuple):
    """Of one parameter in one draw."""

    g: float
    """Sum of squared gradients: at the outputs, or of the parameter itself."""
    x: float
    """Sum of squared inputs."""
    num: int
    """Positions."""


class Sums:
    """Sums over all positions of all draws."""

    def __init__(self, loss: Loss, maps: dict[str, Map]):
        self.layout, self.maps = loss.layout, maps
        self.a: dict[str, Scatter] = {}
        self.g: dict[str, Scatter] = {}
        self.squares: dict[str, Tensor] = {}
        self.draws: list[dict[str, _Squares]] = []

    def start(self) -> None:
        """Another draw."""
        self.draws.append({})

    def take(self, name: str, leaf: LeafGradients, at: slice) -> None:
        if name in self.maps and _is_outer(leaf):
            self._factor(name, leaf, at)
        else:
            made = entry_squares(leaf, name, at)
            self.squares[name] = self.squares.get(name, 0) + made
            self._traced(name, _Squares(float(made.sum()), 0.0, 0))

    def _factor(self, name: str, leaf: LeafGradients, at: slice) -> None:
        x, g = _seen(*self.maps[name].sides(leaf.parts[0]), name, at)  # type: ignore[arg-type]
        for side, rows in ((self.a, x), (self.g, g)):
            side.setdefault(name, Scatter(rows.shape[1])).add(rows)
        self._traced(name, _Squares(_total(g), _total(x), len(x)))

    def _traced(self, name: str, new: _Squares) -> None:
        old = self.draws[-1].get(name, _Squares(0.0, 0.0, 0))
        self.draws[-1][name] = _Squares(old.g + new.g, old.x + new.x, old.num + new.num)

    def factors(self, total: float, labels: Literal["model", "data"], theta: Tensor) -> Kfac:
        if both := sorted(self.a.keys() & self.squares.keys()):
            raise ValueError(
                f"`{both[0]}` is used as a matrix in one batch and otherwise in another: measure batches of one kind."
            )
        num = len(self.draws)
        blocks = {name: self._block(name, num * total, theta.dtype) for name in self.layout.names if name in self.a}
        joined = {self.maps[name].bias for name in blocks}
        others = [name for name in self.layout.names if name not in blocks and name not in joined]
        rest = torch.zeros_like(theta)
        for name in others:
            if name in self.squares:
                rest[self.layout.by_name[name].slice] = (self.squares[name].flatten() / (num * total)).to(rest)
        traces = [[*(self._trace(draw, b) for b in blocks), self._rest_trace(draw, others)] for draw in self.draws]
        return Kfac(blocks, rest, torch.tensor(traces).double() / total, labels, num, False, others)

    def _block(self, name: str, total: float, dtype: torch.dtype) -> KroneckerBlock:
        a, g, use = self.a[name], self.g[name], self.maps[name]
        product = Kronecker(a.mean(a.num, dtype), g.mean(g.num, dtype), a.num / total)
        return KroneckerBlock(
            product, self._span(name), self._span(use.bias) if use.bias else None, use.transposed, a.num
        )

    def _span(self, name: str) -> tuple[int, int]:
        leaf = self.layout.by_name[name]
        return leaf.slice.start, leaf.slice.stop

    def _trace(self, draw: dict[str, _Squares], name: str) -> float:
        one = draw.get(name, _Squares(0.0, 0.0, 0))
        return one.g * one.x / max(one.num, 1)

    def _rest_trace(self, draw: dict[str, _Squares], names: list[str]) -> float:
        return math.fsum(draw[name].g for name in names if name in draw)


def entry_squares(leaf: LeafGradients, name: str, at: slice) -> Tensor:
    """(r, c), wide: every entry's square, summed over sequences; a few rows of the parameter at a time."""
    if _is_outer(leaf) and leaf.parts[0][0].shape[1] == 1:
        left, right = (side[:, 0].square() for side in leaf.parts[0])
        out = left.T @ right
    else:
        out = torch.cat([each.sum(0) for each in _squares(leaf)])
    if not bool(out.isfinite().all()):
        for each in _squares(leaf):
            finite(each.sum((1, 2)), name, at)
    return out.to(wide(out.device))


def _squares(leaf: LeafGradients) -> Iterator[Tensor]:
    """(n, r', c): of a few rows at a time, all in one buffer."""
    buffer: Tensor | None = None
    for part in row_chunks(slice(None), leaf.shape[0], leaf.shape[1] * leaf.num):
        made = leaf.dense(part, slice(None), buffer)
        buffer = made.flatten() if buffer is None else buffer
        yield made.square_()


def _seen(x: Tensor, g: Tensor, name: str, at: slice) -> tuple[Tensor, Tensor]:
    """(u, i), (u, o): the positions with a gradient. Raises ValueError for one that is not finite."""
    largest = g.abs().amax(-1)
    if not bool(largest.isfinite().all() & torch.linalg.vector_norm(x, dim=-1).isfinite().all()):
        finite(x.abs().sum((1, 2)) + g.abs().sum((1, 2)), name, at)
    seen = largest != 0
    return (x.flatten(0, 1), g.flatten(0, 1)) if bool(seen.all()) else (x[seen], g[seen])


def _is_outer(leaf: LeafGradients) -> bool:
    return len(leaf.parts) == 1 and isinstance(leaf.parts[0], Outer)


def _total(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dim=-1).to(wide(x.device)).square().sum())
