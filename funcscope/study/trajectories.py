"""What the catalogue measures of several models together: the curves, plane and barriers of a run, two models compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.estimate import Estimate, p_value
from ..core.objective import Loss
from ..core.result import Result, derived, internal, quantity
from ..core.standard_errors import ratio_stderr
from ..core.tables import counted
from ..landscape.axes import principal_directions
from ..landscape.barriers import BarrierMatrix
from ..landscape.compare import compare_directional
from ..landscape.compare_result import Comparison
from ..landscape.directional_result import DirectionalLosses
from ..landscape.path import barrier_matrix as barriers
from ..landscape.planes import LossPlane, loss_plane
from .measures import MeanLoss

MARGIN = 0.25
"""Of the plane through a trajectory: how far it goes beyond it, as a share of its extent."""


class TrainingCurves(Result):
    """Losses and accuracies over training, as they were written down while it went on."""

    train_loss: Tensor = quantity("train loss", unit="loss", per="step")
    test_loss: Tensor = quantity("test loss", unit="loss", per="step")
    train_accuracy: Tensor = quantity("train accuracy", unit="share", per="step")
    test_accuracy: Tensor = quantity("test accuracy", unit="share", per="step")
    steps: list[int] = internal()

    @property
    def coords(self) -> Mapping[str, list[int]]:
        return {"step": self.steps}

    @property
    def head(self) -> str:
        return f"training, {counted(len(self.steps), 'point')}"


def training_curves(curves: Mapping[str, np.ndarray]) -> TrainingCurves:
    """Loss and accuracy on the training and the test data, over the steps of training."""
    names = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    return TrainingCurves(**_columns(curves, names), steps=_steps(curves))


class InductionCurves(Result):
    """How induction heads grew, as it was written down during training; made by `induction_curves`."""

    second_loss: Tensor = quantity("loss on the second copy", unit="nats", per="step", stderr="second_loss_stderr")
    gain: Tensor = quantity("gain in the second copy", unit="nats", per="step", stderr="gain_stderr")
    induction: Tensor = quantity("largest induction score", per="step", stderr="induction_stderr")
    previous: Tensor = quantity("largest previous-token score of layer 0", per="step", stderr="previous_stderr")
    second_loss_stderr: Tensor
    gain_stderr: Tensor
    induction_stderr: Tensor
    previous_stderr: Tensor
    steps: list[int] = internal()

    @property
    def coords(self) -> Mapping[str, list[int]]:
        return {"step": self.steps}

    @property
    def head(self) -> str:
        return f"induction over training, {counted(len(self.steps), 'point')}"


def induction_curves(curves: Mapping[str, np.ndarray]) -> InductionCurves:
    """The gain in the second copy of a random block, and the heads that look for what came before, over training.

    Per token that can be known, the loss on the second copy; how much lower it is than on the same tokens in the first one;
    the largest induction score (attention to the token behind the earlier occurrence of the current one) of all heads, and
    the largest previous-token score of the heads of the first layer. Errors are over sequences.

    Raises ValueError for the curves of a family without these columns. Olsson et al. (2022), arXiv:2209.11895.
    """
    names = [f"{name}{end}" for end in ("", "_stderr") for name in ("second_loss", "gain", "induction", "previous")]
    if missing := [name for name in names if name not in curves]:
        raise ValueError(f"the curves of this run have no {missing[0]!r}: they are those of the family `induction`.")
    return InductionCurves(**_columns(curves, names), steps=_steps(curves))


class TrajectoryPlane(Result):
    """The loss on the plane of the two principal directions of training, with the checkpoints on it."""

    surface: LossPlane = internal()
    coordinates: Tensor = quantity("coordinate of the checkpoint", per=("step", "axis"))
    explained: Tensor = quantity("share of the squared distances", per="axis")
    residuals: Tensor = quantity("distance from the plane", per="step")
    steps: list[int] = internal()

    @derived("loss", unit="loss", per=("x", "y"), stderr="grid_stderr", shown=False)
    def grid_losses(self) -> Tensor:
        return self.surface.grid_losses

    @property
    def grid_stderr(self) -> Tensor:
        return self.surface.grid_stderr

    @property
    def coords(self) -> Mapping[str, Any]:
        return {**self.surface.coords, "step": self.steps}

    @property
    def head(self) -> str:
        return f"{counted(len(self.steps), 'checkpoint')} on the plane of their principal axes"

    @property
    def notes(self) -> list[str]:
        return self.surface.notes


def trajectory_plane(
    loss: Loss, thetas: Sequence[Tensor], steps: Sequence[int], *, num: int = 25, chunk: int | None = None
) -> TrajectoryPlane:
    """The loss on the plane of the two principal directions of training, with the checkpoints projected on it.

    The plane goes through the last checkpoint; `principal_directions` says what the shares mean. Running statistics, where
    the network tracks any, are re-estimated from the data at every point: checkpoints far from the last have others.
    """
    if len(thetas) < 3:
        raise ValueError(
            f"a plane through training needs three checkpoints or more, got {len(thetas)}: pass more of them."
        )
    path = principal_directions(thetas, num=2, center="last")
    low, high = path.coordinates.amin(0), path.coordinates.amax(0)
    pad = MARGIN * torch.maximum(high - low, 1e-3 * (high - low).max())
    span = tuple((float(a), float(b)) for a, b in zip(low - pad, high + pad, strict=True))
    surface = loss_plane(
        loss, path.origin, path.axes, num=num, span=span, chunk=chunk, buffers="reestimate"  # type: ignore[arg-type]
    )  # fmt: skip
    plane = replace(surface, axes=surface.axes.within_span())
    return TrajectoryPlane(plane, path.coordinates, path.explained, path.residuals, list(steps))


class LossComparison(Result):
    """The losses of two models on the same sequences; made by `loss_comparison`."""

    first: Estimate = quantity("loss of the first", unit="loss")
    second: Estimate = quantity("loss of the second", unit="loss")
    difference: Estimate = quantity("second - first, paired", unit="loss")
    names: tuple[str, str] = internal()

    @derived("p of Student's t test that they are equal")
    def p_value(self) -> float:
        return p_value(self.difference)

    @property
    def head(self) -> str:
        return f"{self.names[1]} - {self.names[0]}, paired over {counted(self.difference.num, 'sequence')}"

    @property
    def notes(self) -> list[str]:
        if not bool(self.difference.value.isfinite()):
            return ["a loss is not finite: there is no difference. Check the weights and the texts."]
        return ["one sequence: there is no error, and no test."] if self.difference.num < 2 else []


def loss_comparison(names: Sequence[str], losses: Sequence[MeanLoss]) -> LossComparison:
    """How much one model's loss differs from another's on the same data: what sequences have in common cancels.

    The standard error is that of the token-weighted mean of the differences, linearised, over sequences. Raises ValueError
    where the two read different tokens or labels: their losses are about different things.
    """
    first, second = losses
    _check_data(names, losses)
    gaps = second.sums - first.sums
    difference = Estimate(gaps.sum() / first.weights.sum(), ratio_stderr(gaps, first.weights), first.num_sequences)
    return LossComparison(first.loss, second.loss, difference, (names[0], names[1]))


def directional_comparison(
    names: Sequence[str], losses: Sequence[MeanLoss], sampled: Sequence[DirectionalLosses]
) -> Comparison:
    """How the loss around one model differs from that around another, direction by direction; see `compare_directional`.

    Raises ValueError where the two read different tokens or labels, and where their parameters differ in names or shapes.
    """
    _check_data(names, losses)
    if losses[0].shapes != losses[1].shapes:
        raise ValueError(
            f"{names[0]} and {names[1]} have parameters of different shapes, and with them no directions in common: "
            "compare their own numbers, `directional_losses` of each."
        )
    return compare_directional(*sampled, names=(names[0], names[1]))


def _check_data(names: Sequence[str], losses: Sequence[MeanLoss]) -> None:
    first, second = losses
    if first.data != second.data:
        raise ValueError(
            f"{names[0]} and {names[1]} make different tokens or labels of the texts, so that their losses are about "
            "different things: give both the same tokenizer, mask token and `label2id`."
        )


def barrier_matrix(loss: Loss, members: Sequence[Any], names: Sequence[str], *, num: int = 11) -> BarrierMatrix:
    """Barriers on the straight lines between every two of the models: which of them share a basin? See `barrier_matrix`."""
    return barriers(loss, [member.end for member in members], num=num, names=list(names))


def _columns(curves: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, Any]:
    return {name: torch.as_tensor(np.asarray(curves[name], dtype=np.float64)) for name in names}


def _steps(curves: Mapping[str, np.ndarray]) -> list[int]:
    return [int(step) for step in curves["step"]]
