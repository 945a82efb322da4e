"""What the Fisher information of one task and of two says block by block, from a model and its data in one call each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_count
from ..core.estimate import wide
from ..core.heads import head_views
from ..core.keys import Key, check_key, fold_in
from ..core.objective import Loss, Theta
from ..core.result import derived, internal, quantity
from ..core.standard_errors import ratio_stderr
from ..curvature.fisher import fisher_diagonal_mc
from ..curvature.gram import Blocks, block_views
from ..curvature.mask_overlap import MaskOverlap, overlaps
from ..curvature.outputs import total_weight
from ..curvature.pruning_masks import obd_saliency, pruning_mask
from ..curvature.scored_sequences import apart, dealt, num_different
from ..curvature.whitening import check_tasks, cut_views
from .importance import Importance
from .interference import HeadInterference, head_interference

GROUPS = 8
"""Of sequences, of which halves are made; a power of 2."""
HALVES = ("different tasks", "first task", "second task")


def fisher_importance(
    loss: Loss, theta: Theta, *, key: Key, by: Blocks = "layer", num: int = 1, num_groups: int = 16
) -> Importance:
    r"""Shares of blocks in the trace of the Fisher information: where the model's predictions are easily moved.

    $\sum_{k \in b} F_k / \sum_k F_k$ with F the diagonal of the Fisher information, sampled: the sequences are dealt to
    `num_groups` groups (or as many as there are), each with `num` draws of labels of its own (`fisher_diagonal_mc`). Standard
    errors are those of a ratio over the groups: of other sequences and of other draws, together.

    Raises ValueError as `fisher_diagonal_mc` does.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 2, bias=False))
    >>> x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.0], [2.0, 0.0]])   # the second column is never used
    >>> loss = fs.objective(net, [(x, torch.tensor([0, 1, 1, 0]))], fs.classification)
    >>> fisher_importance(loss, net.theta, key=fs.key(0), by="tensor").share.tolist()
    [1.0]
    """
    check_key(key)
    check_count("num_groups", num_groups)
    theta = Loss.vector(loss, theta)
    views = block_views(loss.layout, by)
    columns = []
    for diagonal in _diagonals(dealt(loss, theta, num_groups), theta, key, num):
        cuts = [cut_views(diagonal, loss.layout, each) for each in views.values()]
        columns.append(torch.stack([cut.sum(dtype=wide(cut.device)) for cut in cuts]))
    sums = torch.stack(columns, 1)
    sizes = sums.new_tensor([len(cut) for cut in cuts])
    return Importance(sums.sum(1) / sums.sum(), sizes, ratio_stderr(sums, sums.sum(0)), list(views))


class FisherOverlap(MaskOverlap):
    """Parameters of the largest Fisher information for two tasks: what they share, beside chance and beside one task alone.

    `halves` says what could be seen at all: with half of the sequences, and draws of their own, each. That of one task's two
    halves is 1 where the estimate is exact; where it is small, the overlap of tasks is small for lack of data. Errors are of
    the overlap at so many sequences and draws, not of what it comes short of one without noise.
    """

    kappa_stderr: Float[Tensor, " b"] = quantity("standard error of the overlap", per="block", shown=False)
    total_kappa_stderr: float = quantity("standard error of the overlap of all blocks", shown=False)
    halves: Float[Tensor, "b 3"] = quantity("overlap above chance of halves", per=("block", "halves"))
    total_halves: Float[Tensor, " 3"] = quantity("overlap of halves above chance, all blocks", per="halves")
    density: float
    score: str
    num: int
    names: list[str] = internal()

    kappa = derived("overlap above chance", per="block", stderr="kappa_stderr")(
        lambda self: MaskOverlap.kappa.func(self)
    )
    total_kappa = derived("overlap of all blocks above chance", stderr="total_kappa_stderr")(
        lambda self: MaskOverlap.total_kappa.func(self)
    )

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"block": self.blocks, "halves": self.names}

    @property
    def head(self) -> str:
        return f"the {self.density:.3g} of {int(self.sizes.sum()):,} parameters that two tasks need most"


def fisher_overlap(
    first: Loss,
    second: Loss,
    theta: Theta,
    *,
    key: Key,
    density: float = 0.1,
    by: Blocks = "layer",
    within: Blocks = "none",
    score: Literal["fisher", "obd"] = "fisher",
    num: int = 8,
) -> FisherOverlap:
    r"""Whether two tasks need the same parameters: the overlap of their largest Fisher informations, beside chance.

    The parameters of the largest diagonal F (`score="fisher"`), or of the largest $F \theta^2 / 2$ ("obd"), of each task, a
    share of `density` of them: of all parameters together (`within="none"`), or of those of every block of `within`. F is the
    mean of `num` draws of labels (`fisher_diagonal_mc`), per scored token. Counted by block of `by`; see `mask_overlap`.

    The sequences of each task are dealt to 8 groups (of fewer than 8, to 4 or 2), each with draws of its own, which are
    halved in 7 (3, 1) ways, balanced: any two groups are together in as many of them. `halves`: the overlap of the masks of
    halves, mean over ways: of different tasks, four pairs each, and of both halves of one task. It is what an overlap is to
    be compared with: what noise leaves of 1.

    The standard error of $\kappa$, over sequences and draws of both tasks, is the standard deviation over all halves of
    different tasks: balanced half-samples, which for a sum over sequences give the variance of the whole. Overlaps are no
    smooth function of scores: its root mean square was .65 to 1.15 of the deviation of repetitions with 16 to 96 sequences of
    a small classifier (1.3 to 1.9, were groups left out one at a time). nan where a half's mask leaves a block empty or full.

    Memory: the diagonals of all groups of one task at once. McCarthy (1969), doi:10.2307/1402116, for half-samples.

    Raises ValueError for tasks of different parameters or of fewer than two scored sequences, and as `pruning_mask` does.
    """
    check_key(key)
    check_choice("score", score, ("fisher", "obd"))
    theta = Loss.vector(first, theta)
    check_tasks(first, second)
    layout = first.layout

    def mask(parts: Sequence[Tensor]) -> Tensor:
        fisher = sum(parts[1:], parts[0])
        scores = fisher if score == "fisher" else obd_saliency(fisher, theta)
        return pruning_mask(scores, layout, sparsity=1 - density, by=within).mask

    masks = []
    for i, groups in enumerate([_groups(loss, theta, i, GROUPS) for i, loss in enumerate((first, second))]):
        parts = list(_diagonals(groups, theta, fold_in(key, i), num))
        masks.append((mask(parts), [(mask(a), mask(b)) for a, b in _splits(parts)]))
    (a, of_first), (b, of_second) = masks
    count = range(max(len(of_first), len(of_second)))
    across = [pair for i in count for pair in product(of_first[i % len(of_first)], of_second[i % len(of_second)])]
    found = overlaps([(a, b), *across, *of_first, *of_second], layout, by)
    kappas = torch.stack([_kappas(one) for one in found[1:]], -1)
    parts_of = kappas.split([len(across), len(of_first), len(of_second)], -1)
    halves = torch.stack([each.mean(-1) for each in parts_of], 1)
    stderr = parts_of[0].var(-1, correction=0).sqrt()
    every = found[0]
    return FisherOverlap(
        every.sizes, every.num_first, every.num_second, every.num_both, every.blocks, stderr[:-1], float(stderr[-1]),
        halves[:-1], halves[-1], float(density), score, num, list(HALVES),
    )  # fmt: skip


def _splits(parts: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Halves of 2^k groups in 2^k - 1 ways, the first by every second one: any two groups are together in as many of them."""
    for k in range(1, len(parts)):
        sides = [(i & k).bit_count() % 2 for i in range(len(parts))]
        first, second = ([part for part, each in zip(parts, sides, strict=True) if each == side] for side in (0, 1))
        yield first, second


