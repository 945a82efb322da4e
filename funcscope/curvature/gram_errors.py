"""Standard errors over samples of what is a mean over them or over their pairs: traces, squares without bias and ratios."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.standard_errors import jackknife_stderr, ratio_stderr
from .gram_statistics import Data, centred, coupled, of_four, with_total
from .pair_errors import pair_stderr

LEAST = 2.0
"""Standard errors that a square must be above 0, for ratios to it."""


class FreeErrors(NamedTuple):
    """Of numbers without bias."""

    resolved: Bool[Tensor, " c"]
    """Whether ||F||^2 of a block and, last, of all lies `LEAST` of its errors above 0."""
    participation_ratio: Float[Tensor, " c"]
    coupling: Float[Tensor, "b b"]
    off_block_mass: Float[Tensor, ""]


def trace_stderr(data: Data) -> Float[Tensor, " c"]:
    r"""Of the trace of every block and, last, of all: a mean over groups of samples, or, centred, over their pairs.

    $\mathrm{tr}\, C = \frac{1}{n (n-1)} \sum_{i \ne j} |g_i - g_j|^2 / 2$: `pair_stderr`. Pairs of samples within a group are
    shared out evenly among the pairs of groups that it is in.
    """
    ones = torch.ones(len(data.groups)).to(data.values)
    sizes = _by_group(ones, data)
    own = with_total(data.values).diagonal(dim1=1, dim2=2)
    if not data.centered:
        return ratio_stderr(_by_group(own, data), sizes)
    gram = centred(data.values)
    lengths = with_total(gram).diagonal(dim1=1, dim2=2)
    both = _by_groups(with_total(gram), data)
    halves = _by_group(lengths, data)[:, :, None] * sizes
    halves = (halves + halves.mT) / 2 - both
    return pair_stderr(_shared(halves), _shared(sizes[:, None] * sizes - sizes.diag()))


def free_errors(data: Data) -> FreeErrors:
    """Of participation ratios to first order, of couplings the jackknife's; nothing is resolved by two groups."""
    return _centred_errors(data) if data.centered else _uncentred_errors(data)


def _uncentred_errors(data: Data) -> FreeErrors:
    """Pairs of samples of one group are in no number; how many pairs there are of two groups cancels in ratios."""
    values = data.values.masked_fill(data.groups[:, None] == data.groups, 0)
    squares = _by_groups(torch.cat([values.square(), values.sum(0, keepdim=True).square()]), data)
    lengths = _by_group(with_total(data.values).diagonal(dim1=1, dim2=2), data)
    ratios = torch.stack([pair_stderr(x[:, None] * x, square) for x, square in zip(lengths, squares, strict=True)])
    products, rest = torch.einsum("aij,bij->ab", values, values), []
    for i in range(lengths.shape[1]):
        rows = values[:, data.groups == i]
        rest.append(products - 2 * torch.einsum("aij,bij->ab", rows, rows))
    resolved = squares.sum((1, 2)) > LEAST * _of_sum(squares)
    return FreeErrors(resolved, ratios, *_coupling_errors(rest))


def _coupling_errors(moments: list[Float[Tensor, "b b"]]) -> list[Tensor]:
    ratios = [coupled(each, "") for each in moments]
    return [jackknife_stderr(torch.stack([each[name] for each in ratios], -1)) for name in ratios[0]]


def _centred_errors(data: Data) -> FreeErrors:
    """nan for groups, of which there is no number, and for fewer than five samples."""
    num, blocks = len(data.groups), len(data.values)
    nan = data.values.new_full((blocks + 1,), math.nan)
    if num < 5 or int(data.groups.max()) + 1 < num:
        return FreeErrors(nan > 0, nan, nan[:-1].expand(blocks, -1), nan[0])
    apart = centred(data.values)
    apart = apart - torch.diag_embed(apart.diagonal(dim1=1, dim2=2))
    sums = apart.sum(-1)
    products, chains, totals = torch.einsum("aij,bij->ab", apart, apart), sums @ sums.T, sums.sum(-1)
    rest = []
    for row, own in zip(apart.unbind(1), sums.T, strict=True):
        lost, through = row @ row.T, row @ sums.T
        left = chains - own[:, None] * own - through - through.T + lost
        rest.append(of_four(products - 2 * lost, left, totals - 2 * own, num - 1))
    squares = torch.stack([torch.cat([each.diagonal(), each.sum()[None]]) for each in rest], 1)
    whole = of_four(products, chains, totals, num)
    whole = torch.cat([whole.diagonal(), whole.sum()[None]])
    return FreeErrors(whole > LEAST * jackknife_stderr(squares), nan, *_coupling_errors(rest))


def _of_sum(sums: Float[Tensor, "*b g g"]) -> Float[Tensor, "*b"]:
    """The error of a sum over pairs, in place of their mean."""
    num = sums.shape[-1]
    return pair_stderr(sums) * num * (num - 1)


def _by_group(x: Float[Tensor, "*c n"], data: Data) -> Float[Tensor, "*c g"]:
    """Sums over samples."""
    num = int(data.groups.max()) + 1
    return x.new_zeros(*x.shape[:-1], num).index_add(-1, data.groups, x)


def _by_groups(x: Float[Tensor, "*c n n"], data: Data) -> Float[Tensor, "*c g g"]:
    """Sums over pairs of samples."""
    return _by_group(_by_group(x, data).mT, data).mT


def _shared(sums: Float[Tensor, "*c g g"]) -> Float[Tensor, "*c g g"]:
    """With the diagonal spread over the pairs that each group is in."""
    own = sums.diagonal(dim1=-2, dim2=-1) / (2 * max(sums.shape[-1] - 1, 1))
    return sums + own[..., :, None] + own[..., None, :]
