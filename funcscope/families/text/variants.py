"""What the models are made of: architecture, texts and training, as one configuration."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from ...core.checks import check_count

KINDS = ("prose", "code")
"""Of texts; each has a model that is fine-tuned on it."""
BASE = "base"
NAMES = (BASE, *KINDS)
"""Of the models: one trained on both kinds, then one fine-tuned on each."""


@dataclass(frozen=True)
class Config:
    """Three language models of bytes: a Llama with four heads in each of four layers, trained twice."""

    hidden_size: int = 64
    intermediate_size: int = 176
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    length: int = 128
    """Bytes of a sequence, in training and at most."""
    train_bytes: int = 2_000_000
    """Of each kind, at most."""
    heldout_bytes: int = 100_000
    heldout_fraction: float = 0.15
    """Of the modules."""
    batch_size: int = 16
    steps: int = 600
    tuning_steps: int = 150
    learning_rate: float = 4e-3
    tuning_rate: float = 2e-3
    weight_decay: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "batch_size", "steps", "tuning_steps", "train_bytes", "heldout_bytes"):
            check_count(name, getattr(self, name))

    @property
    def name(self) -> str:
        """A folder's name that no other configuration has."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"text-seed{self.seed}-{digest[:8]}"
