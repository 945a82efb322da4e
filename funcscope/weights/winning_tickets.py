"""Does a mask that training found win over a random one? The answer for one model, over several keys."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.apart import check_apart
from ..core.batches import cut, num_rows
from ..core.checks import check_count, check_number
from ..core.estimate import Crossed
from ..core.keys import Key, check_key, fold_in, uniform
from ..core.objective import Loss, Theta
from ..core.result import Result, quantity
from ..core.tables import counted
from .masked_training import masked_training
from .prunable import Prunable, Scope, prunable_leaves
from .sequence_scores import SequenceScores, over_draws, residual_rows, sequence_scores
from .task_vectors import flat_of
from .tickets import contest

NETWORKS = ("dense", "ticket", "one shot", "random")


class WinningTickets(Result):
    """Losses on held-out sequences after the same training: of the whole network, its ticket, and two other masks."""

    losses: Float[Tensor, "d n"] = quantity("loss after training", unit="loss", per=("draw", "network"), shown=False)
    dense_loss: Crossed = quantity("loss of the dense network", unit="loss")
    dense_excess: Crossed = quantity("loss of the dense network above that before training", unit="loss")
    ticket_excess: Crossed = quantity("loss of the ticket above that of the dense network", unit="loss")
    random_excess: Crossed = quantity("loss of the random ticket above that of the ticket", unit="loss")
    one_shot_excess: Crossed = quantity("loss of the one-shot ticket above that of the ticket", unit="loss")
    initial_loss: float = quantity("loss before any training", unit="loss")
    sparsity: float
    rounds: int
    steps: int
    num: int
    num_prunable: int
    num_sequences: int
    """Held out: losses are of these."""
    num_trained_on: int
    num_trainings: int
    scope: str
    key: Key

    @property
    def coords(self) -> dict[str, tuple[str, ...]]:
        return {"network": NETWORKS}

    @property
    def head(self) -> str:
        what = f"tickets of {self.num_prunable:,} weights at a sparsity of {self.sparsity:g}, {counted(self.rounds, 'round')}"
        over = f"{counted(self.num, 'draw')} and {counted(self.num_sequences, 'held-out sequence')}"
        return f"{what} of {counted(self.steps, 'step')}, over {over}"

    @property
    def notes(self) -> list[str]:
        made = [] if self.num > 1 else ["There is one draw, and no error over draws."]
        errors = (self.dense_excess.stderr_total, self.dense_excess.stderr_data)
        error = next((float(each) for each in errors if each.isfinite()), math.inf)
        if abs(float(self.dense_excess.value)) <= 2 * error:
            made.append("Whether training made the dense network better on held-out sequences is not resolved.")
        elif float(self.dense_excess.value) > 0:
            made.append(
                "On held-out sequences the dense network is worse after training than before: it has learnt those that it "
                "was trained on. Take more sequences, fewer steps or a smaller rate to compare networks that generalise."
            )
        return made if self.num_sequences > 1 else [*made, "There is one held-out sequence, and no error over data."]


def winning_tickets(
    loss: Loss,
    theta: Theta,
    *,
    key: Key,
    sparsity: float = 0.8,
    rounds: int = 3,
    num: int = 3,
    steps: int = 40,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    optimiser: Literal["adamw", "sgd"] = "adamw",
    weight_decay: float = 0.0,
    held_out: float = 0.5,
    scope: Scope = "global",
    prunable: Prunable = "linear",
) -> WinningTickets:
    r"""The loss of a ticket from iterative magnitude pruning beside a random one of its size and the dense network.

    From theta, on a part of the sequences, `iterative_magnitude_pruning` trains the whole network, prunes in `rounds` rounds
    with survivors rewound to theta, and trains the last ticket, a one-shot ticket, and a random one with as many weights in
    every tensor, all for the same `steps` of `masked_training`; all are scored on the other sequences.
    `random_excess` above 0 says that training found better weights to keep than chance, `ticket_excess` near 0 that they
    suffice (a winning ticket), `one_shot_excess` above 0 that rounds were worth it. Of a trained model this asks which of its
    weights matter, with a little training; the lottery ticket hypothesis itself asks it of weights near their initialisation.

    num: draws, each with its own order of the data and random mask; the sequences that are held out are the same for all.
    Errors are over draws and over held-out sequences. held_out: their share, at least one; drawn by the key in every batch.

    Cost: num (rounds + 3) trainings of `steps` steps, each about 3 `batch_size` / n forward passes over the n sequences: at
    the default settings, 2,160 passes of 16 sequences.

    Raises ValueError where there are fewer than two sequences, and as `iterative_magnitude_pruning`.

    Frankle, Carbin (2019), arXiv:1803.03635.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(4, 2))
    >>> loss = fs.objective(net, [(torch.eye(4), torch.tensor([0, 1, 0, 1]))], fs.classification)
    >>> made = winning_tickets(loss, net.theta, key=fs.key(0), rounds=1, num=2, steps=2)
    >>> made.num_sequences, made.num_trainings, made.losses.shape
    (2, 8, torch.Size([2, 4]))
    """
    check_key(key)
    check_count("num", num)
    check_count("rounds", rounds)
    check_number("sparsity", sparsity, 0.0, 1.0)
    theta = flat_of("theta", Loss.vector(loss, theta), loss.layout)
    train_on, score_on = split(loss, fold_in(key, "held out"), held_out)
    before = sequence_scores(score_on, theta)
    if not bool(before.weights.any()):
        raise ValueError("`held_out` sequences must have a scored position, got none: hold out more of them.")
    train = masked_training(
        train_on, steps=steps, learning_rate=learning_rate, optimiser=optimiser, weight_decay=weight_decay,
        batch_size=batch_size,
    )  # fmt: skip
    draws: list[list[SequenceScores]] = []
    for draw in range(num):
        made = contest(train, theta, loss.layout, fold_in(key, draw), sparsity, rounds, None, scope, prunable)
        networks = (made.trained[0], made.trained[-1], made.one_shot, made.random)
        draws.append([sequence_scores(score_on, each) for each in networks])
    sums, of = torch.stack([torch.stack([each.sums for each in row]) for row in draws]), before.weights
    return WinningTickets(
        losses=sums.sum(-1) / of.sum(), dense_loss=_mean(sums[:, 0], of),
        dense_excess=_mean(sums[:, 0] - before.sums, of), ticket_excess=_mean(sums[:, 1] - sums[:, 0], of),
        random_excess=_mean(sums[:, 3] - sums[:, 1], of), one_shot_excess=_mean(sums[:, 2] - sums[:, 1], of),
        initial_loss=before.mean, sparsity=float(sparsity), rounds=rounds, steps=steps, num=num,
        num_prunable=sum(leaf.numel for leaf in prunable_leaves(loss.layout, prunable)),
        num_sequences=int((of != 0).sum()), num_trained_on=sum(num_rows(batch) for batch in train_on.batches),
        num_trainings=num * (rounds + 3), scope=scope, key=key,
    )  # fmt: skip


def split(loss: Loss, key: Key, share: float) -> tuple[Loss, Loss]:
    """The loss of some sequences of every batch, and that of the others, of about this share.

    Raises ValueError where one of the two has no sequence.
    """
    check_number("held_out", share, 0.0, 1.0)
    check_apart(loss, 1)
    counts = [num_rows(batch) for batch in loss.batches]
    total = sum(counts)
    num = min(max(round(share * total), 1), total - 1)
    if num < 1:
        raise ValueError(f"`loss` must be of two sequences or more, some of them held out, got {total}.")
    order = uniform(key, torch.zeros(total)).argsort(stable=True)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[order[:num]] = True
    sides: tuple[list, list] = ([], [])
    for batch, flags in zip(loss.batches, chosen.split(counts), strict=True):
        for side, places in zip(sides, ((~flags).nonzero()[:, 0], flags.nonzero()[:, 0]), strict=True):
            if len(places):
                side.append(cut(batch, places.to(loss.net.device), len(flags)))
    return replace(loss, batches=tuple(sides[0])), replace(loss, batches=tuple(sides[1]))


def _mean(sums: Float[Tensor, "d n"], weights: Float[Tensor, " n"]) -> Crossed:
    return over_draws(sums.sum(-1) / weights.sum(), residual_rows(sums, weights))
