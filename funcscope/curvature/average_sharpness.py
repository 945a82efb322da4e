"""Average-case sharpness: the mean rise of the loss over random steps, in pairs of opposite ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_count, check_positive
from ..core.directions import Direction, directions
from ..core.estimate import Crossed, Estimate
from ..core.keys import Key, check_key, fold_in, uniform
from ..core.layout import Params
from ..core.leaf_rows import Part
from ..core.model import Inputs
from ..core.objective import Loss, Theta, check_point
from ..core.restrict import LAZY_ABOVE, Phi, restrict
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from .leafwise import terms_at
from .sequence_forms import SequenceForms

Steps = Literal["sphere", "normal", "relative"]


class AverageSharpness(Result):
    r"""Losses after random steps and their opposites; made by `average_sharpness`.

    `positive` and `negative` have one entry per pair, float64 on the CPU, non-finite ones included. Nats.
    """

    loss: float = quantity("loss", unit="loss")
    forms: SequenceForms = internal()
    """The mean rise of each finite pair, sequence by sequence."""
    positive: Float[Tensor, " n"] = quantity("loss after the step", unit="loss", per="pair")
    negative: Float[Tensor, " n"] = quantity("loss after the opposite step", unit="loss", per="pair")
    distribution: str
    epsilon: float
    num_parameters: int
    trace: Estimate | None = internal()
    """What the caller passed: the trace, or for `relative` the trace weighted by squared parameters."""
    unit_roundoff: float
    key: Key

    @derived("mean rise of a pair", unit="loss", per="pair")
    def values(self) -> Float[Tensor, " n"]:
        """The mean rise of each pair; odd orders of the loss cancel in it."""
        return (self.positive - self.loss + (self.negative - self.loss)) / 2

    @derived("pairs that are not finite")
    def num_nonfinite(self) -> int:
        """Pairs with a loss that is not finite; they are in `values`, and in no mean."""
        return int((~self.values.isfinite()).sum())

    @property
    def estimate(self) -> Estimate:
        """The sharpness with its standard error over finite pairs: biased downwards where `num_nonfinite` is not 0."""
        return Estimate.of(self.values[self.values.isfinite()])

    @derived("average sharpness", unit="loss", name="sharpness")
    def errors(self) -> Crossed:
        """The same with its errors over the pairs, over the sequences, and over both."""
        return self.forms.mean

    @derived("second order from the trace", unit="loss")
    def predicted(self) -> Estimate | None:
        r"""The second order, $\epsilon^2 \operatorname{tr} H / 2P$, from the trace that was passed; None without one."""
        if self.trace is None:
            return None
        factor = self.epsilon**2 / 2 / (1 if self.distribution == "relative" else self.num_parameters)
        return Estimate(self.trace.value * factor, self.trace.stderr * factor, self.trace.num)

    @derived("rounding", unit="loss")
    def rounding(self) -> float:
        r"""The order of what rounding of the losses does to each value: $2 u |L|$, u the model's unit roundoff."""
        return 2 * self.unit_roundoff * abs(self.loss)

    @derived("forward passes", shown=False)
    def num_forwards(self) -> int:
        """Passes over all batches."""
        return 2 * len(self.positive) + 1

    @property
    def unresolved(self) -> list[str]:
        return ["sharpness"] if abs(float(self.errors.value)) < self.rounding else []

    @property
    def notes(self) -> list[str]:
        known = self.predicted is None or bool(self.predicted.stderr.isfinite())
        notes = self.forms.notes + ([] if known else ["predicted: the trace came without an error"])
        lost = (
            f"sharpness: below what rounding of the losses may do to it, {self.rounding:.1g}: take a larger `epsilon`"
        )
        return [lost, *notes] if self.unresolved else notes

    @property
    def head(self) -> str:
        steps = counted(len(self.positive), f"pair of {self.distribution} steps", f"pairs of {self.distribution} steps")
        return f"average sharpness, {steps}, epsilon {self.epsilon:.4g}"


