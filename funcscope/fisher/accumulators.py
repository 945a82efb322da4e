"""Means of what comes one by one: pure accumulators that start, take one more, and merge; nothing is kept of the values."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.pack import storable

Value = Float[Tensor, "..."]


@storable
class Welford(NamedTuple):
    r"""Weighted mean and scatter of values, each with a weight of its own; made by `Welford.start`.

    $$W \leftarrow W + w, \qquad \delta = x - \mu, \qquad \mu \leftarrow \mu + \tfrac{w}{W} \delta, \qquad
      M \leftarrow M + w\, \delta\, (x - \mu):$$

    the weighted mean and $\sum w (x - \mu)^2$ of all values, in any order and however they are merged (proofs/welford.py).
    The scatter does not cancel as a difference of raw squares does; the mean is no better than a plain sum. Weights say how
    much a value stands for, tokens of a batch say; the number of independent values is `num`, never W.

    Welford (1962), doi:10.1080/00401706.1962.10490022; Chan, Golub, LeVeque (1983), doi:10.1080/00031305.1983.10483115.

    >>> made = Welford.start(torch.zeros(1)).update(torch.tensor([1.0]), 3.0).update(torch.tensor([5.0]))
    >>> made.mean.tolist(), made.scatter.tolist(), made.num
    ([2.0], [12.0], 2)
    """

    mean: Value
    scatter: Value
    weight: float
    squared: Value
    """Mean with squared weights, and their scatter below: what errors of a mean with unequal weights are made of."""
    squared_scatter: Value
    squared_weight: float
    num: int

    @classmethod
    def start(cls, like: Value) -> Welford:
        """Of no value yet, for values of this shape and dtype."""
        zero = torch.zeros_like(like)
        return cls(zero, zero, 0.0, zero, zero, 0.0, 0)

    def update(self, x: Value, weight: float = 1.0) -> Welford:
        """With one more value. A weight of 0 changes nothing. Raises ValueError for a negative or infinite one."""
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"`weight` must be a finite number of at least 0, got {weight!r}.")
        zero = torch.zeros_like(x)
        return self.merge(Welford(x, zero, float(weight), x, zero, float(weight) ** 2, 1)) if weight else self

    def merge(self, other: Welford) -> Welford:
        """Of the values of both: associative and commutative, up to rounding."""
        mean, scatter = _merged(self[:3], other[:3])
        squared, squared_scatter = _merged(self[3:6], other[3:6])
        return Welford(
            mean, scatter, self.weight + other.weight,
            squared, squared_scatter, self.squared_weight + other.squared_weight, self.num + other.num,
        )  # fmt: skip

    @property
    def num_effective(self) -> float:
        r"""$W^2 / \sum w^2$: as many values of equal weight have a mean as certain; nan for none."""
        return self.weight**2 / self.squared_weight if self.weight else math.nan

    @property
    def variance(self) -> Value:
        r"""$M / (W - \sum w^2 / W)$, unbiased where all values have one variance; nan below two values."""
        free = self.weight - self.squared_weight / self.weight if self.num > 1 else math.nan
        return self.scatter / free

    @property
    def stderr(self) -> Value:
        r"""Of the mean, whether variances are equal or fall with the weights; nan below two values.

        $$\mathrm{SE}^2 = \frac{n}{n-1} \frac{\sum w^2 (x - \mu)^2}{W^2}.$$

        A document divides by the sum of weights, tokens, for the number of values: too small by about the root of the
        tokens of a batch.
        """
        if self.num < 2:
            return torch.full_like(self.mean, math.nan)
        squares = self.squared_scatter + self.squared_weight * (self.squared - self.mean).square()
        return (self.num / (self.num - 1) * squares).sqrt() / self.weight


@storable
class Ema(NamedTuple):
    r"""Exponential moving average with its bias taken off; made by `Ema.start`.

    $v_0 = 0$, $v_t = \beta v_{t-1} + (1 - \beta) x_t$, and `mean` is $v_t / (1 - \beta^t)$: a mean of all values with
    weights $\propto \beta^{t-s}$ that add up to 1, so the first value itself after one. A document starts at $x_1$
    and divides all the same: 100 times too large at t = 1 and beta = .99.

    >>> made = Ema.start(torch.zeros(1), decay=0.99).update(torch.tensor([5.0]))
    >>> round(float(made.mean), 6)
    5.0
    """

    value: Value
    """v, biased towards 0."""
    decay: float
    num: int

    @classmethod
    def start(cls, like: Value, *, decay: float) -> Ema:
        """Of no value yet. Raises ValueError for a decay outside (0, 1)."""
        if not 0 < decay < 1:
            raise ValueError(f"`decay` must lie between 0 and 1, got {decay!r}.")
        return cls(torch.zeros_like(like), float(decay), 0)

    def update(self, x: Value) -> Ema:
        """With one more value."""
        return Ema(self.decay * self.value + (1 - self.decay) * x, self.decay, self.num + 1)

    def then(self, later: Ema) -> Ema:
        """Of these values and, after them, the later ones: associative. Raises ValueError for another decay."""
        if later.decay != self.decay:
            raise ValueError(f"averages of one decay follow each other, got {self.decay} and {later.decay}.")
        value = self.decay**later.num * self.value + later.value
        return Ema(value, self.decay, self.num + later.num)

    @property
    def mean(self) -> Value:
        """Without the bias; nan for no value."""
        return self.value / (1 - self.decay**self.num) if self.num else torch.full_like(self.value, math.nan)


def _merged(one: tuple[Tensor, Tensor, float], two: tuple[Tensor, Tensor, float]) -> tuple[Tensor, Tensor]:
    """Mean and scatter of both together."""
    (a, scatter_a, weight_a), (b, scatter_b, weight_b) = one, two
    total = weight_a + weight_b
    if not total:
        return a, scatter_a
    apart = b - a
    return a + apart * (weight_b / total), scatter_a + scatter_b + apart * apart * (weight_a * weight_b / total)
