"""What `directional_losses` returns: the samples, the settings, and the statistics computed from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.estimate import Estimate
from ..core.keys import Key
from . import directional_text, statistics
from .notes import curvature_and_step, large_step, low_correlation, undecided_signs
from .precision import Realised
from .resolution import loss_rounding, unresolved_step, without_errors
from .sequences import Residuals, crossed
from .truncation import Truncation, central_second_difference, rounding_bound

_STATISTICS: tuple[tuple[str, Callable[..., Estimate], tuple[str, ...]], ...] = (
    ("loss_mean", statistics.mean, ("loss",)),
    ("loss_std", statistics.spread, ("loss",)),
    ("delta_mean", statistics.mean, ("delta",)),
    ("delta_std", statistics.spread, ("delta",)),
    ("landscape_roughness", statistics.variation, ("loss",)),
    ("dir_grad_mean", statistics.mean, ("dir_grad",)),
    ("dir_grad_std", statistics.spread, ("dir_grad",)),
    ("dir_grad_delta_corr", statistics.correlation, ("dir_grad", "delta")),
    ("curvature_mean", statistics.mean, ("curvature",)),
    ("curvature_std", statistics.spread, ("curvature",)),
    *((f"curvature_p{p}", partial(statistics.quantile, q=p / 100), ("curvature",)) for p in (10, 50, 90)),
    ("rayleigh_mean", statistics.mean, ("rayleigh",)),
    ("delta_mean_negative", statistics.mean, ("delta_negative",)),
    ("loss_mean_negative", statistics.mean, ("negative",)),
    ("loss_std_negative", statistics.spread, ("negative",)),
)
"""By their documented names: what is made of which columns."""


_SIGNED = ("delta", "dir_grad", "curvature")
AGREEMENT = 0.05
"""Share of their size by which slopes and two-sided differences may differ where one stands for the other."""


class Plan(NamedTuple):
    """How the samples were evaluated. The same plan on the same machine gives the same bits."""

    lazy: bool
    chunk: int
    threads: int


@dataclass(frozen=True, eq=False, repr=False)
class DirectionalLosses:
    r"""Losses along random directions; made by `directional_losses`, whose docstring has the formulas.

    Samples are float64 tensors of shape (n,) on the CPU, one entry per direction, non-finite ones included. Statistics
    are over the finite ones: an `Estimate` each, nan where too few samples define it. sd is the sample value (n - 1).
    Those whose terms per sequence are known (a `Crossed`) have an error over sequences, too, and one over both: a loss change
    always, slopes with two sides, from $(L_s^+ - L_s^-)/2h$ of each sequence s, curvatures by difference, and exact ones from
    the second derivatives of single sequences along some directions. It takes the sequences for a random sample.
    Direction norms are those by construction: 1, or that of the parameters that move.
    `asdict()` gives the documented dictionary.
    """

    baseline_loss: float
    losses: Float[Tensor, " n"]
    losses_negative: Float[Tensor, " n"] | None
    slopes: Float[Tensor, " n"] | None
    exact_curvatures: Float[Tensor, " n"] | None
    direction_norms: Float[Tensor, " n"]
    param_norm: float
    span: float
    actual_span: float
    normalize: str
    distribution: str
    relative_span: bool
    global_renorm: bool
    compute_curvature: bool
    unit_roundoff: float
    homogeneous_dtype: bool
    realised: Realised | None
    """What rounding to half precision makes of the step, measured on the first direction; None in full precision."""
    key: Key
    plan: Plan
    num_forwards: int
    num_gradients: int
    num_jvps: int
    num_second_jvps: int
    num_matvecs: int = 0
    residuals: Residuals | None = None
    finer: Float[Tensor, "m 4"] | None = None
    """Losses of the first m directions at +h/2, -h/2, +h/4, -h/4, where curvatures are differences."""
    unmoved: float = 0.0
    """Share of the weights that do not move at all at this step, by rounding; measured on the first direction."""

    @property
    def n_samples(self) -> int:
        """The number of valid samples: finite losses at +span."""
        return int(self.losses.isfinite().sum())

    @property
    def n_nonfinite_pos(self) -> int:
        return len(self.losses) - self.n_samples

    @property
    def n_nonfinite_neg(self) -> int:
        return 0 if self.losses_negative is None else int((~self.losses_negative.isfinite()).sum())

    @property
    def deltas(self) -> Float[Tensor, " n"]:
        """Loss change at +span."""
        return self.losses - self.baseline_loss

    @property
    def curvatures(self) -> Float[Tensor, " n"] | None:
        """Second derivative along each direction per unit of the coefficient: exact, or the two-sided difference."""
        if not self.compute_curvature:
            return None
        if self.exact_curvatures is not None:
            return self.exact_curvatures
        assert self.losses_negative is not None
        return central_second_difference(self.losses, self.losses_negative, self.baseline_loss, self.actual_span)

    @property
    def rayleigh_quotients(self) -> Float[Tensor, " n"] | None:
        """Curvature per unit of distance, c / ||d||^2: comparable between modes, spans and models."""
        return None if self.curvatures is None else self.curvatures / self.direction_norms.square()

    @property
    def curvature_noise_floor(self) -> float:
        r"""How much rounding alone can move a curvature, an order of magnitude; 0 for exact ones in full precision.

        In full precision `rounding_bound`. In half precision it is measured: $\sqrt6\,\epsilon / h^2$ for an error
        $\epsilon$ of each loss (`realised.loss_error`), and rms(s) a / h for two steps that are not quite opposite, which
        let the slope s in (a is `realised.asymmetry`, s the two-sided slopes). nan for exact curvatures in half
        precision: rounding inside the model moves them too, by an amount that is not measured.
        """
        if self.exact_curvatures is not None:
            return 0.0 if self.realised is None else math.nan
        if self.realised is not None and self.losses_negative is not None and math.isfinite(self.realised.loss_error):
            h = self.actual_span
            slopes = _finite(self.losses - self.losses_negative) / (2 * h)
            steps = float(slopes.square().mean().sqrt()) * self.realised.asymmetry / h
            return math.sqrt(6) * self.realised.loss_error / h**2 + steps
        sides = [self.losses] if self.losses_negative is None else [self.losses, self.losses_negative]
        level = max(abs(self.baseline_loss), *(abs(x) for side in sides for x in _finite(side).tolist()), 0.0)
        return rounding_bound(level, self.actual_span, self.unit_roundoff)

    @property
    def n_curvatures_undecided(self) -> int:
        """Directions whose curvature has a sign that rounding may have decided: |c| below the noise floor."""
        return (
            0 if self.curvatures is None else int((_finite(self.curvatures).abs() < self.curvature_noise_floor).sum())
        )

    @property
    def precision_note(self) -> str | None:
        """That rounding may decide signs of curvatures here, and what to do; None where it does not."""
        if not (few := self.n_curvatures_undecided) or self.curvatures is None:
            return None
        half = self.realised is not None
        return undecided_signs(few, len(self.curvatures), self.curvature_noise_floor, half=half)

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
    def step_note(self) -> str | None:
        """That the step, not the sampling, decides the mean curvature, or that it is not resolved; None where it is."""
        known = self.truncation
        return None if known is None else curvature_and_step(known, self.estimates["curvature_mean"], self.actual_span)

    @property
    def loss_rounding(self) -> float:
        """By how much rounding alone may move a loss change; see `resolution.loss_rounding`."""
        num = 0 if self.residuals is None else self.residuals.num
        return loss_rounding(self.baseline_loss, self.unit_roundoff, num, self.realised)

    @property
    def resolution_note(self) -> str | None:
        """Why loss changes at this step are not resolved, so that they have no errors and no tests; None where they are."""
        return unresolved_step(self.unmoved, Estimate.of(_finite(self.deltas)), self.loss_rounding)

    @property
    def displacement(self) -> float:
        """Distance travelled in parameter space, span x ||d||."""
        return self.actual_span * float(self.direction_norms.mean())

    @property
    def relative_step(self) -> float:
        """Displacement over ||theta||; the document's span / ||theta|| where ||d|| = 1."""
        return self.displacement / self.param_norm if self.param_norm else math.nan

    @property
    def n_samples_for_corr(self) -> int:
        """Directions where both the slope and the loss are finite."""
        return 0 if self.slopes is None else int((self.slopes.isfinite() & self.losses.isfinite()).sum())

    @property
    def columns(self) -> dict[str, Float[Tensor, " n"]]:
        """The samples of every quantity that is there."""
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

    def rows(self, quantity: str) -> Float[Tensor, "n g"] | None:
        """What each sequence adds to that quantity beside its mean over sequences; None where that is not known."""
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
        off = _finite((self.losses - self.losses_negative) / (2 * self.actual_span) - self.slopes)
        return bool(off.norm() <= AGREEMENT * _finite(self.slopes).norm())

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Every sampled statistic by its documented name, with its standard errors over directions and over sequences."""
        columns = self.columns
        estimates = {
            name: self._estimated(statistic, {quantity: columns[quantity] for quantity in over})
            for name, statistic, over in _STATISTICS
            if all(quantity in columns for quantity in over)
        }
        return (
            estimates if self.resolution_note is None else without_errors(estimates, self.exact_curvatures is not None)
        )

    def _estimated(self, statistic: Callable[..., Estimate], columns: dict[str, Tensor]) -> Estimate:
        """A statistic of these columns, over the directions where all of them are finite."""
        seen = torch.stack(list(columns.values())).isfinite().all(0)
        rows = [None if (row := self.rows(quantity)) is None else row[seen] for quantity in columns]
        return crossed(statistic, [samples[seen] for samples in columns.values()], rows)

    @cached_property
    def baseline(self) -> Estimate:
        """The loss at theta with its standard error over sequences; nan where that is not known."""
        if self.residuals is None:
            return Estimate(torch.tensor(self.baseline_loss), torch.tensor(math.nan), 0)
        centre = self.residuals.centre
        stderr = (
            (centre.square().sum() * len(centre) / (len(centre) - 1)).sqrt()
            if len(centre) > 1
            else centre[0] * math.nan
        )
        return Estimate(centre.new_tensor(self.baseline_loss), stderr, self.residuals.num)

    @property
    def signs(self) -> dict[str, statistics.Signs]:
        """Of loss changes and, where they are there, of slopes and curvatures: how many are above and below 0."""
        lost = (
            set() if self.resolution_note is None else {"delta", "curvature" if self.exact_curvatures is None else ""}
        )
        tests = {name: statistics.signs(_finite(x)) for name, x in self.columns.items() if name in _SIGNED}
        return {name: test._replace(p_value=math.nan) if name in lost else test for name, test in tests.items()}

    @property
    def note(self) -> str | None:
        """Why slopes do not predict the loss changes here, from the numbers; None where they do, or were not asked for."""
        if self.slopes is None:
            return None
        corr = float(self.estimates["dir_grad_delta_corr"].value)
        return low_correlation(corr, self.deltas, self.slopes, self.actual_span)

    def asdict(self) -> dict[str, Any]:
        """The documented dictionary, then standard errors, settings, costs and per-direction arrays.

        `<name>_stderr` is over directions; where terms per sequence are known, `<name>_stderr_data` is over sequences and
        `<name>_stderr_total` over both, with `<name>_dof` degrees of freedom.

        Plain numbers, strings and numpy arrays; keys of what was not asked for are absent, as documented.
        """
        finite = _finite(self.losses)
        values: dict[str, Any] = {"baseline_loss": self.baseline_loss}
        values["loss_max"] = float(finite.max()) if len(finite) else math.nan
        values["loss_min"] = float(finite.min()) if len(finite) else math.nan
        values |= {name: float(estimate.value) for name, estimate in self.estimates.items()}
        for name, estimate in self.estimates.items():
            values |= estimate.named(name)
        values["baseline_loss_stderr_data"] = float(self.baseline.stderr)
        values["n_sequences"] = 0 if self.residuals is None else self.residuals.num
        for name, (above, below, p) in self.signs.items():
            values |= {f"{name}_n_above": above, f"{name}_n_below": below, f"{name}_sign_p_value": p}
        values["delta_largest_share"] = statistics.largest_share(_finite(self.deltas))
        values |= {"unmoved": self.unmoved, "resolution_note": self.resolution_note}
        values["relative_step_note"] = large_step(self.relative_step)
        if self.slopes is not None:
            values["n_samples_for_corr"] = self.n_samples_for_corr
        if self.compute_curvature:
            values["curvature_noise_floor"] = self.curvature_noise_floor
            values["n_curvatures_undecided"] = self.n_curvatures_undecided
            values["precision_note"] = self.precision_note
        if self.truncation is not None:
            values |= self.truncation.bias.named("curvature_truncation")
            values |= {"curvature_settling": self.truncation.settling, "curvature_status": self.truncation.status}
            values["step_note"] = self.step_note
        if self.realised is not None:
            values |= {f"realised_{name}": value for name, value in self.realised._asdict().items()}
        return values | directional_text.settings(self) | directional_text.arrays(self)

    def __str__(self) -> str:
        return directional_text.plain(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same table, for notebooks."""
        return directional_text.page(self)


def _finite(x: Tensor) -> Tensor:
    return x[x.isfinite()]
