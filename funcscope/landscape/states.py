"""Points of a path as losses see them: parameters with the buffers that belong to them, running statistics above all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_device, check_flat
from ..core.layout import Params
from ..core.model import Functional
from ..core.objective import Loss, Theta
from ..core.running import batch_normalised, held_statistics, power_iterations, running_statistics
from .terms import Metric, Values, check_metrics

Buffers = Literal["interpolate", "reestimate", "fixed"]
End = Theta | Functional
"""A model at an end of a path: its parameters alone, or the net itself, which has its buffers."""
Terms = Callable[[Tensor], tuple[Tensor, Tensor]]

USED = {
    "none": [],
    "interpolate": ["Running statistics are interpolated."],
    "reestimate": ["Running statistics are re-estimated from the data."],
    "fixed": ["Running statistics are those of `loss.net` everywhere."],
}
"""What is noted on a result, by the mode."""
COUNTER = "num_batches_tracked"


class EndPoint(NamedTuple):
    """A model at an end of a path, evaluated once."""

    state: Tensor
    """Theta, and behind it the running statistics where these are interpolated."""
    sums: Tensor
    """(1 + k, n) of the loss and of k metrics."""
    weights: Tensor
    reestimated: Tensor | None
    """The loss's sums with statistics re-estimated, where those of the end are its own and those beside it are not."""
    passes: int
    """Over the batches, that this took."""


