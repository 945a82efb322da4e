"""Which parameters pruning keeps: exactly as many as asked, by any score."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.checks import check_flat, check_instance, check_number
from ..core.layout import Layout, View
from ..core.result import Result, derived, internal, quantity
from .gram import Blocks, block_views


class PruningMask(Result):
    """Parameters that are kept."""

    mask: Bool[Tensor, " p"] = quantity("kept", per="parameter", shown=False)
    num_kept: Float[Tensor, " b"] = quantity("parameters kept", per="block")
    sizes: Float[Tensor, " b"] = quantity("parameters", per="block")
    sparsity: float
    blocks: list[str] = internal()

    @derived("share kept", per="block")
    def density(self) -> Float[Tensor, " b"]:
        return self.num_kept / self.sizes

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"block": self.blocks}

    @property
    def head(self) -> str:
        return f"{int(self.num_kept.sum()):,} of {int(self.sizes.sum()):,} parameters are kept, in {len(self.blocks)} blocks"


def pruning_mask(
    score: Float[Tensor, " p"], layout: Layout, *, sparsity: float, by: Blocks = "none", within: Blocks | None = None
) -> PruningMask:
    r"""The parameters of the largest scores: $n - \lfloor s n + 1/2 \rfloor$ of the n of each block, whatever ties there are.

    Of equal scores, those that come first in theta are kept. What is in no block (where `by` maps names to views) is kept
    and counts nowhere: that is how a prunable set is declared.

    score: $\theta^2$, a Fisher diagonal, `obd_saliency`. sparsity: s, in [0, 1].
    by: `none` ranks all parameters together, `tensor` those of each tensor, and so on, as `gram` knows blocks.
    within: the blocks that the result counts in; default: `by`, or `tensor` where that is `none`.

    A document keeps what is above a quantile instead: of many zeros, as a Fisher diagonal has them, it prunes all.

    Raises ValueError for a sparsity outside [0, 1], a score of another length, or one that is nan.

    >>> layout = Layout.of(torch.nn.Linear(4, 1, bias=False))
    >>> pruning_mask(torch.tensor([0.0, 2.0, 0.0, 0.0]), layout, sparsity=0.5).mask
    tensor([ True,  True, False, False])
    """
    check_instance("layout", layout, Layout, "`net.layout`")
    check_flat("score", score, layout.num)
    check_number("sparsity", sparsity, 0.0, 1.0)
    if bool(score.isnan().any()):
        raise ValueError(f"`score` must have no nan, got one at {int(score.isnan().nonzero()[0])}: it has no rank.")
    mask = torch.ones_like(score, dtype=torch.bool)
    views = block_views(layout, by)
    for each in views.values():
        places = places_of(layout, each)
        mask[places] = _largest(score[places], len(places) - math.floor(sparsity * len(places) + 0.5))
    counted = views if within is None and by != "none" else block_views(layout, within or "tensor")
    inside = [mask[places_of(layout, each)] for each in counted.values()]
    kept, sizes = (
        torch.tensor(x, dtype=torch.float64) for x in ([int(x.sum()) for x in inside], [len(x) for x in inside])
    )
    return PruningMask(mask, kept, sizes, float(sparsity), list(counted))


def obd_saliency(fisher: Float[Tensor, " p"], theta: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    r"""$F_k \theta_k^2 / 2$: what setting parameter k to 0 adds to the loss, to second order at a minimum, F for the Hessian.

    F alone says what moving k by one unit costs, whatever its value: a parameter of 0 is pruned for nothing, however large
    its F (proofs/obd_saliency.py). LeCun, Denker, Solla (1990), Optimal brain damage; no term of other parameters that are
    pruned with it.

    >>> obd_saliency(torch.tensor([2.0, 9.0]), torch.tensor([3.0, 0.0]))
    tensor([9., 0.])
    """
    check_flat("theta", theta, theta.numel())
    check_flat("fisher", fisher, len(theta))
    if not bool((fisher >= 0).all()):
        raise ValueError("`fisher` must have no entry that is negative or nan: a diagonal of squares has none.")
    return fisher * theta.square() / 2


def places_of(layout: Layout, views: tuple[View, ...]) -> Int[Tensor, " k"]:
    """Where the entries of some views lie in theta, in order."""
    parts = []
    for view in views:
        leaf = layout.by_name[view.leaf]
        places = torch.arange(leaf.offset, leaf.offset + leaf.numel).view(leaf.shape)
        parts.append((places.movedim(view.dim, 0)[view.slice] if leaf.shape else places).flatten())
    return torch.cat(parts).sort().values


def _largest(score: Tensor, num: int) -> Tensor:
    """True for `num` of the largest; of those that equal the last of them, the first."""
    if num in (0, len(score)):
        return torch.full_like(score, num > 0, dtype=torch.bool)
    least = score.kthvalue(len(score) - num + 1).values
    above, equal = score > least, score == least
    return above | (equal & (equal.cumsum(0) <= num - above.sum()))
