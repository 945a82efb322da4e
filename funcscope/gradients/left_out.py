"""The gradient of all sequences, of groups of them, and of all but each group: what errors over sequences are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_choice, check_count
from ..core.layout import By
from ..core.objective import Loss, Theta
from ..core.vectors import Leaves, norm
from ..curvature.leafwise import summed_gradient
from ..curvature.scored_sequences import LeftOut, dealt, scored_sequences


class Parts(NamedTuple):
    """Gradients of mean losses, by parameter."""

    own: dict[str, Tensor]
    """Of one group of sequences."""
    rest: dict[str, Tensor]
    """Of all the others."""


class GroupedGradients:
    """The gradient of the mean loss, which may hold what is not finite, and those of groups of sequences."""

    def __init__(self, loss: Loss, theta: Theta, num_groups: int):
        check_count("num_groups", num_groups, least=2)
        self.leaves = loss.wide_leaves(theta)
        self.loss, self.num_unscored = scored_sequences(loss, theta)
        self.sums, terms = summed_gradient(self.loss, self.leaves)
        self.weight, self.num_sequences = float(terms.weights.sum()), len(terms.weights)
        self.groups = dealt(self.loss, theta, num_groups)

    @property
    def whole(self) -> dict[str, Tensor]:
        return {name: x / self.weight for name, x in self.sums.items()}

    def each(self) -> Iterator[Parts]:
        """One group after another, made when it is asked for; none where all sequences are one group."""
        for group in self.groups if len(self.groups) > 1 else []:
            sums, terms = summed_gradient(group, self.leaves)
            weight = float(terms.weights.sum())
            rest = {name: (x - sums[name]) / (self.weight - weight) for name, x in self.sums.items()}
            yield Parts({name: x / weight for name, x in sums.items()}, rest)


def forward_blocks(loss: Loss, by: By) -> dict[str, list[str]]:
    """Names of parameters by block, in the order in which a forward pass first uses them; unused ones come last.

    Raises ValueError for `filter`, which cuts parameters, and for what is no partition.
    """
    if not callable(by):
        check_choice("by", by, ("tensor", "layer", "module"))
    order: dict[str, None] = {}

    def used(name: str, value: Tensor) -> Tensor:
        order[name] = None
        return value

    with torch.no_grad():
        loss.net.apply_leaves(used, loss.batches[0][0])
    groups = loss.layout.group_of(by)
    blocks: dict[str, list[str]] = {}
    for name in order | dict.fromkeys(loss.layout.names):
        blocks.setdefault(groups[name], []).append(name)
    return blocks


def block_norms(leaves: Leaves, blocks: Mapping[str, list[str]]) -> Tensor:
    """Euclidean norms, float64 on the CPU."""
    return torch.tensor(
        [norm({name: leaves[name] for name in names}) for names in blocks.values()], dtype=torch.float64
    )


def num_entries(leaves: Leaves, blocks: Mapping[str, list[str]]) -> Tensor:
    """How many numbers every block has."""
    return torch.tensor([sum(leaves[name].numel() for name in names) for names in blocks.values()])


def num_nonfinite(leaves: Leaves, blocks: Mapping[str, list[str]]) -> Tensor:
    """How many entries of every block are nan or infinite."""
    counts = {name: int((~x.isfinite()).sum()) for name, x in leaves.items()}
    return torch.tensor([sum(counts[name] for name in names) for names in blocks.values()])


def joined(leaves: Leaves, names: list[str]) -> Tensor:
    """One flat vector."""
    return torch.cat([leaves[name].flatten() for name in names])


def error_notes(blocks: Sequence[str], values: Tensor, errors: Tensor, num_groups: int) -> list[str]:
    """Why a number of a block, by rows, has no error: it has no value without one of the groups."""
    lost = values.isfinite() & errors.isnan()
    names = [name for name, each in zip(blocks, lost.reshape(len(lost), -1), strict=True) if bool(each.any())]
    if num_groups < 2 or not names:
        return []
    return [f"no error, as a group of sequences has all there is of a gradient: {', '.join(names)}."]


def sampling_notes(num_groups: int, num_unscored: int) -> list[str]:
    """What a reader must know of the sequences."""
    notes = ["There is one sequence, and no error over sequences."] if num_groups < 2 else []
    return notes + LeftOut(num_unscored, 0, 0).notes
