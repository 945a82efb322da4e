"""How uncertain labels and outputs are: entropies in nats, with errors over sequences."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.checks import check_choice, check_count
from ..core.estimate import wide
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from .groups import Grouping, Groups, check_labels, grouping, with_second_order
from .sequence_sums import SequenceSums

Correction = Literal["miller-madow", "plug-in"]


class Entropy(Result):
    """An entropy, and the number of equally likely outcomes that would have it."""

    entropy: Float[Tensor, ""] = quantity("entropy", unit="nats", stderr="stderr")
    stderr: Float[Tensor, ""]
    num: int
    """Rows, or positions."""
    num_groups: int
    """Sequences."""
    estimator: str
    reason: str = internal(default="")
    """Why a number is nan, or not to be believed."""

    @derived("perplexity", stderr="perplexity_stderr")
    def perplexity(self) -> Float[Tensor, ""]:
        """exp of the entropy."""
        return self.entropy.exp()

    @property
    def perplexity_stderr(self) -> Float[Tensor, ""]:
        """To first order."""
        return self.perplexity * self.stderr

    @property
    def head(self) -> str:
        return f"{self.estimator} entropy of {counted(self.num, 'row')} of {counted(self.num_groups, 'sequence')}"

    @property
    def notes(self) -> list[str]:
        return [self.reason] if self.reason else []


class Occupancy(NamedTuple):
    """How often each label that occurs does, and what its entropy is made of; made by `occupancy`."""

    surprisal: Float[Tensor, " n"]
    """Of each row, $-\\log \\hat p$ of its label."""
    num_labels: int
    missing: Float[Tensor, ""]
    """What the plug-in entropy misses, to first order."""


def discrete_entropy(
    labels: Int[Tensor, " n"], *, groups: Groups | None = None, correction: Correction = "miller-madow"
) -> Entropy:
    r"""Entropy of the distribution that labels are drawn from, in nats.

    $$\hat H = -\sum_k \hat p_k \log \hat p_k + \tfrac12 \sum_k \frac{\widehat{\mathrm{Var}}(\hat p_k)}{\hat p_k}, \qquad
      \widehat{\mathrm{Var}}(\hat p_k) = \frac{1}{N^2} \sum_g (n_{gk} - n_g \hat p_k)^2,$$

    with $n_{gk}$ the rows of sequence g that have label k. The plug-in entropy alone is too low; the second term is that bias
    to first order. For rows that are sequences of their own it is Miller and Madow's $(K - 1) / 2N$, with K the labels that
    occur (proofs/miller_madow.py); copies of rows within a sequence change neither the value nor its error. It is not
    enough where most labels have been seen once: N must be several times K. The error is linearised, over sequences: that of
    the mean of $-\log \hat p$, and at least $\sqrt{2 / (K - 1)}$ of the second term, which is what is left of it where all
    labels are equally likely.

    groups: the sequence of each row. correction: "plug-in" leaves the second term out.

    Raises ValueError for labels that are not whole numbers, one per row.

    Miller (1955), Note on the bias of information estimates.

    >>> print(discrete_entropy(torch.arange(16) % 2))                                           # log 2 + 1 / 32
    miller-madow entropy of 16 rows of 16 sequences
    <BLANKLINE>
    ----------  -------------
    entropy     0.724 ± 0.044
    perplexity  2.063 ± 0.091
    ----------  -------------
    """
    check_labels("labels", labels)
    check_choice("correction", correction, ("miller-madow", "plug-in"))
    rows = grouping(groups, len(labels), labels.device)
    seen = occupancy(labels, rows)
    reason = one_sequence(rows.num) or _seen_too_rarely(len(labels), seen.num_labels)
    value = seen.surprisal.mean() + (seen.missing if correction == "miller-madow" else 0.0)
    stderr = with_second_order(rows.mean_stderr(seen.surprisal), seen.missing, seen.num_labels - 1)
    return Entropy(value, stderr, len(labels), rows.num, correction, reason)


def entropy_of_counts(counts: Int[Tensor, " k"], *, correction: Correction = "miller-madow") -> Entropy:
    r"""As `discrete_entropy`, from how often each label was drawn, for independent draws.

    $$\hat H = -\sum_k \hat p_k \log \hat p_k + \frac{K - 1}{2N}, \qquad
      \mathrm{SE}^2 = \frac{1}{N - 1} \Big(\sum_k \hat p_k \log^2 \hat p_k - \big(\sum_k \hat p_k \log \hat p_k\big)^2\Big)$$

    (at least as `discrete_entropy` has it).

    Counts of tokens are not independent draws: give the labels with their groups there.

    Raises ValueError for counts that are negative, not whole, or all 0.

    >>> float(entropy_of_counts(torch.tensor([2, 2, 0]), correction="plug-in").perplexity)
    2.0
    """
    check_labels("counts", counts)
    check_choice("correction", correction, ("miller-madow", "plug-in"))
    num = int(counts.sum())
    if int(counts.min()) < 0 or not num:
        raise ValueError(f"`counts` must be at least 0, and not all of them 0, got {counts.tolist()[:10]}.")
    weights = counts[counts > 0].to(wide(counts.device))
    share = weights / num
    plain = torch.special.entr(share).sum()
    spread = (share * (share.log() + plain).square()).sum()
    stderr = (spread / (num - 1)).sqrt() if num > 1 else spread.new_tensor(math.nan)
    missing = (len(weights) - 1) / (2 * num)
    stderr = with_second_order(stderr, missing, len(weights) - 1)
    value = plain + (missing if correction == "miller-madow" else 0.0)
    reason = one_sequence(num) or _seen_too_rarely(num, len(weights))
    return Entropy(value, stderr, num, num, correction, reason)


def occupancy(labels: Int[Tensor, " n"], rows: Grouping) -> Occupancy:
    """Of labels of sequences; both entropy and mutual information are means over it."""
    total = wide(labels.device)
    _, label, counts = labels.unique(return_inverse=True, return_counts=True)
    num, share = len(labels), counts.to(total) / len(labels)
    cells, filled = (rows.sequence * len(counts) + label).unique(return_counts=True)
    sequence, of_label = cells // len(counts), cells % len(counts)
    filled, sizes = filled.to(total), rows.sizes.to(total)
    beside = filled.square() - 2 * filled * sizes[sequence] * share[of_label]
    squares = torch.zeros_like(share).index_add(0, of_label, beside) + share.square() * sizes.square().sum()
    return Occupancy(-share.log()[label], len(counts), (squares / share).sum() / (2 * num**2))


@torch.no_grad()
def entropy_sums(logits: Float[Tensor, "b t v"], mask: Bool[Tensor, "b t"], *, chunk: int = 256) -> SequenceSums:
    r"""Of each sequence of a batch, the summed entropy of the outputs at valid positions, in nats, and how many they are.

    $$-\sum_v p_v \log p_v, \qquad \log p = \mathrm{log\,softmax}(z),$$

    in at least float32 and in log space: a class of probability e^-20 counts with its 20 nats, which $\log \max(p,
    \epsilon)$ would cut. Logits of $-\infty$ are classes that cannot occur, and add 0. chunk: positions at a time.

    Raises ValueError for a mask that does not fit the logits.

    >>> entropy_sums(torch.zeros(1, 3, 4), torch.tensor([[True, True, False]])).totals          # 2 log 4, and 2
    tensor([2.7726, 2.0000], dtype=torch.float64)
    """
    check_count("chunk", chunk)
    if logits.ndim != 3 or mask.shape != logits.shape[:2]:
        raise ValueError(
            f"`mask` must say which positions of the logits are valid, shape {tuple(logits.shape[:2])}, got "
            f"{tuple(mask.shape)}."
        )
    total = wide(logits.device)
    sequence, position = mask.nonzero(as_tuple=True)
    parts = [
        _row_entropies(logits[b, t]).to(total)
        for b, t in zip(sequence.split(chunk), position.split(chunk), strict=True)
    ]
    values = torch.cat(parts) if parts else torch.zeros(0, dtype=total, device=logits.device)
    summed = torch.zeros(len(mask), dtype=total, device=logits.device).index_add(0, sequence, values)
    return SequenceSums.of(torch.stack([summed, mask.sum(1).to(total)]))


def output_entropy(sums: SequenceSums) -> Entropy:
    r"""Mean entropy of the outputs over valid positions, in nats, with its error over sequences.

    $$\bar H = \sum_s a_s \Big/ \sum_s n_s, \qquad
      \mathrm{SE}^2 = \tfrac{S}{S - 1} \textstyle\sum_s (a_s - \bar H n_s)^2 \big/ \big(\sum_s n_s\big)^2,$$

    with $a_s$ the summed entropies of sequence s and $n_s$ its valid positions: what `entropy_sums` makes of each batch,
    merged. It is how undecided the model is, not how uncertain the next token is: that takes a model which is calibrated.

    >>> made = output_entropy(entropy_sums(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)))
    >>> round(float(made.perplexity), 6)
    4.0
    """
    num, sequences = int(sums.totals[1]), int(sums.counts[1])
    (value,), (stderr,) = sums.ratios(torch.tensor([[1.0, 0.0]]), 1)
    reason = one_sequence(sequences) if num else "no position is valid: there is no output whose entropy this could be."
    if num and not bool(value.isfinite()):
        reason = "logits are not finite: their softmax is undefined."
    return Entropy(value, stderr, num, sequences, "output", reason)


def one_sequence(num: int) -> str:
    """Why there is no error, where there is none."""
    return "" if num > 1 else "one sequence alone gives no standard error."


def _seen_too_rarely(num: int, num_labels: int) -> str:
    """Below five of each, as in `mutual_information_discrete`."""
    seen = f"{counted(num_labels, 'label')} in {counted(num, 'row')}"
    text = f"{seen}: each must be seen five times, or the entropy is too low."
    return text if num_labels > 1 and num < 5 * num_labels else ""


def _row_entropies(logits: Float[Tensor, "m v"]) -> Float[Tensor, " m"]:
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -torch.where(log_p == -math.inf, 0.0, log_p.exp() * log_p).sum(-1)
