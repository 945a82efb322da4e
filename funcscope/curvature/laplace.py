r"""A Gaussian around a trained point, with the Fisher information for its precision: penalty, variance, natural gradient.

The Fisher information is a `Kfac`, or a diagonal: a vector of theta's length with no negative entry, in either case per
scored token.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count, check_flat, check_positive
from .kfac import Kfac

Fisher = Kfac | Tensor


def ewc_penalty(
    fisher: Fisher, theta: Float[Tensor, " p"], anchor: Float[Tensor, " p"], *, strength: float = 1.0
) -> Float[Tensor, ""]:
    r"""What elastic weight consolidation adds to a loss: $\tfrac12 \lambda (\theta - \theta_0)^\top F (\theta - \theta_0)$.

    With the 1/2, so that the Hessian is $\lambda F$ and, for $\lambda = 1$ and theta near the anchor, the penalty is the rise
    of the old task's loss per token. Kronecker blocks add $\tfrac\lambda2 c\, \mathrm{tr}(D^\top G D A)$. Differentiable in
    theta, so that it may be trained on. The document leaves the 1/2 out, and has the trace of another product.

    Kirkpatrick et al. (2017), arXiv:1612.00796; Ritter et al. (2018), arXiv:1805.07810.

    >>> float(ewc_penalty(torch.tensor([2.0, 0.0]), torch.tensor([3.0, 5.0]), torch.zeros(2)))
    9.0
    """
    num = _length(fisher)
    check_flat("theta", theta, num)
    check_flat("anchor", anchor, num)
    step = theta - anchor
    form = fisher.quadratic(step) if isinstance(fisher, Kfac) else (fisher.to(step) * step.square()).sum()
    return strength / 2 * form


def laplace_variance(
    fisher: Fisher, gradients: Float[Tensor, "*k p"], *, num: int, prior_precision: float
) -> Float[Tensor, "*k"]:
    r"""Variance of a model's output under the Laplace approximation, linearised: $g^\top (N F + \delta I)^{-1} g$.

    gradients: (P,) or (k, P), of an output in theta. num: N, scored tokens that the posterior has seen. prior_precision:
    $\delta > 0$, one over the variance of each weight's prior. In squared units of the output. Assumes a trained point, where
    the posterior is nearly a Gaussian with the Fisher information for its precision; with a block-diagonal F,
    covariances of blocks are left out.

    MacKay (1992), doi:10.1162/neco.1992.4.3.448; Daxberger et al. (2021), arXiv:2106.14806.

    >>> laplace_variance(torch.tensor([0.3, 0.0]), torch.eye(2), num=10, prior_precision=1.0).tolist()
    [0.25, 1.0]
    """
    check_count("num", num)
    check_positive("prior_precision", prior_precision)
    rows = gradients.reshape(-1, gradients.shape[-1])
    check_flat("gradients[0]", rows[0], _length(fisher))
    forms = [g @ _power(fisher, g, -1.0, prior_precision / num) / num for g in rows]
    return torch.stack(forms).reshape(gradients.shape[:-1])


def natural_gradient(
    fisher: Fisher, gradient: Float[Tensor, " p"], *, damping: float, power: float = 1.0, relative: bool = True
) -> Float[Tensor, " p"]:
    r"""A gradient in the geometry of the predictions: $(F + \lambda I)^{-a} g$; a = 1 is the natural gradient, a = 0 is g.

    damping: in units of F's mean eigenvalue by default, so that a factor on the loss changes no direction; `relative=False`
    for the units of F. Raises ValueError for a damping of 0 with a singular F, and a negative one.

    Amari (1998), doi:10.1162/089976698300017746.

    >>> natural_gradient(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]), damping=0.5).tolist()     # mean eigenvalue 2
    [0.25, 0.5]
    """
    check_flat("gradient", gradient, _length(fisher))
    if relative:
        damping = damping * (float(fisher.trace) / len(gradient) if isinstance(fisher, Kfac) else float(fisher.mean()))
    return _power(fisher, gradient, -power, damping)


def _length(fisher: Fisher) -> int:
    if isinstance(fisher, Kfac):
        return len(fisher.rest)
    check_flat("fisher", fisher, fisher.numel())
    if bool((fisher < 0).any()):
        raise ValueError("`fisher` must have no negative entry: a diagonal of squares has none.")
    return len(fisher)


def _power(fisher: Fisher, v: Tensor, power: float, damping: float) -> Tensor:
    if isinstance(fisher, Kfac):
        return fisher.power(v, power, damping)
    shifted = fisher.to(v) + damping
    if not 0 <= damping < math.inf or (power < 0 and bool((shifted == 0).any())):
        raise ValueError(
            f"`damping` must be finite, at least 0, and above it where entries of F are 0, got {damping!r}."
        )
    return shifted**power * v
