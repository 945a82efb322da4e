"""Losses of merged models by method, coefficient and task, beside those of single models and of quadratics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.keys import Key
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted

Table = Float[Tensor, "m c k"]
Forms = Float[Tensor, "m k"]
AXES = ("method", "coefficient", "task")


class MergeCurves(Result):
    """Losses on the lines from the base through merged models; made by `merge_curves`."""

    losses: Table = quantity("loss", unit="loss", per=AXES, stderr="losses_stderr", shown=False)
    losses_stderr: Table
    deltas: Table = quantity("loss above the base", unit="loss", per=AXES, stderr="deltas_stderr", shown=False)
    deltas_stderr: Table
    single_losses: Float[Tensor, "s k"] = quantity(
        "loss of a single model", unit="loss", per=("model", "task"), stderr="single_losses_stderr"
    )
    single_losses_stderr: Float[Tensor, "s k"]
    best_index: list[int] = internal()
    best_loss: Float[Tensor, " m"] = quantity(
        "mean loss at the best coefficient, cross-fitted", unit="loss", per="method", stderr="best_loss_stderr"
    )
    best_loss_stderr: Float[Tensor, " m"]
    gain: Float[Tensor, " m"] = quantity(
        "mean loss above the best single model", unit="loss", per="method", stderr="gain_stderr"
    )
    gain_stderr: Float[Tensor, " m"]
    coefficients: Float[Tensor, " c"] = internal()
    methods: list[str] = internal()
    tasks: list[str] = internal()
    best_single: int = internal()
    density: float
    drop: float
    num_shared: int
    """Sequences that more than one task has."""
    key: Key
    increase: Forms | None = quantity(
        "loss above the task's own expert", unit="loss", per=("method", "task"), stderr="increase_stderr", default=None
    )
    increase_stderr: Forms | None = None
    slope: Forms | None = quantity("its linear term", unit="loss", per=("method", "task"), default=None)
    quadratic: Forms | None = quantity("half the Gauss-Newton form", unit="loss", per=("method", "task"), default=None)
    diagonal: Forms | None = quantity(
        "half the form of the Fisher diagonal", unit="loss", per=("method", "task"), default=None
    )

    @derived("mean loss over tasks", unit="loss", per=("method", "coefficient"), stderr="mean_losses_stderr")
    def mean_losses(self) -> Float[Tensor, "m c"]:
        return self.losses.mean(-1)

    @property
    def mean_losses_stderr(self) -> Float[Tensor, "m c"]:
        return mean_error(self.losses_stderr, self.num_shared)

    @derived("mean loss above the base", unit="loss", per=("method", "coefficient"), stderr="mean_deltas_stderr")
    def mean_deltas(self) -> Float[Tensor, "m c"]:
        """Over tasks."""
        return self.deltas.mean(-1)

    @property
    def mean_deltas_stderr(self) -> Float[Tensor, "m c"]:
        """Paired."""
        return mean_error(self.deltas_stderr, self.num_shared)

    @derived("best coefficient", per="method")
    def best_coefficient(self) -> Float[Tensor, " m"]:
        """Of the least mean loss on the grid, all data; nan where all losses are."""
        return torch.where(self.mean_losses.isnan().all(1), math.nan, self.coefficients[torch.tensor(self.best_index)])

    @derived("diagonal over Gauss-Newton form", per=("method", "task"))
    def diagonal_ratio(self) -> Forms | None:
        """1 where the diagonal is all that counts; below, parameters move together in directions that the loss feels."""
        return None if self.diagonal is None or self.quadratic is None else self.diagonal / self.quadratic

    @property
    def coords(self) -> dict[str, list[object]]:
        return {
            "method": list(self.methods), "coefficient": self.coefficients.tolist(), "task": list(self.tasks),
            "model": ["base", *self.tasks],
        }  # fmt: skip

    @property
    def head(self) -> str:
        return f"{len(self.methods)} ways to merge the models of {len(self.tasks)} tasks"

    @property
    def notes(self) -> list[str]:
        single = ["base", *self.tasks][self.best_single]
        made = [
            f"the best single model over all tasks is {single}; best coefficients are chosen on half of the sequences for "
            "the other half, and increases and their quadratics are at the one of all sequences."
        ]
        ends = [m for m, i in zip(self.methods, self.best_index, strict=True) if i == len(self.coefficients) - 1 > 0]
        if ends:
            made.append(f"the largest coefficient is the best of {', '.join(ends)}: the minimum may lie beyond.")
        if not bool(self.losses.isfinite().all()):
            made.append("a loss is not finite at some coefficient, which is not the best.")
        if bool((self.losses_stderr.isnan() & self.losses.isfinite()).any()):
            made.append("a task of one sequence has no error, and there are no halves to choose and measure on.")
        if self.num_shared:
            made.append(
                f"tasks have {counted(self.num_shared, 'sequence')} in common: errors of means over tasks are their largest."
            )
        if any(method.startswith("dare") for method in self.methods):
            made.append("DARE has one draw of masks: errors are over sequences alone, and other keys have other masks.")
        if self.quadratic is not None:
            made.append("slopes and quadratics are of these sequences, diagonals of these draws, and have no errors.")
        return made

    def with_forms(self, forms: Mapping[str, Forms]) -> MergeCurves:
        """With increases and their quadratics."""
        return replace(self, **forms)  # type: ignore[arg-type]


def mean_error(stderrs: Float[Tensor, "*m k"], num_shared: int) -> Float[Tensor, "*m"]:
    """Of a mean over tasks: of independent sequences, or at most, where some are the same."""
    return stderrs.mean(-1) if num_shared else stderrs.square().sum(-1).sqrt() / stderrs.shape[-1]
