"""What a run is made of: its configuration, the variants there are, and the steps whose checkpoints stay."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import torch

from ...core.checks import check_count

EVERY = 10
"""Steps between two points of the loss curves."""


@dataclass(frozen=True)
class Config:
    """Architecture, data and training of one run.

    When it generalises depends on the seed, and by hundreds of steps on rounding; most seeds do within 5,000 steps.
    """

    p: int = 53
    train_fraction: float = 0.4
    d_model: int = 64
    num_heads: int = 4
    d_mlp: int = 256
    biases: bool = True
    steps: int = 5000
    learning_rate: float = 3e-3
    weight_decay: float = 1.0
    betas: tuple[float, float] = (0.9, 0.98)
    seed: int = 1

    @property
    def name(self) -> str:
        """A folder's name that no other configuration has."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"modular-addition-p{self.p}-seed{self.seed}-{digest[:8]}"


QUICK = Config(p=37, d_mlp=128, steps=2000, learning_rate=1e-2, weight_decay=2.0, seed=0)
"""A smaller run, of a few seconds."""

P113 = Config(
    p=113, train_fraction=0.3, d_model=128, d_mlp=512, biases=False, steps=25_000, learning_rate=1e-3, seed=999
)
"""The published size: 226,048 weights, no biases. The initialisation is that of `make`. Half an hour on two cores."""


def schedule(config: Config, num: int = 24) -> tuple[int, ...]:
    """Steps to keep: the start, a few while it memorises, then evenly to the end; multiples of 10 but for the last.

    >>> schedule(Config(steps=1000), num=8)
    (0, 20, 60, 150, 360, 570, 780, 1000)
    """
    check_count("num", num, least=6)
    early = (0, 20, 60, 150)
    late = torch.linspace(min(150, config.steps), config.steps, num - len(early) + 1)[1:]
    steps = {min(step, config.steps) for step in early} | {int(step) // EVERY * EVERY for step in late} | {config.steps}
    return tuple(sorted(steps))


def published(last: int) -> tuple[int, ...]:
    """Checkpoints every 100 steps where the network changes fast, every 500 elsewhere."""
    dense = (*range(0, 1500, 100), *range(1500, 9000, 500), *range(9000, 13000, 100), *range(13000, last, 500), last)
    return tuple(step for step in dense if step <= last)
