"""How the Fisher information is spread over blocks of parameters."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.estimate import wide
from ..core.layout import Layout
from ..core.result import Result, derived, internal, quantity
from ..core.standard_errors import ratio_stderr
from ..curvature.gram import Blocks, block_views
from ..curvature.whitening import cut_views


class Importance(Result):
    """Shares of blocks in the trace of the Fisher information."""

    share: Float[Tensor, " b"] = quantity("share of the trace", per="block", stderr="share_stderr")
    sizes: Float[Tensor, " b"] = quantity("parameters", per="block")
    share_stderr: Float[Tensor, " b"] = internal()
    blocks: list[str] = internal()

    @derived("mean entry over that of all blocks", per="block")
    def relative_density(self) -> Float[Tensor, " b"]:
        """1 where a block has as much information per parameter as all blocks together."""
        return self.share * self.sizes.sum() / self.sizes

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"block": self.blocks}

    @property
    def head(self) -> str:
        return f"Fisher information of {int(self.sizes.sum()):,} parameters in {len(self.blocks)} blocks"


def importance(
    fisher: Float[Tensor, " p"] | Float[Tensor, "m p"], layout: Layout, *, by: Blocks = "tensor"
) -> Importance:
    r"""$\sum_{k \in b} F_k / \sum_k F_k$ of every block b, from a diagonal over theta.

    fisher: one diagonal, or rows that are independent estimates of it (draws under different keys). Of a single one, errors
    of shares are not known (nan), as those of entries of one draw go together; of rows, the share is that of their sum, with
    the standard error of a ratio.

    Raises ValueError for a diagonal of another length, with an entry that is negative or not finite, or without any above 0.

    >>> layout = Layout.of(torch.nn.Linear(2, 1))
    >>> importance(torch.tensor([1.0, 2.0, 1.0]), layout).share
    tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    rows = fisher if fisher.ndim == 2 else fisher[None]
    for row in rows:
        check_diagonal("fisher", row, layout)
    views = block_views(layout, by)
    cuts = [
        torch.stack([cut_views(row, layout, each) for row in rows]).to(wide(rows.device)) for each in views.values()
    ]
    sums = torch.stack([cut.sum(1) for cut in cuts])
    stderr = ratio_stderr(sums, sums.sum(0))
    sizes = sums.new_tensor([cut.shape[1] for cut in cuts])
    return Importance(sums.sum(1) / sums.sum(), sizes, stderr, list(views))


def importance_vector(fisher: Float[Tensor, " p"], layout: Layout, *, by: Blocks = "none") -> Float[Tensor, " p"]:
    """F over its sum in each block; 0 in a block of zeros, and for what is in no block."""
    check_diagonal("fisher", fisher, layout)
    out = torch.zeros_like(fisher)
    for views in block_views(layout, by).values():
        total = cut_views(fisher, layout, views).sum(dtype=wide(fisher.device)).to(fisher)
        source, made = (layout.unravel(x, cast=False) for x in (fisher, out))
        for view in views if total > 0 else ():
            made[view.leaf].movedim(view.dim, 0)[view.slice] = (
                source[view.leaf].movedim(view.dim, 0)[view.slice] / total
            )
    return out


def check_diagonal(name: str, fisher: Tensor, layout: Layout) -> None:
    """A vector over theta, at least 0 everywhere and above it somewhere."""
    if fisher.shape != (layout.num,) or not fisher.is_floating_point():
        raise ValueError(
            f"`{name}` must be a floating diagonal of {layout.num} entries, got {tuple(fisher.shape)} of {fisher.dtype}: "
            "take the `value` of a Fisher diagonal."
        )
    if not bool((fisher >= 0).all()) or not bool(fisher.isfinite().all()) or not bool(fisher.any()):
        raise ValueError(
            f"`{name}` must be finite, at least 0, and above 0 somewhere, got entries from {float(fisher.min())} to "
            f"{float(fisher.max())}: a Fisher diagonal is a mean of squares."
        )
