"""How far the predictions of two models, or of one model on two inputs, are from each other at the same positions."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.checks import check_count
from ..core.divergences import js_divergence, kl_divergence
from ..core.estimate import wide
from ..core.result import Result, quantity
from ..core.tables import counted
from .sequence_sums import SequenceSums

NAMES = ("kl", "kl_reverse", "js")


class OutputDivergence(Result):
    """Divergences of two predictive distributions at the same positions, means over scored positions."""

    kl: float = quantity("divergence of the second from the first", unit="nats", stderr="kl_stderr")
    kl_reverse: float = quantity("divergence of the first from the second", unit="nats", stderr="kl_reverse_stderr")
    js: float = quantity("Jensen-Shannon divergence", unit="nats", stderr="js_stderr")
    kl_stderr: float
    kl_reverse_stderr: float
    js_stderr: float
    num_positions: float
    """Sum of the weights."""
    num_sequences: int

    @property
    def head(self) -> str:
        return f"divergence of predictions over {counted(self.num_sequences, 'sequence')}"

    @property
    def notes(self) -> list[str]:
        made = []
        if math.isnan(self.js):
            made.append("divergences are nan: logits of a scored position are not numbers, or none is scored.")
        elif math.inf in (self.kl, self.kl_reverse):
            made.append("a divergence is infinite: one distribution gives probability 0 to what the other can say.")
        if self.num_sequences == 1:
            made.append("a single sequence has no standard error.")
        return made


@torch.no_grad()
def divergence_sums(
    first: Float[Tensor, "*b V"],
    second: Float[Tensor, "..."],
    weight: Bool[Tensor, "..."] | Float[Tensor, "..."],
    *,
    chunk: int = 64,
) -> SequenceSums:
    """Sums of a batch for `output_divergence`, to be merged with those of others.

    first, second: logits, position by position of the same text, or row by row of a classifier's same inputs. weight: a mask,
    or the weights of the criterion's targets (`Labels.weight`); what lies where it is 0 is not looked at. Each sequence must
    be whole in one batch. chunk: positions whose log-probabilities are in memory at a time, in float64.

    Raises ValueError where shapes do not fit: of other lengths, the positions are not the same.
    """
    check_count("chunk", chunk)
    if first.ndim not in (2, 3):
        raise ValueError(
            f"`first` must have the shape (sequence, position, token) or (row, class), got {tuple(first.shape)}."
        )
    if first.shape != second.shape:
        raise ValueError(
            f"`second` must be logits of the same positions and tokens as `first`, of shape {tuple(first.shape)}, got "
            f"{tuple(second.shape)}: divergences of unrelated positions say how unlike texts are."
        )
    if weight.shape != first.shape[:-1]:
        raise ValueError(f"`weight` must have the shape {tuple(first.shape[:-1])}, got {tuple(weight.shape)}.")
    columns = torch.zeros(len(NAMES) + 1, len(first), dtype=wide(first.device), device=first.device)
    for at in (weight != 0).nonzero().split(chunk):
        place = tuple(at.T)
        p, q = (each[place].to(columns).log_softmax(-1) for each in (first, second))
        numbers = torch.stack([kl_divergence(p, q), kl_divergence(q, p), js_divergence(p, q), torch.ones_like(p[:, 0])])
        columns.index_add_(1, place[0], numbers * weight[place].to(columns))
    return SequenceSums.of(columns)


def output_divergence(sums: SequenceSums) -> OutputDivergence:
    r"""How much two models' predictions differ on the same text, or one model's on two inputs of the same positions.

    $$\mathrm{KL} = \frac{\sum_{it} w_{it}\, \mathrm{KL}(p_{it} \| q_{it})}{\sum_{it} w_{it}}, \qquad
      \text{likewise } \mathrm{KL}(q \| p) \text{ and } \mathrm{JS},$$

    in nats per scored position, p of the first logits; errors over sequences (`SequenceSums`), for which these are taken as a
    random sample. What makes the two differ must be all that differs: position t of two unrelated prompts is no pair.

    sums: of `divergence_sums`, merged over batches. All in log space and float64: no floor under probabilities.

    >>> import torch
    >>> a, b = torch.tensor([[[0.0, 0.0]], [[0.0, 0.0]]]), torch.tensor([[[0.0, 0.0]], [[1.0, -1.0]]])
    >>> print(output_divergence(divergence_sums(a, b, torch.ones(2, 1))))
    divergence of predictions over 2 sequences
    <BLANKLINE>
    ----------  -------------
    kl          0.22 ± 0.22
    kl_reverse  0.16 ± 0.16
    js          0.045 ± 0.045
    ----------  -------------
    """
    means = sums.ratios(torch.eye(len(NAMES), len(NAMES) + 1), len(NAMES))
    values = dict(zip(NAMES, means.value.tolist(), strict=True))
    errors = {f"{name}_stderr": each for name, each in zip(NAMES, means.stderr.tolist(), strict=True)}
    return OutputDivergence(
        **values, **errors, num_positions=float(sums.totals[-1]), num_sequences=int(sums.counts[-1])
    )
