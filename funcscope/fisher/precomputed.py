"""Gram matrices of gradients that are there already: as rows, or by name as the layout has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_params
from ..core.estimate import wide
from ..core.layout import Layout
from ..curvature.gram import Blocks, Grams, block_views

Gradients = Float[Tensor, "n p"] | Sequence[Mapping[str, Tensor]]


def gradient_gram(gradients: Gradients, layout: Layout, *, by: Blocks = "layer", unit: str = "sequence") -> Grams:
    r"""$K_{ij} = \langle g_i, g_j \rangle$ by block of gradients that were computed before, summed in float64.

    gradients: rows over the flat vector, (n, P), or for every sample its gradients by parameter. unit: what a sample is, for
    the result to say.

    Raises ValueError for no gradient, for those of another layout, with the names or shapes that differ, and for one that is
    not finite, with its sample and parameter.

    >>> from funcscope import Layout
    >>> layout = Layout.of(torch.nn.Linear(2, 1))
    >>> gradient_gram(torch.tensor([[3.0, 0.0, 1.0], [0.0, 4.0, 1.0]]), layout, by="tensor").block("weight")
    tensor([[ 9.,  0.],
            [ 0., 16.]], dtype=torch.float64)
    """
    if not len(gradients):
        raise ValueError(
            "`gradients` is empty: there is no sample, and no spectrum of none. Give a gradient per sample."
        )
    leaves = dict(_rows(gradients, layout) if isinstance(gradients, Tensor) else _named(gradients, layout))
    views = block_views(layout, by)
    num, device = len(gradients), next(iter(leaves.values())).device
    values = torch.zeros(len(views), num, num, dtype=wide(device), device=device)
    for i, members in enumerate(views.values()):
        for view in members:
            part = leaves[view.leaf]
            part = part.movedim(view.dim + 1, 1)[:, view.slice] if part.ndim > 1 else part[:, None]
            flat = part.reshape(num, -1).to(values.dtype)
            values[i] += flat @ flat.T
    return Grams(values, unit, 0, [], list(views))


def _rows(gradients: Tensor, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    if gradients.ndim != 2 or gradients.shape[1] != layout.num:
        raise ValueError(
            f"`gradients` must have shape (n, {layout.num}), a row over all parameters of this layout per sample, got "
            f"{tuple(gradients.shape)}: rows of another model, or of part of this one."
        )
    for leaf in layout.leaves:
        yield leaf.name, _finite(gradients[:, leaf.slice].view(-1, *leaf.shape), leaf.name)


def _named(gradients: Sequence[Mapping[str, Tensor]], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    for i, one in enumerate(gradients):
        check_params(one, layout.shapes, f"gradients[{i}]")
    for name in layout.names:
        yield name, _finite(torch.stack([one[name].detach() for one in gradients]), name)


def _finite(rows: Tensor, name: str) -> Tensor:
    bad = ~rows.reshape(len(rows), -1).isfinite().all(1)
    if bool(bad.any()):
        raise ValueError(
            f"the gradient of sample {int(bad.nonzero()[0])} in `{name}` is not finite: leave the sample out, or look at "
            "the weights there."
        )
    return rows
