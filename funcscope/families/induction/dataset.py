"""Sequences that repeat themselves: a token that begins them, a block of random ones, and this block again and again."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ...core.checks import check_choice
from ...core.keys import Key, fold_in, key, uniform
from ..family import SPLITS
from .variants import Config

Split = Literal["train", "test", "probe"]


def data(config: Config, split: Split) -> dict[str, Int[Tensor, "n t"]]:
    """The sequences of a split, every token after the first scored: `train` and `test` as in training, with periods of
    all lengths, `probe` with exactly two copies of the longest block.

    Each sequence of training is seen once; those of a split are seen by none.

    >>> rows = data(Config(longest=8), "probe")["input_ids"]
    >>> rows.shape, bool((rows[:, 1:9] == rows[:, 9:]).all())
    (torch.Size([128, 17]), True)
    """
    check_choice("split", split, SPLITS)
    shortest = config.longest if split == "probe" else config.shortest
    return {"input_ids": repeated(fold_in(key(config.seed), split), config.num_scored, config, shortest)[0]}


def repeated(
    root: Key, num: int, config: Config, shortest: int | None = None
) -> tuple[Int[Tensor, "n t"], Int[Tensor, " n"]]:
    """Sequences, and the length of the block of each: uniform from the shortest to the longest, its tokens uniform."""
    shortest = config.shortest if shortest is None else shortest
    periods = shortest + _below(fold_in(root, "period"), (num,), config.longest - shortest + 1)
    blocks = _below(fold_in(root, "tokens"), (num, config.longest), config.vocab_size)
    tokens = blocks.gather(1, torch.arange(config.length - 1) % periods[:, None])
    return torch.cat([torch.full((num, 1), config.vocab_size), tokens], 1), periods


def _below(root: Key, shape: tuple[int, ...], bound: int) -> Int[Tensor, "..."]:
    """Uniform integers from 0 to below the bound."""
    return (uniform(root, torch.empty(shape, dtype=torch.float64)) * bound).long()
