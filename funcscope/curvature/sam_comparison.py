"""Which of two models is sharper: by SAM's step, by the largest eigenvalue, and with what certainty."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

from ..core.estimate import Estimate
from ..core.objective import Loss, Theta
from ..core.pack import storable
from ..core.result import Result, derived, internal
from ..core.standard_errors import jackknife_stderr
from .data_error import EigenvalueDifferences, EigenvalueErrors, compare_eigenvalues
from .sam import SamSharpness, sam_sharpness

Sharper = Literal["A", "B"] | None


@storable
class Eigenvalue(NamedTuple):
    """The largest eigenvalue of a Hessian as far as it is known: some true eigenvalue is within `residual` of `value`."""

    value: float
    residual: float
    errors: EigenvalueErrors | None = None
    """What other sequences would change in it, of this one value; see `eigenvalue_errors`."""


Eigenvalues = tuple[Eigenvalue, Eigenvalue] | Callable[[Loss, Theta], Eigenvalue] | None


class SharpnessComparison(Result):
    """Two models beside each other; made by `compare_sharpness`."""

    a: SamSharpness = internal()
    b: SamSharpness = internal()
    eigenvalue_a: Eigenvalue | None = internal()
    eigenvalue_b: Eigenvalue | None = internal()
    paired: bool
    """Whether both losses score the same sequences with the same weights, so that their errors are taken in pairs."""

    @derived("difference of the sharpnesses, A - B", unit="nats")
    def sam_difference(self) -> Estimate:
        """S_A - S_B; standard error over sequences, paired where they are the same."""
        return self._statistic(lambda a, b: a - b, lambda: math.hypot(self.a.stderr, self.b.stderr))

    @derived("95 % interval of the difference", unit="nats", per="bound")
    def sam_interval(self) -> tuple[float, float]:
        """95 % interval of `sam_difference`, by Student's t of n - 1 sequences; nan for one."""
        gap = self.sam_difference
        half = float(student.ppf(0.975, gap.num - 1)) * float(gap.stderr) if gap.num > 1 else math.nan
        return float(gap.value) - half, float(gap.value) + half

    @derived("ratio of the sharpnesses, A / B")
    def sam_ratio(self) -> Estimate:
        """S_A / S_B; meaningful where both are positive, nan where S_B is 0."""
        a, b = self.a.absolute, self.b.absolute

        def separate() -> float:
            return math.hypot(self.a.stderr / b, a * self.b.stderr / b**2) if b else math.nan

        return self._statistic(lambda a, b: a / b, separate)

    @derived("ratio of the largest eigenvalues, A / B")
    def eigenvalue_ratio(self) -> float:
        """lambda_A / lambda_B; nan where they are not known, or B's is 0."""
        if self.eigenvalue_a is None or self.eigenvalue_b is None or self.eigenvalue_b.value == 0:
            return math.nan
        return self.eigenvalue_a.value / self.eigenvalue_b.value

    @derived("what the residuals leave of the ratio", per="bound")
    def eigenvalue_ratio_interval(self) -> tuple[float, float]:
        """What the residuals leave of the ratio, for two positive eigenvalues; nan where B's may be 0 or less."""
        a, b = self.eigenvalue_a, self.eigenvalue_b
        if a is None or b is None or b.value <= b.residual or a.value < a.residual:
            return math.nan, math.nan
        return (a.value - a.residual) / (b.value + b.residual), (a.value + a.residual) / (b.value - b.residual)

    @property
    def eigenvalue_difference(self) -> EigenvalueDifferences | None:
        """lambda_A - lambda_B with its error over sequences, in pairs where they are the same; None without `errors`."""
        a, b = self.eigenvalue_a, self.eigenvalue_b
        if a is None or b is None or a.errors is None or b.errors is None:
            return None
        return compare_eigenvalues(b.errors, a.errors)

    @derived("the sharper one by SAM")
    def sharper_by_sam(self) -> Sharper:
        """The model whose loss rises more; None where they are equal. `sam_difference` has the certainty."""
        return _larger(self.a.absolute - self.b.absolute, 0.0)

    @derived("the sharper one by the largest eigenvalue")
    def sharper_by_eigenvalue(self) -> Sharper:
        """The model of the larger eigenvalue on these data; None where the residuals leave it open, or nothing is known.

        Whether other data would say the same is a matter of `eigenvalue_difference`.
        """
        a, b = self.eigenvalue_a, self.eigenvalue_b
        return None if a is None or b is None else _larger(a.value - b.value, a.residual + b.residual)

    @property
    def agree(self) -> bool:
        """Whether both measures name the same model. They need not; see `compare_sharpness`."""
        return self.sharper_by_sam is not None and self.sharper_by_sam == self.sharper_by_eigenvalue

    def _statistic(self, of: Callable[[Any, Any], Any], separate: Callable[[], float]) -> Estimate:
        a, b = (torch.tensor(x.absolute, dtype=torch.float64) for x in (self.a, self.b))
        value = of(a, b) if torch.isfinite(of(a, b)) else torch.tensor(math.nan, dtype=torch.float64)
        num = len(self.a.sums)
        if not self.paired:
            return Estimate(value, value.new_tensor(separate()), min(num, len(self.b.sums)))
        error = jackknife_stderr(of(_left_out(self.a), _left_out(self.b))) if num > 1 else value.new_tensor(math.nan)
        return Estimate(value, error, num)

    @property
    def head(self) -> str:
        return "A and B " + ("in pairs over the same sequences" if self.paired else "over sequences, not paired")

    @derived("sharpness", unit="nats", per="model")
    def sharpness(self) -> dict[str, Estimate]:
        return {"A": self.a.estimate, "B": self.b.estimate}

    @derived("first order of the sharpness", unit="nats", per="model")
    def first_order(self) -> list[float]:
        return [self.a.first_order, self.b.first_order]

    @derived("largest eigenvalue", per="model", stderr="eigenvalue_stderr")
    def eigenvalue(self) -> list[float]:
        return [math.nan if x is None else x.value for x in (self.eigenvalue_a, self.eigenvalue_b)]

    @property
    def eigenvalue_stderr(self) -> list[float]:
        """Over the sequences; nan where it is not known."""
        pair = (self.eigenvalue_a, self.eigenvalue_b)
        return [math.nan if x is None or x.errors is None else float(x.errors.stderr[0]) for x in pair]

    @derived("residual of the largest eigenvalue", per="model")
    def residual(self) -> list[float]:
        return [math.nan if x is None else x.residual for x in (self.eigenvalue_a, self.eigenvalue_b)]

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"bound": ["low", "high"], "model": ["A", "B"]}

    @property
    def notes(self) -> list[str]:
        """What the sequences do not decide."""
        low, high = self.sam_interval
        notes = [] if low > 0 or high < 0 else ["SAM: which model is sharper is not resolved by these sequences"]
        gap = self.eigenvalue_difference
        if gap is not None and not bool(gap.resolved[0]):
            notes.append("largest eigenvalue: which is larger is not resolved by these sequences")
        return notes


