"""The terms of a loss where only values are wanted: cheaper kernels, an output that is scored while it is in the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.criterion import Labels
from ..core.layout import Params
from ..core.model import Inputs, LeafFn
from ..core.objective import Loss, Theta, per_sequence

ROWS = 2**19
"""Entries of the output that are scored at a time, so that what the loss makes of them stays in the cache."""


class PerSequence(Loss):
    """The loss before it is a mean, shape (2, n): a row of sums and a row of weights over sequences."""

    @classmethod
    def of(cls, loss: Loss) -> PerSequence:
        return cls(loss.net, loss.batches, loss.criterion)

    def __call__(self, theta: Theta) -> Tensor:
        params = self.params(theta)
        return self._rows(lambda inputs: self.net.apply(params, inputs))

    def at_leaves(self, leaf: LeafFn) -> Tensor:
        return self._rows(lambda inputs: self.net.apply_leaves(leaf, inputs))

    def _rows(self, outputs: Callable[[Inputs], Tensor]) -> Tensor:
        sums, weights = zip(*(self.scored(outputs, *batch) for batch in self.batches), strict=True)
        return torch.stack([torch.cat(sums), torch.cat(weights)])


class Values:
    """`loss.terms` for values alone, called under `no_grad`: fused norms, and the output scored a few rows at a time."""

    def __init__(self, loss: Loss):
        self.loss, self.net = loss, replace(loss.net, attention="keep")  # the batches have their float masks already

    def __call__(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        return self.of(self.loss.params(theta))

    def of(self, params: Params) -> tuple[Tensor, Tensor]:
        """Sums and weights per sequence at a dict of parameters."""
        parts = [self._scored(params, inputs, targets) for inputs, targets in self.loss.batches]
        sums, weights = zip(*parts, strict=True)
        return torch.cat(sums), torch.cat(weights)

    def _scored(self, params: Params, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        out, criterion = self.net.apply(params, inputs), self.loss.criterion
        if not criterion.positionwise or out.numel() <= ROWS or out.shape[:-1] != targets.index.shape:
            return self.loss.scored(lambda _: out, inputs, targets)
        rows = max(1, ROWS // out.shape[-1])
        cut = zip(out.flatten(0, -2).split(rows), *(x.flatten().split(rows) for x in targets), strict=True)
        losses = torch.cat([criterion.scored(z, Labels(index, weight))[0] for z, index, weight in cut])
        return per_sequence(losses.view(targets.index.shape) * targets.weight), per_sequence(targets.weight)
