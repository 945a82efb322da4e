"""How well a network still learns: the loss that remains after a fixed training on new targets for the same inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count
from ..core.estimate import Crossed
from ..core.keys import Key, check_key, fold_in, uniform
from ..core.objective import Loss, Theta
from ..core.result import Result, quantity
from ..core.tables import counted
from ..curvature.scored_sequences import are_scored, chosen
from .masked_training import masked_training
from .sequence_scores import SequenceScores, over_draws, residual_rows, sequence_scores
from .task_vectors import flat_of

MOMENTS = ("before", "after")
CROSS_ENTROPY = "nats"
"""The unit of criteria whose loss is at least 0, whatever labels are drawn, and 0 where all are known."""


class Plasticity(Result):
    """Losses on new targets before and after a fixed training on them; made by `plasticity`."""

    losses: Float[Tensor, "d 2"] = quantity("loss on new targets", unit="loss", per=("draw", "training"), shown=False)
    remaining_loss: Crossed = quantity("loss on new targets after training", unit="loss")
    initial_loss: Crossed = quantity("loss on new targets before training", unit="loss")
    loss_reduction: Crossed = quantity("fall of the loss on new targets", unit="loss")
    memorised_share: Crossed | None = quantity("share of new targets that was memorised")
    """None for losses whose floor is not known."""
    silent_loss: float = quantity("loss of outputs of 0 on new targets", unit="loss")
    """log C for C classes."""
    num_diverged: int
    """Draws whose loss after training is not finite."""
    num: int
    steps: int
    learning_rate: float
    optimiser: str
    num_sequences: int
    key: Key

    @property
    def coords(self) -> dict[str, tuple[str, ...]]:
        return {"training": MOMENTS}

    @property
    def head(self) -> str:
        training = f"{counted(self.steps, 'step')} of {self.optimiser} at a rate of {self.learning_rate:g}"
        over = f"{counted(self.num, 'draw')} for {counted(self.num_sequences, 'sequence')}"
        return f"plasticity: {training} on new targets, {over}"

    @property
    def unresolved(self) -> list[str]:
        if self.num_diverged:
            return [
                "remaining_loss",
                "loss_reduction",
                *(["memorised_share"] if self.memorised_share is not None else []),
            ]
        return ["loss_reduction"] if self._within_errors else []

    @property
    def notes(self) -> list[str]:
        made = [] if self.num > 1 else ["There is one draw, and no error over draws."]
        if self.num_sequences == 1:
            made.append("There is one sequence, and no error over data.")
        if self.num_diverged:
            made.append(
                f"Training diverged in {self.num_diverged} of {counted(self.num, 'draw')}: a mean over the others would be "
                "of those that went well. Take a smaller `learning_rate`."
            )
        elif self._within_errors:
            made.append(
                "Whether training lowered the loss on new targets is not resolved: the change is within two errors."
            )
        elif float(self.loss_reduction.value) < 0:
            made.append("Training raised the loss that it was to lower: take a smaller `learning_rate`.")
        return made

    @property
    def _within_errors(self) -> bool:
        errors = (self.loss_reduction.stderr_total, self.loss_reduction.stderr, self.loss_reduction.stderr_data)
        error = next((float(each) for each in errors if each.isfinite()), math.inf)
        return abs(float(self.loss_reduction.value)) <= 2 * error


def plasticity(
    loss: Loss,
    theta: Theta,
    *,
    key: Key,
    num: int = 4,
    steps: int = 100,
    learning_rate: float = 1e-3,
    optimiser: Literal["adamw", "sgd"] = "adamw",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    batch_size: int | None = 16,
    sequences: int | None = 64,
) -> Plasticity:
    r"""How well a network still learns: the loss that remains after a fixed training on new targets for the same inputs.

    $$\text{remaining} = \mathbb{E}_{y} \, L(\theta_k(y); y), \qquad \theta_0(y) = \theta, \qquad
      \text{reduction} = \mathbb{E}_{y} [L(\theta; y) - L(\theta_k(y); y)], \qquad
      \text{memorised} = 1 - \frac{\text{remaining}}{L(0; y)},$$

    with k `steps` of `masked_training` without a mask, on targets y that the criterion draws for outputs of 0: uniform labels
    for a cross-entropy, fair coins for a binary one, noise of variance 1/2 for squared errors. Every position keeps the
    weight that it has in the loss: 0 where it is not scored, and that of its own class where classes are weighted. Losses
    are of the sequences that were trained on, as what is asked is whether targets without a rule are memorised. A lower
    remaining loss is more plasticity. `memorised_share` is for cross-entropies, whose floor is 0: 0 where nothing is better
    than outputs of 0 (log C), 1 where every label is known, negative below a network that says nothing, as confident ones
    are at first. Where equal contexts have got different labels, 1 is out of reach.

    The same key gives the same sequences, targets and batches at every theta: checkpoints differ by their weights alone, and
    a remaining loss that rises over training is a loss of plasticity, for this budget and optimiser.

    num: draws of targets. sequences: how many are trained on, drawn by the key; None for all. Errors are over draws and over
    sequences (`Crossed`), to first order: what other sequences would have changed in the weights is not in them. Cost: `num`
    trainings, each of `steps` steps of about 3 `batch_size` / n forward passes over n sequences; None: 3.

    Raises ValueError for settings out of their range, weights that are not finite, and a criterion that draws no targets.

    Lyle et al. (2023), arXiv:2303.01486, whose plasticity is L(0; y) - remaining where outputs of 0 are the baseline.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(4, 2).double())
    >>> loss = fs.objective(net, [(torch.eye(4).double(), torch.tensor([0, 1, 0, 1]))], fs.classification)
    >>> made = plasticity(loss, net.theta, key=fs.key(0), num=3, steps=50, learning_rate=0.1)
    >>> made.losses.shape, float(made.memorised_share.value) > 0.9, round(made.silent_loss, 4)                 # ln 2
    (torch.Size([3, 2]), True, 0.6931)
    """
    check_key(key)
    check_count("num", num)
    if sequences is not None:
        check_count("sequences", sequences)
    training = partial(
        masked_training, steps=steps, learning_rate=learning_rate, optimiser=optimiser, momentum=momentum,
        weight_decay=weight_decay, batch_size=batch_size,
    )  # fmt: skip
    training(loss)  # its door, before any pass
    theta = flat_of("theta", Loss.vector(loss, theta), loss.layout)
    tasks = new_tasks(some_sequences(loss, theta, fold_in(key, "sequences"), sequences), theta, key, num)
    everything = torch.ones_like(theta, dtype=torch.bool)
    ends = (training(task)(theta, everything, fold_in(fold_in(key, i), "batches")) for i, (task, _) in enumerate(tasks))
    before = [sequence_scores(task, theta) for task, _ in tasks]
    after = [sequence_scores(task, end) for (task, _), end in zip(tasks, ends, strict=True)]
    losses = torch.tensor([[x.mean for x in each] for each in (before, after)], dtype=torch.float64).T
    silent = sum(each for _, each in tasks) / num
    return Plasticity(
        losses=losses, initial_loss=_mean(before), remaining_loss=_mean(after),
        loss_reduction=_mean([x._replace(sums=x.sums - y.sums) for x, y in zip(before, after, strict=True)]),
        memorised_share=_share(after, silent) if loss.criterion.unit == CROSS_ENTROPY else None, silent_loss=silent,
        num_diverged=int((~losses[:, 1].isfinite()).sum()), num=num, steps=steps, learning_rate=float(learning_rate),
        optimiser=optimiser, num_sequences=int((before[0].weights != 0).sum()), key=key,
    )  # fmt: skip


def new_tasks(loss: Loss, theta: Tensor, key: Key, num: int) -> list[tuple[Loss, float]]:
    """The loss with targets that its criterion draws for outputs of 0, and what it is of these; one for each draw.

    Raises ValueError for a criterion that draws none.
    """
    if loss.criterion.sample is None:
        raise ValueError(
            f"`loss` must have a criterion that draws targets, and {loss.criterion!r} has no `sample`: choose a "
            "cross-entropy without smoothing or `fs.mse`, or give yours one by `dataclasses.replace(criterion, sample=...)`."
        )
    with torch.no_grad():
        params = loss.params(theta)
        silent = [_zeros_like(loss.net.apply(params, inputs)) for inputs, _ in loss.batches]
    tasks = [_with_new_targets(loss, silent, fold_in(fold_in(key, draw), "targets")) for draw in range(num)]
    return [(task, _loss_of(task, silent)) for task in tasks]


def some_sequences(loss: Loss, theta: Tensor, key: Key, num: int | None) -> Loss:
    """The loss on so many random sequences of which something is scored, or on all of these."""
    scored = are_scored(loss, theta)
    order = uniform(key, torch.zeros(len(scored))).argsort(stable=True).to(scored.device)
    there = torch.zeros_like(scored)
    there[order[scored[order]][:num]] = True
    return chosen(loss, there)


def _zeros_like(out: Tensor) -> Tensor:
    """In the memory of one number: outputs of all batches, of a large vocabulary, would not fit."""
    return out.new_zeros(()).expand(out.shape)


def _with_new_targets(loss: Loss, silent: Sequence[Tensor], key: Key) -> Loss:
    draw: Any = loss.criterion.sample
    batches = enumerate(zip(loss.batches, silent, strict=True))
    return replace(loss, batches=tuple((x, draw(out, y, fold_in(key, i))) for i, ((x, y), out) in batches))


def _loss_of(loss: Loss, outputs: Sequence[Tensor]) -> float:
    """Of outputs that are given, one for every batch."""
    parts = [
        loss.scored(lambda _, out=out: out, *batch)  # type: ignore[misc]
        for out, batch in zip(outputs, loss.batches, strict=True)
    ]
    return float(sum(sums.sum() for sums, _ in parts) / sum(weights.sum() for _, weights in parts))


def _mean(draws: Sequence[SequenceScores]) -> Crossed:
    """Over draws, each a mean over sequences."""
    values = torch.tensor([each.mean for each in draws], dtype=torch.float64)
    return over_draws(values, torch.stack([residual_rows(each.sums, each.weights) for each in draws]))


def _share(draws: Sequence[SequenceScores], baseline: float) -> Crossed:
    """What is gone of a loss that would be `baseline`."""
    return _mean([each._replace(sums=each.weights - each.sums / baseline) for each in draws])
