"""What the masks of several models have in common, beside what chance gives them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_instance, check_mask, check_number
from ..core.layout import Layout, View
from ..core.objective import Loss
from ..core.result import Result, quantity
from ..core.tables import counted
from ..curvature.mask_overlap import overlaps
from .prunable import Prunable, Scope, prunable_leaves, sparse_mask
from .task_vectors import flat_of

Pairs = Float[Tensor, "m m"]
_PER = ("model", "other model")


class TicketOverlap(Result):
    """For every pair of masks: agreement above chance, its z, and the Jaccard index beside that of random masks."""

    kappa: Pairs = quantity("overlap above chance", per=_PER)
    z: Pairs = quantity("z of the overlap", per=_PER)
    """nan for a mask with itself."""
    jaccard: Pairs = quantity("Jaccard index", per=_PER, shown=False)
    chance_jaccard: Pairs = quantity("Jaccard index by chance", per=_PER, shown=False)
    density: Float[Tensor, " m"] = quantity("share kept", per="model")
    names: list[str]
    num_prunable: int
    scope: str

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"model": self.names, "other model": self.names}

    @property
    def head(self) -> str:
        return f"overlap of {counted(len(self.names), 'mask')} of {self.num_prunable:,} weights, by chance inside each tensor"

    @property
    def notes(self) -> list[str]:
        if bool(self.kappa.isnan().any()):
            return [
                "A mask that is empty or full in every tensor has an overlap that chance gives already: it is undefined."
            ]
        return []


def ticket_overlap(
    loss: Loss | Layout,
    members: Iterable[Tensor],
    names: Sequence[str],
    *,
    density: float = 0.5,
    scope: Scope = "global",
    prunable: Prunable = "linear",
) -> TicketOverlap:
    r"""For every pair of models, how much the masks of their largest weights overlap beyond chance.

    `mask_overlap` of each pair, totals over the prunable tensors: $\kappa$ is 0 by chance and 1 where one mask holds the
    other, z is in standard deviations of random masks with as many weights in every tensor. Models that share an
    initialisation overlap by that alone, and neurons of two models in another order have nothing in common here, however
    alike the models are.

    A document has $|A \cap B| / n$, which is the density at most: .1 for a mask of density .1 with itself. Its Jaccard index
    has no chance level: random masks of density .5 have .33.

    members: parameters, whose `density` of largest prunable magnitudes is the mask, or masks themselves, of torch.bool.
    scope and prunable: as `sparse_mask`; a mask counts inside the prunable set only.

    Nothing is drawn: z is the test, and there is no other error.

    Raises ValueError for fewer than two members, as many names as there are not, and vectors of another length,
    or that are not finite.

    >>> layout = Layout.of(torch.nn.Linear(4, 1, bias=False))
    >>> same, other = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([4.0, 1.0, 3.0, 2.0])
    >>> ticket_overlap(layout, [same, 2 * same, other], ["a", "b", "c"]).kappa.tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    layout = loss.layout if isinstance(loss, Loss) else loss
    check_instance("loss", layout, Layout, "`fs.objective(...)`, or `net.layout`")
    check_number("density", density, 0.0, 1.0)
    leaves = prunable_leaves(layout, prunable)
    each = list(members)
    if len(each) < 2 or len(each) != len(names):
        raise ValueError(f"`members` must be two or more, with a name each, got {len(each)} and {len(names)} names.")
    masks = [_mask(one, layout, density, scope, prunable) for one in each]
    places = list(combinations(range(len(masks)), 2)) + [(i, i) for i in range(len(masks))]
    views = {leaf.name: (View(leaf.name, 0, slice(None)),) for leaf in leaves}
    tables = torch.full((4, len(masks), len(masks)), math.nan, dtype=torch.float64)
    for (i, j), made in zip(places, overlaps([(masks[i], masks[j]) for i, j in places], layout, views), strict=True):
        z = math.nan if i == j else made.total_z
        tables[:, i, j] = tables[:, j, i] = torch.tensor(
            [made.total_kappa, z, made.total_jaccard, made.total_chance_jaccard]
        ).double()
    num = sum(leaf.numel for leaf in leaves)
    shares = [sum(int(mask[leaf.slice].sum()) for leaf in leaves) / num for mask in masks]
    return TicketOverlap(
        kappa=tables[0], z=tables[1], jaccard=tables[2], chance_jaccard=tables[3], density=torch.tensor(shares).double(),
        names=list(map(str, names)), num_prunable=num, scope=scope,
    )  # fmt: skip


def _mask(member: Tensor, layout: Layout, density: float, scope: Scope, prunable: Prunable) -> Tensor:
    if isinstance(member, Tensor) and member.dtype == torch.bool:
        check_mask("members", member, layout.num)
        return member
    return sparse_mask(
        flat_of("members", member, layout).abs(), layout, sparsity=1 - density, scope=scope, prunable=prunable
    )
