"""Sharpness by ascent: how far the loss rises in a step up the gradient, within a ball around theta."""

from __future__ import annotations

import math
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_count, check_positive
from ..core.estimate import Estimate
from ..core.layout import Leaf
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.standard_errors import ratio_interval, ratio_stderr
from ..core.tables import counted
from ..core.vectors import moved, norm
from .leaf_lines import LeafLine
from .leafwise import Terms, ascent_length, gradient_at
from .lines import Line
from .stored_gradient import StoredGradient, gradient_line

Scale = Literal["elementwise", "filter"]


class SamSharpness(Result):
    r"""The rise of the loss in a step $\delta$ and its parts; made by `sam_sharpness` and `asam_sharpness`.

    The samples are the sequences that are scored: `sums`, `differences` and `weights` have one entry each, float64 on the
    CPU. Losses and their differences in nats; `epsilon` in the unit of theta.
    """

    loss: float = quantity("loss", unit="loss")
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
    first_order: float = quantity("first order of the rise", unit="loss")
    r"""$g^\top \delta_1$, $\delta_1$ the one-step displacement: $\epsilon \|g\|$."""
    curvature: float = quantity("curvature along the step")
    r"""$\delta_1^\top H \delta_1 / \|\delta_1\|^2$, a Rayleigh quotient of the Hessian; nan where it was not asked for."""
    second_order: float = quantity("second order of the rise", unit="loss")
    r"""$\delta_1^\top H \delta_1 / 2$: $\tfrac{\epsilon^2}{2}$ times the curvature."""
    rounding: float
    """The order of what rounding may do to `absolute`; see `leafwise.rounding_of_difference`."""
    num_forwards: int  # without a derivative
    num_gradients: int

    @derived("sharpness", unit="loss", stderr="stderr")
    def absolute(self) -> float:
        r"""$L(\theta + \delta) - L(\theta)$."""
        return float(self.differences.sum() / self.weights.sum())

    @derived("standard error of the sharpness over sequences", unit="loss", shown=False)
    def stderr(self) -> float:
        """Over sequences, with the step held fixed; nan for one sequence."""
        return float(ratio_stderr(self.differences, self.weights))

    @derived("sharpness over the loss", stderr="relative_stderr")
    def relative(self) -> float:
        r"""$(L(\theta + \delta) - L(\theta)) / |L(\theta)|$; nan where the loss is 0."""
        return self.absolute / abs(self.loss) if self.loss else math.nan

    @derived("standard error of the sharpness over the loss", shown=False)
    def relative_stderr(self) -> float:
        """The loss in the denominator varies along with the difference."""
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
        if self.loss == 0:
            return "not resolved: the loss is 0"
        if len(self.sums) < 2:
            return "not resolved: one sequence has no error over sequences, score more"
        if not math.isnan(self.relative_interval[0]):
            return ""
        loss = f"{self.loss:.3g} ± {float(ratio_stderr(self.sums, self.weights)):.2g}"
        return f"not resolved: the loss {loss} of {len(self.sums)} sequences may be 0, score more"

    @derived("rise beyond the second order", unit="loss")
    def remainder(self) -> float:
        r"""`absolute - first_order - second_order`: $\epsilon^3$ and up; for several steps, also what they gain over one."""
        return self.absolute - self.first_order - self.second_order

    @property
    def estimate(self) -> Estimate:
        """`absolute` with its standard error."""
        return Estimate(self.sums.new_tensor(self.absolute), self.sums.new_tensor(self.stderr), len(self.sums))

    @property
    def head(self) -> str:
        over = counted(len(self.sums), "sequence")
        return f"sharpness within {self.epsilon:.4g} of theta, {over}, rounding {self.rounding:.1g}"

    @property
    def unresolved(self) -> list[str]:
        small = ["absolute", "relative"] if abs(self.absolute) < self.rounding else []
        return [*small, "remainder"] if small or abs(self.remainder) < self.rounding else []

    @property
    def notes(self) -> list[str]:
        low, high = (f"{100 * end:.3g}" for end in self.relative_interval)
        first = f"relative: {self.relative_note or f'{low} to {high} % of the loss at 95 % confidence'}"
        if "absolute" in self.unresolved:
            first = f"sharpness: below what rounding may do to it, {self.rounding:.1g}: take a larger step"
        return [first, *(["curvature: not asked for, or not finite"] if math.isnan(self.curvature) else [])]


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
    gradient: StoredGradient | None = None,
) -> SamSharpness:
    r"""How far the loss rises in a step of length epsilon up its gradient, and how much of that is slope.

    $$S(\epsilon) = L(\theta + \epsilon \hat g) - L(\theta)
        = \epsilon \|g\| + \tfrac{\epsilon^2}{2}\, \hat g^\top H \hat g + O(\epsilon^3), \qquad \hat g = g / \|g\|.$$

    Nats; theta is a flat vector (P,) or a dict of parameters. Where g is not small this measures the slope: it is *not*
    $\tfrac{\epsilon^2}{2} \lambda_{\max}$, the maximum over the ball of a quadratic at a stationary point; the curvature
    along g lies anywhere between the smallest and the largest eigenvalue (proofs/sam_expansion.py).

    epsilon: the radius of the ball. adaptive_epsilon: $\epsilon \|\theta\|$ in its place, so that epsilon is the relative
    displacement: the same weights times c, in a network that does not mind, have the same sharpness. (Epsilon in units of
    one weight, $\epsilon \|\theta\| / \sqrt P$, is the other reading of "scales with model size".)
    steps: $\delta_k = \Pi(\delta_{k-1} + s\,\epsilon\,\nabla L(\theta + \delta_{k-1}) / \|\cdot\|)$, $\delta_0 = 0$,
    $\Pi$ the projection on the ball. `stride` is s, by default 1 / steps, which never leaves the ball; a longer one slides
    along the border towards the maximum. The parts are those of one step.
    norm_threshold: below it (absolute, nats per unit of theta) a gradient counts as 0, with 0 only 0 itself.
    curvature: False leaves out $\hat g^\top H \hat g$ (some 10 forwards): `curvature`, `second_order`, `remainder` are nan.
    gradient: that of this loss at this theta in a file, for models that fill the memory (`stored_gradient`): all is measured
    with points that exist a leaf at a time. For `steps` of 1.

    The data are the whole population that is spoken of, or else: the gradient of n sequences is longer than that of all
    (by their noise), and the step fits them, so that S is biased upwards; the standard error holds the step fixed and does
    not see this. Losses are summed and subtracted in float64, but each token's loss is in the model's dtype: `rounding`
    has the size of that, and where it is not far below `absolute`, compute in a wider dtype.

    Raises ValueError for a gradient below the threshold, a loss or gradient that is not finite, theta = 0 with
    `adaptive_epsilon`, and where the model's kernels have no second derivative.

    Foret, Kleiner, Mobahi, Neyshabur (2021), Sharpness-aware minimization for efficiently improving generalization.

    >>> import torch, funcscope as fs
    >>> net, square = fs.functional(torch.nn.Linear(1, 1, bias=False)), fs.custom(lambda out, y: (out - y) ** 2)
    >>> loss = fs.objective(net, [(torch.ones(1, 1), torch.zeros(1, 1))], square)
    >>> s = sam_sharpness(loss, torch.tensor([3.0]), epsilon=0.5)                       # 3.5^2 - 3^2
    >>> s.absolute, s.first_order, s.second_order, s.remainder
    (3.25, 3.0, 0.25, 0.0)
    """
    check_positive("epsilon", epsilon)
    check_count("steps", steps)
    if stride is not None:
        check_positive("stride", stride)
    if norm_threshold != 0:
        check_positive("norm_threshold", norm_threshold)
    if gradient is not None and (steps > 1 or stride is not None):
        raise ValueError("`gradient` has a single step to give: leave `steps` at 1 and `stride` out.")
    line, terms = gradient_line(loss, theta, gradient)
    radius = epsilon * line.base_norm if adaptive_epsilon else epsilon
    if radius == 0:
        raise ValueError("`adaptive_epsilon` is relative to the norm of theta, which is 0: pass an absolute `epsilon`.")
    first = step = line.times(radius / ascent_length(line.norm, norm_threshold))
    taken = 1
    if isinstance(line, Line) and (steps > 1 or stride is not None):
        share = 1 / steps if stride is None else stride
        step, taken = _ascent(line, radius, steps, share, norm_threshold)
    return _measured(line, terms, first, step, curvature, radius, adaptive_epsilon, steps, taken)


