"""What `directional_losses` returns: the samples, the settings, and the statistics computed from them."""

from __future__ import annotations

import math
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core import statistics
from ..core.estimate import Crossed, Estimate
from ..core.keys import Key
from ..core.pack import storable
from ..core.result import Result, derived, internal, quantity
from ..core.standard_errors import Statistic
from ..core.tables import counted
from . import caveats
from .directional_columns import Columns, finite
from .precision import Realised
from .residuals import Residuals

_SIGNED = ("delta", "dir_grad", "curvature")
_PER_H2 = "loss per h^2"


@storable
class Plan(NamedTuple):
    """How the samples were evaluated. The same plan on the same machine gives the same bits."""

    lazy: bool
    chunk: int
    threads: int

    @property
    def named(self) -> dict[str, int]:
        """By documented names."""
        return {"fast_vec_path": not self.lazy, "chunk": self.chunk, "threads": self.threads}


class DirectionalLosses(Columns, Result):
    r"""Losses along random directions; made by `directional_losses`, whose docstring has the formulas.

    Samples are float64 tensors of shape (n,) on the CPU, one entry per direction, non-finite ones included. Statistics
    are over the finite ones: an `Estimate` each, nan where too few samples define it. sd is the sample value (n - 1).
    Those whose terms per sequence are known (a `Crossed`) have an error over sequences, too, and one over both: a loss change
    always, slopes with two sides, from $(L_s^+ - L_s^-)/2h$ of each sequence s, curvatures by difference, and exact ones from
    the second derivatives of single sequences along some directions. It takes the sequences for a random sample.
    Direction norms are those by construction: 1, or that of the parameters that move. What was not asked for is None.
    `asdict()` gives the documented dictionary.
    """

    baseline_loss: float = quantity("loss at theta", unit="loss", stderr="baseline_loss_stderr_data")
    losses: Float[Tensor, " n"] = quantity("loss at +h", unit="loss", per="direction")
    losses_negative: Float[Tensor, " n"] | None = quantity("loss at -h", unit="loss", per="direction")
    slopes: Float[Tensor, " n"] | None = quantity("slope", unit="loss per h", per="direction")
    exact_curvatures: Float[Tensor, " n"] | None = internal()
    direction_norms: Float[Tensor, " n"] = quantity("norm of the direction", per="direction")
    param_norm: float
    span: float = internal()
    actual_span: float
    normalize: str
    distribution: str
    relative_span: bool
    global_renorm: bool
    compute_curvature: bool
    unit_roundoff: float = internal()
    homogeneous_dtype: bool
    realised: Realised | None
    """What rounding to half precision makes of the step, measured on the first direction; None in full precision."""
    key: Key
    plan: Plan = internal()
    num_forwards: int
    num_gradients: int
    num_jvps: int
    num_second_jvps: int
    num_matvecs: int = 0
    residuals: Residuals | None = internal(default=None)
    finer: Float[Tensor, "m 4"] | None = internal(default=None)
    """Losses of the first m directions at +h/2, -h/2, +h/4, -h/4, where curvatures are differences."""
    unmoved: float = 0.0
    """Share of the weights that do not move at all at this step, by rounding; measured on the first direction."""

    loss_mean = Statistic("mean loss at +h", statistics.mean, "loss", unit="loss", steady=True)
    loss_std = Statistic("sd of the loss at +h", statistics.spread, "loss", unit="loss")
    delta_mean = Statistic("mean loss change at +h", statistics.mean, "delta", unit="loss")
    delta_std = Statistic("sd of the loss change at +h", statistics.spread, "delta", unit="loss")
    landscape_roughness = Statistic("sd over mean of the loss at +h", statistics.variation, "loss")
    dir_grad_mean = Statistic("mean slope", statistics.mean, "dir_grad", unit="loss per h", steady=True)
    dir_grad_std = Statistic("sd of the slope", statistics.spread, "dir_grad", unit="loss per h", steady=True)
    dir_grad_delta_corr = Statistic("correlation of slope and loss change", statistics.correlation, "dir_grad", "delta")
    curvature_mean = Statistic("mean curvature", statistics.mean, "curvature", unit=_PER_H2)
    curvature_std = Statistic("sd of the curvature", statistics.spread, "curvature", unit=_PER_H2)
    curvature_p10, curvature_p50, curvature_p90 = (
        Statistic(
            f"{p}th percentile of the curvature", partial(statistics.quantile, q=p / 100), "curvature", unit=_PER_H2
        )
        for p in (10, 50, 90)
    )
    rayleigh_mean = Statistic("mean curvature per distance", statistics.mean, "rayleigh", unit="loss per distance^2")
    delta_mean_negative = Statistic("mean loss change at -h", statistics.mean, "delta_negative", unit="loss")
    loss_mean_negative = Statistic("mean loss at -h", statistics.mean, "negative", unit="loss", steady=True)
    loss_std_negative = Statistic("sd of the loss at -h", statistics.spread, "negative", unit="loss")

    @derived("finite losses at +h", shown=False)
    def n_samples(self) -> int:
        """The number of valid samples: finite losses at +span."""
        return int(self.losses.isfinite().sum())

    @derived("losses at +h that are not finite", shown=False)
    def n_nonfinite_pos(self) -> int:
        return len(self.losses) - self.n_samples

    @derived("losses at -h that are not finite", shown=False)
    def n_nonfinite_neg(self) -> int:
        return 0 if self.losses_negative is None else int((~self.losses_negative.isfinite()).sum())

    @property
    def precision_note(self) -> str | None:
        """That rounding may decide signs of curvatures here, and what to do; None where it does not."""
        few, num, floor = self.n_curvatures_undecided, len(self.losses), self.curvature_noise_floor
        half = "compute in float32 (`functional(model, dtype=torch.float32)`)"
        remedy = half if self.realised is not None else "pass `curvature='exact'`"
        return None if few is None else caveats.note("signs", few=few, num=num, floor=floor, remedy=remedy)

    @property
    def step_note(self) -> str | None:
        """That the step, not the sampling, decides the mean curvature, or that it is not resolved; None where it is."""
        known, mean = self.truncation, self.curvature_mean
        return None if known is None else caveats.curvature_and_step(known, mean, self.actual_span)

    @derived("directions with a finite slope and loss", shown=False)
    def n_samples_for_corr(self) -> int | None:
        """Directions where both the slope and the loss are finite."""
        return None if self.slopes is None else int((self.slopes.isfinite() & self.losses.isfinite()).sum())

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Every sampled statistic by its documented name, with its standard errors over directions and over sequences."""
        return Statistic.all_of(self)

    @cached_property
    def baseline(self) -> Estimate:
        """The loss at theta with its standard error over sequences; nan where that is not known."""
        if self.residuals is None:
            return Estimate(torch.tensor(self.baseline_loss), torch.tensor(math.nan), 0)
        centre = self.residuals.centre
        share = len(centre) / (len(centre) - 1) if len(centre) > 1 else math.nan
        stderr = (centre.square().sum() * share).sqrt()
        return Estimate(centre.new_tensor(self.baseline_loss), stderr, self.residuals.num)

    @property
    def signs(self) -> dict[str, statistics.Signs]:
        """Of loss changes and, where they are there, of slopes and curvatures: how many are above and below 0."""
        tests = {name: statistics.signs(finite(x)) for name, x in self.columns.items() if name in _SIGNED}
        lost = {name for name in tests if name != "dir_grad" and self.lost(name)}
        return {name: test._replace(p_value=math.nan) if name in lost else test for name, test in tests.items()}

    @property
    def note(self) -> str | None:
        """Why slopes do not predict the loss changes here, from the numbers; None where they do, or were not asked for."""
        if self.slopes is None:
            return None
        corr = float(self.estimates["dir_grad_delta_corr"].value)
        return caveats.low_correlation(corr, self.deltas, self.slopes, self.actual_span)

    @derived("standard error of the loss at theta over sequences", unit="loss", shown=False)
    def baseline_loss_stderr_data(self) -> float:
        return float(self.baseline.stderr)

    @derived("sign tests", name="*", shown=False)
    def sign_tests(self) -> dict[str, int | float]:
        names = ("n_above", "n_below", "sign_p_value")
        return {f"{of}_{name}": x for of, test in self.signs.items() for name, x in zip(names, test, strict=True)}

    @derived("share of the largest loss change in all", shown=False)
    def delta_largest_share(self) -> float:
        return statistics.largest_share(finite(self.deltas))

    @derived("largest finite loss at +h", unit="loss", shown=False)
    def loss_max(self) -> float:
        return float(near.max()) if len(near := finite(self.losses)) else math.nan

    @derived("smallest finite loss at +h", unit="loss", shown=False)
    def loss_min(self) -> float:
        return float(near.min()) if len(near := finite(self.losses)) else math.nan

    @derived("what the step adds to the mean curvature", unit=_PER_H2)
    def curvature_truncation(self) -> Estimate | None:
        return None if self.truncation is None else self.truncation.bias

    def asdict(self) -> dict[str, Any]:
        """The documented dictionary, then standard errors, settings, costs and per-direction arrays.

        `<name>_stderr` is over directions; where terms per sequence are known, `<name>_stderr_data` is over sequences and
        `<name>_stderr_total` over both, with `<name>_dof` degrees of freedom.

        Plain numbers, strings and numpy arrays, None for a note that does not apply; keys of what was not asked for are
        absent, as documented.
        """
        large = caveats.note("large step", relative=self.relative_step)
        notes: dict[str, Any] = {
            "note": self.note,
            "relative_step_note": large,
            "resolution_note": self.resolution_note,
        }
        notes |= {"precision_note": self.precision_note} if self.compute_curvature else {}
        if (known := self.truncation) is not None:
            settling = {"curvature_status": known.status, "curvature_settling": known.settling}
            notes |= {"step_note": self.step_note} | settling
        unit = {"use_filter_norm": self.normalize == "filter"}
        unit |= {"global_renorm": self.global_renorm or self.normalize == "global"}
        return super().asdict() | unit | self.plan.named | notes

    @property
    def head(self) -> str:
        return (
            f"{counted(len(self.losses), f'{self.normalize}-normalised {self.distribution} direction')} at span "
            f"{self.actual_span:g} (relative step {self.relative_step:.3g}), {self.key!r}"
        )

    @property
    def unresolved(self) -> list[str]:
        rough = self.truncation is not None and self.truncation.status == "rough"
        names = ["curvature_mean", "rayleigh_mean"] if rough else []
        if 2 * (self.n_curvatures_undecided or 0) > len(finite(self.columns.get("curvature", self.losses[:0]))):
            names += [name for name in self.estimates if name.startswith(("curvature", "rayleigh"))]  # below rounding
        lost = {} if self.resolution_note is None else self.estimates
        names += [name for name, estimate in lost.items() if estimate.stderr.isnan()]
        return list(dict.fromkeys(names))

    @property
    def texts(self) -> dict[str, str]:
        return {name: f"{float(self.estimates[name].value):.5g}, not resolved" for name in self.unresolved}

    @property
    def notes(self) -> list[str]:
        """Lost samples, what half precision does, means that are not told from zero, what slopes and steps do not say."""
        columns = self.columns
        means = [
            caveats.unresolved(what, self.estimates[f"{name}_mean"], finite(columns[name]))
            for name, what in (("delta", "loss change"), ("curvature", "curvature"))
            if name in columns
        ]
        notes = [
            caveats.note("nonfinite", positive=self.n_nonfinite_pos, negative=self.n_nonfinite_neg, step="span"),
            caveats.note("half precision", intended=self.displacement, moved=self.realised),
            self.resolution_note or caveats.note("partly moved", share=self.unmoved),
            caveats.note("large step", relative=self.relative_step),
            *means,
            self.note,
            self.step_note,
            self.precision_note,
            caveats.few_sequences(self.n_sequences),
            caveats.note("no data error", names=", ".join(self._without_data_error)),
        ]
        return [note for note in notes if note]

    @property
    def _without_data_error(self) -> list[str]:
        """Statistics whose terms per sequence are not known, where others may have an error over sequences."""
        if self.n_sequences < 2:
            return []
        known = {name for name, x in self.estimates.items() if isinstance(x, Crossed) and x.stderr_data.isfinite()}
        return [name for name, x in self.estimates.items() if x.stderr.isfinite() and name not in known]


def amounting(
    column: dict[str, Tensor], centre: Tensor, refined: int, num: int, settings: dict[str, Any]
) -> DirectionalLosses:
    """What columns amount to, of `num` sequences that score something and of directions of which some are `refined`."""
    bent = column.get("residuals_curvatures")
    residuals = Residuals(
        centre,
        column["residuals_losses"],
        column.get("residuals_losses_negative"),
        None if bent is None else bent[:refined],
        num=num,
    )
    return DirectionalLosses(
        losses=column["losses"],
        losses_negative=column.get("losses_negative"),
        slopes=column.get("slopes"),
        exact_curvatures=column.get("curvatures"),
        residuals=residuals,
        finer=column["finer"][:refined] if "finer" in column else None,
        **settings,
    )
