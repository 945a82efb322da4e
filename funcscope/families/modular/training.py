"""Full-batch AdamW with checkpoints that training goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...core.store import Stored, load, save
from ..family import Kept
from .dataset import CRITERION, data
from .model import make
from .variants import EVERY, Config

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every parameter besides its number of steps."""


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
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=config.betas, fused=True
    )
    for param in model.parameters():
        optimiser.state[param] = {"step": torch.tensor(0.0)} | {name: torch.zeros_like(param) for name in MOMENTS}
    done = list(takewhile(lambda step: path(folder, step).exists(), sorted(steps)))
    curves = _restore(model, optimiser, config, path(folder, done[-1])) if done else []
    yield from curves
    splits = data(config, "train"), data(config, "test")
    for step in range(done[-1] + 1 if done else 0, max(steps) + 1):
        if step > 0:
            optimiser.zero_grad()
            _scores(model, *splits[0])[0].backward()
            optimiser.step()
        if step % EVERY == 0:
            _drop_denormals(optimiser)
        if step % EVERY == 0 or step in steps:
            with torch.no_grad():
                losses, shares = zip(*(_scores(model, *split) for split in splits), strict=True)
            curves.append(Point(step, *map(float, losses), *shares))
            yield curves[-1]
        if step in steps:
            meta = {"family": "modular_addition", "config": asdict(config), "step": step, "curves": curves}
            save(path(folder, step), _stored(model, optimiser), meta)


def path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a run's folder."""
    return folder / "checkpoints" / f"step_{step:05d}.safetensors"


def checkpoint(config: Config, folder: Path, step: int) -> Kept:
    """One checkpoint of a run. Raises FileNotFoundError, Damaged, or ValueError for another configuration."""
    arrays, _, sha256 = _load(config, path(folder, step))
    params = {name.removeprefix("param."): value for name, value in arrays.items() if name.startswith("param.")}
    return Kept(params, sha256)


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


def _stored(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and moments as they are, under the names that a checkpoint has for them."""
    of = {name: {"param": param, **optimiser.state[param]} for name, param in model.named_parameters()}
    return {f"{kind}.{name}": values[kind] for name, values in of.items() for kind in ("param", *MOMENTS)}


@torch.no_grad()
def _restore(model: nn.Module, optimiser: torch.optim.Optimizer, config: Config, path: Path) -> list[Point]:
    arrays, meta, _ = _load(config, path)
    for name, value in _stored(model, optimiser).items():
        value.copy_(arrays[name])
    for state in optimiser.state.values():
        state["step"].fill_(meta["step"])
    return [Point(*point) for point in meta["curves"]]


def _load(config: Config, path: Path) -> Stored:
    """What a file holds, where it is of this configuration."""
    stored, own = load(path), json.loads(json.dumps(asdict(config)))
    if stored.meta.get("config") != own:
        raise ValueError(f"{path} belongs to another run: its configuration is {stored.meta.get('config')}, not {own}.")
    return stored