def asam_sharpness(
    loss: Loss,
    theta: Theta,
    *,
    rho: float = 0.5,
    scale: Scale = "elementwise",
    eta: float = 0.0,
    norm_threshold: float = 1e-6,
    curvature: bool = True,
) -> SamSharpness:
    r"""The rise of the loss in one step up the gradient, within a ball measured in units of the weights.

    $$L(\theta + \delta) - L(\theta), \qquad \delta = \rho\, \frac{T^2 g}{\|T g\|}, \qquad \|T^{-1} \delta\| = \rho,$$

    the maximiser of $g^\top \delta$ over the ball; T is diagonal. `first_order` is $\rho \|T g\|$, `curvature` that along
    $\delta$, `epsilon` is $\rho$ and `displacement` tells $\|\delta\|$. Nats.

    scale: `elementwise`, $T_i = |\theta_i| + \eta$: the same after $W_1 \to D W_1$, $b_1 \to D b_1$,
    $W_2 \to W_2 D^{-1}$ for every positive diagonal D between two ReLU layers, and SAM is not. `filter`: the norm of the
    weight's filter (row; column of a Hugging Face Conv1D), and $|\theta_i|$ in vectors: the same only where D is one
    number per layer. eta: Kwon et al. use 0.01, which keeps weights of 0 moving and breaks the invariance; 0 keeps it, and
    a weight of 0 stays. rho: theirs is 0.5. norm_threshold: below it $\|T g\|$ counts as 0 (nats).

    Assumptions, bias, standard error and rounding are those of `sam_sharpness`.
    Raises ValueError as `sam_sharpness` does, for $T g$ in place of g.

    Kwon, Kim, Park, Choi (2021), ASAM, arXiv 2102.11600, equations 2 and 9.

    >>> import torch, funcscope as fs
    >>> net, square = fs.functional(torch.nn.Linear(1, 1, bias=False)), fs.custom(lambda out, y: (out - y) ** 2)
    >>> loss = fs.objective(net, [(torch.ones(1, 1), torch.zeros(1, 1))], square)
    >>> asam_sharpness(loss, torch.tensor([4.0]), rho=0.25).absolute                          # 5^2 - 4^2
    9.0
    """
    check_positive("rho", rho)
    check_choice("scale", scale, get_args(Scale))
    for name, number in (("eta", eta), ("norm_threshold", norm_threshold)):
        if number != 0:
            check_positive(name, number)
    at = Loss.wide_leaves(loss, theta)
    gradient, terms = gradient_at(loss, at)
    units = {leaf.name: _unit(leaf, at[leaf.name], scale) + eta for leaf in loss.layout.leaves}
    stretched = {k: units[k] * g for k, g in gradient.items()}
    length = ascent_length(norm(stretched), norm_threshold)
    step = Line(loss, at, {k: units[k] * x * (rho / length) for k, x in stretched.items()})
    line = Line(loss, at, gradient)
    return _measured(line, terms, step, step, curvature, rho, adaptive_epsilon=True, steps=1, taken=1)


