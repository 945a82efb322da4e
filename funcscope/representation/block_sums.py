"""Inner products of centred kernels without one block of samples after another, from sums of the whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Kernels = Float[Tensor, "l n n"]


class BlockSums(NamedTuple):
    """Of kernels that are centred over all samples, for every block of these that is left out."""

    kernels: Kernels
    rows: Float[Tensor, "l n k"]
    """Of each row that stays, the sum over the columns that stay; 0 for the others."""
    totals: Float[Tensor, "l k"]
    diagonals: Float[Tensor, "l n k"]
    """Of the kernel that is centred again; 0 for samples that are left out."""


def block_sums(kernels: Kernels, centred_diagonals: Float[Tensor, "l n"], stay: Bool[Tensor, "n k"]) -> BlockSums:
    """stay: which samples are left, of each block that is left out."""
    rows = torch.where(stay, kernels @ stay.to(kernels), 0.0)
    totals, num = rows.sum(1), stay.sum(0)
    diagonals = centred_diagonals[..., None] - 2 / num * rows + (totals / num.square())[:, None]
    return BlockSums(kernels, rows, totals, torch.where(stay, diagonals, 0.0))


def left_out_cross(x: BlockSums, y: BlockSums, stay: Bool[Tensor, "n k"]) -> Float[Tensor, "k a b"]:
    r"""$\mathrm{tr}(H K_x H\, H K_y H)$ of the m samples that stay, with H their centring:

    $$\sum_{ij} K_{x, ij} K_{y, ij} - \tfrac2m \sum_i k_{x, i} k_{y, i} + \tfrac{1}{m^2} s_x s_y,$$

    sums over these samples of the kernels as they are, with k the sums of rows and s that of all. The first is that of all
    samples without the block's rows and columns.
    """
    of_rows = torch.einsum("anm,bnm->nab", x.kernels, y.kernels)
    num, made = stay.sum(0), []
    for i, out in enumerate(~stay.T):
        inside = (x.kernels[:, out][:, :, out].flatten(1), y.kernels[:, out][:, :, out].flatten(1))
        whole = of_rows[~out].sum(0) - of_rows[out].sum(0) + inside[0] @ inside[1].T
        apart = x.rows[..., i] @ y.rows[..., i].T * (2 / num[i])
        made.append(whole - apart + torch.outer(x.totals[:, i], y.totals[:, i]) / num[i].square())
    return torch.stack(made)
