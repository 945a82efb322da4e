"""Lengths and inner products of two tasks' mean gradients, from those of samples: of all, left out in turn, drawn again."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.keys import Key, fold_in, uniform
from ..core.standard_errors import jackknife_stderr


class Moments(NamedTuple):
    """By block, and by whatever was left out or drawn."""

    inner: Tensor
    first: Tensor
    second: Tensor

    @property
    def cosine(self) -> Tensor:
        defined = (self.first > 0) & (self.second > 0)
        return torch.where(defined, self.inner / (self.first * self.second).clamp(min=0).sqrt(), math.nan)


class Errors(NamedTuple):
    inner: Tensor
    first: Tensor
    second: Tensor
    cosine: Tensor


def _off(gram: Tensor) -> Tensor:
    """Without the inner products of samples with themselves."""
    return gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))


def unbiased(aa: Tensor, ab: Tensor, bb: Tensor) -> Moments:
    """Means over pairs of different samples."""
    n, m = ab.shape[1:]
    return Moments(ab.mean((1, 2)), _off(aa).sum((1, 2)) / (n * (n - 1)), _off(bb).sum((1, 2)) / (m * (m - 1)))


def jackknifed(aa: Tensor, ab: Tensor, bb: Tensor) -> Errors:
    """Each sample left out in turn; nan where a task has two."""
    n, m = ab.shape[1:]
    whole = unbiased(aa, ab, bb)
    sides = []
    for own, rows, count, is_first in ((aa, ab.mean(2), n, True), (bb, ab.mean(1), m, False)):
        inner = (count * whole.inner[:, None] - rows) / (count - 1)
        off = _off(own)
        square = (off.sum((1, 2))[:, None] - 2 * off.sum(2)) / max((count - 1) * (count - 2), 1)
        square = square if count > 2 else torch.full_like(square, math.nan)
        other = whole.second if is_first else whole.first
        moments = Moments(inner, square, other[:, None].expand_as(square))
        sides.append((jackknife_stderr(inner), jackknife_stderr(square), jackknife_stderr(moments.cosine)))
    (inner_a, first, cosine_a), (inner_b, second, cosine_b) = sides
    return Errors(inner_a.hypot(inner_b), first, second, cosine_a.hypot(cosine_b))


def bootstrapped(aa: Tensor, ab: Tensor, bb: Tensor, key: Key, num: int) -> Moments:
    """(b, r): of samples of both tasks drawn with replacement; pairs of copies of one sample are no pairs."""
    n, m = ab.shape[1:]
    first, second = (counts_drawn(size, fold_in(key, name), num).to(ab) for size, name in ((n, "first"), (m, "second")))
    inner = torch.stack([((first @ each) * second).sum(1) for each in ab]) / (n * m)
    return Moments(inner, _squares(aa, first), _squares(bb, second))


def _squares(gram: Tensor, counts: Tensor) -> Tensor:
    """(w' K w - sum w_i^2 K_ii) / ((sum w)^2 - sum w_i^2); nan where all draws are of one sample."""
    pairs = counts.sum(1).square() - counts.square().sum(1)
    return torch.stack([((counts @ each) * counts).sum(1) for each in _off(gram)]) / pairs


def counts_drawn(size: int, key: Key, num: int) -> Tensor:
    """(num, size): how often each sample is drawn."""
    like = torch.zeros(size, dtype=torch.float64)
    draws = ((uniform(fold_in(key, i), like) * size).long() for i in range(num))
    return torch.stack([torch.bincount(draw, minlength=size) for draw in draws])
