"""SAM sharpness: how far the loss rises in a step up the gradient, taken apart into what it is made of."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count, check_positive
from ..core.estimate import Estimate
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.standard_errors import ratio_interval, ratio_stderr
from .sam_gradient import (
    Leaves,
    Terms,
    curvature_along,
    gradient_at,
    inner,
    leaves_of,
    moved,
    norm,
    realised_norm,
    rounding_of_difference,
    scaled,
    terms_at,
)


class SamSharpness(Result):
    r"""The rise of the loss in a step $\delta$ and its parts; made by `sam_sharpness` and `asam_sharpness`.

    The samples are the sequences that are scored: `sums`, `differences` and `weights` have one entry each, float64 on the
    CPU. All else in the loss's unit (nats), but `epsilon` (of theta), `relative` (none), `gradient_norm`, `curvature`.
    """

    loss: float = quantity("loss", unit="nats")
    r"""$L(\theta)$."""
    sums: Float[Tensor, " n"] = internal()
    r"""Per sequence, the weighted sum of its token losses at $\theta$."""
    differences: Float[Tensor, " n"] = internal()
    r"""Per sequence, the same sum at $\theta + \delta$ minus that at $\theta$, subtracted in float64."""
    weights: Float[Tensor, " n"] = internal()
    epsilon: float
    r"""The radius of the ball that was used; $\|\delta\|$ for one step."""
    adaptive_epsilon: bool
    steps: int
    steps_taken: int
    """Fewer than `steps` where the ascent came to a point without gradient."""
    displacement: float
    r"""$\|[\theta + \delta] - [\theta]\|$, where [.] rounds to the dtypes that the model computes in."""
    gradient_norm: float = quantity("gradient norm")
    first_order: float = quantity("first order of the rise", unit="nats")
    r"""$g^\top \delta_1$, $\delta_1$ the one-step displacement: $\epsilon \|g\|$."""
    curvature: float = quantity("curvature along the step")
    r"""$\delta_1^\top H \delta_1 / \|\delta_1\|^2$, a Rayleigh quotient of the Hessian; nan where it was not asked for."""
    second_order: float = quantity("second order of the rise", unit="nats")
    r"""$\delta_1^\top H \delta_1 / 2$: $\tfrac{\epsilon^2}{2}$ times the curvature."""
    rounding: float
    """The order of what rounding may do to `absolute`; see `sam_gradient.rounding_of_difference`."""
    num_forwards: int
    """Passes over all batches without a derivative."""
    num_gradients: int

    @derived("sharpness", unit="nats", stderr="stderr")
    def absolute(self) -> float:
        r"""The sharpness, $L(\theta + \delta) - L(\theta)$."""
        return float(self.differences.sum() / self.weights.sum())

    @derived("standard error of the sharpness over sequences", unit="nats", shown=False)
    def stderr(self) -> float:
        """Its standard error over sequences, with the step held fixed; nan for one sequence."""
        return float(ratio_stderr(self.differences, self.weights))

    @derived("sharpness over the loss", stderr="relative_stderr")
    def relative(self) -> float:
        r"""$(L(\theta + \delta) - L(\theta)) / |L(\theta)|$; nan where the loss is 0."""
        return self.absolute / abs(self.loss) if self.loss else math.nan

    @derived("standard error of the sharpness over the loss", shown=False)
    def relative_stderr(self) -> float:
        """The standard error of `relative`: the loss in the denominator varies along with the difference."""
        return float(ratio_stderr(self.differences, self.sums)) if self.loss else math.nan

    @derived("95 % interval of the sharpness over the loss", per="bound")
    def relative_interval(self) -> tuple[float, float]:
        """Fieller's 95 % interval of `relative` over sequences; nan where they do not support one (`relative_note`).

        The step is held fixed, as in every error here. `relative` -+ 2 `relative_stderr` covers less: 85 % for 6 sequences
        with log-normal losses, where this one covers 97 % or does not exist.
        """
        low, high = ratio_interval(self.differences, self.sums)
        return (low, high) if self.loss >= 0 else (-high, -low)

    @property
    def relative_note(self) -> str:
        """Why `relative` has no interval; empty where it has one."""
        num = len(self.sums)
        if self.loss == 0:
            return "not resolved: the loss is 0"
        if num < 2:
            return "not resolved: one sequence has no error over sequences, score more"
        if math.isnan(self.relative_interval[0]):
            loss = f"{self.loss:.3g} ± {float(ratio_stderr(self.sums, self.weights)):.2g}"
            return f"not resolved: the loss is {loss} over {num} sequences and may be 0, score more"
        return ""

    @derived("rise beyond the second order", unit="nats")
    def remainder(self) -> float:
        r"""`absolute - first_order - second_order`: $\epsilon^3$ and up; for several steps, also what they gain over one."""
        return self.absolute - self.first_order - self.second_order

    @property
    def estimate(self) -> Estimate:
        """`absolute` with its standard error."""
        return Estimate(self.sums.new_tensor(self.absolute), self.sums.new_tensor(self.stderr), len(self.sums))

    @property
    def head(self) -> str:
        return f"sharpness within {self.epsilon:.4g} of theta, {len(self.sums)} sequences, rounding {self.rounding:.1g}"

    @property
    def notes(self) -> list[str]:
        if self.relative_note:
            return [f"relative: {self.relative_note}"]
        low, high = (f"{100 * end:.3g}" for end in self.relative_interval)
        return [f"relative: {low} to {high} % of the loss at 95 % confidence"]


def sam_sharpness(
    loss: Loss,
    theta: Theta,
    *,
    epsilon: float = 0.01,
    adaptive_epsilon: bool = False,
    steps: int = 1,
    stride: float | None = None,
    norm_threshold: float = 1e-6,
    curvature: bool = True,
) -> SamSharpness:
    r"""How far the loss rises in a step of length epsilon up its gradient, and how much of that is slope.

    $$S(\epsilon) = L(\theta + \epsilon \hat g) - L(\theta)
        = \epsilon \|g\| + \tfrac{\epsilon^2}{2}\, \hat g^\top H \hat g + O(\epsilon^3), \qquad \hat g = g / \|g\|.$$

    Nats; theta is a flat vector (P,) or a dict of parameters. Where g is not small this measures the slope: it is *not*
    $\tfrac{\epsilon^2}{2} \lambda_{\max}$, which is the maximum over the ball of a quadratic at a stationary point. The
    curvature along g lies anywhere between the smallest and the largest eigenvalue. All of this: proofs/sam_expansion.py.

    epsilon: the radius of the ball. adaptive_epsilon: $\epsilon \|\theta\|$ in its place, so that epsilon is the relative
    displacement: the same weights times c, in a network that does not mind, have the same sharpness, and the radius grows
    with the square root of the number of weights of one size. ($\epsilon \|\theta\| / \sqrt P$, epsilon in units of one
    weight, is the other reading of "scales with model size"; pass epsilon / sqrt(P) for it.)
    steps: $\delta_k = \Pi(\delta_{k-1} + s\,\epsilon\,\nabla L(\theta + \delta_{k-1}) / \|\cdot\|)$ with
    $\delta_0 = 0$ and $\Pi$ the projection on the ball. `stride` is s, by default 1 / steps: a path of length epsilon,
    which never leaves the ball; with a longer stride it slides along the border towards the maximum. The parts are those
    of one step. norm_threshold: below it (absolute, nats per unit of theta) a gradient counts as 0, with 0 only 0 itself.
    curvature: False leaves out $\hat g^\top H \hat g$ (some 10 forwards): `curvature`, `second_order`, `remainder` are nan.

    The data are the whole population that is spoken of, or else: the gradient of n sequences is longer than that of all
    (by their noise), and the step fits them, so that S is biased upwards; the standard error holds the step fixed and does
    not see this. Losses are summed and subtracted in float64, but each token's loss is in the model's dtype: `rounding`
    has the size of that, and where it is not far below `absolute`, compute in a wider dtype.

    Raises ValueError for a gradient below the threshold, a loss or gradient that is not finite, theta = 0 with
    `adaptive_epsilon`, and where the model's kernels have no second derivative.

    Foret, Kleiner, Mobahi, Neyshabur (2021), Sharpness-aware minimization for efficiently improving generalization.

    >>> import torch
    >>> from funcscope.core import criterion, model, objective
    >>> net = model.functional(torch.nn.Linear(1, 1, bias=False))
    >>> square = criterion.custom(lambda out, y: (out - y) ** 2)
    >>> loss = objective.objective(net, [(torch.ones(1, 1), torch.zeros(1, 1))], square)
    >>> s = sam_sharpness(loss, torch.tensor([3.0]), epsilon=0.5)                       # 3.5^2 - 3^2
    >>> s.absolute, s.first_order, s.second_order, s.remainder
    (3.25, 3.0, 0.25, 0.0)
    """
    check_positive("epsilon", epsilon)
    check_count("steps", steps)
    if stride is not None:
        check_positive("stride", stride)
    check_threshold(norm_threshold)
    at = leaves_of(loss, theta)
    gradient, terms = gradient_at(loss, at)
    length = check_gradient(gradient, norm_threshold)
    radius = epsilon * _size(at) if adaptive_epsilon else epsilon
    first = scaled(gradient, radius / length)
    share = 1 / steps if stride is None else stride
    step, taken = (
        (first, 1)
        if steps == 1 and stride is None
        else _ascent(loss, at, gradient, radius, steps, share, norm_threshold)
    )
    return measured(
        loss, at, gradient, terms, first, step, curvature=curvature, epsilon=radius,
        adaptive_epsilon=adaptive_epsilon, steps=steps, steps_taken=taken, num_gradients=min(taken + 1, steps),
    )  # fmt: skip


def measured(
    loss: Loss, at: Leaves, gradient: Leaves, terms: Terms, first: Leaves, step: Leaves, *, curvature: bool, **settings
) -> SamSharpness:
    """The rise in `step`, beside the first two orders of the one-step displacement `first`."""
    there = moved(at, step)
    after = terms_at(loss, there)
    scored = terms.weights != 0
    length = norm(first)
    unit = scaled(first, 1 / length)
    bent = curvature_along(loss, at, unit, float(terms.weights.sum())) if curvature else math.nan
    return SamSharpness(
        loss=terms.mean,
        sums=terms.sums[scored],
        differences=(after.sums - terms.sums)[scored],
        weights=terms.weights[scored],
        displacement=realised_norm(loss, at, there),
        gradient_norm=norm(gradient),
        first_order=inner(gradient, first),
        curvature=bent,
        second_order=length**2 / 2 * bent,
        rounding=rounding_of_difference(loss, at, gradient, max(abs(terms.mean), abs(after.mean))),
        num_forwards=1,
        **settings,
    )


def check_threshold(norm_threshold: float) -> None:
    """A threshold is 0 or a finite number above."""
    if norm_threshold != 0:
        check_positive("norm_threshold", norm_threshold)


def check_gradient(gradient: Leaves, norm_threshold: float) -> float:
    """The gradient's norm; raises ValueError where there is no direction to climb in."""
    length = norm(gradient)
    if length == 0 or length < norm_threshold:
        raise ValueError(
            f"the gradient's norm is {length:.3g}, below `norm_threshold={norm_threshold:g}` (absolute, in nats per unit of "
            "theta), so that there is no direction to climb in. At a stationary point the maximum over the ball is "
            "epsilon^2 lambda_max / 2: use the Hessian's largest eigenvalue. Or lower `norm_threshold`."
        )
    return length


def _size(at: Leaves) -> float:
    if (size := norm(at)) == 0:
        raise ValueError("`adaptive_epsilon` is relative to the norm of theta, which is 0: pass an absolute `epsilon`.")
    return size


def _ascent(
    loss: Loss, at: Leaves, gradient: Leaves, radius: float, steps: int, share: float, norm_threshold: float
) -> tuple[Leaves, int]:
    """The displacement after normalised gradient steps of length share * radius, projected on the ball."""
    step = scaled(gradient, min(share, 1.0) * radius / norm(gradient))
    for taken in range(1, steps):
        uphill, _ = gradient_at(loss, moved(at, step))
        length = norm(uphill)
        if length == 0 or length < norm_threshold:
            return step, taken
        step = {k: x + uphill[k] * (share * radius / length) for k, x in step.items()}
        if (size := norm(step)) > radius:
            step = scaled(step, radius / size)
    return step, steps