def _kappas(one: MaskOverlap) -> Float[Tensor, " c"]:
    """Of blocks and, last, of all."""
    return torch.cat([one.kappa, one.kappa.new_tensor([one.total_kappa])])


def qkov_interference(
    first: Loss,
    second: Loss,
    theta: Theta,
    *,
    key: Key,
    damping: float = 1e-3,
    num: int = 999,
    chunk_size: int = 8,
) -> HeadInterference:
    """Interference of two tasks in the queries, keys, values and outputs of every head; see `head_interference`.

    Every second sequence of both tasks is held out for the Fisher information that weighs it. Sequences that both tasks
    have, and copies, are left out.

    Raises ValueError for no Hugging Face model with attention heads, for fewer than four scored sequences of a task, and as
    `head_views` and `head_interference` do.
    """
    check_tasks(first, second)
    if first.layout.heads is None:
        raise ValueError("heads are those of a Hugging Face model, and this is none: take `head_interference`.")
    views = head_views(first.layout, first.layout.heads)
    theta = Loss.vector(first, theta)
    first, second, _ = apart(first, second, theta)
    (a, held), (b, also) = (_groups(loss, theta, i, 2, least=4) for i, loss in enumerate((first, second)))
    return head_interference(
        a, b, replace(held, batches=held.batches + also.batches), theta, views=views, key=key,
        damping=damping, num=num, chunk_size=chunk_size,
    )  # fmt: skip


def _groups(loss: Loss, theta: Theta, task: int, num: int, least: int = 2) -> list[Loss]:
    if (there := num_different(loss, theta)) < least:
        which = ("first", "second")[task]
        raise ValueError(
            f"the {which} task must have {least} different scored sequences, got {there}: half of them are set apart."
        )
    return dealt(loss, theta, min(num, 1 << there.bit_length() - 1))


def _diagonals(parts: list[Loss], theta: Tensor, key: Key, num: int) -> Iterator[Float[Tensor, " p"]]:
    """Of every part, its Fisher diagonal times what its tokens weigh."""
    for i, part in enumerate(parts):
        made = fisher_diagonal_mc(part, theta, key=fold_in(key, i), num=num).value * total_weight(part, theta)
        if not bool(made.isfinite().all()):
            name = next(leaf.name for leaf in part.layout.leaves if not bool(made[leaf.slice].isfinite().all()))
            raise ValueError(
                f"the Fisher diagonal in `{name}` is not finite: look at the weights there, and at the data."
            )
        yield made
