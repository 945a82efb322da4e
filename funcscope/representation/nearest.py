"""Nearest rows of other sequences, without duplicates, and errors of means over points that share neighbours."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.tables import counted
from .measures import Rows, centred, compact

LEAST = 20
"""Distinct rows: with fewer, a dimension is not resolved."""
ENTRIES = 2**22
"""Of arrays that are in memory at a time."""


class Cloud(NamedTuple):
    """Distinct points."""

    x: Rows
    sequence: Int[Tensor, " n"]
    within: bool
    """Whether neighbours may be of the same sequence."""
    num_duplicates: int
    """Rows that were left out, as an earlier one is the same."""


class Nearest(NamedTuple):
    distances: Float[Tensor, "n m"]
    """Ascending; infinite where there are no more points."""
    indices: Int[Tensor, "n m"]


def cloud(x: Rows, sequence: Int[Tensor, " n"], within: bool) -> Cloud:
    """The distinct rows, in at most as many dimensions as there are rows."""
    _, inverse = x.unique(dim=0, return_inverse=True)
    places = torch.arange(len(x), device=x.device)
    first = torch.full((int(inverse.max()) + 1,), len(x), device=x.device).scatter_reduce(0, inverse, places, "amin")
    keep = first.sort().values
    return Cloud(compact(centred(x[keep])), sequence[keep].unique(return_inverse=True)[1], within, len(x) - len(keep))


def nearest(points: Cloud, num: int) -> Nearest:
    """The nearest points of each: candidates by inner products, whose differences round; then by exact distances."""
    x, sequence = points.x, points.sequence
    norms, few, every = x.square().sum(1), min(num + 4, len(x)), torch.arange(len(x), device=x.device)
    distances, indices = [], []
    for part in every.split(max(1, ENTRIES // max(len(x), few * x.shape[1]))):
        apart = norms[part, None] + norms - 2 * x[part] @ x.T
        out = part[:, None] == every if points.within else sequence[part, None] == sequence
        found = apart.masked_fill(out, math.inf).topk(few, largest=False).indices
        exact = (x[found] - x[part, None]).norm(dim=2).masked_fill(out.gather(1, found), math.inf)
        ordered = exact.sort(1)
        short = (0, max(num - few, 0))
        distances.append(torch.nn.functional.pad(ordered.values[:, :num], short, value=math.inf))
        indices.append(torch.nn.functional.pad(found.gather(1, ordered.indices[:, :num]), short))
    return Nearest(torch.cat(distances), torch.cat(indices))


def overlap_stderr(moves: Float[Tensor, "n *m"], points: Cloud, near: Nearest, k: int) -> Float[Tensor, "*m"]:
    r"""Standard error over sequences of a statistic that point i moves by `moves` i, from its k nearest neighbours.

    Points that share neighbours are not independent, nor are those of a sequence. With $z_s$ the sum of the moves of sequence
    s and $c_{sj}$ how often point j is one of its points or their neighbours,

    $$\mathrm{SE}^2 = \frac{\sum_{st} w_{st} z_s z_t}{1 - \bar w}, \qquad
      w_{st} = \frac{\sum_j c_{sj} c_{tj}}{\sqrt{\sum_j c_{sj}^2 \sum_j c_{tj}^2}},$$

    the weights of what two sequences share, which make it no less than 0. The denominator is for the moves' own mean, which
    is taken off them. A jackknife is 1.6 to 1.8 times too large: who is left out changes the neighbours of others.

    nan for one sequence. Conley (1999), doi:10.1016/S0304-4076(98)00084-0, for errors under dependence by distance.
    """
    num, size = int(points.sequence.max()) + 1, len(points.x)
    if num < 2:
        return moves.new_full(moves.shape[1:], math.nan)
    places = torch.cat([torch.arange(size, device=moves.device)[:, None], near.indices[:, :k]], 1)
    pairs, counts = (points.sequence[:, None] * size + places).unique(return_counts=True)
    of, at, counts = pairs // size, pairs % size, counts.to(moves)
    weights = counts / counts.new_zeros(num).index_add(0, of, counts.square()).sqrt()[of]
    sums = moves.new_zeros(num, *moves.shape[1:]).index_add(0, points.sequence, moves - moves.mean(0))
    both = torch.cat([sums.reshape(num, -1), sums.new_ones(num, 1)], 1)
    shared = weights.new_zeros(size, both.shape[1]).index_add(0, at, weights[:, None] * both[of]).square().sum(0)
    rest = 1 - shared[-1] / num**2
    return (shared[:-1] / rest.where(rest > 1e-9, torch.nan)).sqrt().reshape(moves.shape[1:])


def dimension_notes(
    num_points: int | Float[Tensor, "*m"],
    num_rows: int,
    num_sequences: int,
    within: bool,
    dimension: Float[Tensor, "*m"],
) -> list[str]:
    """What a reader must know beside dimensions of num_rows rows. num_points: distinct ones, of all or of each."""
    notes, points = [], torch.as_tensor(num_points).expand(dimension.shape)
    least = int(points.min())
    num_duplicates = num_rows - least
    if least < LEAST:
        notes.append(f"{counted(least, 'distinct row')} resolve no dimension: it takes {LEAST} at least.")
    elif bool(dimension.isnan().any()):
        notes.append("nan is undefined: rows have too few neighbours among those of other sequences.")
    if num_sequences < 2:
        notes.append("rows of one sequence have no error over sequences.")
    if within:
        notes.append("neighbours may be of the same sequence, and tokens beside each other are near for that reason.")
    if num_duplicates:
        one, some = num_duplicates == 1, "up to " if bool((points != least).any()) else ""
        notes.append(
            f"{some}{counted(num_duplicates, 'row')} that {'equals' if one else 'equal'} another one (repeated tokens) "
            f"{'is' if one else 'are'} left out."
        )
    beyond = dimension.isfinite() & (dimension > 2 * points.to(dimension).log10())
    if bool(beyond.any()):
        few = int(points[beyond].min())
        notes.append(
            f"{few:,} points resolve dimensions up to about {2 * math.log10(few):.1f} (2 log10 N): in more, "
            "neighbours are nearly as far as all points, and the estimate is far too small; it is no sign of compression."
        )
    return notes
