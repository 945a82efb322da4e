"""Vectors of which every rank of a process group has a share: some rows of each parameter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .content import of_bits
from .keys import Distribution, Key, draw_spans
from .layout import Layout
from .processes import Processes
from .vectors import dot


@dataclass(frozen=True, eq=False)
class Rows:
    """How one parameter is cut over the ranks: equal numbers of rows, the last ranks fewer or none, as DTensor's Shard(0)."""

    name: str
    shape: tuple[int, ...]
    """Of the whole."""
    ranks: Processes

    @property
    def num(self) -> int:
        """Rows of the whole; a number has one."""
        return self.shape[0] if self.shape else 1

    @property
    def most(self) -> int:
        """Rows of the first rank."""
        return max(1, -(-self.num // self.ranks.num))

    def span(self, rank: int) -> tuple[int, int]:
        """Start and stop of a rank's rows."""
        return min(rank * self.most, self.num), min((rank + 1) * self.most, self.num)

    @property
    def own(self) -> slice:
        return slice(*self.span(self.ranks.rank))

    @property
    def own_shape(self) -> tuple[int, ...]:
        return (self.own.stop - self.own.start, *self.shape[1:])

    def whole(self, rows: Tensor) -> Tensor:
        """The parameter, from the rows of all ranks."""
        every = self.ranks.gathered_rows(_padded(rows, self.most), f"`{self.name}`")
        return every[: self.num].view(self.shape)

    def summed(self, whole: Tensor) -> Tensor:
        """This rank's rows of the sum over ranks, which is made in float32 at least."""
        wide = whole.reshape(self.num, *self.shape[1:]).to(torch.promote_types(whole.dtype, torch.float32))
        rows = self.ranks.summed_rows(_padded(wide, self.most * self.ranks.num), f"`{self.name}`")
        return rows[: self.own_shape[0]].to(whole.dtype)


class Gather(Function):
    r"""The rows of every rank $x = (x_1, \ldots, x_n)$ become the whole on each: $x \mapsto (x, \ldots, x)$.

    A linear map on what all ranks have together; its transpose is `Scatter`, $(y_1, \ldots, y_n) \mapsto \sum_r y_r$ cut
    into rows, and each is the derivative of the other. What is differentiated is so the sum over ranks of what each
    computes, at every order and in both modes.
    """

    @staticmethod
    def forward(rows: Tensor, cut: Rows) -> Tensor:
        return cut.whole(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
        ctx.cut = inputs[1]

    @staticmethod
    def backward(ctx: Any, whole: Tensor) -> tuple[Tensor, None]:
        return Scatter.apply(whole, ctx.cut), None

    @staticmethod
    def jvp(ctx: Any, rows: Tensor, _: None) -> Tensor:
        return Gather.apply(rows, ctx.cut)


class Scatter(Function):
    """The transpose of `Gather`: this rank's rows of the sum over ranks."""

    @staticmethod
    def forward(whole: Tensor, cut: Rows) -> Tensor:
        return cut.summed(whole)

    setup_context = staticmethod(Gather.setup_context)  # type: ignore[assignment]

    @staticmethod
    def backward(ctx: Any, rows: Tensor) -> tuple[Tensor, None]:
        return Gather.apply(rows, ctx.cut), None

    @staticmethod
    def jvp(ctx: Any, whole: Tensor, _: None) -> Tensor:
        return Scatter.apply(whole, ctx.cut)


class Total(Function):
    """The sum of a number over ranks, the same on each. Its cotangent is the same on each, too, and passes as it is."""

    @staticmethod
    def forward(x: Tensor, ranks: Processes) -> Tensor:
        return ranks.sum(x.clone(), "a total")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
        ctx.ranks = inputs[1]

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor, None]:
        return Copy.apply(bar, ctx.ranks), None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, _: None) -> Tensor:
        return Total.apply(x, ctx.ranks)


class Copy(Function):
    """The transpose of `Total`: a number that is the same on every rank, whose uses on all ranks count."""

    @staticmethod
    def forward(x: Tensor, _: Processes) -> Tensor:
        return x.clone()

    setup_context = staticmethod(Total.setup_context)  # type: ignore[assignment]

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor, None]:
        return Total.apply(bar, ctx.ranks), None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, _: None) -> Tensor:
        return Copy.apply(x, ctx.ranks)


@dataclass(frozen=True, eq=False)
class Shares:
    """The space of vectors of shape (P,) of which each rank has a share: its rows of every parameter, one after the other.

    Takes the place of `like` in `hutchinson_trace`, `eigenpairs` and `spectral_density`; made by `sharded_functional`, as
    `net.shares`. A vector is a plain one of shape (p,) on each rank, p the rank's own number; sums of two of them are
    shares of the sum, and products are summed over the ranks here.
    """

    whole: Layout
    """Of theta as one rank would have it."""
    rows: dict[str, Rows]
    like: Float[Tensor, " p"]
    """An empty vector of this rank's length, for its dtype and device."""
    ranks: Processes

    def __repr__(self) -> str:
        return f"Shares({len(self.like):,} of {self.num:,} parameters, rank {self.ranks.rank} of {self.ranks.num})"

    @property
    def num(self) -> int:
        """P, over all ranks."""
        return self.whole.num

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Where this rank's entries are in the whole vector."""
        out = []
        for leaf in self.whole.leaves:
            cut = self.rows[leaf.name]
            width = leaf.numel // max(1, cut.num)
            out.append((leaf.offset + cut.own.start * width, leaf.offset + cut.own.stop * width))
        return out

    def draw(self, key: Key, distribution: Distribution) -> Float[Tensor, " p"]:
        """This rank's part of what one rank would draw, without the rest."""
        self.ranks.note(f"{distribution} draws of {key!r}")
        return draw_spans(key, self.num, distribution, self.spans, device=self.like.device).to(self.like)

    def dot(self, x: Float[Tensor, " p"], y: Float[Tensor, " p"]) -> float:
        return float(self.summed(torch.tensor(dot(x, y) if len(x) else 0.0, dtype=torch.float64)))

    def summed(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The sum over ranks of a few float64 numbers on the CPU, the same bits on each."""
        return self.ranks.sum(x.to(self.ranks.device, copy=True), "an inner product").cpu()

    def of(self, vector: Float[Tensor, " P"]) -> Float[Tensor, " p"]:
        """This rank's share of a whole vector, which all ranks have."""
        self.ranks.note(of_bits(vector))
        return torch.cat([vector[start:stop] for start, stop in self.spans]).to(self.like)

    def gathered(self, v: Float[Tensor, " p"]) -> Float[Tensor, " P"]:
        """The whole vector on every rank, in the order of one rank's theta: for models that one rank can hold."""
        sizes = [stop - start for start, stop in self.spans]
        each = zip(self.whole.leaves, v.split(sizes), strict=True)
        parts = [self.rows[leaf.name].whole(part.view(self.rows[leaf.name].own_shape)) for leaf, part in each]
        return torch.cat([part.reshape(-1) for part in parts])


def _padded(rows: Tensor, num: int) -> Tensor:
    return rows if len(rows) == num else F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, num - len(rows)))
