"""Iterative magnitude pruning with rewinding: masks that were found by training, and what is left once they are trained."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.checks import check_count, check_flat, check_number
from ..core.estimate import Estimate
from ..core.keys import Key, check_key, fold_in, uniform
from ..core.layout import Layout
from ..core.objective import Loss
from ..core.result import Result, internal, quantity
from ..core.tables import counted
from .masked_training import Train
from .prunable import Prunable, Scope, prunable_leaves, sparse_mask
from .sequence_scores import SequenceScores, mean_difference, sequence_scores
from .task_vectors import flat_of


class Contest(NamedTuple):
    """What was trained from one point."""

    masks: list[Tensor]
    """Of every round: nothing pruned, ..., the ticket."""
    trained: list[Tensor]
    random_mask: Tensor
    random: Tensor
    one_shot_mask: Tensor
    one_shot: Tensor


class IterativePruning(Result):
    """Masks of every round of training and pruning, and the losses of what was trained under them."""

    sparsity: Float[Tensor, " r"] = quantity("share pruned", per="round")
    loss: Float[Tensor, " r"] | None = quantity("loss after training", unit="loss", per="round", stderr="loss_stderr")
    loss_stderr: Float[Tensor, " r"] | None
    """Paired, over sequences, of the difference to round 0; 0 there."""
    ticket_excess: Estimate | None = quantity("loss of the ticket above that of the dense network", unit="loss")
    random_excess: Estimate | None = quantity("loss of the random ticket above that of the ticket", unit="loss")
    one_shot_excess: Estimate | None = quantity("loss of the one-shot ticket above that of the ticket", unit="loss")
    masks: Bool[Tensor, "r p"] = quantity("kept", per=("round", "parameter"), shown=False)
    random_mask: Bool[Tensor, " p"] = quantity("kept by the random ticket", per="parameter", shown=False)
    one_shot_mask: Bool[Tensor, " p"] = quantity("kept by the one-shot ticket", per="parameter", shown=False)
    ticket: Float[Tensor, " p"] = internal()
    """The trained ticket."""
    num_prunable: int
    num_trainings: int
    scope: str
    key: Key

    @property
    def coords(self) -> dict[str, range]:
        return {"round": range(len(self.sparsity))}

    @property
    def head(self) -> str:
        what = f"{self.num_prunable:,} prunable weights, {counted(len(self.masks) - 1, 'round')}"
        return f"iterative magnitude pruning ({self.scope}) of {what}, {counted(self.num_trainings, 'training')}"

    @property
    def notes(self) -> list[str]:
        made = ["There is one training of each kind: no error over initialisations and orders of the data."]
        return made if self.loss is not None else ["No loss was given, so that nothing says how good the ticket is."]


def iterative_magnitude_pruning(
    train: Train,
    theta: Float[Tensor, " p"],
    layout: Layout,
    *,
    key: Key,
    sparsity: float = 0.8,
    rounds: int = 4,
    rewind: Float[Tensor, " p"] | None = None,
    scope: Scope = "global",
    prunable: Prunable = "linear",
    loss: Loss | None = None,
) -> IterativePruning:
    r"""Train, prune the smallest of the weights that are left, put the others back, and again: a lottery ticket.

    $$s_i = 1 - (1 - s)^{i/n}, \qquad i = 0, \ldots, n,$$

    is the sparsity under which round i trains: round 0 all weights from theta, every later one the survivors from where they
    were at theta, or at `rewind`. Each round prunes, of the survivors of the one before, those that have come out smallest,
    so that masks are nested and the last has s exactly, up to one weight of each scope. Trained the same way, under as many
    weights in every tensor, are a random ticket, and a one-shot ticket: the largest weights of round 0, all pruned at
    once. That a ticket wins is a statement about these losses after training; a mask alone says nothing of it.

    train: `(theta, mask, key) -> theta`, as `masked_training` makes one; round i has the i-th child of the key. It must
    return 0 wherever the mask is False: what grows back was not pruned. rewind: $\theta_k$, weights after a few steps.
    loss: of the data that trained networks are compared on, held out if that is the question; without it no losses.
    scope and prunable: as `sparse_mask`.

    `rounds` + 3 trainings. Errors are over sequences and paired; none is over trainings, of which each is one.

    A document prunes once, without training, along $s (1 - e^{-3p})$, which ends at 0.855 for a target of 0.9, and gives the
    mask of the best loss, that is of the least sparsity, for the ticket.

    Raises ValueError for weights that are not finite, and where `train` returns another shape, numbers that are not finite,
    or weights that the mask had pruned.

    Frankle, Carbin (2019), arXiv:1803.03635; Frankle et al. (2020), arXiv:1912.05671 (rewinding).

    >>> import funcscope as fs
    >>> layout = Layout.of(torch.nn.Linear(4, 1, bias=False))
    >>> drift = lambda theta, mask, key: mask * (theta + torch.tensor([0.0, 9.0, 0.0, 0.0]))
    >>> made = iterative_magnitude_pruning(drift, torch.tensor([1.0, 2.0, 3.0, 4.0]), layout, key=fs.key(0), sparsity=0.5)
    >>> made.masks[-1].tolist(), made.ticket.tolist()
    ([False, True, False, True], [0.0, 11.0, 0.0, 4.0])
    """
    theta = flat_of("theta", theta, layout)
    check_key(key)
    check_number("sparsity", sparsity, 0.0, 1.0)
    check_count("rounds", rounds)
    if rewind is not None:
        rewind = flat_of("rewind", rewind, layout)
    made = contest(train, theta, layout, key, sparsity, rounds, rewind, scope, prunable)
    leaves = prunable_leaves(layout, prunable)
    num = sum(leaf.numel for leaf in leaves)
    shares = [1 - sum(int(mask[leaf.slice].sum()) for leaf in leaves) / num for mask in made.masks]
    return IterativePruning(
        sparsity=torch.tensor(shares).double(), **_losses(made, loss), masks=torch.stack(made.masks),
        random_mask=made.random_mask, one_shot_mask=made.one_shot_mask, ticket=made.trained[-1], num_prunable=num,
        num_trainings=rounds + 3, scope=scope, key=key,
    )  # fmt: skip


def contest(
    train: Train, theta: Tensor, layout: Layout, key: Key, sparsity: float, rounds: int, rewind: Tensor | None,
    scope: Scope, prunable: Prunable,
) -> Contest:  # fmt: skip
    """All trainings of `iterative_magnitude_pruning`."""
    start = theta if rewind is None else rewind
    mask = torch.ones_like(theta, dtype=torch.bool)
    masks, trained = [mask], [_trained(train, theta, mask, fold_in(key, 0))]
    for i in range(1, rounds + 1):
        share = 1 - (1 - sparsity) ** (i / rounds) if i < rounds else sparsity
        left = torch.where(mask, trained[-1].abs(), -1.0)  # what is pruned is smaller than any survivor
        mask = sparse_mask(left, layout, sparsity=share, scope=scope, prunable=prunable)
        masks.append(mask)
        trained.append(_trained(train, start, mask, fold_in(key, i)))
    once = _as_many(trained[0].abs(), masks[-1], layout)
    chance = _as_many(uniform(fold_in(key, "random"), theta.float()), masks[-1], layout)
    others = [
        _trained(train, start, each, fold_in(key, name))
        for each, name in ((chance, "random ticket"), (once, "one shot"))
    ]
    return Contest(masks, trained, chance, others[0], once, others[1])


def _trained(train: Train, start: Tensor, mask: Tensor, key: Key) -> Tensor:
    made = train(start * mask, mask, key)
    check_flat("train(theta, mask, key)", made, len(start))
    if not bool(made.isfinite().all()):
        raise ValueError("`train` must return finite weights, got some that are not: take a smaller learning rate.")
    if bool(made[~mask].any()):
        raise ValueError(
            f"`train` must return 0 where the mask is False, got {int((made[~mask] != 0).sum()):,} weights that grew back: "
            "multiply the weights by the mask at every step, as `masked_training` does."
        )
    return made.detach()


def _as_many(score: Tensor, ticket: Tensor, layout: Layout) -> Tensor:
    """The largest scores, in every tensor as many as a ticket keeps."""
    mask = torch.zeros_like(ticket)
    for leaf in layout.leaves:
        order = score[leaf.slice].argsort(descending=True, stable=True)[: int(ticket[leaf.slice].sum())]
        mask[leaf.offset + order] = True
    return mask


def _losses(made: Contest, loss: Loss | None) -> dict[str, Any]:
    names = ("loss", "loss_stderr", "ticket_excess", "random_excess", "one_shot_excess")
    if loss is None:
        return dict.fromkeys(names)
    each: list[SequenceScores] = [sequence_scores(loss, theta) for theta in made.trained]
    random, once = (sequence_scores(loss, theta) for theta in (made.random, made.one_shot))
    errors = torch.stack([mean_difference(one, each[0]).stderr for one in each])
    values = torch.tensor([one.mean for one in each]).double()
    excess = [mean_difference(*pair) for pair in ((each[-1], each[0]), (random, each[-1]), (once, each[-1]))]
    return dict(zip(names, (values, errors, *excess), strict=True))
