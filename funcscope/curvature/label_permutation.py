"""Whether samples of two tasks are of one distribution: sums of inner products under permutations of their labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count
from ..core.keys import Key, check_key, fold_in, uniform


class LabelTest(NamedTuple):
    """By block: the statistic, and the p value that it is as small as it is by chance."""

    statistic: Float[Tensor, " b"]
    p_value: Float[Tensor, " b"]


def label_test(pooled: Float[Tensor, "b n n"], num_first: int, *, key: Key, num: int = 999) -> LabelTest:
    r"""Mean between the tasks minus mean within them, and the share of label permutations with one as small.

    $$S = \frac{1}{nm} \sum_{i \in A, j \in B} K_{ij} - \frac12 \Big(\frac{\sum_{i \ne j \in A} K_{ij}}{n (n-1)} +
      \frac{\sum_{i \ne j \in B} K_{ij}}{m (m-1)}\Big), \qquad p = \frac{1 + \#\{S^* \le S\}}{1 + R}.$$

    With inner products K of gradients, $\mathbb E S = - \lVert \mu_A - \mu_B \rVert^2 / 2$. The replicate is the sample: if
    labels say nothing of samples, p is at most u with probability at most u, for every n, m and R. That needs a K in which
    the labels do not enter: what whitens it comes from all samples together or from others. All blocks share their
    permutations.

    pooled: K of the samples of both tasks, the `num_first` of A first. It need not be symmetric: i is of A between tasks.

    Raises ValueError for fewer than two samples of a task. Phipson, Smyth (2010), doi:10.2202/1544-6115.1585.

    >>> import funcscope as fs
    >>> x = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    >>> float(label_test((x @ x.T)[None], 2, key=fs.key(0)).statistic)
    -2.0
    """
    check_key(key)
    check_count("num", num)
    total = pooled.shape[1]
    if min(num_first, total - num_first) < 2:
        raise ValueError(f"each task must have two samples at least, got {num_first} and {total - num_first}.")
    rest = (pooled - torch.diag_embed(pooled.diagonal(dim1=1, dim2=2))).double()
    like = torch.zeros(total, dtype=torch.float64)
    first = (like.index_fill(0, torch.arange(num_first), 1)).expand(num + 1, total).clone()
    for i in range(num):
        first[1 + i] = first[0][uniform(fold_in(key, i), like).argsort()]
    values = torch.stack([_statistic(each, first.to(rest.device), num_first) for each in rest])
    rounding = 1e-12 * rest.abs().amax((1, 2))  # relabellings that say the same are equal
    as_small = (values[:, 1:] <= (values[:, 0] + rounding)[:, None]).sum(1)
    p_value = torch.where(values[:, 0].isfinite(), (1 + as_small.double()) / (1 + num), torch.nan)
    return LabelTest(values[:, 0], p_value)


def _statistic(rest: Tensor, first: Tensor, n: int) -> Tensor:
    """Of every row of labels (r, n); the matrix has no diagonal."""
    second, m = 1 - first, first.shape[1] - n
    from_first, from_second = first @ rest, second @ rest
    within = (from_first * first).sum(1) / (n * (n - 1)) + (from_second * second).sum(1) / (m * (m - 1))
    return (from_first * second).sum(1) / (n * m) - within / 2
