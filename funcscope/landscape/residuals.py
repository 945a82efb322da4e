"""What single sequences, or groups of them, add to losses along directions beside their means."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.pack import storable

MOST = 2**22
"""Numbers that are stored per side, over directions and sequences: beyond, sequences are summed in groups."""


@storable
class Residuals(NamedTuple):
    r"""What each sequence (or group of them) adds beside the mean: $(s_{ds} - L_d w_{ds}) / W_d$; rows add up to 0.

    For directions by sequences, `negative` where both sides were evaluated. Linear: those of a loss change, of a second
    difference or of a mean over directions are the same combination of these.
    """

    centre: Float[Tensor, " g"]
    positive: Float[Tensor, "n g"]
    negative: Float[Tensor, "n g"] | None
    curvature: Float[Tensor, "m g"] | None = None
    """Of exact curvatures, along the first m directions; nan where those of a direction are not known."""
    num: int = 0
    """Sequences that score something; their groups are the columns."""

    def of(self, quantity: str, step: float) -> Float[Tensor, "n g"] | None:
        """The same of a quantity that is linear in the losses; None where it needs a side that was not evaluated."""
        one, two = 1 / (2 * step), 1 / step**2
        positive, negative, centre = {
            "loss": (1, 0, 0), "delta": (1, 0, -1), "negative": (0, 1, 0), "delta_negative": (0, 1, -1),
            "delta_two_sided": (0.5, 0.5, -1), "dir_grad": (one, -one, 0), "curvature": (two, two, -2 * two),
        }[quantity]  # fmt: skip
        rows = positive * self.positive + centre * self.centre
        if negative == 0:
            return rows
        return None if self.negative is None else rows + negative * self.negative

    @property
    def exact(self) -> Float[Tensor, "n g"] | None:
        """Of exact curvatures; nan along the directions whose sequences are not known, None where none is."""
        known = self.curvature
        if known is None or not known.isfinite().all(1).any():
            return None
        return torch.cat([known, known.new_full((len(self.positive) - len(known), known.shape[1]), math.nan)])


def num_groups(num_sequences: int, num_directions: int) -> int:
    """As many groups as sequences where there is room for them, 64 at the least."""
    return min(num_sequences, max(64, MOST // num_directions))


def residuals(
    terms: Float[Tensor, "*d 2 n"], scored: Tensor, groups: int
) -> tuple[Float[Tensor, " *d"], Float[Tensor, "*d g"]]:
    """The loss, and what each group of sequences adds beside it, from sums and weights per sequence.

    scored: the places of the sequences that score something.
    """
    sums, weights = terms.unbind(-2)
    total = weights.sum(-1)
    value = sums.sum(-1) / total
    beside = ((sums - value[..., None] * weights) / total[..., None])[..., scored]
    return value, in_groups(beside, groups)


def in_groups(x: Float[Tensor, "*d n"], groups: int) -> Float[Tensor, "*d g"]:
    """Sums over the sequences of each group: sequence i is of group i modulo `groups`."""
    more = -x.shape[-1] % groups
    return torch.nn.functional.pad(x, (0, more)).unflatten(-1, (-1, groups)).sum(-2)
