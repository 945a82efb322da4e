"""What `flatness` returns: loss changes along random directions, settings, and the statistics of both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..core import statistics
from ..core.estimate import Estimate
from ..core.keys import Key
from ..core.result import Result, derived, internal, quantity
from ..core.standard_errors import Statistic
from ..core.tables import Entry, counted
from ..linalg.trace import TraceEstimate
from . import caveats
from .directional_columns import Sampled, finite, scaled
from .directional_result import Plan
from .residuals import Residuals

SHARE_OF_BASELINE = 0.1
"""A direction counts as flat for `flatness_ratio` where the loss rises by less than this share of the baseline."""
PAIRED = ("pair_mean", "pair_variance_ratio", "second_order")
"""What needs both sides."""


class Flatness(Sampled, Result):
    r"""Loss changes at a step along random directions; made by `flatness`, whose docstring has the formulas.

    Samples, statistics and their errors are as in `DirectionalLosses`; but the two shares count a non-finite change as not
    flat, and have no error over sequences: they have no derivative by a loss.
    """

    delta_losses: Float[Tensor, " n"] = quantity("loss change at +d", unit="loss", per="direction")
    delta_losses_negative: Float[Tensor, " n"] | None = quantity("loss change at -d", unit="loss", per="direction")
    epsilon: float
    step: float
    """The coefficient of the directions: epsilon, or epsilon ||theta|| / ||d|| where it is relative."""
    baseline_loss: float = quantity("loss at theta", unit="loss")
    direction_norm: float
    param_norm: float
    num_params: int
    relative: bool
    normalize: str
    threshold: float
    key: Key
    plan: Plan = internal()
    num_forwards: int
    """Evaluations of the loss for this epsilon, and two at theta, which the epsilons of a profile share."""
    residuals: Residuals | None = internal(default=None)
    unmoved: float = 0.0
    """Share of the weights that do not move at all at this step, by rounding; measured on the first direction."""
    loss_rounding: float = 0.0
    """By how much rounding alone may move a loss change; 0 in half precision, where it is not measured."""

    @derived("length of the step", shown=False)
    def displacement(self) -> float:
        """The length of the step in parameter space."""
        return self.step * self.direction_norm

    @derived("length of the step over ||theta||", shown=False)
    def epsilon_relative(self) -> float:
        """The length of the step over ||theta||; nan at theta = 0."""
        return self.displacement / self.param_norm if self.param_norm else math.nan

    @derived("losses at +d that are not finite", shown=False)
    def n_nonfinite(self) -> int:
        return int((~self.delta_losses.isfinite()).sum())

    @derived("losses at -d that are not finite", shown=False)
    def n_nonfinite_negative(self) -> int:
        return 0 if self.delta_losses_negative is None else int((~self.delta_losses_negative.isfinite()).sum())

    @derived("largest loss change at +d", unit="loss")
    def max_delta_loss(self) -> float:
        """The largest finite change at +d; it grows with the number of directions, and has no standard error."""
        rises = finite(self.delta_losses)
        return float(rises.max()) if len(rises) else math.nan

    @property
    def resolution_note(self) -> str | None:
        """Why loss changes at this step are not resolved, so that no statistic of them has an error; None where they are."""
        return self.lost("rise")

    @property
    def pair_note(self) -> str | None:
        """Why the means of both sides are not resolved at this step; None where they are, or where there are none."""
        return self.lost("even") if len(self.even) else None

    @property
    def unresolved(self) -> list[str]:
        one_sided = [] if self.resolution_note is None else [name for name in self.estimates if name not in PAIRED]
        return one_sided + ([] if self.pair_note is None else [name for name in self.estimates if name in PAIRED])

    @property
    def even(self) -> Float[Tensor, " m"]:
        """(D+ + D-) / 2 of the pairs with two finite sides; empty where one side was evaluated only."""
        return finite(self.columns["even"])

    mean_delta_loss = Statistic("mean loss change at +d", statistics.mean, "rise", unit="loss")
    median_delta_loss = Statistic("median loss change at +d", partial(statistics.order, q=0.5), "rise", unit="loss")
    std_delta_loss = Statistic("sd of the loss change at +d", statistics.spread, "rise", unit="loss")
    p90_delta_loss = Statistic("90th percentile of it", partial(statistics.order, q=0.9), "rise", unit="loss")
    p10_delta_loss = Statistic("10th percentile of it", partial(statistics.order, q=0.1), "rise", unit="loss")

    @derived("directions in which the loss rises by less than a share of itself", unit="share")
    def flatness_ratio(self) -> Estimate:
        """Where the rise is below `SHARE_OF_BASELINE` of the loss at theta (of 1 nat where that is not positive)."""
        return self._share_below(SHARE_OF_BASELINE * (self.baseline_loss if self.baseline_loss > 0 else 1.0))

    @derived("directions in which the loss rises by less than the threshold", unit="share")
    def flatness_fraction(self) -> Estimate:
        """Where the rise is below `threshold`."""
        return self._share_below(self.threshold)

    @derived("mean of both sides", unit="loss")
    def pair_mean(self) -> Estimate:
        r"""Mean of the even parts: $E[\Delta]$ without the scatter of the gradient and of all odd orders.

        Exact cancellation, expectation and when pairs win: proofs/antithetic_pairs.py.
        """
        return self.estimated(statistics.mean, ["even"])

    @derived("variance of one side over that of pairs")
    def pair_variance_ratio(self) -> Estimate:
        r"""Variance of the one-sided mean over that of the pair mean, at an equal number of evaluations.

        $\tfrac12 (1 + \mathrm{Var}(o) / \mathrm{Var}(e))$, $o = (\Delta^+ - \Delta^-)/2$; 1/2 at the least, where the
        gradient is 0 and half as many directions are all that pairs bring. Jackknife standard error.
        On a quadratic above 1 only if $\|g\|^2 > \epsilon^2 (\|H\|_F^2 - \mathrm{tr}(H)^2/P) / (2(P+2))$,
        proofs/antithetic_pairs.py. nan below 2 pairs (the error below 3), or where nothing varies.
        """
        return self.estimated(statistics.variance_ratio, ["even", "odd"])

    @derived("trace of the Hessian at this step", unit="loss per distance^2")
    def second_order(self) -> Estimate:
        r"""$2 P \,\overline{e} / \epsilon^2$, epsilon the displacement: tr(H) at this step's resolution, not tr(H) itself.

        Off by $O(\epsilon^2)$ for a loss with four derivatives; with kinks within epsilon (ReLU), no estimate of the trace
        of autodiff's Hessian, which has none: ratios of 0.6 to 0.8 between the two are common. nan for one-sided samples
        and for directions other than `global`, where the mean weighs the blocks of H.
        """
        if self.normalize != "global":
            return scaled(self.pair_mean, math.nan)
        return scaled(self.pair_mean, 2 * self.num_params / self.displacement / self.displacement)

    def expected_from_trace(self, trace: Estimate | TraceEstimate) -> Estimate:
        r"""$\epsilon^2 \mathrm{tr}(H) / 2P$ with its error, for a trace from elsewhere: to put beside the means.

        The two agree to $O(\epsilon^4)$ where `second_order` is the trace. Raises ValueError for directions other than
        `global`, whose mean is no trace.
        """
        if self.normalize != "global":
            raise ValueError(
                f"the mean along {self.normalize!r} directions weighs the blocks of the Hessian by the norms of the "
                "parameters and is no trace: use `normalize='global'`."
            )
        num = trace.num if isinstance(trace, Estimate) else len(trace.samples)
        known = Estimate(trace.value, trace.stderr, num)
        return scaled(known, self.displacement * self.displacement / (2 * self.num_params))

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Every sampled statistic by its name, with its standard error; those of pairs where there are any."""
        return {entry.name: entry.value for entry in self.entries() if isinstance(entry.value, Estimate)}

    @property
    def columns(self) -> dict[str, Float[Tensor, " n"]]:
        """Changes at +d, and half the sum and the difference of both sides; these are empty where one side is known only."""
        rise, negative = self.delta_losses, self.delta_losses_negative
        if negative is None:
            return {"rise": rise, "even": rise.new_empty(0), "odd": rise.new_empty(0)}
        return {"rise": rise, "even": (rise + negative) / 2, "odd": (rise - negative) / 2}

    def rows(self, quantity: str) -> Float[Tensor, "n g"] | None:
        known = self.residuals
        if known is None or (quantity != "rise" and known.negative is None):
            return None
        rows = known.positive - known.centre
        if known.negative is not None and quantity != "rise":
            sign = 1 if quantity == "even" else -1
            rows = (rows + sign * (known.negative - known.centre)) / 2
        return rows

    lost = Sampled.unresolved_step

    def entries(self, only: str | None = None) -> Iterator[Entry]:
        absent = PAIRED if self.delta_losses_negative is None else ()
        return (entry for entry in super().entries(only) if entry.name not in absent)

    def asdict(self) -> dict[str, Any]:
        """As of every result; keys of the other side and of pairs are absent where one side was evaluated only."""
        sides = {"n_directions": len(self.delta_losses), "two_sided": self.delta_losses_negative is not None}
        return super().asdict() | sides | self.plan.named | {"resolution_note": self.resolution_note or ""}

    @property
    def head(self) -> str:
        sides = "one-sided" if self.delta_losses_negative is None else "two-sided"
        return (
            f"{counted(len(self.delta_losses), f'{self.normalize} direction')}, {sides}, a step of {self.displacement:.4g} "
            f"({self.epsilon_relative:.3g} of ||theta||), {self.key!r}"
        )

    @property
    def notes(self) -> list[str]:
        notes = (
            caveats.note("nonfinite", positive=self.n_nonfinite, negative=self.n_nonfinite_negative, step="d"),
            self.resolution_note or caveats.note("partly moved", share=self.unmoved),
            None if self.resolution_note or not self.pair_note else f"pairs: {self.pair_note}",
            caveats.note("large step", relative=self.epsilon_relative),
            caveats.unresolved("loss change", self.estimates["mean_delta_loss"], finite(self.delta_losses)),
            caveats.few_sequences(self.n_sequences),
        )
        return [note for note in notes if note]

    def _share_below(self, rise: float) -> Estimate:
        share = Estimate.of((self.delta_losses.isfinite() & (self.delta_losses < rise)).double())
        return share if self.resolution_note is None else scaled(share, 1.0, math.nan)
