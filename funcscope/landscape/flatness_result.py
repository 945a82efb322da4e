"""What `flatness` returns: loss changes along random directions, settings, and the statistics of both."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from tabulate import tabulate
from torch import Tensor

from ..core.estimate import Crossed, Estimate
from ..core.keys import Key
from ..linalg.trace import TraceEstimate
from . import statistics
from .directional_text import HEADERS, row
from .notes import few_sequences, large_step, unresolved
from .paired import variance_ratio
from .resolution import partly_moved, unresolved_step, without_error
from .samples import Plan
from .sequences import Residuals, crossed

SHARE_OF_BASELINE = 0.1
"""A direction counts as flat for `flatness_ratio` where the loss rises by less than this share of the baseline."""


@dataclass(frozen=True, eq=False, repr=False)
class Flatness:
    r"""Loss changes at a step along random directions; made by `flatness`, whose docstring has the formulas.

    Samples are float64 tensors of shape (n,) on the CPU, non-finite ones included. Statistics are over the finite ones
    (pairs: where both sides are), but the two shares, which count a non-finite change as not flat. Errors are over
    directions, and for all but the shares (which have no derivative by a loss) over sequences, too (`Crossed`); nan where too
    few samples define one. `asdict()` has the documented names.
    """

    delta_losses: Float[Tensor, " n"]
    delta_losses_negative: Float[Tensor, " n"] | None
    epsilon: float
    step: float
    """The coefficient of the directions: epsilon, or epsilon ||theta|| / ||d|| where it is relative."""
    baseline_loss: float
    direction_norm: float
    param_norm: float
    num_params: int
    relative: bool
    normalize: str
    threshold: float
    key: Key
    plan: Plan
    num_forwards: int
    """Evaluations of the loss for this epsilon, and two at theta, which the epsilons of a profile share."""
    residuals: Residuals | None = None
    unmoved: float = 0.0
    """Share of the weights that do not move at all at this step, by rounding; measured on the first direction."""
    loss_rounding: float = 0.0
    """By how much rounding alone may move a loss change; 0 in half precision, where it is not measured."""

    @property
    def displacement(self) -> float:
        """The length of the step in parameter space."""
        return self.step * self.direction_norm

    @property
    def epsilon_relative(self) -> float:
        """The length of the step over ||theta||; nan at theta = 0."""
        return self.displacement / self.param_norm if self.param_norm else math.nan

    @property
    def n_nonfinite(self) -> int:
        return int((~self.delta_losses.isfinite()).sum())

    @property
    def n_nonfinite_negative(self) -> int:
        return 0 if self.delta_losses_negative is None else int((~self.delta_losses_negative.isfinite()).sum())

    @property
    def max_delta_loss(self) -> float:
        """The largest finite change at +d; it grows with the number of directions, and has no standard error."""
        finite = self._finite
        return float(finite.max()) if len(finite) else math.nan

    @property
    def resolution_note(self) -> str | None:
        """Why loss changes at this step are not resolved, so that no statistic of them has an error; None where they are."""
        return unresolved_step(self.unmoved, Estimate.of(self._finite), self.loss_rounding)

    @property
    def even(self) -> Float[Tensor, " m"]:
        """(D+ + D-) / 2 of the pairs with two finite sides; empty where one side was evaluated only."""
        return self._pairs(1)

    @property
    def pair_mean(self) -> Estimate:
        r"""Mean of the even parts: $E[\Delta]$ without the scatter of the gradient and of all odd orders.

        Exact cancellation, expectation and when pairs win: proofs/antithetic_pairs.py.
        """
        return self._crossed(statistics.mean, self._pairs_seen, (self.even,), (1,))

    @property
    def pair_variance_ratio(self) -> Estimate:
        r"""Variance of the one-sided mean over that of the pair mean, at an equal number of evaluations.

        $\tfrac12 (1 + \mathrm{Var}(o) / \mathrm{Var}(e))$, $o = (\Delta^+ - \Delta^-)/2$; 1/2 at the least, where the
        gradient is 0 and half as many directions are all that pairs bring. Jackknife standard error.
        On a quadratic above 1 only if $\|g\|^2 > \epsilon^2 (\|H\|_F^2 - \mathrm{tr}(H)^2/P) / (2(P+2))$,
        proofs/antithetic_pairs.py. nan below 2 pairs (the error below 3), or where nothing varies.
        """
        return self._crossed(variance_ratio, self._pairs_seen, (self.even, self._pairs(-1)), (1, -1))

    @property
    def second_order(self) -> Estimate:
        r"""$2 P \,\overline{e} / \epsilon^2$, epsilon the displacement: tr(H) at this step's resolution, not tr(H) itself.

        Off by $O(\epsilon^2)$ for a loss with four derivatives. For a ReLU network it contains the kinks within epsilon,
        which the Hessian of autodiff does not have, and which do not vanish with higher orders: no estimate of that
        trace (ratios of 0.6 to 0.8 between the two are common) unless epsilon is small against the distance to the kinks.
        nan for one-sided samples and for directions other than `global`, where the mean weighs the blocks of H.
        """
        if self.normalize != "global":
            return _scaled(self.pair_mean, math.nan)
        return _scaled(self.pair_mean, 2 * self.num_params / self.displacement / self.displacement)

    def expected_from_trace(self, trace: Estimate | TraceEstimate) -> Estimate:
        r"""$\epsilon^2 \mathrm{tr}(H) / 2P$ with its error, for a trace from elsewhere: to put beside the means.

        The two agree to $O(\epsilon^4)$ for a loss with four derivatives; for a ReLU network the Hessian of autodiff lacks
        the kinks (`second_order`). Raises ValueError for directions other than `global`, whose mean is no trace.
        """
        if self.normalize != "global":
            raise ValueError(
                f"the mean along {self.normalize!r} directions weighs the blocks of the Hessian by the norms of the "
                "parameters and is no trace: use `normalize='global'`."
            )
        num = trace.num if isinstance(trace, Estimate) else len(trace.samples)
        known = Estimate(trace.value, trace.stderr, num)
        return _scaled(known, self.displacement * self.displacement / (2 * self.num_params))

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Every sampled statistic by its name, with its standard error; those of pairs where there are any."""
        finite = self._finite
        relative = SHARE_OF_BASELINE * (self.baseline_loss if self.baseline_loss > 0 else 1.0)
        of_rises: dict[str, Callable[..., Estimate]] = {
            "mean_delta_loss": statistics.mean,
            "median_delta_loss": partial(_quantile, q=0.5),
            "std_delta_loss": statistics.spread,
            "p90_delta_loss": partial(_quantile, q=0.9),
            "p10_delta_loss": partial(_quantile, q=0.1),
        }
        seen = self.delta_losses.isfinite()
        found = {name: self._crossed(statistic, seen, (finite,), (0,)) for name, statistic in of_rises.items()}
        found |= {
            "flatness_ratio": self._share_below(relative),
            "flatness_fraction": self._share_below(self.threshold),
        }
        if self.delta_losses_negative is not None:
            found["pair_mean"] = self.pair_mean
            found["pair_variance_ratio"] = self.pair_variance_ratio
            found["second_order"] = self.second_order
        return found

    def asdict(self) -> dict[str, Any]:
        """Documented names, standard errors, settings, costs, samples: plain numbers, strings, numpy arrays.

        `<name>_stderr` is over directions, `<name>_stderr_data` over sequences, `<name>_stderr_total` over both.

        Keys of the other side and of pairs are absent where one side was evaluated only.
        """
        values: dict[str, Any] = {"baseline_loss": self.baseline_loss, "max_delta_loss": self.max_delta_loss}
        for name, estimate in self.estimates.items():
            values |= estimate.named(name)
        values |= {"unmoved": self.unmoved, "resolution_note": self.resolution_note or ""}
        values["n_sequences"] = 0 if self.residuals is None else self.residuals.num
        values |= {"epsilon": self.epsilon, "delta_losses": self.delta_losses.numpy()}
        if self.delta_losses_negative is not None:
            values["delta_losses_negative"] = self.delta_losses_negative.numpy()
        return values | self._settings()

    def _settings(self) -> dict[str, Any]:
        return {
            "epsilon_relative": self.epsilon_relative,
            "displacement": self.displacement,
            "param_norm": self.param_norm,
            "num_params": self.num_params,
            "threshold": self.threshold,
            "n_directions": len(self.delta_losses),
            "n_nonfinite": self.n_nonfinite,
            "n_nonfinite_negative": self.n_nonfinite_negative,
            "relative": self.relative,
            "normalize": self.normalize,
            "two_sided": self.delta_losses_negative is not None,
            "seed": self.key.seed,
            "key": f"{self.key.bits:032x}",
            "fast_vec_path": not self.plan.lazy,
            "chunk": self.plan.chunk,
            "threads": self.plan.threads,
            "num_forwards": self.num_forwards,
        }

    def __str__(self) -> str:
        table = tabulate(self._rows(), headers=HEADERS, disable_numparse=True)
        return "\n".join([self._head(), table, *self._tail()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same table, for notebooks."""
        table = tabulate(self._rows(), headers=HEADERS, tablefmt="html", disable_numparse=True)
        first, *rest = (f"<p>{html.escape(text)}</p>" for text in (self._head(), *self._tail()))
        return "\n".join([first, str(table), *rest])

    def _head(self) -> str:
        sides = "one-sided" if self.delta_losses_negative is None else "two-sided"
        return (
            f"{len(self.delta_losses)} {self.normalize} directions, {sides}, a step of {self.displacement:.4g} "
            f"({self.epsilon_relative:.3g} of ||theta||), {self.key!r}"
        )

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            ("baseline_loss", f"{self.baseline_loss:.6g}", "", "", ""),
            ("max_delta_loss", f"{self.max_delta_loss:.5g}", "", "", ""),
        ]
        return rows + [row(name, estimate) for name, estimate in self.estimates.items()]

    def _tail(self) -> list[str]:
        tail = []
        if self.n_nonfinite + self.n_nonfinite_negative:
            tail += [f"non-finite losses: {self.n_nonfinite} at +d, {self.n_nonfinite_negative} at -d"]
        mean = self.estimates["mean_delta_loss"]
        notes = (
            self.resolution_note or partly_moved(self.unmoved),
            large_step(self.epsilon_relative),
            unresolved("loss change", mean, self._finite),
            few_sequences(0 if self.residuals is None else self.residuals.num),
        )
        return tail + [note for note in notes if note]

    def _crossed(
        self, statistic: Callable[..., Estimate], seen: Tensor, columns: tuple[Tensor, ...], signs: tuple[int, ...]
    ) -> Estimate:
        """A statistic with both errors. signs: 0 for changes at +d, 1 and -1 for half the sum or difference of both sides."""
        estimate = crossed(statistic, columns, [self._residuals(sign, seen) for sign in signs])
        lost = unresolved_step(self.unmoved, Estimate.of(columns[0]), self.loss_rounding)
        return estimate if lost is None else without_error(estimate)

    def _residuals(self, sign: int, seen: Tensor) -> Tensor | None:
        if self.residuals is None or (sign and self.residuals.negative is None):
            return None
        rows = self.residuals.positive - self.residuals.centre
        if sign:
            assert self.residuals.negative is not None
            rows = (rows + sign * (self.residuals.negative - self.residuals.centre)) / 2
        return rows[seen]

    @property
    def _pairs_seen(self) -> Tensor:
        negative = self.delta_losses_negative
        seen = self.delta_losses.isfinite()
        return seen & negative.isfinite() if negative is not None else torch.zeros_like(seen)

    @property
    def _finite(self) -> Tensor:
        return self.delta_losses[self.delta_losses.isfinite()]

    def _pairs(self, sign: int) -> Tensor:
        """Half the sum (or, for -1, the difference) of the two sides, where both are finite."""
        if self.delta_losses_negative is None:
            return self.delta_losses.new_empty(0)
        halves = (self.delta_losses + sign * self.delta_losses_negative) / 2
        return halves[self._pairs_seen]

    def _share_below(self, rise: float) -> Estimate:
        share = Estimate.of((self.delta_losses.isfinite() & (self.delta_losses < rise)).double())
        return share if self.resolution_note is None else without_error(share)


def _quantile(x: Tensor, q: float) -> Estimate:
    """The quantile of a single sample is that sample, its error undefined."""
    return Estimate(x[0], x.new_tensor(math.nan), 1) if len(x) == 1 else statistics.quantile(x, q)


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    scaled = replace(estimate, value=estimate.value * factor, stderr=estimate.stderr * abs(factor))
    if not isinstance(scaled, Crossed):
        return scaled
    size = abs(factor)
    return replace(scaled, stderr_data=scaled.stderr_data * size, stderr_total=scaled.stderr_total * size)
