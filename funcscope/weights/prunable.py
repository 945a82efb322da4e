"""Which parameters may be pruned, and masks that keep exactly as many of them as asked."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.checks import check_choice, check_flat, check_instance, check_number
from ..core.layout import Layout, Leaf, View
from ..curvature.pruning_masks import pruning_mask

Prunable = Literal["linear", "matrices", "all"] | Collection[str]
Scope = Literal["global", "tensor", "row"]
SCOPES = ("global", "tensor", "row")
_LINEAR = ("Linear", "Conv1D")


def prunable_leaves(layout: Layout, prunable: Prunable = "linear") -> list[Leaf]:
    """The parameters that may be pruned.

    prunable: `linear`, the matrices of linear maps and convolutions, that of the head among them where it is not tied to
    the embedding; no biases, norms and embeddings. `matrices`: whatever has two dimensions or more. `all`, or names.

    Raises ValueError for a name that the layout does not have, and where nothing may be pruned.

    >>> layout = Layout.of(torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 2)))
    >>> [leaf.name for leaf in prunable_leaves(layout)]
    ['1.weight']
    """
    check_instance("layout", layout, Layout, "`net.layout`")
    if not isinstance(prunable, str):
        if unknown := sorted(set(prunable) - set(layout.names)):
            raise ValueError(f"`prunable` holds names that are not among `layout.names`: {unknown[:3]}.")
        leaves = [leaf for leaf in layout.leaves if leaf.name in set(prunable)]
    else:
        check_choice("prunable", prunable, ("linear", "matrices", "all"))
        kinds = layout.group_of("module")
        leaves = [leaf for leaf in layout.leaves if _is_in(leaf, kinds[leaf.name], prunable)]
    if not leaves:
        raise ValueError(f"`prunable` must name a parameter, got {prunable!r}, of which this layout has none.")
    return leaves


def sparse_mask(
    score: Float[Tensor, " p"],
    layout: Layout,
    *,
    sparsity: float,
    scope: Scope = "global",
    prunable: Prunable = "linear",
) -> Bool[Tensor, " p"]:
    r"""The weights of the largest scores: $n - \lfloor s n + 1/2 \rfloor$ of n; what may not be pruned is kept.

    scope: scores are compared over all prunable parameters together (`global`), inside each tensor, or inside each `row`:
    the weights of one output unit, whichever way the matrix is stored. Of equal scores the first are kept.

    Raises ValueError for a score that is nan where it may be pruned, and as `pruning_mask` and `prunable_leaves`.

    >>> layout = Layout.of(torch.nn.Linear(2, 2))
    >>> sparse_mask(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0, 0.0]), layout, sparsity=0.5).tolist()
    [True, True, False, False, True, True]
    >>> sparse_mask(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0, 0.0]), layout, sparsity=0.5, scope="row").tolist()
    [True, False, True, False, True, True]
    """
    check_choice("scope", scope, SCOPES)
    leaves = prunable_leaves(layout, prunable)
    check_flat("score", score, layout.num)
    check_number("sparsity", sparsity, 0.0, 1.0)
    for leaf in leaves:
        if bool(score[leaf.slice].isnan().any()):
            raise ValueError(f"`score` must have a number for every prunable parameter, got nan in `{leaf.name}`.")
    if scope == "row":
        return _by_row(score, leaves, sparsity)
    views = {leaf.name: (View(leaf.name, 0, slice(None)),) for leaf in leaves}
    blocks = views if scope == "tensor" else {"all": tuple(view for (view,) in views.values())}
    return pruning_mask(score.nan_to_num(posinf=math.inf, neginf=-math.inf), layout, sparsity=sparsity, by=blocks).mask


def num_left(num: int, sparsity: float) -> int:
    """How many of `num` are kept."""
    return num - math.floor(sparsity * num + 0.5)


def largest(score: Float[Tensor, "r c"], num: int) -> Bool[Tensor, "r c"]:
    """True for `num` of the largest of every row; of equal ones, for the first.

    >>> largest(torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]), 1).tolist()
    [[False, True, False], [True, False, False]]
    """
    order = score.argsort(dim=1, descending=True, stable=True)[:, :num]
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order, torch.ones_like(order, dtype=torch.bool))


def _by_row(score: Tensor, leaves: list[Leaf], sparsity: float) -> Tensor:
    mask = torch.ones_like(score, dtype=torch.bool)
    for leaf in leaves:
        dim = leaf.filter_dim
        whole = score[leaf.slice].view(leaf.shape)
        moved = whole.reshape(1, -1) if dim is None else whole.movedim(dim, 0)
        rows = moved.flatten(1)
        kept = largest(rows, num_left(rows.shape[1], sparsity)).view(moved.shape)
        mask[leaf.slice] = (kept if dim is None else kept.movedim(0, dim)).flatten()
    return mask


def _is_in(leaf: Leaf, kind: str, prunable: str) -> bool:
    if prunable == "all" or len(leaf.shape) < 2:
        return prunable == "all"
    return prunable == "matrices" or leaf.owner in _LINEAR or kind not in ("embedding", "norm")
