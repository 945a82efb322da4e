"""What a model makes of sequences that repeat themselves: what the first copy is worth, and which heads look where."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...core.estimate import Estimate, wide
from ...core.layout import Params
from ...core.model import Functional
from ...core.trace import trace


class Scores(NamedTuple):
    """Means over sequences, each with its error. Of heads, that of the largest mean, picked on the same sequences."""

    second_loss: Estimate
    """Nats per token of the second copy that can be known: all but its first."""
    gain: Estimate
    """The loss on the same tokens in the first copy, minus that: in nats, of what the context tells."""
    induction: Estimate
    """The head that most attends from a token to the one behind its earlier occurrence: mean of A[q, q - P + 1]."""
    previous: Estimate
    """The head of the first layer that most attends to the token before: mean of A[q, q - 1]."""


@torch.no_grad()
def scores(net: Functional, params: Params, tokens: Int[Tensor, "n t"], period: int) -> Scores:
    r"""Scores on sequences of one token that begins them and two copies of a block of P tokens, t = 1 + 2 P.

    A head that attends uniformly has the induction score $\tfrac1P \sum_{q=P+1}^{2P} \tfrac1{q+1} \approx \ln 2 / P$.

    Olsson et al. (2022), arXiv:2209.11895.
    """
    if tokens.shape[1] != 1 + 2 * period:
        raise ValueError(f"`tokens` must be of 1 + 2 * {period} positions, got {tokens.shape[1]}.")
    seen = trace(net, params, {"input_ids": tokens}, ["logits", "pattern"])
    chances = seen["logits"][:, :-1].to(wide(tokens.device)).log_softmax(-1)
    losses = -chances.gather(-1, tokens[:, 1:, None])[..., 0]  # of the tokens 1 to 2 P
    first, second = (losses[:, start + 1 : start + period].mean(1) for start in (0, period))
    pattern = seen["pattern"].to(chances.dtype)
    q = torch.arange(1, 1 + 2 * period)
    late = q[period:]
    return Scores(
        Estimate.of(second),
        Estimate.of(first - second),
        largest(pattern[..., late, late - period + 1].mean(-1)),
        largest(pattern[:1, ..., q, q - 1].mean(-1)),
    )


def largest(values: Float[Tensor, "l n h"]) -> Estimate:
    """Of the head with the largest mean over sequences."""
    layer, head = divmod(int(values.mean(1).argmax()), values.shape[2])
    return Estimate.of(values[layer, :, head])
