"""What the catalogue measures of models that were fine-tuned from one base: their task vectors, and merges of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..core.keys import Key
from ..core.objective import Loss
from ..curvature.gram import Blocks
from ..weights import merge_curves as curves_of
from ..weights import task_vectors as vectors_of
from ..weights import ticket_overlap as overlap_of
from ..weights.merge_curves import COEFFICIENTS, USUAL
from ..weights.merge_curves_result import MergeCurves
from ..weights.merging import Method
from ..weights.prunable import Prunable, Scope
from ..weights.task_vectors import TaskVectors
from ..weights.ticket_overlap import TicketOverlap

Losses = Mapping[str, Loss]
Models = Mapping[str, Tensor]


def task_vectors(
    losses: Losses, experts: Models, base: Tensor, *, by: Blocks = "layer", density: float = 0.2
) -> TaskVectors:
    """Differences of fine-tuned models to their base: lengths, cosines, and signs that oppose each other after trimming."""
    layout = next(iter(losses.values())).layout
    return vectors_of(base, [*experts.values()], layout, by=by, density=density, names=[*experts])


def ticket_overlap(
    losses: Losses,
    experts: Models,
    base: Tensor,
    *,
    density: float = 0.5,
    scope: Scope = "global",
    prunable: Prunable = "linear",
) -> TicketOverlap:
    """How much the masks of the largest weights of fine-tuned models and their base overlap beyond chance."""
    layout, names = next(iter(losses.values())).layout, ["base", *experts]
    given = {"density": density, "scope": scope, "prunable": prunable}
    return overlap_of(layout, [base, *experts.values()], names, **given)  # type: ignore[arg-type]


def merge_curves(
    losses: Losses,
    experts: Models,
    base: Tensor,
    *,
    key: Key,
    methods: Sequence[Method] = USUAL,
    coefficients: Sequence[float] = COEFFICIENTS,
    density: float = 0.2,
    drop: float = 0.5,
    shrink: float = 0.9,
    num: int = 8,
) -> MergeCurves:
    """The loss of every task over the coefficient of each way to merge, and what quadratic losses predict."""
    return curves_of(
        losses, experts, base, key=key, methods=methods, coefficients=coefficients, density=density, drop=drop,
        shrink=shrink, num=num,
    )  # fmt: skip


def ties_merging(
    losses: Losses,
    experts: Models,
    base: Tensor,
    *,
    key: Key,
    coefficients: Sequence[float] = COEFFICIENTS,
    density: float = 0.2,
) -> MergeCurves:
    """The loss of every task where the models are merged by TIES: trimmed, signs elected, the agreeing ones averaged."""
    given = {"methods": ("ties",), "coefficients": coefficients, "density": density}
    return curves_of(losses, experts, base, key=key, **given)  # type: ignore[arg-type]


def fisher_merging(
    losses: Losses,
    experts: Models,
    base: Tensor,
    *,
    key: Key,
    coefficients: Sequence[float] = COEFFICIENTS,
    num: int = 8,
) -> MergeCurves:
    """The loss of every task where the models are averaged by their Fisher information, parameter by parameter."""
    given = {"methods": ("fisher",), "coefficients": coefficients, "num": num}
    return curves_of(losses, experts, base, key=key, **given)  # type: ignore[arg-type]
