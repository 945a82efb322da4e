"""What Grams of the gradients of two tasks say of their mean gradients: lengths, alignment, and whether they oppose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.keys import Key
from ..core.objective import Loss, Theta
from .gram import Blocks, Grams, gram
from .gram_errors import LEAST
from .leafwise import terms_at
from .mean_gradients import Errors, Moments, bootstrapped, bounds, jackknifed, unbiased

Values = Float[Tensor, " b"]


class PairStatistics(NamedTuple):
    """By block."""

    value: Moments
    """Without bias: inner product and squared lengths of the mean gradients."""
    errors: Errors
    """Standard errors of `value`, and of its cosine."""
    resolved: Bool[Tensor, " b"]
    """Whether both squared lengths lie `LEAST` of their errors above 0."""
    cosine: Values
    """Disattenuated; it, its error and its bounds are nan where it is not resolved."""
    cosine_stderr: Values
    low: Values
    high: Values
    undefined: Values
    """Share of the resamples without a cosine."""
    p_conflict: Values
    """One-sided p value of an inner product of at least 0, from the resamples."""


def pair_statistics(
    aa: Float[Tensor, "b n n"],
    ab: Float[Tensor, "b n m"],
    bb: Float[Tensor, "b m m"],
    *,
    key: Key,
    num: int,
    weights: tuple[Tensor, Tensor] | None = None,
) -> PairStatistics:
    """From the Grams of A, of A with B, and of B, with `num` resamples of both; what they are: `fisher.gram_conflicts`.

    weights: of the samples of A and of B, in units of their means, where the Grams are over mean weights (`task_grams`).
    """
    drawn = bootstrapped(aa, ab, bb, key, num)
    cosines = drawn.cosine
    value, errors = unbiased(aa, ab, bb), jackknifed(aa, ab, bb, weights)
    resolved = (value.first > LEAST * errors.first) & (value.second > LEAST * errors.second)
    cosine, error, low, high = (
        torch.where(resolved, x, math.nan) for x in (value.cosine, errors.cosine, *bounds(cosines, min(ab.shape[1:])))
    )
    as_large = (1 + (~(drawn.inner < 0)).sum(1).double()) / (1 + num)
    p_conflict = torch.where(value.inner.isfinite(), as_large, math.nan)
    undefined = cosines.isnan().double().mean(1)
    return PairStatistics(value, errors, resolved, cosine, error, low, high, undefined, p_conflict)


def check_grams(first: Grams, between: Grams, second: Grams) -> None:
    """The Grams of A, of A with B, and of B belong together, and are of sequences."""
    n, m = between.values.shape[1:]
    shapes = [tuple(each.values.shape[1:]) for each in (first, between, second)]
    if shapes != [(n, n), (n, m), (m, m)]:
        raise ValueError(
            f"the Grams must be of (n, n), (n, m) and (m, m) samples, got {shapes}: the second is `gram(other=)`."
        )
    if not first.blocks == between.blocks == second.blocks:
        raise ValueError("the three Grams must have the same blocks: take them with equal `by`.")
    if "token" in (first.unit, between.unit, second.unit):
        raise ValueError(
            "tokens of one sequence go together, and are no samples of a test: take Grams with `unit='sequence'`."
        )


def pooled(aa: Float[Tensor, "b n n"], ab: Float[Tensor, "b n m"], bb: Float[Tensor, "b m m"]) -> Tensor:
    """The Gram of the samples of both tasks, those of A first."""
    return torch.cat([torch.cat([aa, ab], 2), torch.cat([ab.mT, bb], 2)], 1)


def unit_lengths(aa: Tensor, ab: Tensor, bb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Grams of the gradients' directions. Raises ValueError for a sample without a gradient."""
    a, b = (_lengths(each, name) for each, name in ((aa, "first"), (bb, "second")))
    return (
        aa / (a[:, :, None] * a[:, None]),
        ab / (a[:, :, None] * b[:, None]),
        bb / (b[:, :, None] * b[:, None]),
    )


def _lengths(gram: Tensor, name: str) -> Tensor:
    squares = gram.diagonal(dim1=1, dim2=2)
    if bool((squares <= 0).any()):
        block, sample = (squares <= 0).nonzero()[0].tolist()
        raise ValueError(
            f"`unit_length` needs samples with gradients, and sample {sample} of the {name} task has none in block {block}: "
            "leave it out."
        )
    return squares.sqrt()


def task_grams(
    losses: Mapping[str, Loss], theta: Theta, *, by: Blocks = "layer", chunk_size: int = 64
) -> dict[tuple[str, str], Grams]:
    r"""Grams of every task and of every pair of them, of gradients over the mean weight of the task's sequences.

    Then the mean of a task's rows is the gradient of its loss, a mean over tokens, whatever the sequences' length. The mean
    weight is of the sample, too: errors take it in (`relative_weights`).
    """
    weights = {name: float(terms_at(loss, theta).weights.mean()) for name, loss in losses.items()}
    made = {}
    for a, b in [*((name, name) for name in losses), *combinations(losses, 2)]:
        other = None if a == b else losses[b]
        each = gram(losses[a], theta, other=other, by=by, chunk_size=chunk_size)
        scaled = each.values / (weights[a] * weights[b])
        made[a, b] = Grams(scaled, each.unit, each.num_passes, each.by_rows, each.blocks)
    return made


def relative_weights(losses: Mapping[str, Loss], theta: Theta) -> dict[str, Float[Tensor, " n"]]:
    """Of every task, the weights of its sequences in units of their mean."""
    weights = {name: terms_at(loss, theta).weights for name, loss in losses.items()}
    return {name: each / each.mean() for name, each in weights.items()}
