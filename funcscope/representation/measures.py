"""Forms that similarities compare: kernels of samples by samples, made once of each layer and permuted as they are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .block_sums import block_sums, left_out_cross
from .sequences import blocks

Rows = Float[Tensor, "n _"]
ENTRIES = 2**16
"""Of a kernel that are picked at a time."""


class Form(NamedTuple):
    """What a measure compares, of several layers over the same n samples."""

    rows: list[Rows]
    """Factors W of the kernels W W', or what else is compared."""
    kernels: Float[Tensor, "l n n"] | None
    """Where these are fewer numbers to multiply than the factors."""
    diagonals: Float[Tensor, "l n"]
    squares: Float[Tensor, " l"]
    """Squared Frobenius norms of the kernels."""


class Measure(ABC):
    """A similarity of representations, between all layers of one and all of another at once."""

    @abstractmethod
    def form(self, rows: Sequence[Rows], sequence: Int[Tensor, " n"]) -> Form:
        """What is compared, of every layer."""

    @abstractmethod
    def values(self, x: Form, y: Form) -> Float[Tensor, "a b"]:
        """Of every pair of layers."""

    @abstractmethod
    def permuted(self, x: Form, y: Form, orders: Iterable[Int[Tensor, " n"]]) -> Iterator[Float[Tensor, "a b"]]:
        """The same with sample i of x beside sample order[i] of y, for each order."""

    def without(self, form: Form, rows: Sequence[Rows], sequence: Int[Tensor, " n"], keep: Bool[Tensor, " n"]) -> Form:
        """The form of the samples that stay."""
        del form
        return self.form([x[keep] for x in rows], sequence[keep])

    def left_out(
        self, x: Form, y: Form, xs: Sequence[Rows], ys: Sequence[Rows], sequence: Int[Tensor, " n"]
    ) -> list[Float[Tensor, "a b"]]:
        """The values without each block of sequences (`sequences.blocks`), of the rows xs and ys of the forms."""
        return [self._without(keep, x, y, xs, ys, sequence) for keep in blocks(sequence)]

    def _without(
        self, keep: Bool[Tensor, " n"], x: Form, y: Form, xs: Sequence[Rows], ys: Sequence[Rows], sequence: Int[Tensor, " n"]
    ) -> Float[Tensor, "a b"]:  # fmt: skip
        part = self.without(x, xs, sequence, keep)
        return self.values(part, part if y is x else self.without(y, ys, sequence, keep))


def centred(x: Rows) -> Rows:
    return x - x.mean(0)


def compact(x: Rows) -> Rows:
    """Rows with the same inner products, in at most as many dimensions as there are rows."""
    return x if x.shape[1] <= len(x) else torch.linalg.qr(x.T, mode="r").R.T


def kernel_form(factors: list[Rows], kernels: bool) -> Form:
    diagonals = torch.stack([w.square().sum(1) for w in factors])
    whole = torch.stack([w @ w.T for w in factors]) if kernels else None
    small = [w.T @ w for w in factors] if whole is None else list(whole)
    return Form(factors, whole, diagonals, torch.stack([each.square().sum() for each in small]))


def cross(x: Form, y: Form) -> Float[Tensor, "a b"]:
    r"""$\mathrm{tr}(K_x K_y)$ of every pair: by kernels, or by factors where both have few columns."""
    if x.kernels is not None and y.kernels is not None:
        return x.kernels.flatten(1) @ y.kernels.flatten(1).T
    return torch.stack([torch.stack([(a.T @ b).square().sum() for b in y.rows]) for a in x.rows])


def permuted_cross(x: Form, y: Form, orders: Iterable[Int[Tensor, " n"]]) -> Iterator[Float[Tensor, "a b"]]:
    """The same for permuted samples of y: each entry above the diagonal is picked once, as kernels are symmetric.

    Entries of all layers lie side by side, and few of them are picked at a time: what is read and made stays in the cache.
    """
    if x.kernels is None or y.kernels is None:
        for order in orders:
            yield cross(x, Form([each[order] for each in y.rows], None, y.diagonals, y.squares))
        return
    size = len(x.rows[0])
    rows, columns = torch.triu_indices(size, size, 1, device=x.diagonals.device)
    entries = y.kernels.flatten(1).T.contiguous()
    above = x.kernels.flatten(1).T.index_select(0, rows * size + columns)
    parts = list(zip(*(each.split(ENTRIES) for each in (above, rows, columns)), strict=True))
    for order in orders:
        both = x.diagonals @ y.diagonals[:, order].T
        for part, i, j in parts:
            picked = order.index_select(0, i).mul_(size).add_(order.index_select(0, j))
            both = both + 2 * part.T @ entries.index_select(0, picked)
        yield both