def average_sharpness(
    loss: Loss,
    theta: Theta,
    *,
    key: Key,
    num: int = 20,
    epsilon: float = 0.01,
    distribution: Steps = "sphere",
    trace: float | Estimate | None = None,
) -> AverageSharpness:
    r"""The mean rise of the loss over random steps d, from `num` pairs of opposite ones.

    $$\mathbb E_d\, L(\theta + d) - L(\theta) = \frac{\epsilon^2}{2P} \operatorname{tr} H + O(\epsilon^4).$$

    Nats; theta is a flat vector (P,) or a dict of parameters. Unbiased; a pair cancels the gradient exactly, which a single
    step would carry as noise of size $\epsilon \|g\| / \sqrt P$.

    distribution: `sphere`, uniform with $\|d\| = \epsilon$. `normal`, $d \sim N(0, \epsilon^2 I / P)$, of the same mean
    square length; a given $\sigma$ is $\epsilon = \sigma \sqrt P$. `relative`, $d_i = \epsilon |\theta_i| z_i$ with z
    standard normal: the same after rescaling of ReLU layers, with second order
    $\tfrac{\epsilon^2}{2} \sum_i \theta_i^2 H_{ii}$.
    trace: an estimate of $\operatorname{tr} H$ (of $\sum_i \theta_i^2 H_{ii}$ for `relative`), for `predicted`.

    The second order needs a loss with four derivatives. With ReLU the Hessian of autodiff lacks the kinks, which enter at
    the same order: the mean is no measure of the trace there, except for very small epsilon. A step of epsilon moves each
    weight by some $\epsilon / \sqrt P$: in half precision most of that is lost to rounding; compute in float32.

    Raises ValueError for a loss that is not finite at theta, and for `relative` where theta is 0.

    Andriushchenko and Flammarion (2022), Towards understanding sharpness-aware minimization, arXiv 2206.06232.

    >>> import funcscope as fs
    >>> net, square = fs.functional(torch.nn.Linear(1, 1, bias=False)), fs.custom(lambda out, y: (out - y) ** 2)
    >>> loss = fs.objective(net, [(torch.ones(1, 1), torch.zeros(1, 1))], square)
    >>> s = average_sharpness(loss, torch.tensor([3.0]), key=fs.key(0), num=2, epsilon=0.5, trace=2.0)      # tr H = 2
    >>> print(s.estimate, "and", s.predicted)
    0.25 ± 0 (n = 2) and 0.25 ± undefined (n = 0)
    """
    check_key(key)
    check_count("num", num)
    check_positive("epsilon", epsilon)
    check_choice("distribution", distribution, get_args(Steps))
    check_point(loss, theta)
    params = loss.leaves(theta)
    before, weights = terms = terms_at(loss, theta)
    if not math.isfinite(terms.mean):
        raise ValueError(
            f"the loss at theta is {terms.mean}: there is no sharpness around it. Check weights and batch."
        )
    if distribution == "relative" and not any(bool(x.any()) for x in params.values()):
        raise ValueError("`relative` steps are proportional to theta, which is 0: use 'sphere' or 'normal'.")
    with torch.no_grad():
        drawn = directions(loss.net, key=fold_in(key, "directions"), num=num, normalize="global", base=params)
        each = _Sequences(loss.net, loss.batches, loss.criterion, loss._verdicts)
        after = torch.stack([_pair(each, theta, params, d, distribution, epsilon) for d in drawn])
    if trace is not None and not isinstance(trace, Estimate):
        value, unknown = torch.tensor([float(trace), math.nan], dtype=torch.float64)
        trace = Estimate(value, unknown, 0)
    positive, negative = after.sum(2).T / weights.sum()
    rises, scored = ((after - before).sum(1) / 2)[(positive + negative).isfinite()], weights != 0
    return AverageSharpness(
        loss=terms.mean,
        forms=SequenceForms(rises[:, scored], weights[scored]),
        positive=positive,
        negative=negative,
        distribution=distribution,
        epsilon=epsilon,
        num_parameters=loss.layout.num,
        trace=trace,
        unit_roundoff=loss.net.unit_roundoff,
        key=key,
    )


@dataclass(frozen=True, eq=False, repr=False)
class _Sequences(Loss):
    """The loss, which also writes down the sums of the single sequences at every evaluation."""

    sums: list[Tensor] = field(default_factory=list)

    def _parts(self, outputs: Callable[[Inputs], Tensor]) -> list[tuple[Tensor, Tensor]]:
        parts = super()._parts(outputs)
        self.sums.append(torch.cat([sums for sums, _ in parts]).cpu().double())
        return parts


@dataclass(frozen=True)
class _Stretched:
    """A direction times |theta|, a few rows of a leaf at a time."""

    direction: Direction
    params: Params

    def parts(self, name: str) -> Iterator[Part]:
        value = self.params[name]
        for rows, step in self.direction.parts(name):
            yield Part(rows, step.mul_((value[rows] if value.ndim else value).abs()))


def _pair(
    loss: _Sequences, theta: Theta, params: Params, direction: Direction, distribution: Steps, epsilon: float
) -> Float[Tensor, "2 n"]:
    """Sums per sequence after a step and its opposite: a unit vector times an independent length."""
    num = loss.layout.num
    if distribution == "sphere":
        length = epsilon
    else:  # a normal vector is a uniform direction times a chi variable; half a step keeps the quantile inside (0, 1)
        unit = float(uniform(fold_in(direction.key, "length"), torch.zeros(1))) + 2.0**-25
        length = epsilon * math.sqrt(scipy.stats.chi2.ppf(unit, num) / (num if distribution == "normal" else 1))
    phi = _line(loss, theta, params, direction, stretched=distribution == "relative")
    for at in (length, -length):
        phi(at)
    return torch.stack([loss.sums.pop() for _ in range(2)]).flip(0)


def _line(loss: Loss, theta: Theta, params: Params, direction: Direction, *, stretched: bool) -> Phi:
    if loss.layout.num > LAZY_ABOVE:
        return restrict(loss, theta, _Stretched(direction, params) if stretched else direction, lazy=True)
    row = direction.dense()
    if stretched:
        row *= loss.layout.ravel(params, row.dtype).abs()
    return restrict(loss, theta, row)
