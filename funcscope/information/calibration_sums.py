"""Sums over sequences and bins of confidence, from which calibration follows, and where the bins end."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count
from ..core.estimate import wide
from ..core.softmax import Labels, check_classes
from .sequence_sums import SequenceSums

SCORES = ("weight", "correct", "confidence", "brier", "nll")
BINS = 15


class CalibrationSums(NamedTuple):
    """What `calibration` needs of a corpus, batch by batch; made by `calibration_sums`."""

    edges: Float[Tensor, " m"]
    sums: SequenceSums
    """Of the scores, and by bin of weights, of what is right, and of confidences."""
    variance: Float[Tensor, " k"]
    r"""By bin, of the weighted number of right answers of a calibrated model: $\sum w^2 c (1 - c)$."""

    def merge(self, other: CalibrationSums) -> CalibrationSums:
        """Of the sequences of both, which must be different ones. Raises ValueError where bins differ."""
        if not self.edges.equal(other.edges):
            raise ValueError("sums over different bins cannot be merged: pass the same `edges` for every batch.")
        return CalibrationSums(self.edges, self.sums.merge(other.sums), self.variance + other.variance)


def equal_width_edges(bins: int = BINS) -> Float[Tensor, " m"]:
    """Ends of `bins` intervals of equal width between 0 and 1.

    >>> equal_width_edges(2).tolist()
    [0.0, 0.5, 1.0]
    """
    check_count("bins", bins)
    return torch.linspace(0, 1, bins + 1, dtype=torch.float64)


def equal_mass_edges(confidence: Float[Tensor, " n"], bins: int = BINS) -> Float[Tensor, " m"]:
    """Ends of at most `bins` intervals that hold about equally many of these confidences: quantiles, between 0 and 1.

    confidence: of all positions, or of a sample that came before the corpus passes (`confidence_of`). Where confidences
    coincide there are fewer bins. Bins that are made of the same data as the error are a small part of its bias.

    >>> import torch
    >>> equal_mass_edges(torch.tensor([0.25, 0.5, 0.75, 0.875]), 2).tolist()
    [0.0, 0.625, 1.0]
    """
    check_count("bins", bins)
    if not confidence.numel() or not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise ValueError("`confidence` must hold probabilities, at least one: `confidence_of(logits, targets)`.")
    inner = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    values = confidence.double().cpu().quantile(inner) if bins > 1 else inner
    return torch.cat([inner.new_zeros(1), values, inner.new_ones(1)]).round(decimals=12).unique()


@torch.no_grad()
def confidence_of(logits: Float[Tensor, "*b V"], targets: Labels) -> Float[Tensor, " n"]:
    """The largest probability at every scored position, in float64."""
    at = logits[_scored(logits, targets)].to(wide(logits.device))
    return (at.amax(-1) - at.logsumexp(-1)).exp()


@torch.no_grad()
def calibration_sums(
    logits: Float[Tensor, "*b V"], targets: Labels, edges: Float[Tensor, " m"], *, chunk: int = 64
) -> CalibrationSums:
    """Sums of a batch for `calibration`, to be merged with those of others.

    logits: of shape (sequence, position, class) or (row, class). targets: labels and weights at the same positions as the
    logits, as a criterion's `prepare` makes them: for a causal model, token t + 1 at position t, and no padding. Each
    sequence must be whole in one batch. edges: `equal_width_edges` or `equal_mass_edges`, the same for all batches. chunk:
    positions whose probabilities are in memory at a time, in float64.

    Raises ValueError where shapes do not fit, and for edges that do not rise from 0 to 1.
    """
    check_count("chunk", chunk)
    _check_edges(edges)
    scored = _scored(logits, targets)
    bins, total = len(edges) - 1, wide(logits.device)
    inner = edges[1:-1].to(logits.device, total)
    columns = torch.zeros(len(SCORES) + 3 * bins, len(logits), dtype=total, device=logits.device)
    variance = torch.zeros(bins, dtype=total, device=logits.device)
    for at in scored.nonzero().split(chunk):
        place = tuple(at.T)
        weight = targets.weight[place].to(total)
        scores = _scores(logits[place].to(total), targets.index[place])
        where = torch.bucketize(scores[2], inner)
        columns[: len(SCORES)].index_add_(1, place[0], scores * weight)
        for i in range(3):
            first = len(SCORES) + i * bins
            columns.index_put_((first + where, place[0]), scores[i] * weight, accumulate=True)
        variance.index_add_(0, where, weight.square() * scores[2] * (1 - scores[2]))
    return CalibrationSums(edges.double().cpu(), SequenceSums.of(columns), variance.cpu())


def _scores(logits: Float[Tensor, "n V"], label: Tensor) -> Float[Tensor, "scores n"]:
    log_p = logits.log_softmax(-1)
    chosen = log_p.gather(-1, label[:, None])[:, 0]
    confidence, best = log_p.max(-1)
    p = log_p.exp()
    brier = p.square().sum(-1) - 2 * chosen.exp() + 1
    right = torch.where(confidence.isnan(), math.nan, (best == label).to(chosen))
    return torch.stack([torch.ones_like(chosen), right, confidence.exp(), brier, -chosen])


def _scored(logits: Tensor, targets: Labels) -> Tensor:
    if (
        logits.ndim not in (2, 3)
        or targets.index.shape != logits.shape[:-1]
        or targets.weight.shape != logits.shape[:-1]
    ):
        raise ValueError(
            f"`targets` must hold labels and weights of shape {tuple(logits.shape[:-1])}, one per row of `logits`, got "
            f"{tuple(targets.index.shape)} and {tuple(targets.weight.shape)}: they are made by a criterion's `prepare`."
        )
    check_classes(targets, logits.shape[-1])
    return targets.weight != 0


def _check_edges(edges: Tensor) -> None:
    ends = len(edges) > 1 and float(edges[0]) == 0 and float(edges[-1]) == 1
    if not ends or not bool((edges.diff() > 0).all()):
        raise ValueError(f"`edges` must rise from 0 to 1, got {edges.tolist()}: `equal_width_edges(bins)`.")
