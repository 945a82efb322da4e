"""Rules that make one model of several: of one leaf, a tensor of each, so that models of any size merge leaf by leaf.

Every rule is a pure function of tensors of one shape on one device. It accumulates in float64 (float32 where the device has
none) and returns the dtype of the first leaf. Whatever a rule needs of other leaves, as a threshold over the whole model,
is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_number
from ..core.estimate import wide
from ..core.keys import Key, fold_in, uniform
from ..core.vectors import dot
from .elementwise import by_parts, check_leaves, each_of, positive_weights, shares_of
from .magnitude_cuts import Cut, global_cut, largest
from .regmean import regmean

__all__ = [
    "Cut", "dare", "fisher", "global_cut", "linear", "regmean", "slerp", "task_arithmetic", "task_vector", "ties",
]  # fmt: skip

Leaf = Float[Tensor, "..."]


def linear(leaves: Sequence[Leaf], weights: Sequence[float] | None = None) -> Leaf:
    r"""The weighted mean $\sum_k w_k \theta_k / \sum_k w_k$; equal weights unless given. Equal leaves stay what they are.

    Weights may be negative (to go beyond a model), but not sum to 0. With equal weights: a model soup.

    Raises ValueError for no leaf, leaves of other shapes, or that are not finite, and weights that sum to 0.

    Wortsman et al. (2022), arXiv:2203.05482.

    >>> linear([torch.zeros(2), torch.ones(2)], [1.0, 3.0])
    tensor([0.7500, 0.7500])
    """
    check_leaves("leaves", leaves)
    shares = shares_of(weights, len(leaves))

    def mean(first: Tensor, *others: Tensor) -> Tensor:
        return first + sum(share * (x - first) for share, x in zip(shares[1:], others, strict=True))

    return by_parts(mean, leaves)


def slerp(a: Leaf, b: Leaf, t: float) -> Leaf:
    r"""Spherical interpolation: along the great circle through both, with the chord's mixture of the two lengths.

    $$\frac{\sin((1 - t)\, \Omega)}{\sin \Omega}\, a + \frac{\sin(t\, \Omega)}{\sin \Omega}\, b, \qquad
      \Omega = \angle(a, b).$$

    Of tensors of one length it keeps that length. Where no single great circle goes through both (one is 0, they are
    parallel, or opposite to 8 digits) it is the linear mean, which is the limit of parallel ones. mergekit already takes the
    linear mean where |cos| > 0.9995, and gives a tensor of 0 a right angle to every other.

    Raises ValueError as `linear`, and for t outside [0, 1].

    Shoemake (1985), doi:10.1145/325165.325242.

    >>> slerp(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]), 0.5)
    tensor([1.4142, 1.4142])
    """
    check_leaves("a, b", (a, b))
    shares = great_circle(lambda: [(a, b)], t)
    if shares is None:
        return linear([a, b], [1 - t, t])
    return by_parts(lambda x, y: shares[0] * x + shares[1] * y, (a, b))


def great_circle(parts: Callable[[], Iterable[tuple[Leaf, Leaf]]], t: float) -> tuple[float, float] | None:
    """The two factors of `slerp` for a leaf that is never whole; None where it is the linear mean.

    parts: called twice, always with the same parts of a and b.

    >>> shares = great_circle(lambda: [(torch.ones(1), torch.zeros(1)), (torch.zeros(1), torch.ones(1))], 1 / 3)
    >>> [round(share, 6) for share in shares]
    [0.866025, 0.5]
    """
    check_number("t", t, 0.0, 1.0)

    def wide_parts() -> Iterator[list[Tensor]]:
        return ([x.detach().to(wide(x.device)) for x in pair] for pair in parts())

    squares = [[dot(x, x) for x in pair] for pair in wide_parts()]
    lengths = [math.sqrt(math.fsum(each)) for each in zip(*squares, strict=True)]
    if not all(lengths):
        return None
    sums = [0.0, 0.0]
    for pair in wide_parts():
        one, other = (x / length for x, length in zip(pair, lengths, strict=True))
        sums = [sums[0] + dot(one - other, one - other), sums[1] + dot(one + other, one + other)]
    apart, along = map(math.sqrt, sums)
    angle = 2 * math.atan2(apart, along)
    if math.sin(angle) < (1e-8 if apart > along else 1e-150):
        return None
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def task_arithmetic(base: Leaf, leaves: Sequence[Leaf], scales: float | Sequence[float]) -> Leaf:
    r"""$\theta_0 + \sum_k \lambda_k (\theta_k - \theta_0)$: task vectors added, or with $\lambda < 0$ taken away.

    scales: one for all, or one each. With $\lambda_k = w_k$ that sum to 1 it is `linear`.

    Raises ValueError as `linear`, and for another number of scales.

    Ilharco et al. (2023), arXiv:2212.04089.

    >>> task_arithmetic(torch.ones(1), [torch.tensor([3.0]), torch.tensor([0.0])], [0.5, 2.0])
    tensor([0.])
    """
    check_leaves("base, leaves", (base, *leaves), least=2)
    factors = each_of("scales", scales, len(leaves))

    def moved(zero: Tensor, *others: Tensor) -> Tensor:
        return zero + sum(factor * (x - zero) for factor, x in zip(factors, others, strict=True))

    return by_parts(moved, (base, *leaves), leaves[0].dtype)


def task_vector(base: Leaf, leaf: Leaf) -> Leaf:
    """leaf - base in float32 at least: what `largest` and `global_cut` rank.

    >>> task_vector(torch.ones(2), torch.tensor([1.5, 0.0]))
    tensor([ 0.5000, -1.0000])
    """
    dtype = torch.promote_types(torch.promote_types(base.dtype, leaf.dtype), torch.float32)
    return leaf.detach().to(dtype) - base.detach().to(dtype)


def ties(
    base: Leaf,
    leaves: Sequence[Leaf],
    *,
    density: float | None = None,
    cuts: Sequence[Cut] | None = None,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
) -> Leaf:
    r"""TIES: trim, elect signs, mean over those that agree.

    $$\hat\tau_k = \tau_k \text{ where } |\tau_k| \text{ is among the largest, else } 0, \qquad
      \gamma = \mathrm{sign}\Big(\sum_k w_k \hat\tau_k\Big), \qquad
      \theta = \theta_0 + \lambda \frac{\sum_{k:\, \mathrm{sign}\,\hat\tau_k = \gamma} w_k \hat\tau_k}
                                       {\sum_{k:\, \mathrm{sign}\,\hat\tau_k = \gamma} w_k}.$$

    Signs are elected by the trimmed vectors; where their sum is exactly 0, or nobody kept the entry, nothing is added. The
    paper trims over the whole task vector: `cuts` has the cut of every model for that (`global_cut`, then `Cut.behind` leaf
    by leaf). `density` instead keeps exactly that share of this leaf, as mergekit does leaf by leaf: 1 for small leaves too.
    Equal magnitudes: the first in order. fusion_bench keeps one entry more, and gives even signs that of most entries.

    weights: positive, of the models in election and mean; the paper has none. mergekit elects + where the sum is 0 and has
    `normalize`, without which sums are not divided by the weights of those that agree; its `lambda` is the scale.

    Raises ValueError as `linear`, for a density outside (0, 1], for both or none of density and cuts, and for weights that
    are not positive.

    Yadav et al. (2023), arXiv:2306.01708.

    >>> taus = [torch.tensor([4.0, 1.0, 0.0]), torch.tensor([-2.0, 0.0, 3.0]), torch.tensor([2.0, 0.5, 2.0])]
    >>> ties(torch.zeros(3), taus, density=2 / 3)
    tensor([3.0000, 1.0000, 2.5000])
    """
    check_leaves("base, leaves", (base, *leaves), least=2)
    if (density is None) == (cuts is None):
        raise ValueError("give either `density`, of this leaf, or `cuts`, one per model, over the whole of it.")
    if cuts is not None and len(cuts) != len(leaves):
        raise ValueError(f"`cuts` must be one per leaf, {len(leaves)}, got {len(cuts)}.")
    trimmed = []
    for k, leaf in enumerate(leaves):
        tau = task_vector(base, leaf)
        kept = largest(tau, density) if density is not None else cuts[k].mask(tau)  # type: ignore[index]
        trimmed.append(tau * kept)
    return _elected(base, trimmed, scale, weights, leaves[0].dtype)


def dare(
    base: Leaf,
    leaves: Sequence[Leaf],
    *,
    drop: float,
    key: Key,
    name: str,
    scale: float = 1.0,
    then: Literal["linear", "ties"] = "linear",
    weights: Sequence[float] | None = None,
) -> Leaf:
    r"""DARE: every entry of a task vector is dropped with probability p, the others divided by 1 - p.

    $$\tilde\tau_k = m_k \odot \tau_k / (1 - p), \qquad m_k \sim \mathrm{Bernoulli}(1 - p), \qquad
      \mathrm{E}\, \tilde\tau_k = \tau_k.$$

    then: `linear` adds the scale times their weighted mean, which in expectation is `linear` at scale 1 and task arithmetic
    at scale $K \lambda$; `ties` elects signs and takes the mean of those that agree, without trimming.
    name: of the leaf: with the model's place it says which child of the key draws the mask, so that leaves can be merged in
    any order, on any machine.

    Raises ValueError as `ties`, and for a drop outside [0, 1).

    Yu et al. (2024), arXiv:2311.03099.

    >>> from funcscope.core.keys import key
    >>> merged = dare(torch.zeros(8), [torch.ones(8)], drop=0.5, key=key(0), name="w")
    >>> sorted(set(merged.tolist()))
    [0.0, 2.0]
    """
    check_leaves("base, leaves", (base, *leaves), least=2)
    check_choice("then", then, ("linear", "ties"))
    check_number("drop", drop, 0.0)
    if drop >= 1:
        raise ValueError(f"`drop` must be a probability below 1, got {drop!r}: nothing would be left.")
    thinned = []
    for k, leaf in enumerate(leaves):
        tau = task_vector(base, leaf)
        unit = uniform(fold_in(fold_in(key, name), k), torch.empty(tau.shape, device=tau.device))
        thinned.append(torch.where(unit >= drop, tau / (1 - drop), 0.0))
    if then == "ties":
        return _elected(base, thinned, scale, weights, leaves[0].dtype)
    shares = shares_of(weights, len(leaves))

    def moved(zero: Tensor, *taus: Tensor) -> Tensor:
        return zero + scale * sum(share * tau for share, tau in zip(shares, taus, strict=True))

    return by_parts(moved, (base, *thinned), leaves[0].dtype)


def fisher(
    leaves: Sequence[Leaf],
    fishers: Sequence[Leaf],
    weights: Sequence[float] | None = None,
    *,
    means: Sequence[float] | None = None,
    floor: float = 1e-8,
) -> Leaf:
    r"""Fisher merging: every entry a mean weighted by how much each model's likelihood hangs on it.

    $$\theta = \frac{\sum_k w_k (F_k + \epsilon_k)\, \theta_k}{\sum_k w_k (F_k + \epsilon_k)}, \qquad
      \epsilon_k = 10^{-8}\, \bar F_k.$$

    It is the mode of the product of the powers $w_k$ of normal densities around $\theta_k$ with precisions $F_k$
    (proofs/merging.py). The floor is inside both sums: entries that no model needs become the mean of the models; an epsilon
    in the denominator alone would pull them to 0. Where the denominator is 0 all the same (all Fishers and their means are),
    the weighted mean by w.

    fishers: diagonals, of the shape of the leaves. means: of each model's whole diagonal, for the floor; default: of this
    leaf's. floor: as a share of the mean.

    Raises ValueError as `linear`, and for Fishers that are negative or not finite, or of another number.

    Matena, Raffel (2022), arXiv:2111.09832.

    >>> fisher([torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])], [torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])])
    tensor([0.2500, 0.2500])
    """
    check_leaves("leaves", leaves)
    check_leaves("fishers", fishers, least=len(leaves), like=leaves[0])
    if len(fishers) != len(leaves) or any(bool((x < 0).any()) for x in fishers):
        raise ValueError(f"`fishers` must be {len(leaves)} diagonals, none of them with an entry below 0.")
    shares = shares_of(weights, len(leaves))
    if means is None:
        means = [float(x.to(wide(x.device)).mean()) if x.numel() else 0.0 for x in fishers]
    floors = [floor * mean for mean in each_of("means", means, len(leaves))]

    def mean(*both: Tensor) -> Tensor:
        thetas, precisions = both[: len(leaves)], both[len(leaves) :]
        parts = [share * (F + eps) for share, F, eps in zip(shares, precisions, floors, strict=True)]
        total = sum(parts)
        first, plain = thetas[0], sum(share * (x - thetas[0]) for share, x in zip(shares, thetas, strict=True))
        moved = sum(part * (x - first) for part, x in zip(parts, thetas, strict=True))
        return first + torch.where(total != 0, moved / total, plain)  # type: ignore[arg-type]

    return by_parts(mean, (*leaves, *fishers), leaves[0].dtype)


def _elected(
    base: Tensor, taus: Sequence[Tensor], scale: float, weights: Sequence[float] | None, dtype: torch.dtype
) -> Tensor:
    """base + scale * the weighted mean, entry by entry, of the task vectors with the elected sign."""
    check_number("scale", scale)
    votes = positive_weights(weights, len(taus))  # as they are: shares of thirds would not balance exactly

    def moved(zero: Tensor, *each: Tensor) -> Tensor:
        elected = sum(vote * tau for vote, tau in zip(votes, each, strict=True)).sign()  # type: ignore[union-attr]
        agree = [vote * (tau * elected > 0) for vote, tau in zip(votes, each, strict=True)]
        total = sum(agree)
        summed = sum(part * tau for part, tau in zip(agree, each, strict=True))
        return zero + scale * summed / (total + (total == 0))  # type: ignore[operator]

    return by_parts(moved, (base, *taus), dtype)
