"""Whether scores of training samples foretell what training without them does: the linear datamodeling score."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from torch import Tensor

from ..core.checks import check_count, check_number
from ..core.estimate import Estimate
from ..core.keys import Key, check_key, fold_in, uniform
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted


class DatamodelingScore(Result):
    """How well sums of scores rank the losses of retrained models; made by `linear_datamodeling_score`."""

    correlations: Float[Tensor, " m"] = quantity("rank correlation over subsets", per="other sample")
    low: float = quantity("lower end of the interval of the mean")
    high: float = quantity("upper end of the interval of the mean")
    ceilings: Float[Tensor, " m"] | None = quantity("ceiling of the rank correlation", per="other sample")
    """What the randomness of the training leaves of a perfect prediction."""
    level: float
    num_subsets: int = internal()
    num_repeats: int
    key: Key

    @derived("linear datamodeling score")
    def score(self) -> Estimate:
        """Over test samples whose correlation is defined; the error is over them, the subsets being as they are."""
        return Estimate.of(self.correlations[self.correlations.isfinite()])

    @derived("mean ceiling")
    def ceiling(self) -> Estimate | None:
        return None if self.ceilings is None else Estimate.of(self.ceilings[self.ceilings.isfinite()])

    @property
    def head(self) -> str:
        return (
            f"linear datamodeling score of {counted(len(self.correlations), 'test sample')} over "
            f"{counted(self.num_subsets, 'retrained subset')}"
        )

    @property
    def notes(self) -> list[str]:
        bad = int((~self.correlations.isfinite()).sum())
        text = "have no correlation, as their scores or their losses do not vary, and are left out"
        return [f"{bad} of {counted(len(self.correlations), 'test sample')} {text}."] if bad else []


def linear_datamodeling_score(
    scores: Float[Tensor, "n m"],
    subsets: Tensor,
    retrained_losses: Float[Tensor, "..."],
    *,
    key: Key,
    num: int = 1000,
    level: float = 0.95,
) -> DatamodelingScore:
    r"""How well scores of training samples foretell the losses of models that are trained on subsets of them.

    $$\mathrm{LDS} = \frac1m \sum_{z'} \rho\Big(\big(\textstyle\sum_{z \in S_j} s_{z z'}\big)_j, \big(\ell_{z'}(\theta(S_j))
      \big)_j\Big),$$

    $\rho$ Spearman's rank correlation over random subsets $S_j$ (`half_subsets`), $\theta(S_j)$ retrained on $S_j$ alone.

    scores: what a training sample adds to the loss of a test sample: `influence(...).values`, and the negative of TracIn,
    whose proponents are positive. A factor, or a constant per test sample where all subsets are of one size, changes
    nothing. subsets: True for the samples that are in. retrained_losses: of every subset and test sample; with a first axis
    of r trainings that differ in their randomness alone, their mean is taken, and the ceiling is known:
    $\sqrt{\tfrac{r\bar\rho}{1 + (r - 1)\bar\rho}}$, with $\bar\rho$ the mean correlation of two repeats (Spearman, Brown):
    the correlation of the mean with what it is the mean of, exact for Pearson's and taken over to ranks.

    Shapes: scores (n, m), subsets (s, n), losses (s, m) or (r, s, m). Errors: over test samples, of the mean; `low` and
    `high` are percentiles of `num` bootstrap means over test samples. The subsets are as they are: each correlation has an
    error of about $1/\sqrt{s - 1}$ of its own, which test samples share in part. A sample without spread has nan.

    Raises ValueError for shapes that do not fit, fewer than three subsets, and numbers that are not finite.

    Ilyas et al. (2022), arXiv:2202.00622; Park et al. (2023), arXiv:2303.14186.

    >>> import funcscope as fs
    >>> scores, subsets = torch.tensor([[1.0], [2.0], [4.0]]), torch.eye(3, dtype=torch.bool)
    >>> float(linear_datamodeling_score(scores, subsets, torch.tensor([[1.0], [3.0], [2.0]]), key=fs.key(0)).score.value)
    0.5
    """
    check_key(key)
    check_count("num", num)
    check_number("level", level, 0.0, 1.0)
    repeats = retrained_losses[None] if retrained_losses.ndim == 2 else retrained_losses
    _check_shapes(scores, subsets, repeats)
    predicted = subsets.double() @ scores.double()
    found = _rank_correlations(predicted, repeats.double().mean(0))
    ceilings = _ceilings(repeats.double()) if len(repeats) > 1 else None
    low, high = _interval(found[found.isfinite()], key, num, level)
    return DatamodelingScore(found, low, high, ceilings, level, len(subsets), len(repeats), key)


def half_subsets(num_samples: int, *, key: Key, num: int, share: float = 0.5) -> Bool[Tensor, "s n"]:
    """`num` random subsets of `share` of the samples, all of one size, rounded down.

    >>> import funcscope as fs
    >>> half_subsets(5, key=fs.key(0), num=3).sum(1).tolist()
    [2, 2, 2]
    """
    check_count("num_samples", num_samples, 2)
    check_count("num", num)
    check_number("share", share, 0.0, 1.0)
    like = torch.zeros(num_samples, dtype=torch.float64)
    orders = torch.stack([uniform(fold_in(key, i), like).argsort() for i in range(num)])
    chosen = torch.zeros(num, num_samples, dtype=torch.bool)
    return chosen.scatter(1, orders[:, : int(share * num_samples)], True)


def _check_shapes(scores: Tensor, subsets: Tensor, repeats: Tensor) -> None:
    if scores.ndim != 2 or subsets.ndim != 2 or subsets.shape[1] != len(scores) or subsets.dtype != torch.bool:
        raise ValueError(
            f"`subsets` must be True or False for each of the {len(scores)} rows of `scores`, of shape "
            f"(s, {len(scores)}), got {tuple(subsets.shape)} of {subsets.dtype}."
        )
    expected = (len(subsets), scores.shape[1])
    if repeats.ndim != 3 or tuple(repeats.shape[1:]) != expected:
        raise ValueError(
            f"`retrained_losses` must have shape {expected}, one per subset and test sample, or one more axis of repeats in "
            f"front, got {tuple(repeats.shape)}."
        )
    if len(subsets) < 3:
        raise ValueError(f"`subsets` must be three or more, got {len(subsets)}: a rank correlation of two is 1 or -1.")
    for name, x in (("scores", scores), ("retrained_losses", repeats)):
        if not bool(x.isfinite().all()):
            raise ValueError(f"`{name}` must be finite: leave out test samples whose numbers are not.")


def _rank_correlations(x: Float[Tensor, "s m"], y: Float[Tensor, "s m"]) -> Float[Tensor, " m"]:
    """Spearman's, column by column, equal values sharing their mean rank; nan where one of the two does not vary."""
    one, two = (torch.from_numpy(np.asarray(rankdata(side.cpu().numpy(), axis=0), dtype=np.float64)) for side in (x, y))
    one, two = one - one.mean(0), two - two.mean(0)
    both = one.square().sum(0) * two.square().sum(0)
    return torch.where(both > 0, (one * two).sum(0) / both.sqrt(), math.nan)


def _ceilings(repeats: Float[Tensor, "r s m"]) -> Float[Tensor, " m"]:
    num = len(repeats)
    pairs = [_rank_correlations(repeats[i], repeats[j]) for i in range(num) for j in range(i)]
    mean = torch.stack(pairs).mean(0).clamp(min=0)
    return (num * mean / (1 + (num - 1) * mean)).sqrt()


def _interval(x: Float[Tensor, " m"], key: Key, num: int, level: float) -> tuple[float, float]:
    """Percentiles of means of resamples; nan below two."""
    if len(x) < 2:
        return math.nan, math.nan
    draws = uniform(key, torch.zeros(num, len(x), dtype=torch.float64))
    means = x[(draws * len(x)).long().clamp_max(len(x) - 1)].mean(1)
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=means.dtype)).tolist()
    return low, high
