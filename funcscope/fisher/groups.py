"""A Fisher diagonal by groups of parameters: tensors, rows, channels, heads."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.layout import Layout
from ..core.result import Result, derived, internal, quantity
from ..curvature.gram import Blocks, block_views
from ..curvature.whitening import cut_views
from .importance import check_diagonal


class GroupedFisher(Result):
    """A Fisher diagonal by groups of parameters: their trace, and the mean entry."""

    total: Float[Tensor, " b"] = quantity("sum of entries", per="block")
    sizes: Float[Tensor, " b"] = quantity("parameters", per="block")
    blocks: list[str] = internal()

    @derived("mean entry", per="block")
    def mean(self) -> Float[Tensor, " b"]:
        return self.total / self.sizes

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"block": self.blocks}

    @property
    def head(self) -> str:
        return f"Fisher diagonal in {len(self.blocks)} groups"


def fisher_groups(
    fisher: Float[Tensor, " p"], layout: Layout, *, by: Blocks | Literal["row", "channel"] = "tensor"
) -> GroupedFisher:
    """Sums and means of a diagonal over groups: a sum is a trace, and favours large groups where groups are pruned.

    by: `row` is an output unit of a matrix (row of a linear layer, column of a Hugging Face Conv1D), other tensors whole,
    `channel` an output channel of a convolution, other tensors whole; `head_views` gives heads; others as `gram` has them.

    Raises ValueError for a diagonal of another length, or with negative entries.

    >>> layout = Layout.of(torch.nn.Linear(2, 2, bias=False))
    >>> groups = fisher_groups(torch.tensor([1.0, 2.0, 3.0, 4.0]), layout, by="row")
    >>> groups.total.tolist(), groups.mean.tolist()
    ([3.0, 7.0], [1.5, 3.5])
    """
    check_diagonal("fisher", fisher, layout)
    if by in ("row", "channel"):
        wanted = [
            leaf.name for leaf in layout.leaves if (len(leaf.shape) == 2) == (by == "row") and len(leaf.shape) > 1
        ]
        units = layout.blocks("filter")
        views = {name: each for name, each in units.items() if each[0].leaf in wanted}
        whole = {name: each for name, each in layout.blocks("tensor").items() if name not in wanted}
        views |= whole
    else:
        views = block_views(layout, by)  # type: ignore[arg-type]
    parts = [cut_views(fisher, layout, each).double() for each in views.values()]
    sizes = torch.tensor([len(part) for part in parts], dtype=torch.float64)
    return GroupedFisher(torch.stack([part.sum() for part in parts]), sizes, list(views))
