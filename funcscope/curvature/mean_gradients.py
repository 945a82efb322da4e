"""Lengths and inner products of two tasks' mean gradients, from those of samples: of all, left out in turn, drawn again."""

from __future__ import annotations

import math
from typing import NamedTuple

import scipy
import torch
from torch import Tensor

from ..core.keys import Key, fold_in, uniform
from ..core.standard_errors import jackknife_stderr
from .pair_errors import crossed_stderr, pair_stderr


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


def jackknifed(aa: Tensor, ab: Tensor, bb: Tensor, weights: tuple[Tensor, Tensor] | None = None) -> Errors:
    """Of the cosine, from each sample left out in turn, nan where a task has two; of means over pairs, by their parts.

    weights: of the samples, in units of their mean, that the means are ratios to; no cosine depends on them.
    """
    whole = unbiased(aa, ab, bb)
    squares = torch.zeros_like(whole.inner)
    for own, rows, other in ((aa, ab.mean(2), whole.second), (bb, ab.mean(1), whole.first)):
        count, off = own.shape[1], _off(own)
        inner = (count * whole.inner[:, None] - rows) / (count - 1)
        square = (off.sum((1, 2))[:, None] - 2 * off.sum(2)) / ((count - 1) * (count - 2) or math.nan)
        squares = squares + jackknife_stderr(Moments(inner, square, other[:, None].expand_as(square)).cosine).square()
    counts = (None, None) if weights is None else tuple(torch.outer(each, each) for each in weights)
    first, second = (pair_stderr(*each) for each in zip((aa, bb), counts, strict=True))
    return Errors(crossed_stderr(ab, weights), first, second, squares.sqrt())


def bounds(draws: Tensor, num: int, level: float = 0.95) -> tuple[Tensor, Tensor]:
    r"""Quantiles of a bootstrap from `num` samples, further out than those of the level, over draws that are not nan.

    At $\Phi(\mp \sqrt{n/(n-1)}\, t_{n-1})$: a resample's spread is that of n samples about their own mean, and an error from
    few samples takes Student's quantile. For 95 % at 15 samples 1.3 % and 98.7 %; at 40, 2.0 % and 98.0 %.
    How often bounds of a cosine have the truth between them: `gram_conflicts`.
    Hesterberg (2015), doi:10.1080/00031305.2015.1089789.
    """
    spread = scipy.stats.t.ppf((1 + level) / 2, num - 1) * math.sqrt(num / (num - 1))
    outside = float(scipy.stats.norm.sf(spread))
    return draws.nanquantile(outside, -1), draws.nanquantile(1 - outside, -1)


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
