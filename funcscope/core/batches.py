"""The door for data: batches as loaders and arrays bring them, and what a criterion makes of them, checked once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset

from .checks import check_device
from .criterion import Criterion, Labels
from .model import Functional, Inputs

Prepared = tuple[tuple[Inputs, Any], ...]
UNSCORED = (
    "no position is scored: every label is -100 or masked, or every weight is 0. Check `labels`, `attention_mask` and the "
    "weights of the criterion; the mean over no token is undefined."
)


def prepared(net: Functional, batches: Any, criterion: Criterion) -> Prepared:
    """(inputs, targets) of every batch that has a sequence; see `objective`."""
    listed = _listed(batches)
    if not listed:
        raise ValueError("`batches` is empty: a mean over nothing is undefined.")
    for tensor in tensors(listed):
        check_device("the batch", tensor.device, "the model", net.device)
    pairs = tuple((_checked(net.prepare(inputs)), targets) for inputs, targets in map(criterion.prepare, listed))
    full = tuple(pair for pair in pairs if rows(pair) != 0)
    if not full:
        raise ValueError("`batches` hold no sequence: the first dimension of every one is 0.")
    for _, targets in full:
        if isinstance(targets, Labels) and not targets.index.ndim:
            raise ValueError(
                "a batch has one label and no first dimension: batches of one have shape (1, ...), `x[None]`."
            )
    weights = [targets.weight for _, targets in full if hasattr(targets, "weight")]
    if weights and not any(bool(weight.any()) for weight in weights):
        raise ValueError(UNSCORED)
    return full


def tensors(tree: Any) -> Iterable[Tensor]:
    """Every tensor of nested mappings, tuples and lists."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from tensors(value)


def divided(batches: Prepared, size: int) -> Prepared:
    """The same sequences, in their order, in batches of at most `size`; one that cannot be cut stays."""
    return tuple(part for pair in batches for part in _parts(pair, size))


def parts_between(batches: Prepared, start: int, stop: int) -> list[tuple[Any, Any, slice | None]]:
    """Sequences `start` to `stop` - 1 of all: (part, its batch, rows of it), the rows None for a batch that is whole.

    One that cannot be cut is whole where its first sequence is.
    """
    out: list[tuple[Any, Any, slice | None]] = []
    first = 0
    for pair in batches:
        num = num_rows(pair)
        low, high = max(start - first, 0), min(stop - first, num)
        if not can_be_cut(pair, num):
            low, high = (0, num) if start <= first < stop else (0, 0)
        if low < high:
            whole = high - low == num
            at = slice(low, high)
            out.append((pair, pair, None) if whole else (cut(pair, at, num), pair, at))
        first += num
    return out


def _parts(pair: tuple[Inputs, Any], size: int) -> list[Any]:
    num = rows(pair)
    if num is None or num <= size or not can_be_cut(pair, num):
        return [pair]
    return [cut(pair, slice(first, first + size), num) for first in range(0, num, size)]


def can_be_cut(pair: tuple[Inputs, Any], num: int) -> bool:
    """Whether every part of a batch of so many sequences may have its rows, or the whole, of all that the batch holds."""
    return all(_serves(leaf, num) for leaf in tree_leaves(pair))


def _serves(leaf: Any, num: int) -> bool:
    return not isinstance(leaf, str) and (not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) in (1, num))


def is_cut(x: Any, rows: int) -> bool:
    """Whether a leaf has an entry for each of so many sequences; one that all share may have, by chance: core/apart.py."""
    return isinstance(x, Tensor) and x.ndim > 0 and len(x) == rows


def cut(tree: Any, part: slice | Tensor, rows: int) -> Any:
    """Some of the rows of every tensor that has so many."""
    return tree_map(lambda x: x[part] if is_cut(x, rows) else x, tree)


