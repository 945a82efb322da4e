"""Sequences that repeat themselves: attention-only transformers of one and of two layers, and a small Llama.

Two layers learn to look for an earlier occurrence of the current token and to say what came after it: a head that attends
to the token before, and one in the next layer that reads what it wrote, as in Olsson et al. (2022), In-context learning and
induction heads, arXiv:2209.11895. They grow within some fifty steps, in which the loss falls. One layer cannot.
"""

from ...core.criterion import causal_lm
from ..checkpoints import checkpoint, path
from ..family import Family, Setup, register
from .dataset import data, repeated
from .model import make, network
from .scores import Scores, scores
from .training import Point, train
from .variants import EVERY, Config, schedule

__all__ = [
    "CONFIGS", "EVERY", "FAMILY", "Config", "Point", "Scores", "checkpoint", "data", "make", "network", "path", "repeated",
    "schedule", "scores", "train",
]  # fmt: skip

CONFIGS = {"two_layers": Config(), "one_layer": Config(num_layers=1), "llama": Config(mlp=True)}
"""By variant: attention only, of two layers and of one, and two layers with MLPs."""

FAMILY = register(
    Family(
        name="induction",
        variants={name: Setup(config, schedule(config)) for name, config in CONFIGS.items()},
        config=Config,
        network=network,
        batches=lambda config, split: [data(config, split)],  # type: ignore[arg-type]
        criterion=causal_lm,
        train=train,
        checkpoint=checkpoint,
    )
)
