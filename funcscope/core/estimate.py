"""The unit of every sampled number: a value with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.stats import t as student
from torch import Tensor


def wide(device: torch.device) -> torch.dtype:
    """The dtype of sums: float64, or float32 where the device has no other.

    >>> wide(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Estimate:
    """A mean over `num` independent samples and the standard error of that mean.

    >>> import torch
    >>> print(Estimate.of(torch.tensor([1.0, 2.0, 3.0])))
    2 ± 0.58 (n = 3)
    """

    value: Float[Tensor, ""]
    stderr: Float[Tensor, ""]
    num: int

    @classmethod
    def of(cls, samples: Float[Tensor, " n"]) -> Estimate:
        """Sample mean and sd / sqrt(n); both are nan where n is too small to define them (0, 1)."""
        num = len(samples)
        wide = samples.double()
        stderr = wide.std() / num**0.5 if num > 1 else wide.new_tensor(float("nan"))
        return cls(wide.mean(), stderr, num)

    def __str__(self) -> str:
        return f"{float(self.value):.4g} ± {float(self.stderr):.2g} (n = {self.num})"


def jackknife_stderr(left_out: Float[Tensor, "*m n"]) -> Float[Tensor, "*m"]:
    r"""Standard error of a smooth statistic from its n leave-one-out values, along the last dimension.

    $$\mathrm{SE}^2 = \tfrac{n-1}{n} \textstyle\sum_i (s_{(i)} - \bar s)^2.$$

    For the mean this is sd / sqrt(n) exactly. Efron and Stein (1981), doi:10.1214/aos/1176345462.

    >>> import torch
    >>> x = torch.tensor([1.0, 2.0, 6.0])
    >>> left_out = (x.sum() - x) / 2
    >>> torch.allclose(jackknife_stderr(left_out), x.std() / 3**0.5)
    True
    """
    num = left_out.shape[-1]
    return ((num - 1) / num * (left_out - left_out.mean(-1, keepdim=True)).square().sum(-1)).sqrt()


def ratio_stderr(numerators: Float[Tensor, "*m n"], denominators: Float[Tensor, " n"]) -> Float[Tensor, "*m"]:
    r"""Jackknife standard error of $\sum_i a_i / \sum_i b_i$ over n sequences: of a token-weighted mean, say.

    Linear in a for fixed b: numerators that are differences give the error of a difference, in pairs. nan below two
    sequences, and where a single one has all the weight.

    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0, 6.0]])
    >>> torch.allclose(ratio_stderr(x, torch.ones(3)), x.std() / 3**0.5)
    True
    """
    num = denominators.shape[-1]
    if num < 2:
        return numerators.new_full(numerators.shape[:-1], float("nan"))
    rest = denominators.sum() - denominators
    return jackknife_stderr((numerators.sum(-1, keepdim=True) - numerators) / rest)


def ratio_interval(
    numerators: Float[Tensor, " n"], denominators: Float[Tensor, " n"], level: float = 0.95
) -> tuple[float, float]:
    r"""Fieller's interval for a ratio of two means over n sequences, with Student's t of n - 1 degrees of freedom.

    $$\{r : (\bar a - r \bar b)^2 \le t^2\, \widehat{\mathrm{Var}}(\bar a - r \bar b)\},$$

    exact for normal pairs, and wider above than below where the denominator is uncertain. nan, twice, where the
    denominator's own interval reaches 0 (the set of ratios has no end then) and below two sequences.

    Fieller (1954), doi:10.1111/j.2517-6161.1954.tb00159.x.

    >>> import torch
    >>> low, high = ratio_interval(torch.tensor([2.0, 2.2, 1.8]), torch.ones(3))
    >>> round(low, 3), round(high, 3)                             # a certain denominator: 2 -+ 4.303 * 0.1155
    (1.503, 2.497)
    """
    num = len(numerators)
    if num < 2:
        return math.nan, math.nan
    both = torch.stack([numerators, denominators]).double()
    a, b = both.mean(1).tolist()
    (aa, ab), (_, bb) = (float(student.ppf((1 + level) / 2, num - 1)) ** 2 / num * both.cov()).tolist()
    square, middle, rest = b * b - bb, a * b - ab, a * a - aa
    if square <= 0:
        return math.nan, math.nan
    half = math.sqrt(max(middle * middle - square * rest, 0.0))
    return (middle - half) / square, (middle + half) / square
