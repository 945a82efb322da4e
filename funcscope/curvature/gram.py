"""Inner products of the gradients of single sequences, block by block, without a gradient that is multiplied out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad
from torch.utils._pytree import tree_leaves, tree_map

from ..core.batches import divided, rows as rows_of
from ..core.checks import check_choice, check_count
from ..core.criterion import Labels
from ..core.estimate import wide
from ..core.layout import By, Layout, View
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from .leaf_gradients import LeafGradients, Part, Rows
from .outputs import total_of
from .rows import cut, is_cut, per_sample_gradients, tolerance
from .uses import run

Unit = Literal["sequence", "token"]
Blocks = By | Literal["none"] | Mapping[str, Sequence[View]]


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
        """Blocks cover every parameter once, so that their Grams add up to that of the whole gradients."""
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

    $g_b = \sum_{t \in b} w_t \nabla \ell_t$, as the rows of `per_sample_gradients`, of which none is made: a linear layer with
    inputs $x_t$ and gradients $\delta_t$ at its outputs has $K_{ab} = \sum_{t, s} (x_{at} \cdot x_{bs})
    (\delta_{at} \cdot \delta_{bs})$, and all uses of one parameter are added up before they are multiplied, so that tied
    weights are right. One forward and one backward pass, in which no gradient of a parameter is taken, give all blocks.

    other: another data set, for inner products across (n, m); the loss of the same net.
    by: a partition as `Layout.blocks` knows them, but `filter`; `none` for one block; or views by name.
    unit: `token` takes every scored position for a sample of its own, each with a pass of its own.
    chunk_size: rows that go through the model at once. More rows than that are taken pair by pair of chunks, each chunk's
    passes made again for every other: memory is that of two chunks, passes grow as n^2 / (2 chunk_size).

    A parameter whose use is not known, and one for which the gradient of a row alone, which is taken once for every shape of
    batch, is not what its use says, has its rows multiplied out, and is named in the result.

    Raises ValueError for sequences that see each other, as `per_sample_gradients` does, and for a gradient that is not
    finite, with its sequence and parameter.

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
    check_choice("unit", unit, ("sequence", "token"))
    check_count("chunk_size", chunk_size)
    theta = Loss.vector(loss, theta)
    if other is not None:
        Loss.vector(other, theta)
    views = block_views(loss.layout, by)
    one = _Data(loss, theta, _tiles(loss, unit, chunk_size))
    two = one if other is None else _Data(other, theta, _tiles(other, unit, chunk_size))
    out = torch.zeros(len(views), one.num, two.num, dtype=wide(theta.device), device=theta.device)
    places = _places(loss.layout, views)

    def add(name: str, a: LeafGradients, b: LeafGradients, at: slice, to: slice) -> None:
        for block, part_rows, part_cols in places[name]:
            made = _finite(a.gram(b, part_rows, part_cols), name, at)
            out[block, at, to] += made
            if other is None and at != to:
                out[block, to, at] += made.T

    for i, (at, tile) in enumerate(one.tiles):
        later = one.tiles[i + 1 :] if other is None else two.tiles
        held: dict[str, LeafGradients] = {}

        def first(name: str, leaf: LeafGradients, at: slice = at, held: Any = held, keep: bool = bool(later)) -> None:
            if other is None:
                add(name, leaf, leaf, at, at)
            if keep:
                held[name] = leaf.smaller()

        one.each(tile, first)
        for to, right in later:

            def second(name: str, leaf: LeafGradients, at: slice = at, to: slice = to, held: Any = held) -> None:
                if name in held:
                    add(name, held[name], leaf, at, to)

            two.each(right, second)
    passes = one.passes + (0 if two is one else two.passes)
    return Grams(out, unit, passes, sorted(one.by_rows | two.by_rows), list(views))


class Norms(Result):
    """Lengths of the gradients of single samples, by block of parameters."""

    values: Float[Tensor, "b n"] = quantity("length of the gradient", per=("block", "sample"))
    unit: str
    blocks: list[str] = internal()

    @derived("length of the whole gradient", per="sample")
    def total(self) -> Float[Tensor, " n"]:
        return self.values.square().sum(0).sqrt()

    coords, head = Grams.coords, property(lambda self: f"lengths of the gradients of {self.values.shape[1]} {self.unit}s")


def gradient_norms(
    loss: Loss, theta: Theta, *, by: Blocks = "layer", unit: Unit = "sequence", chunk_size: int = 64
) -> Norms:
    r"""$\lVert g_b \rVert$ of every sample in every block, from one forward and one backward pass; arguments as of `gram`."""
    check_choice("unit", unit, ("sequence", "token"))
    check_count("chunk_size", chunk_size)
    theta = Loss.vector(loss, theta)
    views = block_views(loss.layout, by)
    data = _Data(loss, theta, _tiles(loss, unit, chunk_size))
    places = _places(loss.layout, views)
    out = torch.zeros(len(views), data.num, dtype=wide(theta.device), device=theta.device)
    for at, tile in data.tiles:

        def add(name: str, leaf: LeafGradients, at: slice = at) -> None:
            for block, part_rows, part_cols in places[name]:
                out[block, at] += _finite(leaf.squares(part_rows, part_cols), name, at)

        data.each(tile, add)
    return Norms(out.sqrt(), unit, list(views))


def block_views(layout: Layout, by: Blocks) -> dict[str, tuple[View, ...]]:
    """The views of every block. Raises ValueError for `filter`, which has as many blocks as the model has units."""
    if isinstance(by, Mapping):
        return {name: tuple(views) for name, views in by.items()}
    if by == "none":
        return layout.blocks(lambda _: "all")
    if by == "filter":
        raise ValueError("`by` must be 'none', 'tensor', 'layer', 'module', a callable or views by name, got 'filter'.")
    return layout.blocks(by)


def _places(layout: Layout, views: Mapping[str, Sequence[View]]) -> dict[str, list[tuple[int, slice, slice]]]:
    """By parameter: block, and which rows and columns of the parameter as a matrix belong to it."""
    places: dict[str, list[tuple[int, slice, slice]]] = {name: [] for name in layout.names}
    whole = slice(None)
    for block, members in enumerate(views.values()):
        for view in members:
            ndim = len(layout.by_name[view.leaf].shape)
            if view.slice != whole and (view.dim > 1 or (view.dim == 1 and ndim > 2)):
                raise ValueError(f"a view of `{view.leaf}` cuts dimension {view.dim}: only rows and columns can be cut.")
            by_row = view.dim == 0 and ndim > 1
            places[view.leaf].append((block, view.slice if by_row else whole, whole if by_row else view.slice))
    return places


Tile = tuple[slice, tuple[Any, Any]]


class _Data:
    """One data set: its batches as they go through the model, and what is known of the uses of parameters there."""

    def __init__(self, loss: Loss, theta: Tensor, tiles: list[Tile]):
        self.loss, self.theta, self.tiles = loss, theta, tiles
        self.params = {name: x.to(loss.net._dtypes[name]) for name, x in loss.params(theta).items()}
        self.num = tiles[-1][0].stop
        self.passes = 0
        self.by_rows: set[str] = set()
        self.compared: set[Any] = set()

    def each(self, batch: tuple[Any, Any], take: Callable[[str, LeafGradients], None]) -> None:
        """`take(name, gradients)` for every parameter that makes a difference."""
        num, alone, size = rows_of(batch), self._alone(batch), 0.0
        if alone:
            size = math.sqrt(sum(float(x.square().sum(dtype=wide(x.device))) for x in alone.values()))

        def known(name: str, parts: list[Part]) -> None:
            leaf = LeafGradients.of(parts, self.loss.layout.shapes[name])
            if name in alone and self._is_off(leaf.row(num - 1) - alone.pop(name).flatten(), size):
                self.by_rows.add(name)
            if name not in self.by_rows:
                take(name, leaf)

        self.passes += num
        self.by_rows |= run(self.loss, self.params, batch, num, known)
        self.by_rows |= {name for name, x in alone.items() if self._is_off(x, size)}
        if self.by_rows:
            self._rows(batch, take)

    def _alone(self, batch: tuple[Any, Any]) -> dict[str, Tensor]:
        """The gradient of the last row in a batch of one: once for every shape of batch."""
        if (shape := _shapes(batch)) in self.compared:
            return {}
        self.compared.add(shape)
        self.passes += 1
        num = rows_of(batch)
        return grad(lambda p: self._total(p, cut(batch, slice(num - 1, num), num)))(self.params)

    def _is_off(self, difference: Tensor, size: float) -> bool:
        return not float(torch.linalg.vector_norm(difference.float())) <= tolerance(self.loss) * size

    def _total(self, params: Any, batch: tuple[Any, Any]) -> Tensor:
        return total_of(self.loss.criterion, self.loss.net.apply(params, batch[0]), batch[1])

    def _rows(self, batch: tuple[Any, Any], take: Callable[[str, LeafGradients], None]) -> None:
        names = [name for name in self.loss.layout.names if name in self.by_rows]
        net = self.loss.net.only(names, self.loss.params(self.theta))
        part = replace(self.loss, net=net, batches=(batch,))
        rows = per_sample_gradients(part, net.theta.to(self.theta))
        for leaf in net.layout.leaves:
            take(leaf.name, LeafGradients.of([Rows(rows[:, leaf.slice])], leaf.shape))


def _tiles(loss: Loss, unit: Unit, chunk_size: int) -> list[Tile]:
    """The batches, each with the places of its rows: cut to `chunk_size`, and put together up to it where shapes are equal."""
    batches = loss.batches if unit == "sequence" else tuple(map(_by_token, _checked(loss)))
    tiles: list[Tile] = []
    at = 0
    for batch in _merged(divided(batches, chunk_size), chunk_size):
        num = rows_of(batch)
        if num is None:
            num = next(len(x) for x in tree_leaves(batch[1]) if isinstance(x, Tensor) and x.ndim)
        tiles.append((slice(at, at + num), batch))
        at += num
    return tiles


def _merged(batches: Sequence[Any], chunk_size: int) -> list[Any]:
    out: list[Any] = []
    for batch in batches:
        last = out[-1] if out else None
        if last is not None and rows_of(last) + rows_of(batch) <= chunk_size and _can_join(last, batch):
            num, more = rows_of(last), rows_of(batch)
            out[-1] = tree_map(
                lambda x, y, num=num, more=more: torch.cat([x, y]) if is_cut(x, num) and is_cut(y, more) else x, last, batch
            )
        else:
            out.append(batch)
    return out


def _can_join(one: Any, two: Any) -> bool:
    """Every tensor has a row for each sequence, and the same shape beside."""
    rows, others = rows_of(one), rows_of(two)
    pairs = list(zip(tree_leaves(one), tree_leaves(two), strict=False))
    if len(tree_leaves(one)) != len(tree_leaves(two)):
        return False
    return all(
        (is_cut(x, rows) and is_cut(y, others) and x.shape[1:] == y.shape[1:] and x.dtype == y.dtype)
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.ndim and y.ndim
        else x is y
        for x, y in pairs
    )


def _checked(loss: Loss) -> Sequence[Any]:
    if not loss.criterion.positionwise:
        raise ValueError(f"`unit='token'` needs a criterion over labels, one loss at each position; got {loss.criterion!r}.")
    return loss.batches


def _by_token(batch: tuple[Any, Any]) -> tuple[Any, Any]:
    """A row for every scored position, with a weight there alone."""
    inputs, labels = batch
    places = labels.weight.nonzero()
    row, num = places[:, 0], len(labels.weight)
    inputs = tree_map(lambda x: x[row] if is_cut(x, num) else x, inputs)
    weight = labels.weight[row]
    alone = torch.zeros_like(weight)
    at = (torch.arange(len(row), device=row.device), *places[:, 1:].T)
    alone[at] = weight[at]
    return inputs, Labels(labels.index[row], alone)


def _shapes(batch: Any) -> Any:
    return tuple(tuple(x.shape) if isinstance(x, Tensor) else None for x in tree_leaves(batch))


def _finite(values: Tensor, name: str, at: slice) -> Tensor:
    if not bool(values.isfinite().all()):
        bad = (~values.isfinite()).nonzero()[0]
        raise ValueError(
            f"the gradient of sample {at.start + int(bad[0])} in `{name}` is not finite: leave the sample out, or look at "
            "the weights there."
        )
    return values
