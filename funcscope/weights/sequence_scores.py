"""Loss and accuracy of every sequence at one point, and errors of their means and differences over sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.estimate import Crossed, Estimate
from ..core.objective import Loss, per_sequence
from ..core.softmax import Labels
from ..core.standard_errors import ratio_stderr


class SequenceScores(NamedTuple):
    """Of n sequences, float64 on the CPU."""

    sums: Float[Tensor, " n"]
    """Weighted sums of the losses of each."""
    weights: Float[Tensor, " n"]
    hits: Float[Tensor, " n"] | None
    """Weighted counts of the positions whose largest output is the label's, one of several that are as large counting for
    its share (a network of zeros knows no label); None where there are no labels."""

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.weights.sum())


@torch.no_grad()
def sequence_scores(loss: Loss, theta: Tensor) -> SequenceScores:
    """One forward pass over all batches. The criterion has moved labels to the positions that predict them."""
    params = loss.params(theta)
    parts = []
    for inputs, targets in loss.batches:
        out = loss.net.apply(params, inputs)
        sums, weights = loss.scored(lambda _, out=out: out, inputs, targets)  # type: ignore[misc]
        labelled = loss.criterion.positionwise and isinstance(targets, Labels)
        hits = per_sequence(_share_of_the_largest(out, targets.index) * targets.weight) if labelled else None
        parts.append((sums, weights, hits))
    sums, weights = (torch.cat([part[i] for part in parts]).cpu().double() for i in range(2))
    if any(part[2] is None for part in parts):
        return SequenceScores(sums, weights, None)
    return SequenceScores(sums, weights, torch.cat([part[2] for part in parts]).cpu().double())


def _share_of_the_largest(out: Float[Tensor, "*p c"], index: Int[Tensor, "*p"]) -> Float[Tensor, "*p"]:
    """1 where the label's output is the largest, 1 / k where it is one of k, else 0."""
    is_largest = out == out.amax(-1, keepdim=True)
    return is_largest.gather(-1, index[..., None])[..., 0] / is_largest.sum(-1).clamp(min=1)


def residual_rows(differences: Float[Tensor, "*m n"], weights: Float[Tensor, " n"]) -> Float[Tensor, "*m g"]:
    """What each sequence that scores something moves the mean of some sums by; linear in them."""
    scored = weights != 0
    sums, weights = differences[..., scored], weights[scored]
    total = weights.sum()
    return (sums - sums.sum(-1, keepdim=True) / total * weights) / total


def mean_difference(first: SequenceScores, second: SequenceScores) -> Estimate:
    """How much larger the first loss is, with the paired error over sequences."""
    change = first.sums - second.sums
    num = int((first.weights != 0).sum())
    return Estimate(change.sum() / first.weights.sum(), ratio_stderr(change, first.weights), num)


def over_draws(values: Float[Tensor, " d"], rows: Float[Tensor, "d g"]) -> Crossed:
    """The mean over draws, with errors over these and over sequences. rows: `residual_rows` of each draw."""
    return Crossed.of_rows(Estimate.of(values), rows / len(values))
