"""How many dimensions a matrix uses: three numbers of different definitions, from its singular values."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Ranks(NamedTuple):
    effective_rank: float
    """exp of the entropy of the singular values, sigma / sum sigma: Roy and Vetterli (2007)."""
    spectral_rank: float
    """exp of the entropy of their squares."""
    participation_ratio: float
    """(sum sigma^2)^2 / sum sigma^4."""


def matrix_ranks(matrix: Float[Tensor, "m n"]) -> Ranks:
    r"""Effective rank, spectral rank and participation ratio of a matrix; each is k for k equal singular values.

    With $p_i = \sigma_i / \sum_j \sigma_j$ and $q_i = \sigma_i^2 / \sum_j \sigma_j^2$:

    $$r_{\mathrm{eff}} = e^{H(p)}, \qquad r_{\mathrm{spec}} = e^{H(q)}, \qquad
      \mathrm{PR} = \frac{(\sum_i \sigma_i^2)^2}{\sum_i \sigma_i^4}, \qquad
      \mathrm{PR} \le r_{\mathrm{spec}} \le r_{\mathrm{eff}} \le \mathrm{rank}.$$

    Between 1 and min(m, n), unchanged by scaling and by rotations of rows and columns; nothing is centred. nan for a matrix
    of zeros, or one that is not finite. Computed in float64. Roy and Vetterli (2007), The effective rank.

    >>> [round(rank, 3) for rank in matrix_ranks(torch.diag(torch.tensor([2.0, 1.0, 1.0])))]
    [2.828, 2.381, 2.0]
    """
    if matrix.ndim != 2 or not matrix.numel():
        raise ValueError(f"`matrix` must have two dimensions, none of them 0, got {tuple(matrix.shape)}.")
    if not bool(matrix.isfinite().all()) or not bool(matrix.any()):
        return Ranks(math.nan, math.nan, math.nan)
    sigma = torch.linalg.svdvals(matrix.detach().cpu().double())
    square = (sigma / sigma[0]).square()  # of the largest one: no overflow
    return Ranks(_perplexity(sigma), _perplexity(square), float(square.sum().square() / square.square().sum()))


def _perplexity(weights: Tensor) -> float:
    share = weights / weights.sum()
    return float(torch.special.entr(share).sum().exp())
