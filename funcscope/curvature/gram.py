"""Inner products of the gradients of single sequences, block by block, without a gradient that is multiplied out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jvp

from ..core.checks import check_choice, check_flat
from ..core.estimate import Estimate, wide
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from .blocks import Blocks, block_views, places_of
from .leaf_gradients import LeafGradients
from .outputs import total_weight
from .samples import Data, Tile, Unit, tiles_of


class Grams(Result):
    """Inner products of per-sample gradients, by block of parameters."""

    values: Float[Tensor, "b n m"] = quantity("inner product", per=("block", "sample", "other sample"), shown=False)
    unit: str
    num_passes: int
    """Rows that went forward and backward through the model."""
    by_rows: list[str] = internal()
    """Parameters whose gradients were multiplied out, as they are used in a way that is not known."""
    blocks: list[str] = internal()

    @derived("mean squared length", per="block")
    def mean_square(self) -> Float[Tensor, " b"]:
        return self.values.diagonal(dim1=1, dim2=2).mean(1)

    @derived("inner product of all parameters", per=("sample", "other sample"), shown=False)
    def total(self) -> Float[Tensor, "n m"]:
        """The sum over blocks: that of the whole gradients, where blocks cover every parameter once, as all but views do."""
        return self.values.sum(0)

    def block(self, name: str) -> Float[Tensor, "n m"]:
        """The Gram of one block. Raises ValueError for a name that no block has."""
        check_choice("name", name, tuple(self.blocks))
        return self.values[self.blocks.index(name)]

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"block": self.blocks}

    @property
    def head(self) -> str:
        num, other = self.values.shape[1:]
        return f"inner products of the gradients of {num} x {other} {self.unit}s in {len(self.blocks)} blocks"

    @property
    def notes(self) -> list[str]:
        rows = f"multiplied out, as their use is not known: {', '.join(self.by_rows)}."
        return [rows] if self.by_rows else []


def gram(
    loss: Loss,
    theta: Theta,
    *,
    other: Loss | None = None,
    by: Blocks = "layer",
    unit: Unit = "sequence",
    chunk_size: int = 64,
) -> Grams:
    r"""$K_{ab} = \langle g_a, g_b \rangle$ of the gradients of single sequences, for every block of parameters.

    $g_b = \sum_{t \in b} w_t \nabla \ell_t$, as the rows of `per_sample_gradients`, of which none is made: a linear layer
    with inputs $x_t$ and gradients $\delta_t$ at its outputs has $K_{ab} = \sum_{t, s} (x_{at} \cdot x_{bs})
    (\delta_{at} \cdot \delta_{bs})$, and all uses of one parameter are added up before they are multiplied, so that tied
    weights are right. One forward and one backward pass, in which no gradient of a parameter is taken, give all blocks.

    other: another data set, for inner products across (n, m); the loss of the same net.
    by: a partition as `Layout.blocks` knows them, but `filter`; `none` for one block; `head` for the queries, keys, values
    and outputs of every attention head, as `head_views` cuts them, and what is left of every layer; or views by name.
    unit: `token` takes every scored position for a sample of its own, each with a pass of its own.
    chunk_size: rows that go through the model at once. More rows than that are taken pair by pair of chunks, each chunk's
    passes made again for every other: memory is that of two chunks, passes grow as n^2 / (2 chunk_size).

    A parameter whose use is not known, and one for which the gradient of a row alone, which is taken once for every shape of
    batch, is not what its use says, has its rows multiplied out, and is named in the result. Where values choose the rows
    that an operation takes (experts), a weighted sum over all rows is compared for every batch, at the price of a pass.

    Raises ValueError for sequences that see each other, as `per_sample_gradients` does, for a batch that cannot be cut to
    `chunk_size`, as `Loss.split` does, for a gradient that is not finite, with its sequence and parameter, and for data of
    which nothing is scored.

    Goodfellow (2015), arXiv:1510.01799; Rochette, Manoel, Tramel (2019), arXiv:1912.06015; Dangel, Kunstner, Hennig (2020),
    arXiv:1912.10985.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 1, bias=False))
    >>> half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> loss = fs.objective(net, [(torch.eye(2), torch.zeros(2, 1))], half_square)
    >>> gram(loss, torch.tensor([3.0, 4.0]), by="none").total          # gradients (3, 0) and (0, 4)
    tensor([[ 9.,  0.],
            [ 0., 16.]], dtype=torch.float64)
    """
    theta = Loss.vector(loss, theta)
    if other is not None:
        Loss.vector(other, theta)
        if other.layout.shapes != loss.layout.shapes:
            raise ValueError("`other` must be a loss of the same parameters, and has other names or shapes of them.")
    views = block_views(loss.layout, by)
    one = Data(loss, theta, tiles_of(loss, unit, chunk_size))
    two = one if other is None else Data(other, theta, tiles_of(other, unit, chunk_size))
    sums = _Products(one, two, views)
    for i, (at, tile) in enumerate(one.tiles):
        sums.of_tile(at, tile, one.tiles[i + 1 :] if other is None else two.tiles)
    if not bool(sums.out.any()):
        for data in (one, two):
            total_weight(data.loss, theta)  # raises
    passes = one.passes + (0 if two is one else two.passes)
    return Grams(sums.out, unit, passes, sorted(one.by_rows | two.by_rows), list(views))


class _Products:
    """The inner products of one data set's gradients with another's, or with its own: those of both orders at once then."""

    def __init__(self, one: Data, two: Data, views: Mapping[str, Any]):
        self.one, self.two, device = one, two, one.theta.device
        self.out = torch.zeros(len(views), one.num, two.num, dtype=wide(device), device=device)
        self.places = places_of(one.loss.layout, views)

    def of_tile(self, at: slice, tile: Any, later: Sequence[Tile]) -> None:
        """Of the samples of a tile, with each other where the data are the same, and with those of later tiles."""
        held: dict[str, LeafGradients] = {}

        def first(name: str, leaf: LeafGradients) -> None:
            if self.two is self.one:
                self._add(name, leaf, leaf, at, at)
            if later:
                held[name] = leaf.smaller()

        self.one.each(tile, first)
        for to, right in later:

            def second(name: str, leaf: LeafGradients, to: slice = to) -> None:
                if name in held:
                    self._add(name, held[name], leaf, at, to)

            self.two.each(right, second)

    def _add(self, name: str, a: LeafGradients, b: LeafGradients, at: slice, to: slice) -> None:
        for block, part_rows, part_cols in self.places[name]:
            made = finite(a.gram(b, part_rows, part_cols), name, at, to)
            self.out[block, at, to] += made
            if self.two is self.one and at != to:
                self.out[block, to, at] += made.T


class Norms(Result):
    """Lengths of the gradients of single samples, by block of parameters."""

    values: Float[Tensor, "b n"] = quantity("length of the gradient", per=("block", "sample"))
    unit: str
    blocks: list[str] = internal()

    @derived("mean length of the whole gradient")
    def mean_total(self) -> Estimate:
        return Estimate.of(self.total)

    @derived("length of the whole gradient", per="sample")
    def total(self) -> Float[Tensor, " n"]:
        return self.values.square().sum(0).sqrt()

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"block": self.blocks}

    @property
    def head(self) -> str:
        return f"lengths of the gradients of {counted(self.values.shape[1], self.unit)}"


def gradient_norms(
    loss: Loss, theta: Theta, *, by: Blocks = "layer", unit: Unit = "sequence", chunk_size: int = 64
) -> Norms:
    r"""$\lVert g_b \rVert$ of every sample in every block, from one forward and one backward pass; arguments as of `gram`."""
    theta = Loss.vector(loss, theta)
    views = block_views(loss.layout, by)
    data = Data(loss, theta, tiles_of(loss, unit, chunk_size))
    places = places_of(loss.layout, views)
    out = torch.zeros(len(views), data.num, dtype=wide(theta.device), device=theta.device)
    for at, tile in data.tiles:

        def add(name: str, leaf: LeafGradients, at: slice = at) -> None:
            for block, part_rows, part_cols in places[name]:
                out[block, at] += finite(leaf.squares(part_rows, part_cols), name, at)

        data.each(tile, add)
    if not bool(out.any()):
        total_weight(loss, theta)  # raises
    return Norms(out.sqrt(), unit, list(views))


def gram_matvec(loss: Loss, theta: Theta) -> Callable[[Float[Tensor, " n"]], Float[Tensor, " n"]]:
    r"""u -> K u = G (G' u) over the sequences, from one backward and one forward-mode pass; G is never made.

    Arguments as of `per_sample_gradients`; the rows are those of its `sum`. Before the first product their lengths are taken
    once, by `gradient_norms`, which raises ValueError as `gram` does.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 1, bias=False))
    >>> half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> loss = fs.objective(net, [(torch.eye(2), torch.zeros(2, 1))], half_square)
    >>> gram_matvec(loss, torch.tensor([3.0, 4.0]))(torch.ones(2)).tolist()          # K = diag(9, 16)
    [9.0, 16.0]
    """
    theta = Loss.vector(loss, theta)
    num = gradient_norms(loss, theta, by="none", chunk_size=loss.batch_size).values.shape[1]

    def sums(t: Tensor) -> Tensor:
        return loss.terms(t)[0]

    def matvec(u: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        check_flat("u", u, num)
        weighted = grad(lambda t: (sums(t) * u.detach()).sum())(theta)
        return jvp(sums, (theta,), (weighted,))[1].to(u.dtype)

    return matvec


def finite(values: Tensor, name: str, at: slice, to: slice | None = None) -> Tensor:
    """The values of samples `at`, or of these and those `to`; raises ValueError for what is not finite, with its sample."""
    bad = ~values.isfinite()
    if bool(bad.any()):
        rows = (bad.all(1) if to is not None else bad).nonzero()
        sample = at.start + int(rows[0]) if len(rows) else (to or at).start + int(bad.any(0).nonzero()[0])
        raise ValueError(
            f"the gradient of sample {sample} in `{name}` is not finite: leave the sample out, or look at the weights."
        )
    return values