@dataclass(frozen=True, eq=False)
class States:
    """How the rows of a path become parameters and buffers of the loss's net."""

    loss: Loss
    buffers: Literal["none", "interpolate", "reestimate", "fixed"]
    """"none": the net tracks no statistics, and all modes are one."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """Measured beside the loss, by name."""

    @classmethod
    def of(cls, loss: Loss, buffers: Buffers, metric: Mapping[str, Metric] | None = None) -> States:
        check_choice("buffers", buffers, ("interpolate", "reestimate", "fixed"))
        return cls(loss, buffers if held_statistics(loss.net) else "none", check_metrics(metric))

    def at(self, row: Float[Tensor, " s"]) -> tuple[Loss, Tensor]:
        """The loss with the buffers of that point, and its theta; interpolated statistics are constants to derivatives."""
        theta = row[: self.loss.layout.num]
        if self.buffers == "interpolate":
            return with_statistics(self.loss, self._unravelled(row[len(theta) :].detach())), theta
        if self.buffers == "reestimate":
            return with_statistics(self.loss, running_statistics(self.loss, theta)), theta
        return self.loss, row

    @property
    def passes(self) -> int:
        """Over the batches, for one point between the ends."""
        return 2 if self.buffers == "reestimate" else 1

    def __call__(self, row: Float[Tensor, " s"]) -> Float[Tensor, ""]:
        """The loss at a point, to be trained on: on the statistics of each batch where they are re-estimated."""
        if self.buffers == "reestimate":
            return batch_normalised(self.loss, row)
        loss, theta = self.at(row)
        return loss(theta)

    def terms(self, buffer: Float[Tensor, "k s"]) -> Terms:
        """Sums (1 + k, n) of the loss and of k metrics, and weights, at the rows of a buffer: see `Values.rows`.

        To be mapped where there are several; the only one of a loop is taken apart once.
        """
        functions, is_mapped, layout = tuple(self.metrics.values()), len(buffer) > 1, self.loss.layout

        def terms(row: Tensor) -> tuple[Tensor, Tensor]:
            loss, theta = self.at(row)
            return Values(loss, functions, is_mapped=is_mapped).rows(theta)

        if self.buffers not in ("none", "fixed"):
            return terms
        values = Values(self.loss, functions, is_mapped=is_mapped)
        if is_mapped or any(leaf.dtype != buffer.dtype for leaf in layout.leaves):
            return values.rows
        views = layout.unravel(buffer[0])
        return lambda _: values.rows(views)

    def end(self, end: End, name: str) -> EndPoint:
        """An end checked, flat, and its per-sequence sums: of a net, with its own buffers in every mode but "fixed"."""
        ours, fixed = self.loss.net, self.buffers == "fixed"
        if isinstance(end, Functional):
            _check_alike(ours, end, name, self.buffers)
            theta = self.vector(end.theta, name)
            statistics: Params = {} if fixed else {key: end.buffers[key] for key in held_statistics(ours)}
        else:
            theta = self.vector(end, name)
            statistics = self._of_bare(theta, name)
        loss, state = with_statistics(self.loss, statistics), theta
        if self.buffers == "interpolate":
            state = torch.cat([theta, *(value.flatten() for value in statistics.values())])
        sums, weights = self._evaluated(loss, theta, name)
        if self.buffers != "reestimate" or not isinstance(end, Functional):
            return EndPoint(state, sums, weights, None, self.passes)
        return EndPoint(state, sums, weights, self._evaluated(self.at(state)[0], theta, name)[0][0], 3)

    def vector(self, theta: Theta, name: str) -> Float[Tensor, " p"]:
        """`Loss.vector` of finite numbers."""
        if not isinstance(theta, Mapping):
            check_flat(name, theta, self.loss.layout.num)
        flat = self.loss.vector(theta, name)
        check_device(f"`{name}`", flat.device, "the model", self.loss.net.device)
        if bad := int((~flat.isfinite()).sum()):
            raise ValueError(f"`{name}` must hold finite numbers, {bad} of {len(flat)} are not: no path leads there.")
        return flat

    def _evaluated(self, loss: Loss, theta: Tensor, name: str) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            sums, weights = (x.cpu().double() for x in Values(loss, self.metrics.values()).rows(theta))
        value = float(sums[0].sum() / weights.sum())
        if not math.isfinite(value):
            raise ValueError(
                f"the loss at `{name}` is {value}: barriers are measured from there; check weights and batches."
            )
        return sums, weights

    def _unravelled(self, values: Tensor) -> Params:
        buffers = held_statistics(self.loss.net)
        parts = values.split([buffer.numel() for buffer in buffers.values()])
        pairs = zip(buffers.items(), parts, strict=True)
        return {name: part.view(buffer.shape).to(buffer.dtype) for (name, buffer), part in pairs}

    def _of_bare(self, theta: Tensor, name: str) -> Params:
        """The statistics at a bare theta."""
        ours, singular = held_statistics(self.loss.net), power_iterations(self.loss.net)
        tied = [*(ours if self.buffers == "interpolate" else ()), *(singular if self.buffers != "fixed" else ())]
        if tied and not torch.equal(theta, self.loss.vector(self.loss.net.params).to(theta.dtype)):
            raise ValueError(
                f"`{name}` is a bare theta other than that of `loss.net`, whose buffers (`{tied[0]}`; {len(tied)} of them) "
                "belong to its own weights: pass the net itself, `fs.functional(model)`. Without one, "
                '`buffers="reestimate"` takes statistics from the data, `buffers="fixed"` those of `loss.net`.'
            )
        return running_statistics(self.loss, theta) if self.buffers == "reestimate" else ours


def with_statistics(loss: Loss, statistics: Params) -> Loss:
    """The loss with these running statistics, which may be functions of theta: nothing is copied."""
    return replace(loss, net=replace(loss.net, buffers={**loss.net.buffers, **statistics}))


def _check_alike(ours: Functional, end: Functional, name: str, buffers: str) -> None:
    """An end is of the loss's architecture: what is neither theta nor running statistics is the same in both."""
    if end.layout.shapes != ours.layout.shapes:
        raise ValueError(
            f"`{name}` is a net of other parameters than `loss.net` ({end.layout.num:,} and {ours.layout.num:,} in theta): "
            "paths lead between models of one architecture, with one choice of `trainable`: of others, compare losses."
        )
    check_device(f"`{name}`", end.device, "the model", ours.device)
    cases = [("frozen parameter", end.frozen, ours.frozen, 'make both nets with `trainable="all"`')]
    if buffers != "fixed":
        sizes = [{key: tuple(x.shape) for key, x in held_statistics(net).items()} for net in (end, ours)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"`{name}` and `loss.net` track different running statistics ({len(sizes[0])} and {len(sizes[1])} buffers): "
                "make both with the same normalising layers."
            )
        remedy = "it is no running statistic that could be interpolated; make it the same, or merge it into the weights"
        cases.append(("buffer", _constants(end), _constants(ours), remedy))
    for what, one, other, remedy in cases:
        if missing := sorted(one.keys() ^ other.keys()):
            raise ValueError(f"the {what} `{missing[0]}` belongs to one of `{name}` and `loss.net` only: {remedy}.")
        for key, value in one.items():
            if not torch.equal(value, other[key].to(value.dtype)):
                raise ValueError(f"the {what} `{key}` of `{name}` differs from that of `loss.net`: {remedy}.")


def _constants(net: Functional) -> Params:
    """Tables, masks: what is no running statistic."""
    statistics = held_statistics(net)
    return {k: v for k, v in net.buffers.items() if k not in statistics and not k.endswith(COUNTER)}
