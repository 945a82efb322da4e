"""Whether sequences have the losses in smaller batches that they have beside others: what lets a batch be cut.

A tensor with as many rows as its batch has sequences is taken to have one for each. One that all sequences share, such as a
scale per feature, may have as many by chance; no shape tells the two apart, and values do: a model that needs all rows of it
fails with some of them, or makes other losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten

from .batches import can_be_cut, is_cut, num_rows, rows
from .content import of_tree
from .criterion import Labels
from .held import peak_bytes
from .purity import output_nearby

if TYPE_CHECKING:
    from .objective import Loss

MOST = 2**30
"""Bytes that the forward pass may take in which a batch is compared with its parts."""
PARTS = 32
"""Parts that are compared, at most."""
_FAILED = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)
"""What a model raises for inputs whose sizes do not go together."""


def coupled(rows: int | str = "as many") -> str:
    """Why parts are not those of a whole, and what helps."""
    return (
        "sequences see each other (statistics over the batch, a loss across rows), or a tensor that all share has "
        f"{rows} rows by chance and was cut, or dimension 0 is not that of the sequences. Use a batch of another size, give "
        "the shared tensor a dimension of 1 in front, take statistics that do not depend on the batch, or put sequences "
        "first (`batch_first=True` of recurrent layers)."
    )


def tolerance(loss: Loss) -> float:
    """Relative; beyond it, what is computed for sequences alone is not what is computed for all together."""
    return max(32 * loss.net.unit_roundoff, min(1e-4, 1e8 * loss.net.unit_roundoff))


def check_apart(loss: Loss, size: int) -> None:
    """Raises ValueError where a batch of more than `size` sequences would be cut and its parts had other losses.

    The last two parts and the first two are scored beside each other and apart, near the net's own parameters: once for
    every shape of batch of an objective. Where a tensor may be shared, as several have that many rows, so are all sequences
    of every batch and up to 32 of its parts; of a batch that would take more than 1 GiB, as many as do not. No gradient. A
    tensor that has to be left whole is named.
    """
    if hasattr(loss.net, "shares"):
        return  # a forward pass is one of all ranks together, which compare what they have themselves
    for pair in loss.batches:
        num = rows(pair)
        if num is not None and num > size and can_be_cut(pair, num):
            verdict = f"apart by {size}: {_structure(pair)}"
            if _may_share(loss, pair, num):  # what all share differs from batch to batch
                verdict += of_tree(pair)
            if verdict not in loss._verdicts:
                _check(loss, pair, num, size)
                loss._verdicts.add(verdict)


def _structure(pair: Any) -> str:
    leaves, names = tree_flatten(pair)
    return f"{names} {[(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in leaves]}"


def is_joined(loss: Loss, one: Any, two: Any, both: Any) -> bool:
    """Whether the sequences of two batches score in one batch, `both`, what they score in their own; once per shapes."""
    verdict = f"{_structure(one)} {_structure(two)}"
    if f"joined: {verdict}" not in loss._verdicts and f"not joined: {verdict}" not in loss._verdicts:
        with torch.no_grad(), _same_generator(loss):
            differs = _difference(loss, both, [one, two], torch.arange(sum(map(num_rows, (one, two)))))
        loss._verdicts.add(f"joined: {verdict}" if differs is None else f"not joined: {verdict}")
    return f"joined: {verdict}" in loss._verdicts


def _same_generator(loss: Loss) -> Any:
    return torch.random.fork_rng(devices=[loss.net.device] if loss.net.device.type == "cuda" else [])


def _check(loss: Loss, pair: Any, num: int, size: int) -> None:
    with torch.no_grad(), _same_generator(loss):
        for places, parts in _compared(loss, pair, num, size):
            reason = _difference(loss, *_cut(pair, num, places, parts))
            if reason is not None:
                _refuse(loss, pair, num, reason, places, parts)


def _refuse(loss: Loss, pair: Any, num: int, reason: str, places: Tensor, parts: list[Tensor]) -> None:
    _scored(loss, pair)  # a model that fails with the whole batch, too, says why itself
    replace(loss, batches=(pair,), _verdicts=set()).check_function()  # as does one that is no function of theta
    shared = next(_shared(loss, pair, num, places, parts), None)
    if shared is None:
        raise ValueError(f"a batch of {num} sequences cannot be cut, {reason}: {coupled(num)}")
    raise ValueError(
        f"`{shared}` has {num} rows, as its batch has sequences, and all of these share them: in a part of it, {reason}. "
        "Give it a dimension of 1 in front, `x[None]`, or use batches of another size."
    )


def _compared(loss: Loss, pair: Any, num: int, size: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Sequences that are scored beside each other, and the positions of parts among them."""
    span = min(num, 2 * size)
    for ends in _ends(pair, num, span):
        yield ends, list(torch.arange(span).split(size))
    if not _may_share(loss, pair, num):
        return
    few, more = (peak_bytes(lambda at=at: _scored(loss, _part(pair, num, at))) for at in (ends[: span // 2], ends))
    each = (more - few) / (span - span // 2)
    most = num if more + each * (num - span) <= MOST else int(span + (MOST - more) / each)
    if most > span:
        parts = torch.arange(most).split(size)
        some = torch.linspace(0, len(parts) - 1, min(len(parts), PARTS)).round().long().tolist()
        yield torch.linspace(0, num - 1, most, dtype=torch.float64).round().long(), [parts[i] for i in some]


def _may_share(loss: Loss, pair: Any, num: int) -> bool:
    """Whether not all tensors of as many rows are known to have one for each sequence.

    Known are the inputs of models that have a configuration, labels with their weights, and a tensor that is alone.
    """

    def several(tree: Any) -> bool:
        return sum(is_cut(leaf, num) for leaf in tree_leaves(tree)) > 1

    inputs, targets = pair
    return (loss.net.config is None and several(inputs)) or (not isinstance(targets, Labels) and several(targets))


def _ends(pair: Any, num: int, span: int) -> Iterator[Tensor]:
    """The last and the first sequences that are scored; all of them where these are no more."""
    if span == num:
        yield torch.arange(num)
        return
    weight = pair[1].weight if isinstance(pair[1], Labels) else torch.ones(num)
    some = weight.reshape(num, -1).any(1).nonzero()[:, 0].cpu()
    some = some if len(some) >= span else torch.arange(num)
    yield some[-span:]
    yield some[:span]


def _part(pair: Any, num: int, at: Tensor, whole: int | None = None) -> Any:
    """Some rows of a batch. whole: the number of a leaf that is not cut."""
    leaves, spec = tree_flatten(pair)
    cut = [x[at.to(x.device)] if is_cut(x, num) and i != whole else x for i, x in enumerate(leaves)]
    return tree_unflatten(cut, spec)


def _cut(pair: Any, num: int, places: Tensor, parts: list[Tensor], whole: int | None = None) -> tuple[Any, Any, Tensor]:
    """Rows beside each other, in parts, and at which of the first those of the second are."""
    beside, *apart = (_part(pair, num, at, whole) for at in (places, *(places[at] for at in parts)))
    return beside, apart, torch.cat(parts)


def _difference(loss: Loss, beside: Any, apart: list[Any], at: Tensor) -> str | None:
    """How sequences that are scored apart differ from those beside each other, where they are; None where they do not."""
    try:
        whole, *parts = (_scored(loss, each) for each in (beside, *apart))
    except torch.OutOfMemoryError:
        raise
    except _FAILED as err:
        said = str(err).splitlines() or [type(err).__name__]
        return f"the model or the criterion fails ({said[0][:100]})"
    for one, *other in zip(whole, *parts, strict=True):
        made = torch.cat(other)
        if len(made) != len(at) or len(one) <= int(at.max()):
            return f"{len(at)} sequences have {len(made)} losses"
        one = one[at.to(one.device)]
        scale = float(one[one.isfinite()].abs().amax()) if bool(one.isfinite().any()) else 0.0
        same = ((one - made).abs() <= tolerance(loss) * scale) | (one == made) | (one.isnan() & made.isnan())
        if not bool(same.all()):
            i = int((~same).nonzero()[0])
            return f"a sequence scores {float(made[i]):.6g} instead of {float(one[i]):.6g}"
    return None


def _scored(loss: Loss, pair: Any) -> tuple[Tensor, Tensor]:
    """Sums and weights per sequence."""
    losses, weight = loss.criterion.scored(output_nearby(loss.net, 0.01, pair[0]), pair[1])
    sums, weights = ((x.flatten(1).sum(1) if x.ndim > 1 else x) for x in (losses * weight, weight))
    return sums, weights


def _shared(loss: Loss, pair: Any, num: int, places: Tensor, parts: list[Tensor]) -> Iterator[str]:
    """Names of tensors that make all right where they are not cut."""
    for i, (path, leaf) in enumerate(tree_flatten_with_path(pair)[0]):
        if is_cut(leaf, num) and _difference(loss, *_cut(pair, num, places, parts, i)) is None:
            place = keystr(path)  # [0] for the inputs, [1] for the targets, and what follows
            yield f"{'inputs' if place.startswith('[0]') else 'targets'}{place[3:]}"
