"""The linear map that does what several do, each on its own inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_number
from ..core.estimate import wide
from .elementwise import check_leaves, shares_of


def regmean(
    leaves: Sequence[Float[Tensor, "i o"]],
    grams: Sequence[Float[Tensor, "i i"]],
    *,
    shrink: float = 0.9,
    weights: Sequence[float] | None = None,
) -> Float[Tensor, "i o"]:
    r"""RegMean: of all linear maps the one whose outputs are nearest to those of every model on that model's inputs.

    $$W = \Big(\sum_k w_k G_k'\Big)^{-1} \sum_k w_k G_k' W_k = \arg\min_W \sum_k w_k \|X_k W - X_k W_k\|_F^2
      \text{ at } \alpha = 1, \qquad G_k = X_k^\top X_k, \quad G' = \alpha G + (1 - \alpha)\, \mathrm{diag}\, G.$$

    In the orientation (in, out): torch's linear layers store the transpose, Hugging Face's Conv1D this
    (proofs/merging.py). Biases and all else are averaged, which is not done here.

    leaves: (in, out). grams: sums over the same number of positions, or means; with sums a model counts by its data.
    shrink: alpha, what off-diagonals are multiplied by. Inputs that no model uses have no solution of their own: their rows
    are the weighted mean, and so is, at shrink 1, whatever no input sees.

    Raises ValueError for no model, other shapes, numbers that are not finite, a shrink outside [0, 1], and Grams that are
    not square or have a negative diagonal.

    Jin et al. (2023), arXiv:2212.09849.

    >>> regmean([torch.tensor([[1.0]]), torch.tensor([[4.0]])], [torch.tensor([[2.0]]), torch.tensor([[1.0]])])
    tensor([[2.]])
    """
    check_leaves("leaves", leaves)
    rows = leaves[0].shape[0] if leaves[0].ndim == 2 else -1
    check_leaves("grams", grams, least=len(leaves))
    if len(grams) != len(leaves) or tuple(grams[0].shape) != (rows, rows):
        raise ValueError(
            f"`leaves` must be matrices of shape (in, out) with one Gram of (in, in) each, got {len(leaves)} of "
            f"{tuple(leaves[0].shape)} and {len(grams)} Grams of {tuple(grams[0].shape)}."
        )
    check_number("shrink", shrink, 0.0, 1.0)
    if any(bool((gram.diagonal() < 0).any()) for gram in grams):
        raise ValueError("`grams` must be sums of squares, and one has a negative number on its diagonal.")
    total, shares = wide(leaves[0].device), shares_of(weights, len(leaves))
    matrices = [leaf.detach().to(total) for leaf in leaves]
    mean = matrices[0] + sum(share * (W - matrices[0]) for share, W in zip(shares, matrices, strict=True))
    left, right = torch.zeros(rows, rows, dtype=total, device=mean.device), torch.zeros_like(mean)
    for share, gram, W in zip(shares, grams, matrices, strict=True):
        shrunk = shrink * gram.detach().to(total)
        shrunk.diagonal().copy_(gram.detach().diagonal())
        left += share * shrunk
        right += share * (shrunk @ (W - mean))
    return (mean + _solved(left, right)).to(leaves[0].dtype)


def _solved(left: Tensor, right: Tensor) -> Tensor:
    """The solution of least norm in units of the diagonal; 0 in rows whose diagonal is 0."""
    scale = left.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    unit = left * inverse[:, None] * inverse
    unit.diagonal().copy_(torch.ones_like(scale))
    factor, info = torch.linalg.cholesky_ex(unit)
    if not int(info) and float(factor.diagonal().min()) > len(scale) * torch.finfo(left.dtype).eps ** 0.5:
        return inverse[:, None] * torch.cholesky_solve(inverse[:, None] * right, factor)
    return inverse[:, None] * (torch.linalg.pinv(unit, hermitian=True) @ (inverse[:, None] * right))
