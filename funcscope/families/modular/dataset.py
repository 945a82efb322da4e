"""All pairs with their sums, in three splits, and what is scored on them."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ...core.checks import check_choice
from ...core.criterion import Criterion, classification
from ...core.keys import fold_in, key, uniform
from ..family import SPLITS
from .variants import Config

Split = Literal["train", "test", "probe"]

CRITERION: Criterion = classification.in_dtype(torch.float64)
"""Cross-entropy of float64 logits: in float32 the confident network's gradient vanishes, and its training slips."""


def data(config: Config, split: Split) -> tuple[Int[Tensor, "n 3"], Int[Tensor, " n"]]:
    """Tokens (a, b, p) and answers (a + b) mod p of a random share of all p^2 pairs, of the rest, or of all in order.

    >>> tokens, answers = data(Config(p=5), "train")
    >>> len(answers), bool((tokens[:, :2].sum(1) % 5 == answers).all())
    (10, True)
    """
    check_choice("split", split, SPLITS)
    p = config.p
    chosen = torch.arange(p * p)
    if split != "probe":
        order = uniform(fold_in(key(config.seed), "split"), torch.empty(p * p)).argsort(stable=True)
        cut = round(config.train_fraction * p * p)
        chosen = order[:cut] if split == "train" else order[cut:]
    a, b = chosen // p, chosen % p
    return torch.stack([a, b, torch.full_like(a, p)], dim=1), (a + b) % p
