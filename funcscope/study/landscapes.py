"""What the catalogue measures of the landscape around one model: random directions, planes, lines, lengths of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.directions import Normalize, directions, stack
from ..core.estimate import Estimate
from ..core.keys import Distribution, Key, fold_in
from ..core.layout import Params
from ..core.objective import Loss
from ..core.result import Result, internal, quantity
from ..core.tables import counted
from ..curvature.derivatives import in_float64
from ..curvature.hessian import hessian
from ..landscape.axes import plane_directions
from ..landscape.directional import Sampling, prepare
from ..landscape.flatness import flatness_profile as profile
from ..landscape.planes import LossLines, LossPlane, loss_plane
from ..landscape.planes import loss_lines as lines
from ..landscape.sampling import SamplingSettings
from ..linalg.trace import hutchinson_trace

EPSILONS = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
STILL = 1e-4
"""Share of the shortest step at which only rounding is left: there the loss changes by 1e-8 of what it does at that step."""


def directional(
    loss: Loss,
    params: Params,
    *,
    key: Key,
    n_samples: int = 50,
    span: float = 0.1,
    normalize: Normalize = "filter",
    distribution: Distribution = "normal",
    relative_span: bool = False,
    slopes: bool = True,
    curvature: Literal["difference", "exact", "none"] = "difference",
    chunk: int | None = None,
) -> Sampling:
    """Losses, slopes and curvatures along random directions, on both sides; see `directional_losses`."""
    return prepare(
        loss,
        params,
        SamplingSettings(
            key=key, num=n_samples, lengths=(span,), normalize=normalize, distribution=distribution,
            relative=relative_span, slope="auto" if slopes else None, chunk=chunk,
            curvature=None if curvature == "none" else curvature,
        ),
    )  # fmt: skip


def loss_landscape_2d(
    loss: Loss,
    theta: Tensor,
    *,
    key: Key,
    n_points: int = 25,
    span: float = 0.1,
    normalization: Normalize = "layer",
    chunk: int | None = None,
) -> LossPlane:
    """The loss on the plane through theta along two random directions, orthogonal in every group; see `loss_plane`."""
    base = loss.net.layout.unravel(theta)
    axes = plane_directions(loss.net, key=key, normalize=normalization, base=base)
    surface = loss_plane(loss, theta, axes, num=n_points, span=span, chunk=chunk)
    return replace(surface, axes=surface.axes.within_span())


class FlatnessProfile(Result):
    """Mean loss changes at several lengths of the step beside what the Hessian says of them; made by `flatness_profile`."""

    mean_delta_loss: Tensor = quantity("mean loss change", unit="loss", per="epsilon", stderr="mean_delta_loss_stderr")
    mean_delta_loss_stderr: Tensor = quantity("its standard error", unit="loss", per="epsilon", shown=False)
    pair_mean: Tensor = quantity("mean change of both sides", unit="loss", per="epsilon", stderr="pair_mean_stderr")
    pair_mean_stderr: Tensor = quantity("its standard error", unit="loss", per="epsilon", shown=False)
    expected_delta_loss: Tensor = quantity(
        "change by the trace of the Hessian", unit="loss", per="epsilon", stderr="expected_delta_loss_stderr"
    )
    expected_delta_loss_stderr: Tensor = quantity("its standard error", unit="loss", per="epsilon", shown=False)
    rounding_delta_loss: float = quantity("what rounding leaves of a pair mean", unit="loss")
    trace: Estimate = quantity("trace of the Hessian", name="hessian_trace", unit="loss per distance^2")
    baseline_loss: float = quantity("loss", unit="loss", shown=False)
    param_norm: float
    epsilon: list[float] = internal()

    @property
    def coords(self) -> Mapping[str, list[float]]:
        return {"epsilon": self.epsilon}

    @property
    def axis_titles(self) -> Mapping[str, str]:
        return {"epsilon": "epsilon, the length of the step"}

    @property
    def head(self) -> str:
        return f"loss changes at {counted(len(self.epsilon), 'length')} of the step"

    @property
    def notes(self) -> list[str]:
        """The errors are over directions alone; and where a pair mean is no larger than what rounding leaves of one."""
        small = (self.pair_mean.abs() <= self.rounding_delta_loss).tolist()
        names = [f"{length:g}" for length, is_small in zip(self.epsilon, small, strict=True) if is_small]
        lost = [f"not resolved from rounding: the mean change of both sides at epsilon {', '.join(names)}."]
        return ["errors are over directions, on these data.", *(lost if names else [])]


def flatness_profile(
    loss: Loss,
    theta: Tensor,
    *,
    key: Key,
    n_directions: int = 50,
    epsilons: Sequence[float] = EPSILONS,
    products: int = 32,
) -> FlatnessProfile:
    """The mean loss change at several epsilons beside eps^2 tr(H) / 2P: where the two part, the Hessian does not describe it.

    The trace is Hutchinson's, from `products` random signs. All of it in float64: the losses of the shortest steps differ by
    less than float32 resolves. `rounding_delta_loss` is what is left of the pair mean in steps that are far too short to
    change the loss, its root mean square over directions: a pair mean near it is rounding.
    """
    loss, theta = in_float64(loss), theta.double()
    *each, still = profile(loss, theta, key=key, epsilons=(*epsilons, STILL * min(epsilons)), n_directions=n_directions)
    trace = hutchinson_trace(hessian(loss, theta), theta, key=fold_in(key, "trace"), num=products)
    expected = [one.expected_from_trace(trace) for one in each]
    return FlatnessProfile(
        mean_delta_loss=_column([one.mean_delta_loss.value for one in each]),
        mean_delta_loss_stderr=_column([one.mean_delta_loss.stderr for one in each]),
        pair_mean=_column([one.pair_mean.value for one in each]),
        pair_mean_stderr=_column([one.pair_mean.stderr for one in each]),
        expected_delta_loss=_column([one.value for one in expected]),
        expected_delta_loss_stderr=_column([one.stderr for one in expected]),
        rounding_delta_loss=float(still.even.square().mean().sqrt()),
        trace=Estimate(trace.value, trace.stderr, trace.num),
        baseline_loss=each[0].baseline_loss,
        param_norm=each[0].param_norm,
        epsilon=list(epsilons),
    )


def _column(values: Sequence[Any]) -> Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def loss_lines(
    loss: Loss,
    theta: Tensor,
    *,
    key: Key,
    num_directions: int = 8,
    num: int = 41,
    span: float = 0.5,
    chunk: int | None = None,
) -> LossLines:
    """The loss along a few filter-normalised random directions, on both sides; see `loss_lines`."""
    base = loss.net.layout.unravel(theta)
    rows = stack(directions(loss.net, key=fold_in(key, "profiles"), num=num_directions, base=base))
    along = lines(loss, theta, rows, num=num, span=span, chunk=chunk)
    return replace(along, axes=along.axes.within_span())
