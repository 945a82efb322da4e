"""Inner products of gradients that are divided by the root of a Fisher diagonal, coordinate by coordinate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_flat
from ..core.estimate import wide
from ..core.layout import Layout, View
from ..core.objective import Loss, Theta
from .gram import Blocks, Grams, block_views
from .rows import per_sample_gradients


def whitened_grams(
    first: Loss,
    second: Loss,
    theta: Theta,
    *,
    by: Blocks = "layer",
    fisher: Float[Tensor, " p"] | None = None,
    damping: float = 1e-3,
    chunk_size: int = 8,
) -> tuple[Grams, Grams, Grams]:
    r"""Grams of A, of A with B, of B, with $g / \sqrt{I + \lambda}$ in the place of g.

    $$I_k = \frac{1}{n + m} \sum_{i \in A \cup B} g_{ik}^2, \qquad \lambda = \text{damping} \cdot \overline{I},$$

    the mean over the block. I is of the samples of both tasks together, so that a permutation of labels leaves it as it is.
    With that of one task's own samples, its mean gradient comes out shorter than that of the other where tasks are equal, and
    a label test at the level .05 rejects .13 to .5 of the time.

    fisher: another I, of held-out samples, over all of theta.
    A block's gradients are multiplied out, so that memory is (n + m) times the largest block, and time a forward and
    backward pass for each block.

    Raises ValueError for tasks of different parameters, for a gradient that is not finite, with its sequence and parameter,
    and for a block in which every gradient is 0.
    """
    theta = Loss.vector(first, theta)
    check_tasks(first, second)
    if fisher is not None:
        check_flat("fisher", fisher, first.layout.num)
    if not damping >= 0:
        raise ValueError(f"`damping` must be at least 0, got {damping}.")
    views = block_views(first.layout, by)
    parts = []
    for name, members in views.items():
        (a,), (b,) = (block_rows(loss, theta, [members], chunk_size) for loss in (first, second))
        weights = torch.cat([a, b]).square().mean(0) if fisher is None else cut_views(fisher, first.layout, members)
        root = damped(weights.to(a), damping, name).sqrt()
        a, b = a / root, b / root
        parts.append((a @ a.T, a @ b.T, b @ b.T))
    num = sum(parts[0][1].shape) * len(views)
    aa, ab, bb = (Grams(torch.stack(each), "sequence", num, [], list(views)) for each in zip(*parts, strict=True))
    return aa, ab, bb


def block_rows(
    loss: Loss, theta: Tensor, blocks: Sequence[Sequence[View]], chunk_size: int
) -> list[Float[Tensor, "n k"]]:
    """The gradients of single sequences in some blocks, wide: those of their parameters only are taken, once."""
    names = list(dict.fromkeys(view.leaf for views in blocks for view in views))
    net = loss.net.only(names, loss.params(theta))
    rows = per_sample_gradients(replace(loss, net=net), net.theta.to(theta), chunk_size=chunk_size)
    wider = wide(rows.device)
    for i, row in enumerate(rows):
        check_finite(row, i, net.layout)
    return [torch.stack([cut_views(row, net.layout, views) for row in rows]).to(wider) for views in blocks]


def check_finite(values: Float[Tensor, " p"], sample: int, layout: Layout) -> None:
    """Raises ValueError with the sequence and the parameter for what is nan or infinite."""
    if not bool(values.isfinite().all()):
        name = next(leaf.name for leaf in layout.leaves if not bool(values[leaf.slice].isfinite().all()))
        raise ValueError(
            f"the gradient of sequence {sample} in `{name}` is not finite: leave it out, or look at the weights there."
        )


def cut_views(vector: Float[Tensor, " p"], layout: Layout, views: Sequence[View]) -> Float[Tensor, " k"]:
    """The entries of a flat vector in some views, one after another."""
    leaves = layout.unravel(vector, cast=False)
    return torch.cat([leaves[view.leaf].movedim(view.dim, 0)[view.slice].flatten() for view in views])


def damped(fisher: Tensor, damping: float, name: str) -> Tensor:
    """Plus that share of its mean. Raises ValueError where that is not above 0 somewhere."""
    made = fisher + damping * fisher.mean()
    if not bool((made > 0).all()):
        raise ValueError(
            f"the Fisher diagonal plus `damping` times its mean must be above 0 in block `{name}`, got {float(made.min())}: "
            "take more damping, or leave out a block without gradients."
        )
    return made


def check_tasks(first: Loss, second: Loss) -> None:
    """Both are losses of the same parameters."""
    if first.layout != second.layout:
        raise ValueError(
            f"both tasks must be losses of the same net, got {first.layout.num} and {second.layout.num} parameters: "
            "other vocabularies make other parameters."
        )