def compare_sharpness(
    loss_a: Loss,
    theta_a: Theta,
    loss_b: Loss,
    theta_b: Theta,
    *,
    epsilon: float = 0.01,
    adaptive_epsilon: bool = False,
    norm_threshold: float = 1e-6,
    eigenvalues: Eigenvalues = None,
) -> SharpnessComparison:
    r"""Which of two models is sharper, by SAM's one-step rise and by the Hessian's largest eigenvalue.

    $$\frac{S_A}{S_B}, \qquad \frac{\lambda_{\max}^A}{\lambda_{\max}^B}, \qquad
        S = \epsilon \|g\| + \tfrac{\epsilon^2}{2} \hat g^\top H \hat g + O(\epsilon^3).$$

    Ratios have no unit. The two orders may differ, and `agree` says whether they do; it is no check of either: away from a
    stationary point S compares the lengths of two gradients (the column "of it slope"), and what is left is the curvature
    along g, which may lie far below the largest eigenvalue. For the same reason S / epsilon^2 and the eigenvalue need not
    have one order of magnitude. proofs/sam_expansion.py has a pair of quadratics with opposite orders.

    eigenvalues: the two largest eigenvalues with their residuals, or a function `(loss, theta) -> Eigenvalue` that finds one.
    Standard errors are jackknife over sequences with the steps held fixed, in pairs where both losses give every sequence the
    same weight, which is taken to mean that they are the same tokens; eigenvalues have the residual of the iteration, and
    an error over sequences where `errors` comes with them. Models of different size or scale of weights have no common
    epsilon: compare with `adaptive_epsilon`, or ASAM.

    Raises ValueError as `sam_sharpness` does.

    Foret et al. (2021); Dinh, Pascanu, Bengio, Bengio (2017), Sharp minima can generalize for deep nets.

    >>> from funcscope.core import criterion, model, objective
    >>> net = model.functional(torch.nn.Linear(1, 1, bias=False))
    >>> square = criterion.custom(lambda out, y: (out - y) ** 2)
    >>> loss = objective.objective(net, [(torch.ones(1, 1), torch.zeros(1, 1))], square)
    >>> both = (Eigenvalue(2.0, 0.0), Eigenvalue(2.0, 0.0))                      # one parabola at two places
    >>> found = compare_sharpness(loss, torch.tensor([8.0]), loss, torch.tensor([2.0]), epsilon=1.0, eigenvalues=both)
    >>> float(found.sam_ratio.value), found.eigenvalue_ratio, found.sharper_by_sam, found.agree
    (3.4, 1.0, 'A', False)
    """
    sides = ((loss_a, theta_a), (loss_b, theta_b))
    a, b = (
        sam_sharpness(
            *side, epsilon=epsilon, adaptive_epsilon=adaptive_epsilon, norm_threshold=norm_threshold, curvature=False
        )
        for side in sides
    )
    known: tuple[Eigenvalue | None, Eigenvalue | None] = (None, None)
    if eigenvalues is not None:
        known = tuple(eigenvalues(*side) for side in sides) if callable(eigenvalues) else eigenvalues  # type: ignore[assignment]
    return SharpnessComparison(a, b, *known, paired=bool(torch.equal(a.weights, b.weights)))


def _larger(difference: float, margin: float) -> Sharper:
    if not abs(difference) > margin:
        return None
    return "A" if difference > 0 else "B"


def _left_out(x: SamSharpness) -> Tensor:
    """The sharpness without each sequence."""
    return (x.differences.sum() - x.differences) / (x.weights.sum() - x.weights)
