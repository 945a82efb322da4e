"""Whether predictions are right as often as they say: calibration error, reliability by confidence, Brier score."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_count
from ..core.keys import Key, check_key, normal
from ..core.result import Result, quantity
from ..core.softmax import Labels
from ..core.tables import counted
from .calibration_sums import (
    BINS,
    SCORES,
    CalibrationSums,
    calibration_sums,
    confidence_of,
    equal_mass_edges,
    equal_width_edges,
)
from .sequence_sums import SequenceSums


class Calibration(Result):
    """Calibration error, its null value, and the reliability table: what `calibration` measured."""

    ece: float = quantity("expected calibration error", stderr="ece_stderr")
    ece_stderr: float
    ece_null: float = quantity("the same of a calibrated model", stderr="ece_null_stderr")
    """Mean over draws of a model that is right as often as it says, at these confidences: the bias of `ece` at this n."""
    ece_null_stderr: float
    """Of that mean, over draws."""
    ece_null_95: float = quantity("95 % point of a calibrated model")
    p_value: float = quantity("p value of calibration")
    squared_error: float = quantity("debiased mean squared calibration error")
    """Without the part that sampling adds; below 0 by chance where calibration is as good as these data can tell."""
    overconfidence: float = quantity("confidence less accuracy", stderr="overconfidence_stderr")
    overconfidence_stderr: float
    accuracy: float = quantity("accuracy", stderr="accuracy_stderr")
    accuracy_stderr: float
    brier: float = quantity("Brier score", stderr="brier_stderr")
    brier_stderr: float
    nll: float = quantity("negative log-likelihood", unit="nats", stderr="nll_stderr")
    nll_stderr: float
    bin_confidence: Float[Tensor, " k"] = quantity("confidence", per="bin")
    bin_accuracy: Float[Tensor, " k"] = quantity("accuracy", per="bin", stderr="bin_accuracy_stderr")
    bin_accuracy_stderr: Float[Tensor, " k"]
    bin_low: Float[Tensor, " k"] = quantity("accuracy, lower end of the 95 % interval", per="bin")
    bin_high: Float[Tensor, " k"] = quantity("accuracy, upper end of the 95 % interval", per="bin")
    bin_weight: Float[Tensor, " k"] = quantity("scored positions", per="bin")
    edges: Float[Tensor, " m"]
    num_alone: int
    """Bins with positions of one sequence only."""
    num_sequences: int
    num: int
    """Draws of a calibrated model."""
    key: Key

    @property
    def coords(self) -> dict[str, list[str]]:
        ends = [f"{x:.4g}" for x in self.edges.tolist()]
        return {"bin": [f"{a} to {b}" for a, b in pairwise(ends)]}

    @property
    def head(self) -> str:
        return f"calibration over {counted(self.num_sequences, 'sequence')}"

    @property
    def notes(self) -> list[str]:
        made = ["A calibrated model has an expected calibration error above 0 at any n: compare it with `ece_null`."]
        if math.isnan(self.nll):
            made.append("scores are nan: logits of a scored position are not numbers, or none is scored.")
        if math.isinf(self.nll):
            made.append("the likelihood is infinite: a label has probability 0, and no standard error is known.")
        if self.num_alone and self.num_sequences > 1:
            made.append(
                f"{counted(self.num_alone, 'bin')} with positions of one sequence alone: no standard error of accuracy. "
                "`squared_error`, which takes off what sampling adds, is not known, either. Fewer `bins` have more sequences."
            )
        if empty := int((self.bin_weight == 0).sum()):
            made.append(f"{counted(empty, 'bin')} without a position: no accuracy there.")
        if self.num_sequences == 1:
            made.append("a single sequence has no standard error.")
        return made


def calibration(sums: CalibrationSums, *, key: Key, num: int = 1000) -> Calibration:
    r"""How far confidence is from accuracy: expected calibration error over bins of confidence, with its null value.

    With $c$ the largest probability, right or wrong $a$, weights w, bins b of c, $W_b$ their weights and W the sum of these,

    $$\mathrm{ECE} = \sum_b \tfrac{W_b}{W} |\bar a_b - \bar c_b|, \qquad
      \mathrm{Brier} = \overline{\textstyle\sum_v (p_v - [v = y])^2}.$$

    Errors are over sequences; that of ECE to first order, with the sign of each bin as it is: of a model that is nearly
    calibrated, whose signs are chance, it is too large (1.7 times in a simulation with 400 positions). ECE is biased upward,
    the more the fewer positions a bin has: `ece_null` is its mean for a calibrated model with the same confidences, by `num`
    draws of normal deviations of variance $\sum w^2 c (1 - c)$ in each bin. These are the exact variances of a causal model's
    successive predictions, too: if it is calibrated given the text so far, deviations are uncorrelated. `p_value` is the
    share of draws that are as large. `squared_error` is $\sum_b \frac{W_b}{W} [(\bar a_b - \bar c_b)^2 - \mathrm{SE}_b^2]$:
    the bias is taken off; nan where a bin has positions of one sequence only. Within a bin over- and underconfidence cancel:
    ECE is a lower bound of the error.

    The interval of a bin's accuracy is Wilson's for as many independent positions as have its standard error, at most
    those there are; as many as there are sequences where all answers are alike, which have no standard error. Nor have the
    null values and `squared_error`: they are what the data are compared with.

    sums: of `calibration_sums`, merged over batches.

    Naeini, Cooper, Hauskrecht (2015), doi:10.1609/aaai.v29i1.9602; Guo et al. (2017), arXiv:1706.04599; the bias: Kumar,
    Liang, Ma (2019), arXiv:1909.10155; Brier (1950), doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2.

    >>> import torch, funcscope as fs
    >>> sure = torch.tensor([[[0.0, 9.0]], [[0.0, 9.0]]])                              # says 1 twice, and is right once
    >>> targets = Labels(torch.tensor([[1], [0]]), torch.ones(2, 1))
    >>> found = calibration(calibration_sums(sure, targets, equal_width_edges(10)), key=fs.key(0))
    >>> round(found.ece, 4), found.accuracy, found.bin_weight.tolist()[-1]
    (0.4999, 0.5, 2.0)
    """
    check_key(key)
    check_count("num", num, 2)
    bins, total = len(sums.edges) - 1, sums.sums.totals
    scores, per_bin = total[: len(SCORES)], total[len(SCORES) :].view(3, bins)
    gaps = per_bin[1] - per_bin[2]
    fields = _scalars(sums.sums, gaps)
    null = (normal(key, gaps.new_zeros(num, bins)) * sums.variance.sqrt()).abs().sum(1) / scores[0]
    known = not math.isnan(fields["ece"])
    table, gap_stderr = _table(sums.sums, bins)
    squares = (gaps / per_bin[0]).square() - gap_stderr.square()
    share = per_bin[0] / scores[0]
    return Calibration(
        **fields,
        ece_null=float(null.mean()),
        ece_null_stderr=float(null.std()) / num**0.5,
        ece_null_95=float(null.quantile(0.95)),
        p_value=(1 + int((null >= fields["ece"]).sum())) / (1 + num) if known else math.nan,
        squared_error=float((share * squares)[per_bin[0] != 0].sum()) if known else math.nan,
        **table,
        edges=sums.edges,
        num_alone=int((sums.sums.counts[len(SCORES) : len(SCORES) + bins] == 1).sum()),
        num_sequences=int(sums.sums.counts[0]),
        num=num,
        key=key,
    )


def expected_calibration_error(
    logits: Float[Tensor, "*b V"],
    targets: Labels,
    *,
    key: Key,
    bins: int = BINS,
    kind: Literal["equal_mass", "equal_width"] = "equal_mass",
    num: int = 1000,
) -> Calibration:
    """`calibration` of logits that are all in memory, with bins by their own confidences or of equal width.

    >>> import torch, funcscope as fs
    >>> inputs, targets = fs.causal_lm.prepare(torch.tensor([[3, 1, 2], [2, 0, 1]]))      # labels are shifted here
    >>> logits = fs.normal(fs.key(0), torch.zeros(2, 3, 4))
    >>> expected_calibration_error(logits, targets, key=fs.key(1), bins=2).num_sequences
    2
    """
    check_choice("kind", kind, ("equal_mass", "equal_width"))
    mass = kind == "equal_mass"
    edges = equal_mass_edges(confidence_of(logits, targets), bins) if mass else equal_width_edges(bins)
    return calibration(calibration_sums(logits, targets, edges), key=key, num=num)


def _scalars(sums: SequenceSums, gaps: Float[Tensor, " k"]) -> dict[str, Any]:
    bins, rest = len(gaps), len(SCORES)
    mix = torch.zeros(5, len(sums.totals), dtype=torch.float64)
    sign = torch.where(gaps.isnan(), gaps, gaps.sign())  # `sign` has none for nan
    mix[0, rest + bins : rest + 2 * bins], mix[0, rest + 2 * bins :] = sign, -sign
    mix[1, 1], mix[1, 2] = -1.0, 1.0
    mix[2, 1], mix[3, 3], mix[4, 4] = 1.0, 1.0, 1.0
    values, errors = sums.ratios(mix, 0)
    names = ("ece", "overconfidence", "accuracy", "brier", "nll")
    pairs = zip(names, values.tolist(), errors.tolist(), strict=True)
    return {key: x for name, value, error in pairs for key, x in ((name, value), (f"{name}_stderr", error))}


def _table(sums: SequenceSums, bins: int) -> tuple[dict[str, Any], Float[Tensor, " k"]]:
    """Fields per bin, and the standard errors of accuracy less confidence."""
    made, first = [], len(SCORES)
    for b in range(bins):
        mix = torch.zeros(3, len(sums.totals), dtype=torch.float64)
        mix[0, first + bins + b] = mix[1, first + 2 * bins + b] = 1.0
        mix[2] = mix[0] - mix[1]
        made.append(torch.cat(sums.ratios(mix, first + b)))
    accuracy, confidence, _, stderr, _, gap_stderr = torch.stack(made).T
    weight, sequences = sums.totals[first : first + bins], sums.counts[first : first + bins]
    low, high = _wilson(accuracy, stderr, weight, sequences)
    return {
        "bin_confidence": confidence, "bin_accuracy": accuracy,
        "bin_accuracy_stderr": torch.where(accuracy * (1 - accuracy) > 1e-9, stderr, math.nan),
        "bin_low": low, "bin_high": high, "bin_weight": weight,
    }, gap_stderr  # fmt: skip


def _wilson(p: Tensor, stderr: Tensor, weight: Tensor, sequences: Tensor, z: float = 1.959964) -> tuple[Tensor, Tensor]:
    """Wilson (1927), doi:10.1080/01621459.1927.10502953."""
    alone = p * (1 - p)
    num = torch.where(alone > 1e-9, torch.minimum(alone / stderr.square(), weight).clamp_min(1), sequences.to(weight))
    centre = (p + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z / (1 + z**2 / num) * (p * (1 - p) / num + z**2 / (4 * num**2)).clamp_min(0).sqrt()
    return (centre - half).clamp(0, 1), (centre + half).clamp(0, 1)