def _is_wide(rows: Sequence[Rows]) -> bool:
    """Whether kernels are the cheaper ones: n^2 numbers of them against n d^2."""
    return len(rows[0]) <= max(x.shape[1] for x in rows) ** 2


@dataclass(frozen=True)
class LinearKernels(Measure):
    """Centred kernel alignment of linear kernels."""

    debiased: bool

    def form(self, rows: Sequence[Rows], sequence: Int[Tensor, " n"]) -> Form:  # noqa: ARG002
        return kernel_form([centred(x) for x in rows], _is_wide(rows))

    def values(self, x: Form, y: Form) -> Float[Tensor, "a b"]:
        return self._ratio(x, y, cross(x, y), y.diagonals)

    def permuted(self, x: Form, y: Form, orders: Iterable[Int[Tensor, " n"]]) -> Iterator[Float[Tensor, "a b"]]:
        orders = list(orders)
        for order, both in zip(orders, permuted_cross(x, y, orders), strict=True):
            yield self._ratio(x, y, both, y.diagonals[:, order])

    def _ratio(self, x: Form, y: Form, both: Tensor, diagonals: Tensor) -> Tensor:
        traces = torch.outer(x.diagonals.sum(1), y.diagonals.sum(1))
        both = self._hsic(both, x.diagonals @ diagonals.T, traces, len(x.rows[0]))
        return both / torch.outer(self.own(x), self.own(y)).sqrt()

    def own(self, form: Form) -> Float[Tensor, " l"]:
        """h(K, K); nan where it is not above 0."""
        diagonals = form.diagonals
        own = self._hsic(form.squares, diagonals.square().sum(1), diagonals.sum(1).square(), len(form.rows[0]))
        return own.where(own > 0, torch.nan)

    def left_out(
        self, x: Form, y: Form, xs: Sequence[Rows], ys: Sequence[Rows], sequence: Int[Tensor, " n"]
    ) -> list[Float[Tensor, "a b"]]:
        """By taking the block's entries off the sums of the whole; afresh where these are nearly all of a kernel."""
        keeps = blocks(sequence)
        if x.kernels is None or y.kernels is None or not keeps:
            return super().left_out(x, y, xs, ys, sequence)
        stay = torch.stack(keeps, 1)
        first = block_sums(x.kernels, x.diagonals, stay)
        second = first if y is x else block_sums(y.kernels, y.diagonals, stay)
        both = left_out_cross(first, second, stay)
        own_x = (both if y is x else left_out_cross(first, first, stay)).diagonal(dim1=1, dim2=2)
        own_y = own_x if y is x else left_out_cross(second, second, stay).diagonal(dim1=1, dim2=2)
        made = []
        for i, keep in enumerate(keeps):
            if bool((own_x[i] < 1e-8 * x.squares).any()) or bool((own_y[i] < 1e-8 * y.squares).any()):
                made.append(self._without(keep, x, y, xs, ys, sequence))
                continue
            a, b = (
                Form([each[keep] for each in rows], None, sums.diagonals[:, keep, i], own[i])
                for rows, sums, own in ((xs, first, own_x), (ys, second, own_y))
            )
            made.append(self._ratio(a, b, both[i], b.diagonals))
        return made

    def _hsic(self, cross: Tensor, diagonals: Tensor, traces: Tensor, num: int) -> Tensor:
        """With kernels that are centred, the sums over their rows without the diagonal are what the diagonal is."""
        if not self.debiased:
            return cross
        if num < 4:
            return torch.full_like(cross, math.nan)
        return (cross + traces / ((num - 1) * (num - 2)) - num / (num - 2) * diagonals) / (num * (num - 3))


