"""Training under a mask: what is pruned is 0 at the start, at every step and at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.func import grad

from ..core.apart import check_apart
from ..core.batches import cut, num_rows
from ..core.checks import check_choice, check_count, check_flat, check_mask, check_number, check_positive
from ..core.keys import Key, fold_in, uniform
from ..core.objective import Loss

Train = Callable[[Float[Tensor, " p"], Bool[Tensor, " p"], Key], Float[Tensor, " p"]]
"""(theta, mask, key) -> trained parameters, 0 where the mask is False."""


def masked_training(
    loss: Loss,
    *,
    steps: int = 100,
    learning_rate: float = 1e-3,
    optimiser: Literal["adamw", "sgd"] = "adamw",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    batch_size: int | None = None,
) -> Train:
    r"""A pure function `train(theta, mask, key)`: so many steps of AdamW or SGD over the flat vector, under a mask.

    The mask multiplies the first weights, every gradient, and the weights behind every step, so that neither moments nor
    weight decay bring anything back: $\theta_{t+1} = m \odot (\theta_t - \eta (u_t + \lambda \theta_t))$, where $u_t$ is
    Adam's step of decay .9 and .999 and epsilon 1e-8, or the momentum buffer of SGD, both as torch has them (decay is
    decoupled for AdamW; for SGD it is added to the gradient, as there).

    batch_size: sequences of a step, drawn without repetition from one batch, which is drawn by a chance in proportion to
    its sequences; the key decides. None: all data at every step, and the key is not looked at. A step costs about three
    forward passes over these.

    Raises ValueError for settings out of their range.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 1, bias=False))
    >>> loss = fs.objective(net, [(torch.eye(2), torch.tensor([[1.0], [2.0]]))], fs.mse)
    >>> train = masked_training(loss, steps=50, learning_rate=0.5, optimiser="sgd", momentum=0.0)
    >>> train(torch.zeros(2), torch.tensor([True, False]), fs.key(0)).round(decimals=4).tolist()
    [1.0, 0.0]
    """
    check_count("steps", steps)
    check_positive("learning_rate", learning_rate)
    check_choice("optimiser", optimiser, ("adamw", "sgd"))
    check_number("momentum", momentum, 0.0, 1.0)
    check_number("weight_decay", weight_decay, 0.0)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    step = _adamw(learning_rate, weight_decay) if optimiser == "adamw" else _sgd(learning_rate, momentum, weight_decay)

    def train(theta: Tensor, mask: Tensor, key: Key) -> Tensor:
        check_flat("theta", theta, loss.layout.num)
        check_mask("mask", mask, loss.layout.num)
        at, state = Loss.vector(loss, theta) * mask, torch.zeros(2, len(theta)).to(theta)
        for i in range(steps):
            part = loss if batch_size is None else drawn_batch(loss, fold_in(key, i), batch_size)
            gradient = grad(part)(at) * mask
            at, state = step(at, gradient, state, i + 1)
            at = at * mask
        return at

    return train


def drawn_batch(loss: Loss, key: Key, size: int) -> Loss:
    """The loss of at most `size` random sequences of one of its batches."""
    check_apart(loss, size)
    counts = torch.tensor([num_rows(batch) for batch in loss.batches], dtype=torch.float64)
    cuts = counts.cumsum(0) / counts.sum()
    place = uniform(fold_in(key, "batch"), torch.zeros(1, dtype=torch.float64))
    chosen = min(int(torch.searchsorted(cuts, place, right=True)), len(counts) - 1)
    batch, num = loss.batches[chosen], int(counts[chosen])
    order = uniform(fold_in(key, "sequences"), torch.zeros(num)).argsort(stable=True)[:size]
    return replace(loss, batches=(cut(batch, order.sort().values.to(loss.net.device), num),))


def _adamw(rate: float, decay: float) -> Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    def step(theta: Tensor, gradient: Tensor, state: Tensor, count: int) -> tuple[Tensor, Tensor]:
        first = 0.9 * state[0] + 0.1 * gradient
        second = 0.999 * state[1] + 0.001 * gradient.square()
        scale = (second / (1 - 0.999**count)).sqrt() + 1e-8
        moved = theta * (1 - rate * decay) - rate * first / (1 - 0.9**count) / scale
        return moved, torch.stack([first, second])

    return step


def _sgd(rate: float, momentum: float, decay: float) -> Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    def step(theta: Tensor, gradient: Tensor, state: Tensor, _: int) -> tuple[Tensor, Tensor]:
        velocity = momentum * state[0] + gradient + decay * theta
        return theta - rate * velocity, torch.stack([velocity, state[1]])

    return step
