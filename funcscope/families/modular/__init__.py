"""Modular addition: a one-layer transformer that learns (a + b) mod p, memorising first and generalising later.

Tokens are (a, b, =); the answer is read at "=". One attention layer, one ReLU layer, no layer norm, as in Nanda, Chan,
Lieberum, Smith, Steinhardt (2023), Progress measures for grokking via mechanistic interpretability.
"""

from ..family import Family, Setup, register
from .dataset import CRITERION, data
from .model import ModularAddition, make, network
from .training import Point, checkpoint, path, train
from .variants import EVERY, P113, QUICK, Config, published, schedule

__all__ = [
    "CRITERION", "EVERY", "FAMILY", "P113", "QUICK", "Config", "ModularAddition", "Point", "checkpoint", "data", "make",
    "network", "path", "schedule", "train",
]  # fmt: skip

FAMILY = register(
    Family(
        name="modular_addition",
        variants={
            "p53": Setup(Config(), schedule(Config(), 30)),
            "p37": Setup(QUICK, schedule(QUICK)),
            "p113": Setup(P113, published(P113.steps)),
        },
        config=Config,
        network=network,
        batches=lambda config, split: [data(config, split)],  # type: ignore[arg-type]
        criterion=CRITERION,
        train=train,
        checkpoint=checkpoint,
    )
)
