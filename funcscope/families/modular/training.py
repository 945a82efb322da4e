"""Full-batch AdamW with checkpoints that training goes on from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoints import MOMENTS, adamw, checkpoint, path, trained
from .dataset import CRITERION, data
from .model import make
from .variants import EVERY, Config

__all__ = ["Point", "checkpoint", "path", "train"]


class Point(NamedTuple):
    """One point of the curves: mean cross-entropy in nats, share of right answers."""

    step: int
    train_loss: float
    test_loss: float
    train_accuracy: float
    test_accuracy: float


def train(config: Config, folder: Path, steps: Sequence[int]) -> Iterator[Point]:
    """Train by full-batch AdamW, keeping checkpoints at `steps` in `folder`; yields a point of the curves as it goes.

    Goes on from the last checkpoint before the first that is missing, with the same bits as an uninterrupted run on the
    same machine and number of threads; stored points are yielded first. A checkpoint holds parameters, optimiser state,
    configuration and curves.

    Raises Damaged for a checkpoint that cannot be read, ValueError for one of another configuration.
    """
    model = make(config)
    optimiser = adamw(model, lr=config.learning_rate, weight_decay=config.weight_decay, betas=config.betas)
    splits = data(config, "train"), data(config, "test")

    def update(step: int) -> None:
        if step > 0:
            optimiser.zero_grad()
            _scores(model, *splits[0])[0].backward()
            optimiser.step()
        if step % EVERY == 0:
            _drop_denormals(optimiser)

    @torch.no_grad()
    def point(step: int) -> Point:
        losses, shares = zip(*(_scores(model, *split) for split in splits), strict=True)
        return Point(step, *map(float, losses), *shares)

    yield from trained(
        "modular_addition", model, optimiser, config, folder, steps, update=update, point=point, every=EVERY, of=Point
    )


def _drop_denormals(optimiser: torch.optim.Optimizer) -> None:
    """Zero the moments below 1e-30: those of dead units decay into denormal numbers, which take 3 times the time."""
    for state in optimiser.state.values():
        for name in MOMENTS:
            state[name].masked_fill_(state[name].abs() < 1e-30, 0.0)


def _scores(model: nn.Module, tokens: Tensor, answers: Tensor) -> tuple[Tensor, float]:
    """The mean loss, and the share of right answers."""
    logits = model(tokens)
    loss, _ = CRITERION.token_loss(logits, CRITERION.prepare((tokens, answers))[1])
    return loss.mean(), float((logits.argmax(-1) == answers).double().mean())
