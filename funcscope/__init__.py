"""A microscope for trained networks, made of pure functions.

A model is a function `apply(params, inputs)`, a loss is `loss(theta)` over one flat vector, and every metric is its
values, its derivatives, its samples. Nothing is edited in place, so nothing has to be restored.
"""

from . import landscape
from .core.criterion import Criterion, causal_lm, classification, criterion_of, custom, masked_lm, seq2seq_lm
from .core.directions import Direction, directions, stack
from .core.estimate import Estimate
from .core.keys import Key, fold_in, key, normal, rademacher
from .core.layout import Layout
from .core.model import Functional, functional
from .core.objective import Loss, objective
from .core.restrict import grid, restrict
from .landscape import Comparison, DirectionalLosses, compare_directional, directional_losses

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "Criterion",
    "Direction",
    "DirectionalLosses",
    "Estimate",
    "Functional",
    "Key",
    "Layout",
    "Loss",
    "causal_lm",
    "classification",
    "compare_directional",
    "criterion_of",
    "custom",
    "directional_losses",
    "directions",
    "fold_in",
    "functional",
    "grid",
    "key",
    "landscape",
    "masked_lm",
    "normal",
    "objective",
    "rademacher",
    "restrict",
    "seq2seq_lm",
    "stack",
]
