"""From masks to curves: losses, areas and critical sparsities, with their errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.estimate import Crossed, Estimate
from ..core.objective import Loss
from ..core.standard_errors import ratio_stderr
from .pruning_result import RANDOM, PruningRobustness
from .sequence_scores import SequenceScores, over_draws, residual_rows, sequence_scores

MaskAt = Callable[[float], Bool[Tensor, " p"]]
"""The mask of a sparsity."""


class Curve(NamedTuple):
    """Of d rankings of one kind: one score, or several random ones."""

    delta: Float[Tensor, "d s"]
    rows: Float[Tensor, "d s g"]
    """What each sequence moves a difference by."""
    hits: Float[Tensor, "d s n"] | None
    kept: Float[Tensor, "d s b"]
    """Shares of blocks."""

    def estimate(self, along: Float[Tensor, " s"]) -> tuple[Tensor, Tensor, Estimate]:
        """A weighted sum along the curve: its value, its total error, and both kinds of it."""
        used = along != 0  # what is not finite elsewhere has no say
        return _estimated(self.delta[:, used] @ along[used], torch.einsum("dsg,s->dg", self.rows[:, used], along[used]))


def measured(
    loss: Loss, theta: Tensor, rankings: Sequence[MaskAt], sparsities: Sequence[float],
    whole: SequenceScores, blocks: Mapping[str, Sequence[slice]], known: list[SequenceScores],
) -> tuple[Curve, int]:  # fmt: skip
    """The losses of all masks and how many forward passes that took: one each, none where nothing is pruned.

    known: the scores of the model of which everything is pruned, which all rankings share; put there where it is made.
    """
    num = 0
    deltas, rows, hits, kept = [], [], [], []
    for mask_at in rankings:
        for sparsity in sparsities:
            mask = mask_at(sparsity)
            shares = [_share(mask, parts) for parts in blocks.values()]
            if bool(mask.all()):
                pruned = whole
            elif sparsity == 1 and known:
                pruned = known[0]
            else:
                pruned = sequence_scores(loss, theta * mask)
                num += 1
                known += [pruned] if sparsity == 1 else []
            change = pruned.sums - whole.sums
            deltas.append(change.sum() / whole.weights.sum())
            rows.append(residual_rows(change, whole.weights))
            hits.append(pruned.hits)
            kept.append(torch.tensor(shares, dtype=torch.float64))

    def stacked(each: list[Any]) -> Tensor:
        return torch.stack(each).unflatten(0, (len(rankings), len(sparsities)))

    return Curve(stacked(deltas), stacked(rows), None if whole.hits is None else stacked(hits), stacked(kept)), num


def curves_result(
    curves: Mapping[str, Curve], whole: SequenceScores, sparsities: Sequence[float], threshold: float, **settings: Any
) -> PruningRobustness:
    """The result of measured curves, the random one last."""
    each = list(curves.values())
    size = len(sparsities)
    points = [[curve.estimate(_one(k, size)) for k in range(size)] for curve in each]
    delta, error = (torch.stack([torch.stack([point[i] for point in row]) for row in points]) for i in (0, 1))  # type: ignore[misc]
    areas = [curve.estimate(_trapezoid(sparsities)) for curve in each]
    critical = [_critical(curve, sparsities, threshold) for curve in each]
    accuracy, accuracy_error = _accuracy(each, whole)
    random = [point[2] for point in points[-1]]
    area = areas[-1][2]
    assert isinstance(area, Crossed)
    return PruningRobustness(
        delta_loss=delta, delta_loss_stderr=error, loss=delta + whole.mean, accuracy=accuracy,
        accuracy_stderr=accuracy_error, area=torch.stack([x[0] for x in areas]),
        area_stderr=torch.stack([x[1] for x in areas]), critical_sparsity=torch.tensor([x[0] for x in critical]).double(),
        critical_sparsity_stderr=torch.tensor([x[1] for x in critical]).double(),
        random_stderr_draws=torch.stack([x.stderr for x in random]),
        random_stderr_data=torch.stack([x.stderr_data for x in random]),  # type: ignore[attr-defined]
        random_area=area, density=torch.stack([curve.kept.mean(0) for curve in each]), baseline_loss=whole.mean,
        scores=list(curves), sparsities=list(map(float, sparsities)), threshold=float(threshold),
        num_random=len(curves[RANDOM].delta), num_sequences=int((whole.weights != 0).sum()), **settings,
    )  # fmt: skip


def _estimated(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Estimate]:
    """Of one ranking the error is over sequences; of several, over these too, as `Crossed` has it; of one draw, as there."""
    crossed = over_draws(values, rows)
    total = crossed.stderr_total if len(values) > 1 else crossed.stderr_data
    return crossed.value, total, crossed


def _critical(curve: Curve, sparsities: Sequence[float], threshold: float) -> tuple[float, float]:
    """The first crossing from below, interpolated, and its error: that of the curve there, over the slope."""
    mean = curve.delta.mean(0)
    for k in range(len(mean) - 1):
        low, high = float(mean[k]), float(mean[k + 1])
        if not (math.isfinite(low) and math.isfinite(high)) or low >= threshold:
            break
        if high >= threshold:
            share, width = (threshold - low) / (high - low), sparsities[k + 1] - sparsities[k]
            there = (1 - share) * _one(k, len(mean)) + share * _one(k + 1, len(mean))
            return sparsities[k] + share * width, float(curve.estimate(there)[1]) * width / (high - low)
    return math.nan, math.nan


def _accuracy(curves: Sequence[Curve], whole: SequenceScores) -> tuple[Tensor | None, Tensor | None]:
    """Shares of the labels, with errors as those of the losses."""
    if whole.hits is None:
        return None, None
    values, errors = [], []
    for curve in curves:
        assert curve.hits is not None
        if len(curve.hits) == 1:
            values.append(curve.hits[0].sum(-1) / whole.weights.sum())
            errors.append(ratio_stderr(curve.hits[0], whole.weights))
            continue
        rows = residual_rows(curve.hits, whole.weights)
        shares = curve.hits.sum(-1) / whole.weights.sum()
        made = [_estimated(shares[:, k], rows[:, k]) for k in range(shares.shape[1])]
        values.append(torch.stack([x[0] for x in made]))
        errors.append(torch.stack([x[1] for x in made]))
    return torch.stack(values), torch.stack(errors)


def _trapezoid(sparsities: Sequence[float]) -> Tensor:
    """Weights that make the mean over the range of sparsities of what is piecewise linear."""
    s = torch.tensor(sparsities, dtype=torch.float64)
    steps = s.diff()
    weights = torch.zeros_like(s)
    weights[1:] += steps / 2
    weights[:-1] += steps / 2
    return weights / (s[-1] - s[0])


def _one(k: int, size: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(k), size).double()


def _share(mask: Tensor, parts: Sequence[slice]) -> float:
    return sum(int(mask[part].sum()) for part in parts) / sum(part.stop - part.start for part in parts)
