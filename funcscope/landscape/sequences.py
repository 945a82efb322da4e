"""Mean losses from the terms of single sequences, with the standard error over them: also of differences of losses."""

from __future__ import annotations

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Means(NamedTuple):
    value: Float[Tensor, " m"]
    stderr: Float[Tensor, " m"]


def means(sums: Float[Tensor, "m n"], weights: Float[Tensor, " n"]) -> Means:
    r"""Token-weighted means of m sets of per-sequence sums, each with its standard error over the n sequences.

    $$L = \frac{\sum_i s_i}{W}, \qquad \mathrm{SE}^2 = \frac{n}{n-1} \frac{\sum_i (s_i - L w_i)^2}{W^2}, \qquad
      W = \sum_i w_i.$$

    Linear in the sums: given differences of sums (of two losses on the same sequences, or of a loss and a chord), these are
    the mean difference and its paired error. Sequences that score nothing do not count. The error takes the sequences for a
    random sample; nan for a single one. On the CPU.
    Cochran (1977), Sampling techniques, section 2.11.

    >>> import torch
    >>> means(torch.tensor([[1.0, 2.0, 6.0]]), torch.ones(3))
    Means(value=tensor([3.], dtype=torch.float64), stderr=tensor([1.5275], dtype=torch.float64))
    """
    scored = weights != 0
    sums, weights = sums[:, scored].cpu().double(), weights[scored].cpu().double()
    num, total = len(weights), weights.sum()
    value = sums.sum(1) / total
    scatter = (sums - value[:, None] * weights).square().sum(1)
    factor = num / (num - 1) if num > 1 else math.nan
    return Means(value, (factor * scatter).sqrt() / total)
