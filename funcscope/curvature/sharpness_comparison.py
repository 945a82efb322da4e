"""Which of two models is sharper: by SAM's step, by the largest eigenvalue, and with what certainty."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..core.estimate import Estimate, interval
from ..core.objective import Loss, Theta
from ..core.pack import storable
from ..core.result import Result, derived, internal
from ..core.standard_errors import jackknife_stderr
from .ascent_sharpness import SamSharpness, sam_sharpness
from .data_error import EigenvalueDifferences, EigenvalueErrors, compare_eigenvalues

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

    @derived("difference of the sharpnesses, A - B", unit="loss")
    def sam_difference(self) -> Estimate:
        """S_A - S_B; standard error over sequences, paired where they are the same."""
        return self._statistic(lambda a, b: a - b, lambda: math.hypot(self.a.stderr, self.b.stderr))

    @derived("95 % interval of the difference", unit="loss", per="bound")
    def sam_interval(self) -> tuple[float, float]:
        """95 % interval of `sam_difference`, by Student's t of n - 1 sequences; nan for one."""
        return interval(self.sam_difference)

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
        pair = self._eigenvalues
        return pair[0].value / pair[1].value if pair and pair[1].value else math.nan

    @derived("what the residuals leave of the ratio", per="bound")
    def eigenvalue_ratio_interval(self) -> tuple[float, float]:
        """What the residuals leave of the ratio, for two positive eigenvalues; nan where B's may be 0 or less."""
        if not self._eigenvalues:
            return math.nan, math.nan
        a, b = self._eigenvalues
        if b.value <= b.residual or a.value < a.residual:
            return math.nan, math.nan
        return (a.value - a.residual) / (b.value + b.residual), (a.value + a.residual) / (b.value - b.residual)

    @property
    def eigenvalue_difference(self) -> EigenvalueDifferences | None:
        """lambda_A - lambda_B with its error over sequences, in pairs where they are the same; None without `errors`."""
        errors = [each.errors for each in self._eigenvalues if each.errors is not None]
        return compare_eigenvalues(errors[1], errors[0]) if len(errors) == 2 else None

    @derived("the sharper one by SAM")
    def sharper_by_sam(self) -> Sharper:
        """The model whose loss rises more; None where they are equal. `sam_difference` has the certainty."""
        return _larger(self.a.absolute - self.b.absolute, 0.0)

    @derived("the sharper one by the largest eigenvalue")
    def sharper_by_eigenvalue(self) -> Sharper:
        """The model of the larger eigenvalue on these data; None where the residuals leave it open, or nothing is known.

        Whether other data would say the same is a matter of `eigenvalue_difference`.
        """
        if not self._eigenvalues:
            return None
        a, b = self._eigenvalues
        return _larger(a.value - b.value, a.residual + b.residual)

    @property
    def agree(self) -> bool:
        """Whether both measures name the same model. They need not; see `compare_sharpness`."""
        return self.sharper_by_sam is not None and self.sharper_by_sam == self.sharper_by_eigenvalue

    @property
    def _eigenvalues(self) -> tuple[Eigenvalue, Eigenvalue] | tuple[()]:
        a, b = self.eigenvalue_a, self.eigenvalue_b
        return () if a is None or b is None else (a, b)

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

    @derived("sharpness", unit="loss", per="model")
    def sharpness(self) -> dict[str, Estimate]:
        return {"A": self.a.estimate, "B": self.b.estimate}

    @derived("first order of the sharpness", unit="loss", per="model")
    def first_order(self) -> list[float]:
        return [self.a.first_order, self.b.first_order]

    @derived("largest eigenvalue", per="model", stderr="eigenvalue_stderr")
    def eigenvalue(self) -> list[float] | None:
        return [each.value for each in self._eigenvalues] or None

    @property
    def eigenvalue_stderr(self) -> list[float]:
        """Over the sequences; nan where it is not known."""
        return [math.nan if each.errors is None else float(each.errors.stderr[0]) for each in self._eigenvalues]

    @derived("residual of the largest eigenvalue", per="model")
    def residual(self) -> list[float] | None:
        return [each.residual for each in self._eigenvalues] or None

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"bound": ["low", "high"], "model": ["A", "B"]}

    @property
    def notes(self) -> list[str]:
        """What the sequences do not decide, and what is not known."""
        low, high = self.sam_interval
        notes = [] if low > 0 or high < 0 else ["SAM: which model is sharper is not resolved by these sequences"]
        gap = self.eigenvalue_difference
        if gap is not None and not bool(gap.resolved[0]):
            notes.append("largest eigenvalue: which is larger is not resolved by these sequences")
        if math.isnan(self.eigenvalue_ratio_interval[0]):
            reason = "one of them may be 0 or less" if self._eigenvalues else "no eigenvalues were given"
            notes.append(f"eigenvalue_ratio: no interval, as {reason}")
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
    stationary point S compares the lengths of two gradients (`first_order`), and the rest is the curvature
    along g, which may lie far below the largest eigenvalue. For the same reason S / epsilon^2 and the eigenvalue need not
    have one order of magnitude. proofs/sam_expansion.py has a pair of quadratics with opposite orders.

    eigenvalues: the two largest eigenvalues with their residuals, or a function `(loss, theta) -> Eigenvalue` that finds one.
    Standard errors are jackknife over sequences with the steps held fixed, in pairs where both losses give every sequence the
    same weight, which is taken to mean that they are the same tokens; eigenvalues have the residual of the iteration, and
    an error over sequences where `errors` comes with them. Models of different size or scale of weights have no common
    epsilon: compare with `adaptive_epsilon`, or ASAM.

    Raises ValueError as `sam_sharpness` does.

    Foret et al. (2021); Dinh, Pascanu, Bengio, Bengio (2017), Sharp minima can generalize for deep nets.

    >>> import funcscope as fs
    >>> net, square = fs.functional(torch.nn.Linear(1, 1, bias=False)), fs.custom(lambda out, y: (out - y) ** 2)
    >>> loss = fs.objective(net, [(torch.ones(1, 1), torch.zeros(1, 1))], square)
    >>> both = (Eigenvalue(2.0, 0.0), Eigenvalue(2.0, 0.0))                      # one parabola at two places
    >>> pair = compare_sharpness(loss, torch.tensor([8.0]), loss, torch.tensor([2.0]), epsilon=1.0, eigenvalues=both)
    >>> float(pair.sam_ratio.value), pair.eigenvalue_ratio, pair.sharper_by_sam, pair.agree
    (3.4, 1.0, 'A', False)
    """
    sides = ((loss_a, theta_a), (loss_b, theta_b))
    steps: Any = {"epsilon": epsilon, "adaptive_epsilon": adaptive_epsilon, "norm_threshold": norm_threshold}
    a, b = (sam_sharpness(*side, **steps, curvature=False) for side in sides)
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
