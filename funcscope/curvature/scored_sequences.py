"""Which samples a spectrum is of, and how many parameters its blocks have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..core.apart import check_apart
from ..core.batches import UNSCORED, cut, num_rows, rows, tensors
from ..core.checks import check_count
from ..core.criterion import Labels
from ..core.layout import Layout, View
from ..core.masks import tokens_there
from ..core.objective import Loss, Theta
from ..core.tables import counted
from .gram import Blocks, block_views
from .leafwise import terms_at


def first(loss: Loss, num: int) -> Loss:
    """The loss on its first `num` sequences, or on all of them where there are fewer."""
    check_count("n_samples", num)
    check_apart(loss, num)
    batches = []
    for batch in loss.batches:
        size = rows(batch)
        if num > 0 and size is not None:
            batches.append(batch if size <= num else cut(batch, slice(0, num), size))
            num -= size
    weights = [targets.weight for _, targets in batches if hasattr(targets, "weight")]
    if weights and not any(bool(weight.any()) for weight in weights):
        raise ValueError("no position of the first `n_samples` sequences is scored: take more, or check the labels.")
    return replace(loss, batches=tuple(batches))


def sizes(layout: Layout, by: Blocks) -> list[int]:
    """How many parameters every block has. Raises ValueError for views that overlap: their Grams would not add up."""
    views = block_views(layout, by)
    if isinstance(by, Mapping):
        _check_apart(layout, views)
    return [sum(_numel(layout, view) for view in members) for members in views.values()]


def _numel(layout: Layout, view: View) -> int:
    leaf = layout.by_name[view.leaf]
    if view.slice == slice(None):
        return leaf.numel
    return len(range(*view.slice.indices(leaf.shape[view.dim]))) * leaf.numel // leaf.shape[view.dim]


def _check_apart(layout: Layout, views: Mapping[str, Sequence[View]]) -> None:
    seen: dict[str, Tensor] = {}
    for block, members in views.items():
        for view in members:
            shape = layout.by_name[view.leaf].shape
            there = seen.setdefault(view.leaf, torch.zeros(shape, dtype=torch.bool))
            part = there.movedim(view.dim, 0)[view.slice] if shape else there
            if bool(part.any()):
                raise ValueError(
                    f"block {block!r} has entries of `{view.leaf}` that an earlier view has: blocks add up to the whole only "
                    "where every entry is in one of them."
                )
            part.fill_(True)


def scored_sequences(loss: Loss, theta: Theta) -> tuple[Loss, int]:
    """The loss without the sequences of which nothing is scored, and how many these are; a gradient of 0 is a sample."""
    there = are_scored(loss, theta)
    if not bool(there.any()):
        raise ValueError(UNSCORED)
    return chosen(loss, there), int((~there).sum())


def dealt(loss: Loss, theta: Theta, num: int) -> list[Loss]:
    """Losses on every `num`-th scored sequence, from the first on, from the second on, ...: as many as have one.

    Copies of a sequence go where it goes.
    """
    there, places = are_scored(loss, theta), dict[bytes, int]()
    order = [
        places.setdefault(each, len(places)) if real else -1 for each, real in zip(contents(loss), there, strict=True)
    ]
    group = torch.where(there, torch.tensor(order, device=there.device) % num, -1)
    return [chosen(loss, group == i) for i in range(min(num, len(places)))]


class LeftOut(NamedTuple):
    """Sequences that are no independent samples of two tasks."""

    unscored: int
    """Nothing of them is."""
    shared: int
    """Both tasks have them."""
    copies: int
    """Of others of their task."""

    @property
    def notes(self) -> list[str]:
        """What a result says of them."""
        reasons = (
            "not scored: no samples",
            "in several tasks: no independent samples",
            "a copy of another one: no sample",
        )
        return [f"{counted(num, 'sequence')} left out: {why}." for num, why in zip(self, reasons, strict=True) if num]


def apart(first: Loss, second: Loss, theta: Theta) -> tuple[Loss, Loss, LeftOut]:
    """Both tasks on sequences that are scored, that the other one has not, and that differ from each other.

    Raises ValueError where fewer than two are left of one.
    """
    tasks, lost = all_apart({"first": first, "second": second}, theta)
    return tasks["first"], tasks["second"], lost


def all_apart(losses: Mapping[str, Loss], theta: Theta) -> tuple[dict[str, Loss], LeftOut]:
    """Every task on sequences that are scored, that no other one has, and that differ from each other.

    Raises ValueError where fewer than two are left of one.
    """
    keys = {name: contents(loss) for name, loss in losses.items()}
    times = Counter(key for own in keys.values() for key in {*own})
    kept, counts = dict[str, Loss](), [0, 0, 0]
    for name, loss in losses.items():
        scored, known = are_scored(loss, theta).tolist(), set[bytes]()
        there = []
        for real, key in zip(scored, keys[name], strict=True):
            reasons = (not real, times[key] > 1, key in known)
            there.append(not any(reasons))
            if any(reasons):
                counts[reasons.index(True)] += 1
            else:
                known.add(key)
        if sum(there) < 2:
            other = "the other one has not" if len(losses) == 2 else "no other one has"
            raise ValueError(
                f"the {name} task must have two different scored sequences that {other}, got {sum(there)}: tests and errors "
                "are over independent sequences."
            )
        kept[name] = chosen(loss, torch.tensor(there))
    return kept, LeftOut(*counts)


def apart_from_copies(loss: Loss, theta: Theta) -> tuple[Loss, int]:
    """The loss on scored sequences that differ from each other, and how many are left out."""
    there, known = [], set[bytes]()
    for real, content in zip(are_scored(loss, theta).tolist(), contents(loss), strict=True):
        there.append(real and content not in known)
        known.add(content)
    return chosen(loss, torch.tensor(there)), there.count(False)


def num_different(loss: Loss, theta: Theta) -> int:
    """Scored sequences, copies once."""
    return len({key for key, real in zip(contents(loss), are_scored(loss, theta), strict=True) if real})


def contents(loss: Loss) -> list[bytes]:
    """What every sequence holds, whatever its padding: equal for copies."""
    made: list[bytes] = []
    for inputs, targets in loss.batches:
        size = num_rows((inputs, targets))
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        if isinstance(ids, Tensor) and mask is not None and isinstance(targets, Labels):
            real, scored = tokens_there(mask).expand(ids.shape), targets.weight != 0
            rows = [[ids[r][real[r]], targets.index[r][scored[r]]] for r in range(size)]
        else:
            leaves = [x for x in tensors((inputs, targets)) if x.ndim and len(x) == size]
            rows = [[x[r] for x in leaves] for r in range(size)]
        made += [blake2b(b"".join(map(_bytes, row))).digest() for row in rows]
    return made


def _bytes(x: Tensor) -> bytes:
    flat = x.detach().cpu().contiguous().flatten()
    return f"{tuple(x.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()


def are_scored(loss: Loss, theta: Theta) -> Bool[Tensor, " n"]:
    """Whether anything of a sequence is."""
    labels = [targets.weight for _, targets in loss.batches if hasattr(targets, "weight")]
    if len(labels) == len(loss.batches):
        return torch.cat([weight.ne(0).reshape(len(weight), -1).any(1) for weight in labels])
    return terms_at(loss, theta).weights != 0


def chosen(loss: Loss, there: Bool[Tensor, " n"]) -> Loss:
    """The loss on some of its sequences, in the batches that they are in."""
    if not bool(there.all()):
        check_apart(loss, 1)
    batches, at = [], 0
    for batch in loss.batches:
        size = num_rows(batch)
        part = there[at : at + size]
        if bool(part.any()):
            batches.append(batch if bool(part.all()) else cut(batch, part.nonzero()[:, 0], size))
        at += size
    return replace(loss, batches=tuple(batches))


def sequences(loss: Loss) -> Int[Tensor, " n"]:
    """The number of the sequence that every scored position is of."""
    parts, at = [], 0
    for _, labels in loss.batches:
        parts.append(labels.weight.nonzero()[:, 0] + at)
        at += len(labels.weight)
    return torch.cat(parts)
