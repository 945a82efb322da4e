"""Whether a sequence's gradient depends on what else is in its batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad

from ..core.batches import cut, num_rows
from ..core.checks import check_count
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, quantity


class BatchDependence(Result):
    """How far the gradients of sequences in their batches are from those alone."""

    values: Float[Tensor, " n"] = quantity("relative difference", per="sample")

    @derived("largest relative difference")
    def largest(self) -> float:
        return float(self.values.max())

    @property
    def head(self) -> str:
        return f"gradients of {len(self.values)} sequences in their batches against those alone"


def batch_dependence(loss: Loss, theta: Theta, *, num: int = 8) -> BatchDependence:
    r"""Relative differences between the gradients of sequences computed in their batch and computed alone.

    $$\frac{\lVert g_b^{\text{batch}} - g_b^{\text{alone}} \rVert}{\lVert g_b^{\text{alone}} \rVert}$$

    of the first `num` sequences; g is that of the sequence's own loss. Rounding where sequences do not see each other, as
    kernels differ with the size of a batch; of order one where they do (a norm over the batch). nan where the gradient is 0.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 3))
    >>> loss = fs.objective(net, [(torch.eye(2), torch.tensor([0, 1]))], fs.classification)
    >>> batch_dependence(loss, net.theta).largest < 1e-5
    True
    """
    check_count("num", num)
    theta = Loss.vector(loss, theta)
    values: list[Tensor] = []
    for batch in loss.batches:
        rows = num_rows(batch)
        for i in range(min(rows, num - len(values))):
            inside = grad(lambda t, i=i, batch=batch: replace(loss, batches=(batch,)).terms(t)[0][i])(theta)
            part = replace(loss, batches=(cut(batch, slice(i, i + 1), rows),))
            alone = grad(lambda t, part=part: part.terms(t)[0][0])(theta)
            values.append(torch.linalg.vector_norm(inside - alone) / torch.linalg.vector_norm(alone))
    return BatchDependence(torch.stack(values))