@dataclass(frozen=True)
class Projections(Measure):
    """Squared canonical correlations of the leading principal components."""

    variance: float

    def form(self, rows: Sequence[Rows], sequence: Int[Tensor, " n"]) -> Form:  # noqa: ARG002
        return kernel_form([self._whitened(centred(x)) for x in rows], _is_wide(rows))

    def values(self, x: Form, y: Form) -> Float[Tensor, "a b"]:
        return self._mean(x, y, cross(x, y))

    def permuted(self, x: Form, y: Form, orders: Iterable[Int[Tensor, " n"]]) -> Iterator[Float[Tensor, "a b"]]:
        return (self._mean(x, y, both) for both in permuted_cross(x, y, orders))

    def _mean(self, x: Form, y: Form, both: Tensor) -> Tensor:
        ranks = [each.diagonals.sum(1).round() for each in (x, y)]
        few = torch.minimum(ranks[0][:, None], ranks[1])
        all_of_it = torch.maximum(ranks[0][:, None], ranks[1]) >= len(x.rows[0]) - 1
        return (both / few).where((few > 0) & ~all_of_it, torch.nan)

    def _whitened(self, x: Rows) -> Rows:
        """Left singular vectors of the components that hold the share of the variance."""
        left, sigma, _ = torch.linalg.svd(x, full_matrices=False)
        there = sigma > max(x.shape) * torch.finfo(x.dtype).eps * sigma[0]
        below = sigma.square().cumsum(0) - sigma.square()  # what the components before each hold
        return left[:, there & (below < self.variance * sigma.square().sum() * (1 - 1e-12))]


@dataclass(frozen=True)
class Neighbours(Measure):
    """Shares of the k nearest neighbours, of other sequences, that two representations have in common."""

    k: int

    def form(self, rows: Sequence[Rows], sequence: Int[Tensor, " n"]) -> Form:
        return self._form([self._squared(centred(x)) for x in rows], sequence)

    def values(self, x: Form, y: Form) -> Float[Tensor, "a b"]:
        return cross(x, y) / (len(x.rows[0]) * self.k)

    def permuted(self, x: Form, y: Form, orders: Iterable[Int[Tensor, " n"]]) -> Iterator[Float[Tensor, "a b"]]:
        """Of y only entries between a sample and its neighbours in x are picked."""
        assert x.kernels is not None
        assert y.kernels is not None
        size, graphs = len(x.rows[0]), y.kernels.flatten(1)
        pairs = [each.nonzero(as_tuple=True) for each in x.kernels]
        undefined = x.kernels.sum((1, 2))[:, None] * y.kernels.sum((1, 2)) * 0
        for order in orders:
            shared = [graphs[:, order[i] * size + order[j]].sum(1) for i, j in pairs]
            yield torch.stack(shared) / (size * self.k) + undefined

    def without(self, form: Form, rows: Sequence[Rows], sequence: Int[Tensor, " n"], keep: Bool[Tensor, " n"]) -> Form:
        """Distances are the same among fewer samples."""
        del rows
        return self._form([apart[keep][:, keep] for apart in form.rows], sequence[keep])

    def _form(self, distances: list[Float[Tensor, "n n"]], sequence: Int[Tensor, " n"]) -> Form:
        graphs = torch.stack([self._graph(apart, sequence) for apart in distances])
        return Form(distances, graphs, graphs.sum(2), graphs.sum((1, 2)))

    def _squared(self, x: Rows) -> Float[Tensor, "n n"]:
        norms = x.square().sum(1)
        return norms[:, None] + norms - 2 * x @ x.T

    def _graph(self, apart: Float[Tensor, "n n"], sequence: Int[Tensor, " n"]) -> Float[Tensor, "n n"]:
        same = sequence[:, None] == sequence
        if int((~same).sum(1).min()) < self.k:
            return torch.full_like(apart, math.nan)
        if not bool(apart.any()):  # all at one place
            return torch.full_like(apart, math.nan)
        nearest = apart.masked_fill(same, math.inf).topk(self.k, largest=False).indices
        return torch.zeros_like(apart).scatter(1, nearest, 1.0)


@dataclass(frozen=True)
class Rotations(Measure):
    """Cosine of the angle between shapes, after the best orthogonal map."""

    def form(self, rows: Sequence[Rows], sequence: Int[Tensor, " n"]) -> Form:  # noqa: ARG002
        shapes = [centred(x) for x in rows]
        squares = torch.stack([x.square().sum() for x in shapes])
        return Form(shapes, None, squares[:, None], squares)

    def values(self, x: Form, y: Form) -> Float[Tensor, "a b"]:
        sizes = torch.outer(x.squares, y.squares).sqrt()
        nuclear = [torch.stack([torch.linalg.svdvals(a.T @ b).sum() for b in y.rows]) for a in x.rows]
        return torch.stack(nuclear) / sizes.where(sizes > 0, torch.nan)

    def permuted(self, x: Form, y: Form, orders: Iterable[Int[Tensor, " n"]]) -> Iterator[Float[Tensor, "a b"]]:
        return (self.values(x, Form([b[order] for b in y.rows], None, y.diagonals, y.squares)) for order in orders)
