"""The samples of directional losses as columns, the rows of their sequences, and what rounding and the step do to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.estimate import Estimate
from ..core.result import derived
from ..core.standard_errors import crossed
from ..core.tables import ERRORS
from . import caveats
from .precision import Realised, loss_rounding
from .residuals import Residuals
from .truncation import Truncation, central_second_difference, rounding_bound

AGREEMENT = 0.05
"""Share of their size by which slopes and two-sided differences may differ where one stands for the other."""


class Sampled:
    """What directional losses and flatness share: samples along random directions as columns, statistics with two errors."""

    residuals: Residuals | None
    unmoved: float
    loss_rounding: Any
    columns: Any
    """The samples of every quantity that is there."""
    rows: Any
    """Of a quantity, what each sequence adds to it beside its mean over sequences; None where that is not known."""
    lost: Any
    """Of a quantity, why its statistics have no errors and no tests at this step; None where they have."""

    @derived("sequences that score something", shown=False)
    def n_sequences(self) -> int:
        return 0 if self.residuals is None else self.residuals.num

    def unresolved_step(self, quantity: str) -> str | None:
        """Why changes of the loss at this step are not resolved in their dtype."""
        change = Estimate.of(finite(self.columns[quantity]))
        return caveats.unresolved_step(self.unmoved, change, self.loss_rounding)

    def estimated(self, statistic: Callable[..., Estimate], over: Sequence[str], steady: bool = False) -> Any:
        """A statistic of these columns, over the directions where all of them are finite; None where one is not there.

        steady: it does not depend on how well loss changes at the step are resolved.
        """
        columns = self.columns
        if not columns.keys() >= set(over):
            return None
        seen = torch.stack([columns[each] for each in over]).isfinite().all(0)
        rows = [None if (row := self.rows(each)) is None else row[seen] for each in over]
        estimate = crossed(statistic, [columns[each][seen] for each in over], rows)
        return estimate if steady or self.lost(over[0]) is None else scaled(estimate, 1.0, math.nan)


class Columns(Sampled):
    """What `DirectionalLosses` computes from its fields, direction by direction."""

    baseline_loss: float
    losses: Float[Tensor, " n"]
    losses_negative: Float[Tensor, " n"] | None
    slopes: Float[Tensor, " n"] | None
    exact_curvatures: Float[Tensor, " n"] | None
    direction_norms: Float[Tensor, " n"]
    param_norm: float
    actual_span: float
    compute_curvature: bool
    unit_roundoff: float
    realised: Realised | None
    finer: Float[Tensor, "m 4"] | None

    @property
    def deltas(self) -> Float[Tensor, " n"]:
        """Loss change at +span."""
        return self.losses - self.baseline_loss

    @derived("curvature", unit="loss per h^2", per="direction")
    def curvatures(self) -> Float[Tensor, " n"] | None:
        """Second derivative along each direction per unit of the coefficient: exact, or the two-sided difference."""
        if not self.compute_curvature:
            return None
        if self.exact_curvatures is not None:
            return self.exact_curvatures
        assert self.losses_negative is not None
        return central_second_difference(self.losses, self.losses_negative, self.baseline_loss, self.actual_span)

    @derived("curvature per distance", unit="loss per distance^2", per="direction")
    def rayleigh_quotients(self) -> Float[Tensor, " n"] | None:
        """Curvature per unit of distance, c / ||d||^2: comparable between modes, spans and models."""
        return None if self.curvatures is None else self.curvatures / self.direction_norms.square()

    @derived("what rounding may move a curvature by", unit="loss per h^2", shown=False)
    def curvature_noise_floor(self) -> Any:
        r"""How much rounding alone can move a curvature, an order of magnitude; 0 for exact ones in full precision.

        In full precision `rounding_bound`. In half precision it is measured: $\sqrt6\,\epsilon / h^2$ for an error
        $\epsilon$ of each loss (`realised.loss_error`), and rms(s) a / h for two steps that are not quite opposite, which
        let the slope s in (a is `realised.asymmetry`, s the two-sided slopes). nan for exact curvatures in half
        precision: rounding inside the model moves them too, by an amount that is not measured.
        """
        if not self.compute_curvature:
            return None
        if self.exact_curvatures is not None:
            return 0.0 if self.realised is None else math.nan
        if self.realised is not None and self.losses_negative is not None and math.isfinite(self.realised.loss_error):
            h = self.actual_span
            slopes = finite(self.losses - self.losses_negative) / (2 * h)
            steps = float(slopes.square().mean().sqrt()) * self.realised.asymmetry / h
            return math.sqrt(6) * self.realised.loss_error / h**2 + steps
        sides = [self.losses] if self.losses_negative is None else [self.losses, self.losses_negative]
        level = max(abs(self.baseline_loss), *(abs(x) for side in sides for x in finite(side).tolist()), 0.0)
        return rounding_bound(level, self.actual_span, self.unit_roundoff)

    @derived("curvatures whose sign rounding may decide", shown=False)
    def n_curvatures_undecided(self) -> int | None:
        """Directions whose curvature has a sign that rounding may have decided: |c| below the noise floor."""
        known = self.curvatures
        return None if known is None else int((finite(known).abs() < self.curvature_noise_floor).sum())

    @cached_property
    def truncation(self) -> Truncation | None:
        """Second differences at three steps, along the first directions; None for exact curvatures."""
        if self.finer is None or self.curvatures is None:
            return None
        at, h, num = self.baseline_loss, self.actual_span, len(self.finer)
        half, quarter = (
            central_second_difference(self.finer[:, i], self.finer[:, i + 1], at, h / (2 + i)) for i in (0, 2)
        )
        every = torch.stack([self.curvatures[:num], half, quarter])
        return Truncation(*every[:, every.isfinite().all(0)], noise=self.curvature_noise_floor)

    @property
    def loss_rounding(self) -> float:
        """By how much rounding alone may move a loss change; see `precision.loss_rounding`."""
        return loss_rounding(self.baseline_loss, self.unit_roundoff, self.n_sequences, self.realised)

    @derived("length of the step", shown=False)
    def displacement(self) -> float:
        """Distance travelled in parameter space, span x ||d||."""
        return self.actual_span * float(self.direction_norms.mean())

    @derived("length of the step over ||theta||", shown=False)
    def relative_step(self) -> float:
        """Displacement over ||theta||; the document's span / ||theta|| where ||d|| = 1."""
        return self.displacement / self.param_norm if self.param_norm else math.nan

    @property
    def columns(self) -> dict[str, Float[Tensor, " n"]]:
        negative = self.losses_negative
        columns = {
            "loss": self.losses,
            "negative": negative,
            "delta": self.deltas,
            "delta_negative": None if negative is None else negative - self.baseline_loss,
            "delta_two_sided": None if negative is None else (self.losses + negative) / 2 - self.baseline_loss,
            "dir_grad": self.slopes,
            "curvature": self.curvatures,
            "rayleigh": self.rayleigh_quotients,
        }
        return {name: samples for name, samples in columns.items() if samples is not None}

    @cached_property
    def resolution_note(self) -> str | None:
        """Why loss changes at this step are not resolved, so that they have no errors and no tests; None where they are."""
        return self.unresolved_step("delta")

    def lost(self, quantity: str) -> str | None:
        steady = self.exact_curvatures is not None and quantity in ("curvature", "rayleigh")
        return None if steady else self.resolution_note

    def rows(self, quantity: str) -> Float[Tensor, "n g"] | None:
        if self.residuals is None:
            return None
        bent = quantity in ("curvature", "rayleigh")
        if bent and self.exact_curvatures is not None:
            rows = self.residuals.exact
        elif quantity == "dir_grad" and not self._slopes_are_differences:
            rows = None
        else:
            rows = self.residuals.of("curvature" if bent else quantity, self.actual_span)
        return rows / self.direction_norms.square()[:, None] if rows is not None and quantity == "rayleigh" else rows

    @property
    def _slopes_are_differences(self) -> bool:
        """At this step, differences of both sides are the slopes: then the slopes of single sequences are theirs, too."""
        if self.slopes is None or self.losses_negative is None:
            return False
        off = finite((self.losses - self.losses_negative) / (2 * self.actual_span) - self.slopes)
        return bool(off.norm() <= AGREEMENT * finite(self.slopes).norm())


def finite(x: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
    """The samples that are finite."""
    return x[x.isfinite()]


def scaled(estimate: Estimate, factor: float, share: float | None = None) -> Estimate:
    """The estimate times a factor; its errors times the size of that, or a share of their own: nan where there are none."""
    size = abs(factor) if share is None else share
    errors = {name: getattr(estimate, name) * size for name in ERRORS if hasattr(estimate, name)}
    return replace(estimate, value=estimate.value * factor, **errors)
