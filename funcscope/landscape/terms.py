"""The terms of a loss, and of metrics beside it, per sequence: in the cheapest way where only values are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.batches import tensors
from ..core.criterion import Labels
from ..core.estimate import Estimate, wide
from ..core.layout import Params
from ..core.model import Inputs, LeafFn
from ..core.objective import Loss, Theta, per_sequence
from ..core.standard_errors import Means, means

Metric = Callable[[Tensor, Any], Tensor]
"""(output of the model, targets): a value for every position that the criterion weighs. Targets of the criteria of this
package are the labels of every position; of others, what they take themselves."""
ENDINGS = ("_stderr", "_baseline", "_excess", "_excess_stderr", "_delta_stderr")
"""Of names in `asdict()`, behind those of metrics."""
ROWS = 2**19
"""Entries of the output that are scored at a time, so that what the loss makes of them stays in the cache."""


class PerSequence(Loss):
    """The loss before it is a mean, shape (2, n): a row of sums and a row of weights over sequences."""

    @classmethod
    def of(cls, loss: Loss) -> PerSequence:
        return cls(loss.net, loss.batches, loss.criterion, loss._verdicts)  # checked once, whoever asks

    def __call__(self, theta: Theta) -> Tensor:
        params = self.params(theta)
        return self._rows(lambda inputs: self.net.apply(params, inputs))

    def at_leaves(self, leaf: LeafFn) -> Tensor:
        return self._rows(lambda inputs: self.net.apply_leaves(leaf, inputs))

    def _rows(self, outputs: Callable[[Inputs], Tensor]) -> Tensor:
        sums, weights = zip(*(self.scored(outputs, *batch) for batch in self.batches), strict=True)
        return torch.stack([torch.cat(sums), torch.cat(weights)])


class Values:
    """`loss.terms` for values alone, called under `no_grad`: fused norms, and the output scored a few rows at a time.

    is_mapped: to be called under `vmap`, with the kernels of `loss.terms` itself.
    """

    def __init__(self, loss: Loss, metrics: Iterable[Metric] = (), *, is_mapped: bool = False):
        self.loss, self.metrics, self.is_mapped = loss, tuple(metrics), is_mapped
        self.net = (
            loss.net if is_mapped else replace(loss.net, attention="keep")
        )  # batches have their float masks already

    def __call__(self, theta: Theta) -> tuple[Tensor, Tensor]:
        """Sums of the loss and weights, (n,) each."""
        sums, weights = self.rows(theta)
        return sums[0], weights

    def rows(self, theta: Theta) -> tuple[Tensor, Tensor]:
        """Sums of the loss and of every metric, (1 + k, n), from one forward pass; weights (n,)."""
        params = self.loss.params(theta)
        parts = [self._scored(params, inputs, targets) for inputs, targets in self.loss.batches]
        sums, weights = zip(*parts, strict=True)
        return torch.cat(sums, dim=1), torch.cat(weights)

    def _scored(self, params: Params, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        out = self.net.apply(params, inputs)
        sums, weights = self._of_loss(out, inputs, targets)
        return torch.stack([sums, *(self._of_metric(metric, out, targets) for metric in self.metrics)]), weights

    def _of_loss(self, out: Tensor, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        criterion = self.loss.criterion
        few = self.is_mapped or not criterion.positionwise or out.numel() <= ROWS
        if few or out.shape[:-1] != targets.index.shape:
            return self.loss.scored(lambda _: out, inputs, targets)
        rows = max(1, ROWS // out.shape[-1])
        cut = zip(out.flatten(0, -2).split(rows), *(x.flatten().split(rows) for x in targets), strict=True)
        losses = torch.cat([criterion.scored(z, Labels(index, weight))[0] for z, index, weight in cut])
        return per_sequence(losses.view(targets.index.shape) * targets.weight), per_sequence(targets.weight)

    def _of_metric(self, metric: Metric, out: Tensor, targets: Any) -> Tensor:
        labels = isinstance(targets, Labels)
        weight = targets.weight if labels else self.loss.criterion.token_loss(out, targets)[1]
        written = [(x, x._version) for x in tensors((out, targets))]
        value = metric(out, targets.index if labels else targets)
        if any(x._version != version for x, version in written):
            raise ValueError(
                "a function in `metric` writes to its arguments, which are those of the loss and of the other functions: "
                "write to a clone."
            )
        if not isinstance(value, Tensor) or value.shape != weight.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"a function in `metric` must return one value for every position, a tensor of shape {tuple(weight.shape)} "
                f"here, got {got}: leave out the mean."
            )
        if value.is_complex():
            raise TypeError(
                f"a function in `metric` must return real numbers, got {value.dtype}: take `.abs()` or `.real`."
            )
        if not value.is_floating_point():
            value = value.to(wide(value.device))  # float32 has no integers above 2^24
        value = value.to(torch.promote_types(value.dtype, weight.dtype))
        return per_sequence(torch.where(weight != 0, value, torch.zeros_like(value)) * weight)


def check_metrics(metric: Any) -> Mapping[str, Metric]:
    """The functions by name; none for None."""
    if metric is None:
        return {}
    if not isinstance(metric, Mapping) or not all(isinstance(k, str) and callable(f) for k, f in metric.items()):
        raise TypeError(
            f"`metric` must map names to functions of (output, targets), got {metric!r}: "
            '`{"accuracy": lambda out, labels: out.argmax(-1) == labels}`.'
        )
    for name in metric:
        for ending in ENDINGS:
            if name.endswith(ending) and name.removesuffix(ending) in metric:
                raise ValueError(
                    f"`metric` has {name!r}, the name that a result has for the {ending[1:]} of "
                    f"{name.removesuffix(ending)!r}: choose another."
                )
    return dict(metric)


class Measured:
    """Of a result: what was measured beside its losses. `_beside` has it by ending ("", "_stderr", ...) and by name."""

    @cached_property
    def _beside(self) -> dict[str, dict[str, Tensor]]:
        raise NotImplementedError

    metrics = property(lambda self: self._beside[""])
    """Means of what was measured beside the loss, by name."""
    metrics_stderr = property(lambda self: self._beside["_stderr"])
    metrics_excess = property(lambda self: self._beside["_excess"])
    """On paths, the metrics less their own chords between the ends, as `excess`; their errors are paired."""
    metrics_excess_stderr = property(lambda self: self._beside["_excess_stderr"])
    metrics_delta_stderr = property(lambda self: self._beside["_delta_stderr"])
    """On lines and planes, paired errors of the metrics' changes from theta, as those of the loss."""

    def documented(self) -> dict[str, Tensor]:
        """By the names that `asdict()` has."""
        every = self._beside.items()
        return {f"metric_{name}{ending}": value for ending, values in every for name, value in values.items()}

    def documented_errors(self) -> dict[str, Tensor]:
        """By the names of the values that they are of."""
        every = ((ending, self._beside.get(f"{ending}_stderr", {})) for ending in ("", "_excess"))
        return {f"metric_{name}{ending}": value for ending, errors in every for name, value in errors.items()}


def by_ending(known: Mapping[str, Means], ending: str = "") -> dict[str, dict[str, Tensor]]:
    """Values and errors apart."""
    values = {name: each.value for name, each in known.items()}
    return {ending: values, f"{ending}_stderr": {name: each.stderr for name, each in known.items()}}


def estimate(sums: Float[Tensor, " n"], weights: Float[Tensor, " n"]) -> Estimate:
    """The mean over tokens of sums per sequence, with its error over the sequences that score something."""
    value, stderr = means(sums[None], weights)
    return Estimate(value[0], stderr[0], int((weights != 0).sum()))