def _measured(
    gradient: Line | LeafLine, terms: Terms, first: Line | LeafLine, step: Line | LeafLine, curvature: bool,
    epsilon: float, adaptive_epsilon: bool, steps: int, taken: int,
) -> SamSharpness:  # fmt: skip
    """The rise in `step`, beside the first two orders of the one-step displacement `first`."""
    after, length, scored = step.terms(), first.norm, terms.weights != 0
    bent = first.curvature(float(terms.weights.sum())) if curvature else math.nan
    return SamSharpness(
        loss=terms.mean,
        sums=terms.sums[scored],
        differences=(after.sums - terms.sums)[scored],
        weights=terms.weights[scored],
        epsilon=epsilon,
        adaptive_epsilon=adaptive_epsilon,
        steps=steps,
        steps_taken=taken,
        displacement=step.displacement(),
        gradient_norm=gradient.norm,
        first_order=gradient.inner(first),
        curvature=bent,
        second_order=length**2 / 2 * bent,
        rounding=gradient.rounding(max(abs(terms.mean), abs(after.mean))),
        num_forwards=1,
        num_gradients=min(taken + 1, steps),
    )


def _ascent(gradient: Line, radius: float, steps: int, share: float, norm_threshold: float) -> tuple[Line, int]:
    """The displacement after normalised gradient steps of length share * radius, projected on the ball."""
    loss, at = gradient.loss, gradient.at
    step = gradient.times(min(share, 1.0) * radius / gradient.norm)
    for taken in range(1, steps):
        uphill, _ = gradient_at(loss, moved(at, step.v))
        length = norm(uphill)
        if length == 0 or length < norm_threshold:
            return step, taken
        step = Line(loss, at, {k: x + uphill[k] * (share * radius / length) for k, x in step.v.items()})
        if step.norm > radius:
            step = step.times(radius / step.norm)
    return step, steps


def _unit(leaf: Leaf, value: Tensor, scale: Scale) -> Tensor:
    """The unit of each weight of a leaf, to broadcast against it."""
    if scale == "elementwise" or leaf.filter_dim is None:
        return value.abs()
    return value.square().sum(leaf.within_filter, keepdim=True).sqrt()
