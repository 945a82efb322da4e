"""Adaptive sharpness: a ball that is measured in units of each weight, so that rescaling layers changes nothing."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from ..core.checks import check_choice, check_positive
from ..core.layout import Leaf
from ..core.objective import Loss, Theta
from .sam import SamSharpness, check_gradient, check_threshold, measured
from .sam_gradient import gradient_at, leaves_of

Scale = Literal["elementwise", "filter"]


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

    >>> import torch
    >>> from funcscope.core import criterion, model, objective
    >>> net = model.functional(torch.nn.Linear(1, 1, bias=False))
    >>> square = criterion.custom(lambda out, y: (out - y) ** 2)
    >>> loss = objective.objective(net, [(torch.ones(1, 1), torch.zeros(1, 1))], square)
    >>> asam_sharpness(loss, torch.tensor([4.0]), rho=0.25).absolute                          # 5^2 - 4^2
    9.0
    """
    check_positive("rho", rho)
    check_choice("scale", scale, get_args(Scale))
    if eta != 0:
        check_positive("eta", eta)
    check_threshold(norm_threshold)
    at = leaves_of(loss, theta)
    gradient, terms = gradient_at(loss, at)
    units = {leaf.name: _unit(leaf, at[leaf.name], scale) + eta for leaf in loss.layout.leaves}
    stretched = {k: units[k] * g for k, g in gradient.items()}
    length = check_gradient(stretched, norm_threshold)
    step = {k: units[k] * x * (rho / length) for k, x in stretched.items()}
    return measured(
        loss, at, gradient, terms, step, step, curvature=curvature, epsilon=rho,
        adaptive_epsilon=True, steps=1, steps_taken=1, num_gradients=1,
    )  # fmt: skip


def _unit(leaf: Leaf, value: Tensor, scale: Scale) -> Tensor:
    """The unit of each weight of a leaf, to broadcast against it."""
    if scale == "elementwise" or leaf.filter_dim is None:
        return value.abs()
    return value.square().sum(leaf.within_filter, keepdim=True).sqrt()
