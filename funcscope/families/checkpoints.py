"""Training that keeps checkpoints, and goes on from them with the same bits: parameters, AdamW's moments, curves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core.store import Stored, load, save
from .family import Kept

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every parameter besides its number of steps."""

Point = TypeVar("Point", bound=tuple[Any, ...])


def adamw(model: nn.Module, **settings: Any) -> torch.optim.AdamW:
    """The optimiser of the parameters that are trained, with moments from the start, so that they can be restored."""
    params = [param for param in model.parameters() if param.requires_grad]
    optimiser = torch.optim.AdamW(params, fused=True, **settings)
    for param in params:
        optimiser.state[param] = {"step": torch.tensor(0.0)} | {name: torch.zeros_like(param) for name in MOMENTS}
    return optimiser


def trained(
    family: str, model: nn.Module, optimiser: torch.optim.Optimizer, config: Any, folder: Path, steps: Sequence[int], *,
    update: Callable[[int], None], point: Callable[[int], Point], every: int, of: Callable[..., Point],
) -> Iterator[Point]:  # fmt: skip
    """Points of the curves of a run, at multiples of `every` and at `steps`, where checkpoints are kept; stored ones first.

    Goes on from the last checkpoint before the first that is missing. update: trains one step. point: measures the model as
    it is. of: makes a point of its stored numbers.

    Raises Damaged for a checkpoint that cannot be read, ValueError for one of another configuration.
    """
    done = list(takewhile(lambda step: path(folder, step).exists(), sorted(steps)))
    curves = [of(*each) for each in _restore(model, optimiser, config, path(folder, done[-1]))] if done else []
    yield from curves
    for step in range(done[-1] + 1 if done else 0, max(steps) + 1):
        update(step)
        if step % every == 0 or step in steps:
            curves.append(point(step))
            yield curves[-1]
        if step in steps:
            meta = {"family": family, "config": asdict(config), "step": step, "curves": curves}
            save(path(folder, step), _stored(model, optimiser), meta)


def path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a run's folder."""
    return folder / "checkpoints" / f"step_{step:05d}.safetensors"


def checkpoint(config: Any, folder: Path, step: int) -> Kept:
    """One checkpoint of a run. Raises FileNotFoundError, Damaged, or ValueError for another configuration."""
    arrays, _, sha256 = _load(config, path(folder, step))
    params = {name.removeprefix("param."): value for name, value in arrays.items() if name.startswith("param.")}
    return Kept(params, sha256)


def _stored(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and moments as they are, under the names that a checkpoint has for them."""
    learned = {name: param for name, param in model.named_parameters() if param.requires_grad}
    of = {name: {"param": param, **optimiser.state[param]} for name, param in learned.items()}
    return {f"{kind}.{name}": values[kind] for name, values in of.items() for kind in ("param", *MOMENTS)}


@torch.no_grad()
def _restore(model: nn.Module, optimiser: torch.optim.Optimizer, config: Any, path: Path) -> list[Any]:
    """The points that a checkpoint holds, after the model and the optimiser are as it has them."""
    arrays, meta, _ = _load(config, path)
    for name, value in _stored(model, optimiser).items():
        value.copy_(arrays[name])
    for state in optimiser.state.values():
        state["step"].fill_(meta["step"])
    return meta["curves"]


def _load(config: Any, path: Path) -> Stored:
    """What a file holds, where it is of this configuration."""
    stored, own = load(path), json.loads(json.dumps(asdict(config)))
    if stored.meta.get("config") != own:
        raise ValueError(f"{path} belongs to another run: its configuration is {stored.meta.get('config')}, not {own}.")
    return stored
