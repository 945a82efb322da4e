"""What a run is made of: its configuration, the variants there are, and the steps whose checkpoints stay."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from ...core.checks import check_count

EVERY = 25
"""Steps between two points of the curves."""


@dataclass(frozen=True)
class Config:
    """Architecture, data and training of one run: a Llama that reads sequences of a beginning and a repeated block."""

    num_layers: int = 2
    mlp: bool = False
    """Without, the MLPs write nothing, and none of their weights is trained: attention is all that there is."""
    hidden_size: int = 64
    num_heads: int = 4
    vocab_size: int = 64
    """Tokens that blocks are made of; one more begins a sequence."""
    shortest: int = 8
    longest: int = 16
    """Tokens of a block."""
    batch_size: int = 32
    num_scored: int = 128
    """Sequences of each split."""
    steps: int = 600
    learning_rate: float = 4e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "shortest", "batch_size", "num_scored", "steps"):
            check_count(name, getattr(self, name))
        check_count("vocab_size", self.vocab_size, least=2)
        check_count("longest", self.longest, least=max(2, self.shortest))

    @property
    def length(self) -> int:
        """Tokens of a sequence: the one that begins it, and two of the longest blocks."""
        return 1 + 2 * self.longest

    @property
    def name(self) -> str:
        """A folder's name that no other configuration has."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        kind = "mlp" if self.mlp else "attention"
        return f"induction-{kind}-{self.num_layers}L-seed{self.seed}-{digest[:8]}"


def schedule(config: Config, gap: int = 50) -> tuple[int, ...]:
    """Steps to keep: one every `gap` from the start on, and the last.

    >>> schedule(Config(steps=120))
    (0, 50, 100, 120)
    """
    check_count("gap", gap)
    return tuple(sorted({*range(0, config.steps, gap), config.steps}))
