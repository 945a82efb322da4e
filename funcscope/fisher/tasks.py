"""What the Fisher information of one task and of two says block by block, from a model and its data in one call each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_count
from ..core.estimate import wide
from ..core.heads import head_views
from ..core.keys import Key, check_key, fold_in
from ..core.objective import Loss, Theta
from ..core.result import internal, quantity
from ..core.standard_errors import ratio_stderr
from ..curvature.fisher import fisher_diagonal_mc
from ..curvature.gram import Blocks, block_views
from ..curvature.outputs import total_weight
from .importance import Importance
from .interference import HeadInterference, head_interference
from .masks import obd_saliency, pruning_mask
from .overlap import MaskOverlap, mask_overlap
from .samples import apart, are_scored, dealt
from .whitening import check_tasks, cut_views

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
    halves is 1 where the estimate is exact; where it is small, the overlap of tasks is small for lack of data.
    """

    halves: Float[Tensor, "b 3"] = quantity("overlap above chance of halves", per=("block", "halves"))
    total_halves: Float[Tensor, " 3"] = quantity("overlap of halves above chance, all blocks", per="halves")
    density: float
    score: str
    num: int
    names: list[str] = internal()

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

    `halves`: the same between the halves of the tasks' sequences, mean over the four pairs of different tasks, and between
    both halves of one task. It is what an overlap is to be compared with: what noise leaves of 1.

    Raises ValueError for tasks of different parameters or of fewer than two scored sequences, and as `pruning_mask` does.
    """
    check_key(key)
    check_choice("score", score, ("fisher", "obd"))
    theta = Loss.vector(first, theta)
    check_tasks(first, second)
    layout = first.layout

    def mask(fisher: Tensor) -> Tensor:
        scores = fisher if score == "fisher" else obd_saliency(fisher, theta)
        return pruning_mask(scores, layout, sparsity=1 - density, by=within).mask

    whole, halves = [], []
    for i, loss in enumerate((first, second)):
        parts = list(_diagonals(_halves(loss, theta, i), theta, fold_in(key, i), num))
        whole.append(mask(parts[0] + parts[1]))
        halves.append([mask(part) for part in parts])
    every = mask_overlap(whole[0], whole[1], layout, by=by)
    (a, b), (c, d) = halves
    pairs = ([(a, c), (a, d), (b, c), (b, d)], [(a, b)], [(c, d)])
    found = [[mask_overlap(*pair, layout, by=by) for pair in each] for each in pairs]
    of_blocks = torch.stack([torch.stack([one.kappa for one in each]).mean(0) for each in found], 1)
    of_all = torch.tensor([sum(one.total_kappa for one in each) / len(each) for each in found], dtype=torch.float64)
    return FisherOverlap(
        every.sizes, every.num_first, every.num_second, every.num_both, every.blocks, of_blocks, of_all, float(density),
        score, num, list(HALVES),
    )  # fmt: skip


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

    Every second sequence of both tasks is held out for the Fisher information that weighs it, a copy where its first is.
    Sequences that both tasks have are left out.

    Raises ValueError for no Hugging Face model with attention heads, for fewer than four scored sequences of a task, and as
    `head_views` and `head_interference` do.
    """
    check_tasks(first, second)
    if first.layout.heads is None:
        raise ValueError("heads are those of a Hugging Face model, and this is none: take `head_interference`.")
    views = head_views(first.layout, first.layout.heads)
    theta = Loss.vector(first, theta)
    first, second, *_ = apart(first, second, theta)
    (a, held), (b, also) = (_halves(loss, theta, i, least=4) for i, loss in enumerate((first, second)))
    return head_interference(
        a, b, replace(held, batches=held.batches + also.batches), theta, views=views, key=key,
        damping=damping, num=num, chunk_size=chunk_size,
    )  # fmt: skip


def _halves(loss: Loss, theta: Theta, task: int, least: int = 2) -> list[Loss]:
    if (num := int(are_scored(loss, theta).sum())) < least:
        which = ("first", "second")[task]
        raise ValueError(f"the {which} task must have {least} scored sequences, got {num}: half of them are set apart.")
    return dealt(loss, theta, 2)


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
