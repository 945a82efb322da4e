"""Running means of tensors that can be merged: with weights, and with a memory that fades."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.estimate import wide


class Welford(NamedTuple):
    r"""Weighted mean and scatter of what came so far; nothing is changed, `update` and `merge` give new ones.

    $$\mu = \frac{\sum w x}{W}, \qquad \mathrm{Var} = \frac{\sum w (x - \mu)^2}{W - S_2 / W}, \qquad
      \mathrm{SE}^2 = \frac{\mathrm{Var}}{n_{\mathrm{eff}}}, \qquad n_{\mathrm{eff}} = \frac{W^2}{S_2},\ S_2 = \sum w^2.$$

    Weights are reliabilities, not counts: all of them times a constant is the same. The error takes the x for independent,
    of equal variance: that of means of batches, with the batches' sizes as weights, is over batches. Taking W, the number of
    tokens, for the number of samples makes it too small by the root of the tokens in a batch.

    Welford (1962), doi:10.1080/00401706.1962.10490022; West (1979), doi:10.1145/359146.359153; merging: Chan, Golub, LeVeque
    (1983).

    >>> both = Welford.of(torch.tensor([1.0])).update(torch.tensor([3.0])).merge(Welford.of(torch.tensor([5.0])))
    >>> float(both.mean), float(both.variance), both.num
    (3.0, 4.0, 3)
    """

    num: int
    weight: float
    weight_square: float
    mean: Float[Tensor, "..."]
    scatter: Float[Tensor, "..."]
    """sum of w (x - mean)^2"""

    @classmethod
    def of(cls, x: Float[Tensor, "..."], weight: float = 1.0) -> Welford:
        """Of one value. Raises ValueError for a weight that is not above 0."""
        if not 0 < weight < math.inf:
            raise ValueError(f"`weight` must be above 0 and finite, got {weight}: leave out what has no weight.")
        mean = x.detach().to(wide(x.device), copy=True)
        return cls(1, float(weight), float(weight) ** 2, mean, torch.zeros_like(mean))

    def update(self, x: Float[Tensor, "..."], weight: float = 1.0) -> Welford:
        """With one value more."""
        return self.merge(Welford.of(x, weight))

    def merge(self, other: Welford) -> Welford:
        """Of all values of both, in any order. Raises ValueError for other shapes."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"what is merged must have one shape, got {tuple(self.mean.shape)} and {tuple(other.mean.shape)}."
            )
        weight = self.weight + other.weight
        step = other.mean - self.mean
        mean = self.mean + step * (other.weight / weight)
        scatter = self.scatter + other.scatter + step.square() * (self.weight * other.weight / weight)
        return Welford(self.num + other.num, weight, self.weight_square + other.weight_square, mean, scatter)

    @property
    def n_eff(self) -> float:
        return self.weight**2 / self.weight_square

    @property
    def variance(self) -> Float[Tensor, "..."]:
        """Unbiased for independent values of equal variance; nan for a single one."""
        free = self.weight - self.weight_square / self.weight
        return self.scatter / free if self.num > 1 else torch.full_like(self.scatter, math.nan)

    @property
    def stderr(self) -> Float[Tensor, "..."]:
        """Of the mean."""
        return (self.variance / self.n_eff).sqrt()


class Ema(NamedTuple):
    r"""An exponential moving average without the bias of its start; `update` and `merge` give new ones.

    $$v_t = \beta v_{t-1} + (1 - \beta) x_t, \qquad v_0 = 0, \qquad \text{value} = \frac{v_t}{1 - \beta^t}.$$

    A document starts at $v_1 = x_1$ and divides by $1 - \beta^t$ all the same: 100 times too much at t = 1 for beta = .99.

    >>> Ema.of(torch.tensor([2.0]), decay=0.99).value
    tensor([2.], dtype=torch.float64)
    """

    num: int
    decay: float
    raw: Float[Tensor, "..."]
    """v, from a start at 0"""

    @classmethod
    def of(cls, x: Float[Tensor, "..."], *, decay: float) -> Ema:
        """Of one value. Raises ValueError for a decay outside [0, 1)."""
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {decay}: the share of the past that a step keeps.")
        return cls(1, decay, (1 - decay) * x.detach().to(wide(x.device)))

    def update(self, x: Float[Tensor, "..."]) -> Ema:
        """With one value more, the newest."""
        return self.merge(Ema.of(x, decay=self.decay))

    def merge(self, later: Ema) -> Ema:
        """Of these values and, after them, of those. Raises ValueError for another decay."""
        if later.decay != self.decay:
            raise ValueError(f"averages that are merged must have one decay, got {self.decay} and {later.decay}.")
        return Ema(self.num + later.num, self.decay, self.decay**later.num * self.raw + later.raw)

    @property
    def value(self) -> Float[Tensor, "..."]:
        return self.raw / -math.expm1(self.num * math.log(self.decay)) if self.decay else self.raw
