"""The samples of one data set, as they go through the model: tiles of rows, and the gradients of each by parameter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad
from torch.utils._pytree import tree_flatten, tree_map

from ..core.apart import check_apart, is_joined, tolerance
from ..core.batches import UNSCORED, cut, divided, is_cut, num_rows
from ..core.checks import check_choice, check_count
from ..core.criterion import Labels
from ..core.estimate import wide
from ..core.objective import Loss
from .leaf_gradients import LeafGradients, Part, Rows
from .outputs import total_of
from .rows import factors_of, per_sample_gradients, weighted_sum
from .uses import run

Unit = Literal["sequence", "token"]
Tile = tuple[slice, tuple[Any, Any]]


class Judge(NamedTuple):
    """A sum over sequences of their gradients times factors, by parameter not judged yet; its uses must give it, too."""

    tolerance: float
    noise: float
    factors: Tensor
    expected: dict[str, Tensor]

    def is_off(self, name: str, leaf: LeafGradients | None) -> bool:
        """None for a parameter of which no use is known: a gradient of 0."""
        if name not in self.expected:
            return False
        expected = self.expected.pop(name).flatten()
        off = expected if leaf is None else self.made(leaf) - expected
        return not _length(off) <= self.tolerance * _length(expected) + self.noise

    def made(self, leaf: LeafGradients) -> Tensor:
        (rows,) = self.factors.nonzero(as_tuple=True)
        return leaf.row(int(rows[0])) if len(rows) == 1 else leaf.weighted(self.factors)


class Data:
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
        num, judge = num_rows(batch), Judge(tolerance(self.loss), 0.0, torch.zeros(0), {})

        def forward_done(indexed: bool) -> None:
            nonlocal judge
            judge = self._judge(batch, indexed)

        def known(name: str, parts: list[Part]) -> None:
            leaf = LeafGradients.of(parts, self.loss.layout.shapes[name])
            if judge.is_off(name, leaf):
                self.by_rows.add(name)
            if name not in self.by_rows:
                take(name, leaf)

        self.passes += num
        self.by_rows |= run(self.loss, self.params, batch, num, known, forward_done=forward_done)
        self.by_rows |= {name for name in list(judge.expected) if judge.is_off(name, None)}
        if self.by_rows:
            self._rows(batch, take)

    def _judge(self, batch: tuple[Any, Any], indexed: bool) -> Judge:
        """What is known of the gradients of a batch beforehand.

        Where shapes say which rows are a sequence's, that of the last sequence that has one, in a batch of one: once for
        every shape of batch, and again for parameters that made no difference so far. Where values do, the sum over all
        sequences with factors that tell them apart.
        """
        shape, num = _shapes(batch), num_rows(batch)
        factors, expected = torch.zeros(num), dict[str, Tensor]()
        names = {
            name for name in self.loss.layout.names if name not in self.by_rows and (shape, name) not in self.compared
        }
        if indexed:
            factors = factors_of(num)
            expected = self._summed(batch, factors)
        elif names:
            row, expected = self._alone(batch, num)
            factors[row] = 1
        noise = 64 * self.loss.net.unit_roundoff * math.sqrt(sum(_length(x) ** 2 for x in expected.values()))
        self.compared |= {(shape, name) for name, x in expected.items() if _length(x) > noise and not indexed}
        return Judge(tolerance(self.loss), noise, factors, expected)

    def _summed(self, batch: tuple[Any, Any], factors: Tensor) -> dict[str, Tensor]:
        self.passes += len(factors)
        return grad(lambda params: weighted_sum(self.loss, params, batch, factors))(self.params)

    def _alone(self, batch: tuple[Any, Any], num: int) -> tuple[int, dict[str, Tensor]]:
        """The last row that has a gradient, and that in a batch of one."""
        for row in reversed(range(num)):
            alone = grad(lambda p, row=row: self._total(p, cut(batch, slice(row, row + 1), num)))(self.params)
            self.passes += 1
            if any(bool(x.any()) for x in alone.values()):
                return row, alone
        return 0, {}

    def _total(self, params: Any, batch: tuple[Any, Any]) -> Tensor:
        return total_of(self.loss.criterion, self.loss.net.apply(params, batch[0]), batch[1])

    def _rows(self, batch: tuple[Any, Any], take: Callable[[str, LeafGradients], None]) -> None:
        names = [name for name in self.loss.layout.names if name in self.by_rows]
        net = self.loss.net.only(names, self.loss.params(self.theta))
        part = replace(self.loss, net=net, batches=(batch,))
        each = per_sample_gradients(part, net.theta.to(self.theta))
        for leaf in net.layout.leaves:
            take(leaf.name, LeafGradients.of([Rows(each[:, leaf.slice])], leaf.shape))


def tiles_of(loss: Loss, unit: Unit, chunk_size: int) -> list[Tile]:
    """The batches and the places of their rows, cut to `chunk_size`; put together up to it where sequences score the same."""
    check_choice("unit", unit, ("sequence", "token"))
    check_count("chunk_size", chunk_size)
    check_apart(loss, 1)
    batches = loss.split(chunk_size).batches if unit == "sequence" else divided(_tokens(loss), chunk_size)
    tiles: list[Tile] = []
    for i, batch in enumerate(batches):
        at, num = tiles[-1][0] if tiles else slice(0, 0), num_rows(batch)
        if at.stop - at.start + num <= chunk_size and i and _are_joined(loss, batches[i - 1], batch):
            tiles[-1] = slice(at.start, at.stop + num), _joined(tiles[-1][1], batch)
        else:
            tiles.append((slice(at.stop, at.stop + num), batch))
    return tiles


def _are_joined(loss: Loss, one: Any, two: Any) -> bool:
    return _is_like(one, two) and is_joined(loss, one, two, _joined(one, two))


def _joined(one: Any, two: Any) -> Any:
    return tree_map(lambda x, y: torch.cat([x, y]) if isinstance(x, Tensor) else x, one, two)


def _is_like(one: Any, two: Any) -> bool:
    """Both have the same names, every tensor a row for each sequence, and beside that one shape."""
    (xs, spec), (ys, other) = tree_flatten(one), tree_flatten(two)
    nums = num_rows(one), num_rows(two)
    return spec == other and all(
        is_cut(x, nums[0]) and is_cut(y, nums[1]) and x.shape[1:] == y.shape[1:] and x.dtype == y.dtype
        if isinstance(x, Tensor)
        else type(x) is type(y) and x == y
        for x, y in zip(xs, ys, strict=True)
    )


def _tokens(loss: Loss) -> tuple[Any, ...]:
    if not loss.criterion.positionwise:
        raise ValueError(
            f"`unit='token'` needs a criterion over labels, one loss at each position; got {loss.criterion!r}."
        )
    if not any(bool(labels.weight.any()) for _, labels in loss.batches):
        raise ValueError(UNSCORED)
    return tuple(map(_by_token, loss.batches))


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


def _length(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=wide(x.device)))


def _shapes(batch: Any) -> Any:
    leaves, names = tree_flatten(batch)
    return str(names), tuple(tuple(x.shape) if isinstance(x, Tensor) else repr(x) for x in leaves)
