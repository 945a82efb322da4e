"""Whether predictions are right as often as they say: calibration error, reliability by confidence, Brier score."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_count
from ..core.estimate import wide
from ..core.keys import Key, check_key, normal
from ..core.result import Result, quantity
from ..core.softmax import Labels, check_classes
from ..core.tables import counted
from .sequence_sums import SequenceSums

SCORES = ("weight", "correct", "confidence", "brier", "nll")
BINS = 15


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
    num_sequences: int
    num: int
    """Draws of a calibrated model."""
    key: Key

    @property
    def coords(self) -> dict[str, list[str]]:
        ends = [f"{x:.4g}" for x in self.edges.tolist()]
        return {"bin": [f"{a} to {b}" for a, b in zip(ends, ends[1:], strict=False)]}

    @property
    def head(self) -> str:
        return f"calibration over {counted(self.num_sequences, 'sequence')}"

    @property
    def notes(self) -> list[str]:
        made = ["A calibrated model has an expected calibration error above 0 at any n: compare it with `ece_null`."]
        if math.isnan(self.nll):
            made.append("scores are nan: logits of a scored position are not numbers, or none is scored.")
        if empty := int((self.bin_weight == 0).sum()):
            made.append(f"{counted(empty, 'bin')} without a position: no accuracy there.")
        if self.num_sequences == 1:
            made.append("a single sequence has no standard error.")
        return made


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


def calibration(sums: CalibrationSums, *, key: Key, num: int = 1000) -> Calibration:
    r"""How far confidence is from accuracy: expected calibration error over bins of confidence, with its null value.

    With $c$ the largest probability, right or wrong $a$, weights w, bins b of c, $W_b$ their weights and W the sum of these,

    $$\mathrm{ECE} = \sum_b \tfrac{W_b}{W} |\bar a_b - \bar c_b|, \qquad
      \mathrm{Brier} = \overline{\textstyle\sum_v (p_v - [v = y])^2}.$$

    Errors are over sequences; that of ECE to first order, with the sign of each bin as it is. ECE is biased upward, the more
    the fewer positions a bin has: `ece_null` is its mean for a calibrated model with the same confidences, by `num` draws
    of normal deviations of variance $\sum w^2 c (1 - c)$ in each bin. These are the exact variances of a causal model's
    successive predictions, too: if it is calibrated given the text so far, deviations are uncorrelated. `p_value` is the share
    of draws that are as large. `squared_error` is $\sum_b \frac{W_b}{W} [(\bar a_b - \bar c_b)^2 - \mathrm{SE}_b^2]$, from
    which the bias is taken off. Within a bin over- and underconfidence cancel: ECE is a lower bound of the error.

    The interval of a bin's accuracy is Wilson's for as many independent positions as have its standard error, at most
    those there are; as many as there are sequences where all answers are alike.

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


def _scores(logits: Float[Tensor, "n V"], label: Tensor) -> Float[Tensor, "scores n"]:
    log_p = logits.log_softmax(-1)
    chosen = log_p.gather(-1, label[:, None])[:, 0]
    confidence, best = log_p.max(-1)
    p = log_p.exp()
    brier = p.square().sum(-1) - 2 * chosen.exp() + 1
    return torch.stack([torch.ones_like(chosen), (best == label).to(chosen), confidence.exp(), brier, -chosen])


def _scalars(sums: SequenceSums, gaps: Float[Tensor, " k"]) -> dict[str, float]:
    bins, rest = len(gaps), len(SCORES)
    mix = torch.zeros(5, len(sums.totals), dtype=torch.float64)
    mix[0, rest + bins : rest + 2 * bins], mix[0, rest + 2 * bins :] = gaps.sign(), -gaps.sign()
    mix[1, 1], mix[1, 2] = -1.0, 1.0
    mix[2, 1], mix[3, 3], mix[4, 4] = 1.0, 1.0, 1.0
    values, errors = sums.ratios(mix, 0)
    names = ("ece", "overconfidence", "accuracy", "brier", "nll")
    pairs = zip(names, values.tolist(), errors.tolist(), strict=True)
    return {key: x for name, value, error in pairs for key, x in ((name, value), (f"{name}_stderr", error))}


def _table(sums: SequenceSums, bins: int) -> tuple[dict[str, Tensor], Float[Tensor, " k"]]:
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
        "bin_confidence": confidence, "bin_accuracy": accuracy, "bin_accuracy_stderr": stderr,
        "bin_low": low, "bin_high": high, "bin_weight": weight,
    }, gap_stderr  # fmt: skip


def _wilson(p: Tensor, stderr: Tensor, weight: Tensor, sequences: Tensor, z: float = 1.959964) -> tuple[Tensor, Tensor]:
    """Wilson (1927), doi:10.1080/01621459.1927.10502953."""
    num = torch.where(stderr > 0, torch.minimum(p * (1 - p) / stderr.square(), weight), sequences.to(weight))
    centre = (p + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z / (1 + z**2 / num) * (p * (1 - p) / num + z**2 / (4 * num**2)).clamp_min(0).sqrt()
    return (centre - half).clamp(0, 1), (centre + half).clamp(0, 1)


def _scored(logits: Tensor, targets: Labels) -> Tensor:
    if logits.ndim not in (2, 3) or targets.index.shape != logits.shape[:-1] or targets.weight.shape != logits.shape[:-1]:
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