class Filled:
    """A `token_loss` whose targets are 0 where they are not finite and weigh nothing.

    The backward pass of a loss multiplies its cotangent, 0 there, by the target: 0 * nan is nan. Weights are those of the
    targets as they are.
    """

    def __init__(self, token_loss: Any):
        self.token_loss = token_loss

    def __call__(self, out: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        weight = self.token_loss(out, targets)[1]
        return self.token_loss(out, _filled(targets, weight))[0], weight


def with_finite_targets(criterion: Criterion, batches: Prepared) -> Criterion:
    """The same criterion, with derivatives where targets are missing: nan, and of weight 0."""
    real = (x for _, targets in batches for x in tensors(targets) if x.is_floating_point())
    if all(bool(x.isfinite().all()) for x in real):
        return criterion
    return replace(criterion, token_loss=Filled(criterion.token_loss))


def _filled(targets: Any, weight: Tensor) -> Any:
    if isinstance(targets, Mapping):
        return {name: _filled(value, weight) for name, value in targets.items()}
    if isinstance(targets, (tuple, list)):
        values = [_filled(value, weight) for value in targets]
        return type(targets)(*values) if hasattr(targets, "_fields") else type(targets)(values)
    if not isinstance(targets, Tensor) or not targets.is_floating_point():
        return targets
    common = min(targets.ndim, weight.ndim)
    if targets.shape[:common] != weight.shape[:common]:
        return targets
    unscored = (weight == 0).flatten(common - 1).all(-1) if weight.ndim > common else weight == 0
    unscored = unscored.reshape(unscored.shape + (1,) * (targets.ndim - common))
    return torch.where(unscored & ~targets.isfinite(), 0, targets)


def _listed(batches: Any) -> list[Any]:
    if isinstance(batches, Dataset):
        raise TypeError(
            f"`batches` is a dataset ({type(batches).__name__}) of single examples: pass a `DataLoader` over it, or batches."
        )
    if isinstance(batches, (Mapping, Tensor, np.ndarray)) or (
        isinstance(batches, tuple) and batches and isinstance(batches[0], (Tensor, np.ndarray))
    ):
        return [_as_tensors(batches)]
    if isinstance(batches, (str, bytes)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"`batches` must be a list of batches, a `DataLoader` or one batch, got a {type(batches).__name__}: "
            "a batch is a tuple `(inputs, targets)`, a mapping, or a tensor of token ids."
        )
    return [_as_tensors(batch, loaded=isinstance(batch, list)) for batch in batches]


def _as_tensors(tree: Any, loaded: bool = False) -> Any:
    """Arrays become tensors; in what the default collate function of a loader made, lists become tuples."""
    if isinstance(tree, np.ndarray):
        return torch.tensor(tree)
    if isinstance(tree, Mapping):
        values = {name: _as_tensors(value, loaded) for name, value in tree.items()}
        return tree if all(values[name] is value for name, value in tree.items()) else values
    if isinstance(tree, (tuple, list)) and not hasattr(tree, "_fields"):
        parts = [_as_tensors(value, loaded) for value in tree]
        return tuple(parts) if loaded or isinstance(tree, tuple) else parts
    return tree


def rows(pair: tuple[Inputs, Any]) -> int | None:
    """The number of sequences: the length of the first tensor of the targets that has not one row, which all may share.

    That of the inputs where there are no targets; None where there is no tensor.
    """
    inputs, targets = pair
    lengths = [len(x) for x in tensors(targets) if x.ndim] or [len(x) for x in tensors(inputs) if x.ndim]
    return next((length for length in lengths if length != 1), 1) if lengths else None


def num_rows(pair: tuple[Inputs, Any]) -> int:
    """The number of sequences; 1 where there is no tensor. Tokens of which none is scored are 0 of them."""
    num = rows(pair)
    return 1 if num is None else num


def _checked(inputs: Inputs) -> Inputs:
    """Negative ids would be taken from the end of the embedding."""
    for name, ids in inputs.items() if isinstance(inputs, Mapping) else ():
        if name in ("input_ids", "decoder_input_ids") and isinstance(ids, Tensor) and bool((ids < 0).any()):
            raise ValueError(f"`{name}` holds the negative id {int(ids.min())}: -100 belongs into `labels` only.")
    return inputs
