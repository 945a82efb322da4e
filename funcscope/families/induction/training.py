"""AdamW on new sequences in every step, with checkpoints that training goes on from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ...core.keys import fold_in, key
from ...core.model import functional
from ..checkpoints import adamw, trained
from ..threads import one_thread
from .dataset import data, repeated
from .model import make
from .scores import scores
from .variants import EVERY, Config


class Point(NamedTuple):
    """One point of the curves: mean cross-entropy of every token in nats, share of right answers among those tokens that
    the context tells, and the scores on the probe with their errors over its sequences."""

    step: int
    train_loss: float
    test_loss: float
    train_accuracy: float
    test_accuracy: float
    second_loss: float
    second_loss_stderr: float
    gain: float
    gain_stderr: float
    induction: float
    induction_stderr: float
    previous: float
    previous_stderr: float


def train(config: Config, folder: Path, steps: Sequence[int]) -> Iterator[Point]:
    """Train by AdamW on repeated sequences, keeping checkpoints at `steps` in `folder`; yields points of the curves.

    A warm-up of 50 steps, a cosine to a tenth of the rate, gradients clipped at norm 1. Goes on from the last checkpoint
    before the first that is missing, with the same bits as an uninterrupted run on the same machine; stored points are
    yielded first. It computes on one thread, so that the bits do not depend on how many there are.

    Raises Damaged for a checkpoint that cannot be read, ValueError for one of another configuration.
    """
    model, root = make(config).train(), fold_in(key(config.seed), "batches")
    optimiser, learned = adamw(model, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0), _learned(model)

    @one_thread()
    def update(step: int) -> None:
        if step > 0:
            rows, _ = repeated(fold_in(root, step), config.batch_size, config)
            optimiser.param_groups[0]["lr"] = rate(step, config)
            optimiser.zero_grad()
            _losses(model, rows).mean().backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimiser.step()

    point = one_thread()(lambda step: measured(model, config, step))
    yield from trained(
        "induction", model, optimiser, config, folder, steps, update=update, point=point, every=EVERY, of=Point
    )


def rate(step: int, config: Config) -> float:
    """The learning rate of a step."""
    cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / config.steps))
    return config.learning_rate * min(1.0, step / 50) * (0.1 + 0.9 * cosine)


@torch.no_grad()
def measured(model: Any, config: Config, step: int) -> Point:
    """The point of a model as it is."""
    losses, shares = [], []
    for split in ("train", "test"):
        rows, periods = repeated(fold_in(key(config.seed), split), config.num_scored, config)
        known = torch.arange(1, config.length) > periods[:, None] + 1  # the second copy's first token could be any
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        losses.append(float(_nats(logits, rows).double().mean()))
        shares.append(float((logits.argmax(-1) == rows[:, 1:])[known].double().mean()))
    net = functional(model)
    found = scores(net, net.params, data(config, "probe")["input_ids"], config.longest)
    return Point(step, *losses, *shares, *(float(x) for each in found for x in (each.value, each.stderr)))


def _losses(model: Any, rows: Int[Tensor, "b t"]) -> Tensor:
    return _nats(model(input_ids=rows, use_cache=False).logits[:, :-1], rows)


def _nats(logits: Tensor, rows: Int[Tensor, "b t"]) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")


def _learned(model: torch.nn.Module) -> list[Tensor]:
    return [param for param in model.parameters() if param.requires_grad]
